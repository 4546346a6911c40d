//! What this machine lets the daemon do, found out before the first client needs it.

use std::fs;

use vdpa_core::Errno;

use crate::fuse::cuse;
use crate::uring::Ring;
use crate::{memfd, rlimit, userns};

/// Descriptors that the daemon and its holder have without a device.
const DESCRIPTORS_BASE: u64 = 64;
/// Descriptors of a device with four queues and a client.
const DESCRIPTORS_DEVICE: u64 = 32;

/// How much is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Nothing: it works.
    None,
    /// Devices work, with a limit that the text names.
    Some,
    /// No device works.
    All,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was checked, one word.
    pub name: &'static str,
    /// What is lost.
    pub loss: Loss,
    /// What was found, and what follows from it.
    pub finding: String,
    /// What would make it work; `None` where it does.
    pub remedy: Option<String>,
}

impl Check {
    fn works(name: &'static str, finding: impl Into<String>) -> Self {
        Self { name, loss: Loss::None, finding: finding.into(), remedy: None }
    }

    fn lacks(name: &'static str, loss: Loss, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, loss, finding: finding.into(), remedy: Some(remedy.into()) }
    }
}

/// Makes all checks, with the rights of this process. Leaves nothing behind.
#[must_use]
pub fn checks() -> Vec<Check> {
    vec![files(), char_devices(), io_uring(), client_memory(), ptrace(), hidepid(), resend(), descriptors()]
}

fn files() -> Check {
    match userns::fuse_available() {
        Ok(()) => Check::works("fuse", "device files can be served"),
        Err(error) => Check::lacks(
            "fuse",
            Loss::All,
            error.to_string(),
            "\"modprobe fuse\"; in a container give it the device /dev/fuse; as a user, rights to open it",
        ),
    }
}

fn char_devices() -> Check {
    match cuse::available() {
        Ok(()) => Check::works("cuse", "device files can be character devices"),
        Err(error) => Check::lacks(
            "cuse",
            Loss::Some,
            format!("device files are files of a FUSE mount, not character devices: {error}"),
            "\"modprobe cuse\" as root, on the host and not in a container",
        ),
    }
}

fn io_uring() -> Check {
    match Ring::new(8) {
        Ok(_) => Check::works("io_uring", "disks are served by io_uring, and client memory is pinned"),
        Err(errno) => {
            let (why, remedy) = io_uring_refusal(errno, sysctl("kernel/io_uring_disabled").as_deref());
            Check::lacks(
                "io_uring",
                Loss::Some,
                format!(
                    "{why}: disks are served by threads, which is slower, and client memory is not pinned"
                ),
                remedy,
            )
        }
    }
}

/// Why io_uring cannot be used, and what to do about that.
#[must_use]
pub fn io_uring_refusal(errno: Errno, sysctl: Option<&str>) -> (String, String) {
    match (errno, sysctl) {
        (Errno::NOSYS, None) => {
            ("this kernel has no io_uring".into(), "A kernel with CONFIG_IO_URING (Linux 5.19 or later)".into())
        }
        (Errno::PERM, Some("2")) => {
            ("kernel.io_uring_disabled is 2".into(), "\"sysctl kernel.io_uring_disabled=0\"".into())
        }
        (Errno::PERM, Some("1")) => (
            "kernel.io_uring_disabled is 1, and this process has not CAP_SYS_ADMIN nor kernel.io_uring_group".into(),
            "\"sysctl kernel.io_uring_disabled=0\", or kernel.io_uring_group set to the daemon's group".into(),
        ),
        (Errno::PERM | Errno::NOSYS, _) => (
            format!("io_uring is refused ({errno}), as a seccomp profile does it"),
            "Allow io_uring_setup, io_uring_enter and io_uring_register in the seccomp profile of the container or unit"
                .into(),
        ),
        _ => (
            format!("io_uring fails: {errno}"),
            "See RLIMIT_MEMLOCK and the memory that is free; a service has LimitMEMLOCK".into(),
        ),
    }
}

/// Whether objects behind the addresses of a client can be opened.
fn client_memory() -> Check {
    let tried = own_map_file();
    match tried {
        Ok(()) => Check::works("map_files", "memory of clients is opened by /proc/PID/map_files"),
        Err(errno) => Check::lacks(
            "map_files",
            Loss::Some,
            format!(
                "/proc/PID/map_files cannot be opened ({errno}): memory of clients works only while they have its descriptor open, as memfds usually are"
            ),
            "CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE in the initial user namespace (CapabilityBoundingSet of the unit)",
        ),
    }
}

