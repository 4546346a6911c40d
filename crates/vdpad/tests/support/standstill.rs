//! Stops a process, for tests of the effect on other processes.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Stops a process and waits until each of its threads has stopped: the signal stops them one after the other, and one that
/// has not stopped may still answer.
pub(crate) fn stop(pid: Pid) {
    kill_process(pid, Signal::STOP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !stands_still(pid) {
        assert!(Instant::now() < deadline, "process {} does not stop", pid.as_raw_nonzero());
        thread::sleep(Duration::from_millis(1));
    }
}

fn stands_still(pid: Pid) -> bool {
    fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap().all(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        status.lines().any(|line| line.starts_with("State:\tT"))
    })
}
