//! Running without root: this process becomes one of another user, with a few capabilities of root.
//!
//! All that it starts gets the same, since the capabilities are in the ambient set: the holder's daemons, after crashes and at upgrades
//! too, the watchdog and the keepers. A service manager can do the same (`User=`, `AmbientCapabilities=`); then only what is too
//! much is given up here.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid};
use rustix::process::{DumpableBehavior, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use crate::daemon::{User, raise_limits};

/// Capabilities of a process.
pub type Capabilities = CapabilitySet;

/// A capability, and what does not work without it.
type Need = (&'static str, CapabilitySet, &'static str);

/// What every daemon needs.
const NEEDED: [Need; 2] = [
    ("ipc_lock", CapabilitySet::IPC_LOCK, "pinned memory beyond RLIMIT_MEMLOCK of the daemon"),
    (
        "checkpoint_restore",
        CapabilitySet::CHECKPOINT_RESTORE,
        "memory of clients that have closed its descriptor",
    ),
];

/// What clients of other users need.
const OTHERS: [Need; 2] = [
    ("sys_ptrace", CapabilitySet::SYS_PTRACE, "clients of other users"),
    (
        "dac_override",
        CapabilitySet::DAC_OVERRIDE,
        "clients of other users, and disks that are not this user's",
    ),
];

/// What the files of a mount need.
const MOUNTS: [Need; 1] =
    [("sys_admin", CapabilitySet::SYS_ADMIN, "files of a FUSE mount, and the attribute device_file")];

/// What some devices need.
const OPTIONAL: [Need; 3] = [
    (
        "net_admin",
        CapabilitySet::NET_ADMIN,
        "TAP interfaces of other users, those that are made, and the kernel's vdpa bus",
    ),
    OTHERS[1],
    MOUNTS[0],
];

/// What this process is to be.
#[derive(Clone, Copy, Debug)]
pub struct Rights<'a> {
    /// The user, with its groups.
    pub user: &'a User,
    /// Whether clients of other users are served.
    pub others: bool,
    /// Whether device files may be those of a mount.
    pub mounts: bool,
    /// Capabilities that are kept besides.
    pub also: CapabilitySet,
}

/// Why rights could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum RightsError {
    /// It is to be no other user.
    #[error("--user is for a user other than root; without it vdpad runs as root")]
    Root,
    /// Only root can become another user.
    #[error("this is user {uid} and cannot become user {wanted}; start it as root or as that user")]
    User {
        /// The present user.
        uid: u32,
        /// The wanted one.
        wanted: u32,
    },
    /// A directory could not be made for the user.
    #[error("cannot make {} for the user", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// The step.
        step: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// A capability that can be kept besides, by its name without "cap_".
///
/// # Errors
/// A text for the command line, which says what would be right.
pub fn capability(name: &str) -> Result<CapabilitySet, String> {
    let plain = name.to_ascii_lowercase();
    let plain = plain.strip_prefix("cap_").unwrap_or(&plain);
    let found = OPTIONAL.iter().find(|(known, ..)| *known == plain);
    found.map(|(_, set, _)| *set).ok_or_else(|| {
        let lines: Vec<_> = OPTIONAL.iter().map(|(known, _, what)| format!("{known} ({what})")).collect();
        format!("these can be kept: {}", lines.join(", "))
    })
}

impl Rights<'_> {
    /// Makes this process, which has one thread, one of the user, and gives up every capability that it does not need; no program that
    /// it starts gets more. Makes `directories` for the user first, where they are missing. Logs what will not work for want of
    /// a capability. Does not block.
    ///
    /// # Errors
    /// [`RightsError`]. The process may have given up some rights then, and is to end.
    pub fn take(self, directories: &[&Path]) -> Result<(), RightsError> {
        let user = self.user;
        let root = geteuid().is_root();
        if user.uid == 0 {
            return Err(RightsError::Root);
        }
        if !root && geteuid().as_raw() != user.uid {
            return Err(RightsError::User { uid: geteuid().as_raw(), wanted: user.uid });
        }
        let wanted = self.needs().fold(CapabilitySet::empty(), |all, (_, set, _)| all | *set);
        let has = capabilities(None).map_err(step("read the capabilities"))?.permitted;
        let kept = wanted & has;
        if root {
            // Only root can raise those of whatever it starts.
            raise_limits();
            for directory in directories {
                make(directory, user)?;
            }
            forget(kept)?;
            become_user(user)?;
        }
        keep(kept)?;
        tracing::info!(uid = user.uid, gid = user.gid, capabilities = %names(kept), "without root");
        for (name, _, what) in self.needs().filter(|(_, set, _)| !kept.contains(*set)) {
            tracing::warn!("without CAP_{} there are no {what}", name.to_ascii_uppercase());
        }
        Ok(())
    }

    fn needs(&self) -> impl Iterator<Item = &'static Need> {
        let (others, mounts, also) = (self.others, self.mounts, self.also);
        let optional = OPTIONAL.iter().filter(move |(_, set, _)| also.contains(*set));
        let others = OTHERS.iter().filter(move |_| others);
        NEEDED.iter().chain(others).chain(MOUNTS.iter().filter(move |_| mounts)).chain(optional)
    }
}

