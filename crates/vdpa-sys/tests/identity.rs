//! Whether a caller is the owner: each case of the comparison that the kernel makes as `dev->mm == current->mm`.
#![expect(unsafe_code, reason = "the process under test forks, clones and execs in unusual ways")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod subject;

use rustix::event::{PollFd, PollFlags, poll};
use subject::Subject;
use vdpa_core::Errno;
use vdpa_core::host::{AddressSpace, Caller as _};
use vdpa_sys::process::{Caller, OwnerSpace, ProcessCaller, Spaces};

fn caller(tid: i32) -> Caller {
    Caller::new(tid).unwrap()
}

fn owner() -> (Subject, OwnerSpace) {
    let subject = Subject::start();
    let space = Spaces::new().adopt(&caller(subject.tid)).unwrap();
    (subject, space)
}

#[test]
fn the_owner_and_its_threads_are_the_owner() {
    let (mut subject, space) = owner();
    let thread = subject.run_id("thread");
    assert_ne!(thread, subject.tid);
    assert!(caller(subject.tid).is(&space) && caller(thread).is(&space));
    assert_eq!((caller(thread).pid(), space.pid()), (Ok(subject.tid), subject.tid));
}

#[test]
fn another_process_is_not_the_owner() {
    let (_subject, space) = owner();
    let other = Subject::start();
    assert!(!caller(other.tid).is(&space));
}

#[test]
fn a_forked_child_is_not_the_owner() {
    let (mut subject, space) = owner();
    let child = subject.run_id("fork");
    assert!(space.is_alive() && !caller(child).is(&space));
}

#[test]
fn processes_that_share_their_memory_are_one_owner() {
    let (mut subject, space) = owner();
    let child = subject.run_id("clone_vm");
    assert!(caller(child).is(&space));
    let by_child = Spaces::new().adopt(&caller(child)).unwrap();
    assert!(caller(subject.tid).is(&by_child));
}

#[test]
fn after_exec_a_process_is_not_the_owner() {
    let (mut subject, space) = owner();
    assert_eq!(subject.run_id("exec"), subject.tid);
    assert!(!space.is_alive() && !caller(subject.tid).is(&space));
}

#[test]
fn after_exec_from_another_thread_a_process_is_not_the_owner() {
    let (mut subject, space) = owner();
    assert_eq!(subject.run_id("exec from thread"), subject.tid);
    assert!(!space.is_alive() && !caller(subject.tid).is(&space));
}

#[test]
fn after_exec_a_process_is_not_the_owner_even_if_a_child_has_the_old_memory() {
    let (mut subject, space) = owner();
    subject.run("clone_vm");
    subject.run("exec");
    assert!(space.is_alive(), "the child still has the old memory");
    assert!(!caller(subject.tid).is(&space));
}

#[test]
fn exec_is_detected_without_address_randomisation() {
    let mut subject = Subject::start();
    subject.run("no aslr");
    subject.run("exec");
    let space = Spaces::new().adopt(&caller(subject.tid)).unwrap();
    subject.run("clone_vm");
    subject.run("exec");
    let now = Spaces::new().adopt(&caller(subject.tid)).unwrap();
    assert_eq!(now.record().random_addr, space.record().random_addr, "the case needs equal addresses");
    assert!(space.is_alive() && !caller(subject.tid).is(&space));
}

#[test]
fn a_thread_that_outlives_the_first_one_is_the_owner() {
    let (mut subject, space) = owner();
    let worker = subject.run_id("exit the first thread");
    assert_ne!(worker, subject.tid);
    assert!(space.is_alive() && caller(worker).is(&space));
    let adopted = Spaces::new().adopt(&caller(worker)).unwrap();
    assert!(caller(worker).is(&adopted) && adopted.is_alive());
    let addr = subject.run("map shared");
    let fragments = adopted.resolve(addr, 4096, vdpa_core::types::Perm::RW).unwrap();
    assert!(fragments[0].memory.map().is_some(), "its memory is found without its first thread");
}

#[test]
fn an_undumpable_process_can_be_the_owner() {
    let mut subject = Subject::start();
    subject.run("undumpable");
    let space = Spaces::new().adopt(&caller(subject.tid)).unwrap();
    assert!(caller(subject.tid).is(&space));
}

#[test]
fn the_end_of_a_process_is_detected() {
    let (mut subject, space) = owner();
    assert_eq!(subject.run_fatal("send itself SIGBUS"), Some(libc::SIGBUS));
    assert!(!space.is_alive());
    let mut fds = [PollFd::new(&space.fds().pidfd, PollFlags::IN)];
    assert_eq!(poll(&mut fds, None), Ok(1));
    assert_eq!(Spaces::new().adopt(&caller(subject.tid)).unwrap_err().raw(), libc::ESRCH);

    let (mut subject, space) = owner();
    let mut child = Subject::start();
    subject.kill();
    child.kill();
    assert!(!space.is_alive() && !caller(child.tid).is(&space));
}

#[test]
fn devices_of_one_owner_share_its_account_and_unused_spaces_are_freed() {
    let mut subject = Subject::start();
    let other = Subject::start();
    let spaces = Spaces::new();
    let thread = subject.run_id("thread");
    let (first, second, third) = (caller(subject.tid), caller(thread), caller(other.tid));
    let adopt = |caller| ProcessCaller { caller, spaces: &spaces }.address_space().unwrap();
    let (a, b, c) = (adopt(&first), adopt(&second), adopt(&third));
    assert!(a.is_same(&b) && !a.is_same(&c));
    a.account().charge(5, 10).unwrap();
    assert_eq!(b.account().charge(6, 10), Err(Errno::NOMEM));
    assert_eq!((c.account().pages(), spaces.len()), (0, 2));
    drop((a, b, c));
    assert!(spaces.is_empty());
}

#[test]
fn a_saved_space_is_recognised_again() {
    let (mut subject, space) = owner();
    let dup = |fd: &std::os::fd::OwnedFd| fd.try_clone().unwrap();
    let fds = vdpa_sys::space::SpaceFds {
        pidfd: dup(&space.fds().pidfd),
        mem: dup(&space.fds().mem),
        maps: dup(&space.fds().maps),
    };
    let spaces = Spaces::new();
    let restored = spaces.restore(space.record(), fds);
    drop(space);
    assert!(caller(subject.tid).is(&restored));
    assert!(spaces.adopt(&caller(subject.tid)).unwrap().is_same(&restored));
    subject.run("exec");
    assert!(!caller(subject.tid).is(&restored));
}