fn own_map_file() -> Result<(), Errno> {
    let memory = memfd::create(c"vdpa-doctor", 4096, None)?;
    let map = crate::mmap::SharedMap::map(&memory, 0, 4096, crate::mmap::Prot::RW, false)?;
    let path = format!("/proc/self/map_files/{:x}-{:x}", map.addr(), map.addr() + 4096);
    let opened = fs::File::options().read(true).write(true).open(path);
    opened.map(drop).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

/// Whether this process may examine its clients.
fn ptrace() -> Check {
    const CAP_SYS_PTRACE: u32 = 19;
    let capable = effective_capabilities() >> CAP_SYS_PTRACE & 1 != 0;
    let scope = sysctl("kernel/yama/ptrace_scope");
    let remedy = "\"sysctl kernel.yama.ptrace_scope=0\", or CAP_SYS_PTRACE for the daemon (not at 3, which forbids everybody)";
    match (scope.as_deref(), capable) {
        (Some("3"), _) => Check::lacks(
            "ptrace",
            Loss::Some,
            "kernel.yama.ptrace_scope is 3: private memory of clients and arguments of character devices cannot be read",
            "Boot with kernel.yama.ptrace_scope=2 or less: 3 cannot be taken back",
        ),
        (Some("1" | "2"), false) => Check::lacks(
            "ptrace",
            Loss::Some,
            "Yama lets this process examine its children only: private memory of clients cannot be read",
            remedy,
        ),
        (_, true) => Check::works("ptrace", "clients of every user can be examined"),
        (_, false) => Check::works("ptrace", "clients of the same user can be examined"),
    }
}

fn hidepid() -> Check {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let hidden =
        mounts.lines().filter(|line| line.contains(" /proc ") && line.contains(" - proc ")).any(|line| {
            line.split(['=', ',', ' '])
                .collect::<Vec<_>>()
                .windows(2)
                .any(|pair| matches!(pair, ["hidepid", value] if !matches!(*value, "0" | "off")))
        });
    const CAP_SYS_PTRACE: u32 = 19;
    if hidden && effective_capabilities() >> CAP_SYS_PTRACE & 1 == 0 {
        return Check::lacks(
            "hidepid",
            Loss::Some,
            "/proc is mounted with hidepid: clients of other users are not seen",
            "Mount /proc with hidepid=0, or with gid= of a group of the daemon; or give it CAP_SYS_PTRACE",
        );
    }
    Check::works("hidepid", "the processes of clients are seen")
}

/// Whether the kernel can send requests on device files again after a crash.
fn resend() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 9) {
        return Check::works(
            "resend",
            format!("Linux {release} sends requests on device files again after a crash"),
        );
    }
    Check::lacks(
        "resend",
        Loss::Some,
        format!(
            "Linux {release}: with --holder, requests on files are kept in memory, and one on a character device that was in progress at a crash gets no answer"
        ),
        "Linux 6.9 or later",
    )
}

fn descriptors() -> Check {
    let hard = rlimit::nofile().hard.unwrap_or(u64::MAX);
    let devices = hard.saturating_sub(DESCRIPTORS_BASE) / DESCRIPTORS_DEVICE;
    let finding = format!(
        "RLIMIT_NOFILE is at most {hard}: enough for about {devices} devices with four queues and a client each ({DESCRIPTORS_DEVICE} descriptors)"
    );
    if devices >= 64 {
        return Check::works("descriptors", finding);
    }
    Check::lacks("descriptors", Loss::Some, finding, "LimitNOFILE of the unit, or \"ulimit -Hn\"")
}

fn sysctl(name: &str) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/sys/{name}")).ok()?.trim().to_owned())
}

fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_says_what_follows_and_what_to_do() {
        let checks = checks();
        assert_eq!(checks.len(), 8);
        for check in checks {
            assert_eq!(check.loss == Loss::None, check.remedy.is_none(), "{check:?}");
            assert!(!check.finding.is_empty());
        }
    }

    #[test]
    fn the_reason_of_a_refusal_is_named() {
        let text = |errno, sysctl| io_uring_refusal(errno, sysctl);
        assert_eq!(text(Errno::PERM, Some("2")).0, "kernel.io_uring_disabled is 2");
        assert!(text(Errno::PERM, Some("1")).1.contains("kernel.io_uring_group"));
        assert!(text(Errno::PERM, Some("0")).0.contains("seccomp"));
        assert!(text(Errno::NOSYS, Some("0")).0.contains("seccomp"));
        assert!(text(Errno::NOSYS, None).0.contains("no io_uring"));
        assert!(text(Errno::NOMEM, Some("0")).1.contains("RLIMIT_MEMLOCK"));
    }
}