/// As in capabilities(7), without "CAP_" and in small letters.
fn names(set: CapabilitySet) -> String {
    let names: Vec<_> = set.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect();
    names.join(",")
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> RightsError {
    move |error| RightsError::Step { step, source: error.into() }
}

/// Makes a directory of the user, if there is none. One that exists may be shared with others, and stays as it is.
fn make(directory: &Path, user: &User) -> Result<(), RightsError> {
    let failed = |source| RightsError::Directory { path: directory.into(), source };
    if let Some(above) = directory.parent() {
        fs::create_dir_all(above).map_err(failed)?;
    }
    match DirBuilder::new().mode(0o755).create(directory) {
        // Nothing asks what it is: a server of the files there may hang.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made.map_err(failed)?,
    }
    chown(directory, Some(user.uid), Some(user.gid)).map_err(failed)
}

/// Takes all but `kept` out of the set that a program can ever get.
fn forget(kept: CapabilitySet) -> Result<(), RightsError> {
    // Beyond those that this program knows a newer kernel may have others.
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match capability_is_in_bounding_set(one) {
            // The kernel has no such capability.
            Err(_) => break,
            Ok(true) if !kept.contains(one) => {
                remove_capability_from_bounding_set(one)
                    .map_err(step("limit the capabilities of programs"))?;
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

fn become_user(user: &User) -> Result<(), RightsError> {
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    set_keep_capabilities(true).map_err(step("keep capabilities"))?;
    set_thread_groups(&groups).map_err(step("set the groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(step("set the group"))?;
    set_thread_res_uid(uid, uid, uid).map_err(step("set the user"))?;
    set_keep_capabilities(false).map_err(step("keep capabilities"))?;
    // As after the start of a program by that user. Its other processes cannot trace this one: they have not its capabilities.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(step("allow /proc/self"))
}

/// Has this process and those that it starts keep these capabilities and no others.
fn keep(kept: CapabilitySet) -> Result<(), RightsError> {
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: kept };
    set_capabilities(None, sets).map_err(step("keep the capabilities"))?;
    clear_ambient_capability_set().map_err(step("keep the capabilities"))?;
    for one in kept.iter() {
        configure_capability_in_ambient_set(one, true).map_err(step("keep the capabilities"))?;
    }
    set_no_new_privs(true).map_err(step("refuse new privileges"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_names() {
        assert_eq!(capability("net_admin"), Ok(CapabilitySet::NET_ADMIN));
        assert_eq!(capability("CAP_DAC_OVERRIDE"), Ok(CapabilitySet::DAC_OVERRIDE));
        assert!(capability("sys_module").unwrap_err().contains("net_admin"));
    }

    #[test]
    fn only_another_user_than_root_is_taken() {
        let (root, other) =
            (User { uid: 0, gid: 0, groups: vec![] }, User { uid: 4800, gid: 4800, groups: vec![] });
        let rights = |user| Rights { user, others: true, mounts: false, also: CapabilitySet::empty() };
        assert!(matches!(rights(&root).take(&[]), Err(RightsError::Root)));
        if !geteuid().is_root() {
            assert!(matches!(rights(&other).take(&[]), Err(RightsError::User { wanted: 4800, .. })));
        }
    }

    #[test]
    fn a_directory_that_exists_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let user = User { uid: geteuid().as_raw(), gid: rustix::process::getegid().as_raw(), groups: vec![] };
        let own = dir.path().join("run/vdpad");
        make(&own, &user).unwrap();
        make(&own, &User { uid: 4800, ..user }).unwrap();
        assert!(own.is_dir());
    }
}
