//! The system calls that the daemon may make: a seccomp filter for all of its threads, and for the processes that it starts.

use std::collections::BTreeMap;
use std::str::FromStr;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};
use syscalls::Sysno;
use vdpa_core::Errno;
use vdpa_sys::sigsys;

mod calls;

use calls::{ALLOWED, FAMILIES, NAMESPACES};

/// What becomes of a system call that is not in the list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It fails with `EPERM`, and is named on standard error.
    On,
    /// It is made, and the kernel logs its number (`type=1326` of the audit log).
    Log,
    /// There is no filter.
    #[default]
    Off,
}

impl FromStr for Mode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "on" => Ok(Self::On),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err("\"on\", \"log\" or \"off\" is right"),
        }
    }
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// There is none for this processor.
    #[error("--seccomp: there is no filter for this processor; use --seccomp off")]
    Processor,
    /// The kernel, or the compiler of filters, refused.
    #[error("--seccomp: the kernel takes no filter; use --seccomp off where it was built without seccomp")]
    Filter(#[from] seccompiler::Error),
}

/// Restricts the calling thread, and all threads and processes that it starts from now on. Does not block.
///
/// # Errors
/// [`SeccompError`]; the process is to end then.
pub fn restrict(mode: Mode) -> Result<(), SeccompError> {
    let refuse = match mode {
        Mode::Off => return Ok(()),
        Mode::On => SeccompAction::Trap,
        Mode::Log => SeccompAction::Log,
    };
    sigsys::name_refused().map_err(|_| SeccompError::Processor)?;
    // Its arguments lie in memory, where a filter does not see whether they ask for a namespace. ENOSYS has the C library use clone. It is
    // in the list all the same: of two filters that refuse, the kernel heeds the trap.
    let without_clone3 = compile(
        rules(["clone3"], |_| Ok(vec![])),
        SeccompAction::Allow,
        SeccompAction::Errno(errno(Errno::NOSYS)),
    )?;
    let allowed = compile(rules(ALLOWED.iter().copied(), conditions), refuse, SeccompAction::Allow)?;
    // The second one does not allow another filter.
    apply_filter(&without_clone3)?;
    apply_filter(&allowed)?;
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn compile(
    rules: Result<Rules, seccompiler::Error>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, SeccompError> {
    let processor = std::env::consts::ARCH.try_into().map_err(|_| SeccompError::Processor)?;
    let filter =
        SeccompFilter::new(rules?, otherwise, matched, processor).map_err(seccompiler::Error::from)?;
    Ok(filter.try_into().map_err(seccompiler::Error::from)?)
}

/// Rules for the calls that this processor has: some are of others only.
fn rules<'a>(
    names: impl IntoIterator<Item = &'a str>,
    conditions: impl Fn(&str) -> Result<Vec<SeccompRule>, seccompiler::Error>,
) -> Result<Rules, seccompiler::Error> {
    let known = names.into_iter().filter_map(|name| Some((name, Sysno::from_str(name).ok()?)));
    known.map(|(name, call)| Ok((i64::from(call.id()), conditions(name)?))).collect()
}

/// With which arguments a call is allowed; none: with any.
fn conditions(name: &str) -> Result<Vec<SeccompRule>, seccompiler::Error> {
    let argument = |operator, value| {
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let rules: Result<Vec<_>, seccompiler::BackendError> = match name {
        "clone" => [argument(SeccompCmpOp::MaskedEq(NAMESPACES), 0)].into_iter().collect(),
        "socket" => FAMILIES.iter().map(|family| argument(SeccompCmpOp::Eq, *family)).collect(),
        _ => Ok(Vec::new()),
    };
    Ok(rules?)
}

fn errno(errno: Errno) -> u32 {
    errno.raw().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::Command;

    use super::*;

    const CHILD: &str = "VDPAD_SECCOMP_TEST";

    /// The test is its own child, which has a filter.
    #[test]
    fn a_call_that_is_not_in_the_list_fails_and_is_named() {
        if std::env::var_os(CHILD).is_some() {
            restrict(Mode::On).unwrap();
            let results = [0; 3].map(|_| rustix::process::chroot("/nonexistent"));
            let family =
                rustix::net::socket(rustix::net::AddressFamily::PACKET, rustix::net::SocketType::RAW, None);
            // What is allowed works, threads too.
            let thread =
                std::thread::spawn(|| std::fs::read("/proc/self/stat").unwrap().len()).join().unwrap();
            let denied = rustix::io::Errno::PERM;
            writeln!(
                std::io::stdout(),
                "{}",
                results == [Err(denied); 3] && family.err() == Some(denied) && thread > 0
            )
            .unwrap();
            return;
        }
        let test = "seccomp::tests::a_call_that_is_not_in_the_list_fails_and_is_named";
        let output = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let (out, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(out.contains("true\n"), "{out}{said}");
        let line = |name: &str| format!("vdpad: {} {name}, number ", sigsys::REFUSED);
        for name in ["chroot", "socket"] {
            assert_eq!(said.matches(&line(name)).count(), 1, "{said}");
        }
    }

    #[test]
    fn every_name_is_one_of_a_call() {
        let unknown = |name: &&&str| Sysno::from_str(name).is_err();
        let unknown: Vec<_> = ALLOWED.iter().filter(unknown).collect();
        assert!(unknown.is_empty() || cfg!(not(target_arch = "x86_64")), "{unknown:?}");
        assert!(!ALLOWED.contains(&"ptrace") && !ALLOWED.contains(&"unshare") && !ALLOWED.contains(&"setns"));
        assert!(ALLOWED.is_sorted(), "in the order of the alphabet");
    }
}
