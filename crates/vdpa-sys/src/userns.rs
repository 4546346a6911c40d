//! Entering a user namespace, in which an ordinary user can serve devices.
#![expect(unsafe_code, reason = "unshare changes what the whole process is")]

use std::fs;
use std::path::Path;

use rustix::mount::MountPropagationFlags;
use rustix::process::{getgid, getuid};
use rustix::thread::UnshareFlags;
use vdpa_core::Errno;

use crate::fuse::MountError;

/// Why a user namespace could not be entered, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum UserNsError {
    /// FUSE cannot be used.
    #[error("{0}")]
    Fuse(MountError),
    /// The process has several threads.
    #[error("a user namespace can only be entered by a process with one thread, this one has {threads}")]
    Threads {
        /// How many there are.
        threads: usize,
    },
    /// User namespaces are disabled.
    #[error(
        "user namespaces are disabled (user.max_user_namespaces = 0); enable them: sysctl user.max_user_namespaces=10000"
    )]
    Disabled,
    /// Forbidden by Debian's sysctl.
    #[error(
        "user namespaces are reserved to root (kernel.unprivileged_userns_clone = 0); \
         enable them: sysctl kernel.unprivileged_userns_clone=1"
    )]
    Unprivileged,
    /// Forbidden by Ubuntu's sysctl.
    #[error(
        "AppArmor restricts user namespaces (kernel.apparmor_restrict_unprivileged_userns = 1); add a profile with \
         the rule \"userns,\" for vdpad, or: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    )]
    AppArmor,
    /// A step failed for another reason.
    #[error("cannot {step}: {errno}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The reason.
        errno: Errno,
    },
}

/// Checks that this process can open `/dev/fuse`.
///
/// # Errors
/// [`MountError::Device`], with what would make it possible.
pub fn fuse_available() -> Result<(), MountError> {
    crate::fuse::open_device().map(drop).map_err(|errno| MountError::Device { errno })
}

/// Moves this process into a new user and mount namespace, in which it is uid 0 and may mount FUSE. Its mounts
/// are visible to itself and its children, and to others through `/proc/PID/root` or `nsenter`.
///
/// Call it at the beginning of `main`, before any thread is started. Only the caller's own uid and gid exist inside;
/// supplementary groups are kept but cannot be changed (`setgroups` is denied, user_namespaces(7)).
///
/// # Errors
/// [`UserNsError`]. After [`UserNsError::Step`] the process may be in the new namespaces without a complete setup, and should exit.
pub fn enter() -> Result<(), UserNsError> {
    fuse_available().map_err(UserNsError::Fuse)?;
    enter_namespaces()
}

fn enter_namespaces() -> Result<(), UserNsError> {
    let threads = fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads > 1 {
        return Err(UserNsError::Threads { threads });
    }
    // Inside the namespace they read as the overflow ids until the maps are written.
    let (uid, gid) = (getuid().as_raw(), getgid().as_raw());
    // SAFETY: the process has one thread, so there is none that could be left in other namespaces; no flag that
    // separates descriptors or memory is used.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }.map_err(
        |error| {
            diagnose(sysctl)
                .unwrap_or(UserNsError::Step { step: "create a user namespace", errno: errno(error) })
        },
    )?;
    // AppArmor lets the namespace be created and then takes its capabilities away.
    let step = |path: &'static str, text: String, step| {
        fs::write(path, text).map_err(|error| {
            diagnose(sysctl).unwrap_or(UserNsError::Step {
                step,
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            })
        })
    };
    step("/proc/self/setgroups", "deny".into(), "deny setgroups (/proc/self/setgroups)")?;
    step("/proc/self/uid_map", format!("0 {uid} 1"), "map the user id (/proc/self/uid_map)")?;
    step("/proc/self/gid_map", format!("0 {gid} 1"), "map the group id (/proc/self/gid_map)")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(Path::new("/"), private).map_err(|error| {
        diagnose(sysctl).unwrap_or(UserNsError::Step { step: "make the mounts private", errno: errno(error) })
    })
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

fn sysctl(name: &str) -> Option<i64> {
    fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

/// The sysctl that forbids user namespaces, if there is one.
fn diagnose(sysctl: impl Fn(&str) -> Option<i64>) -> Option<UserNsError> {
    if sysctl("user/max_user_namespaces") == Some(0) {
        return Some(UserNsError::Disabled);
    }
    if sysctl("kernel/unprivileged_userns_clone") == Some(0) {
        return Some(UserNsError::Unprivileged);
    }
    (sysctl("kernel/apparmor_restrict_unprivileged_userns") == Some(1)).then_some(UserNsError::AppArmor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sysctl_that_forbids_namespaces_is_named() {
        let only = |name: &'static str, value| move |asked: &str| (asked == name).then_some(value);
        assert!(matches!(diagnose(only("user/max_user_namespaces", 0)), Some(UserNsError::Disabled)));
        assert!(matches!(
            diagnose(only("kernel/unprivileged_userns_clone", 0)),
            Some(UserNsError::Unprivileged)
        ));
        let apparmor = "kernel/apparmor_restrict_unprivileged_userns";
        assert!(matches!(diagnose(only(apparmor, 1)), Some(UserNsError::AppArmor)));
        assert!(diagnose(only(apparmor, 0)).is_none());
    }

    #[test]
    fn several_threads_are_refused() {
        let (hold, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv().is_err());
        let error = enter_namespaces().unwrap_err();
        assert!(matches!(error, UserNsError::Threads { threads: 2.. }), "{error}");
        drop(hold);
        assert!(other.join().unwrap());
    }
}
