//! The buffers registered with a process's rings, as the rings' files in `/proc/PID/fdinfo` show them: a line `UserBufs: N`, and
//! then `INDEX: ADDRESS/LENGTH` for each, or `INDEX: <none>`.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Time within which a ring describes itself at least once. It does not while it is in use (the kernel's
/// `io_uring_show_fdinfo` tries its lock and leaves out everything if it is taken).
const LIMIT: Duration = Duration::from_secs(10);

/// A registered buffer: its address in the process, in hexadecimal, and its length in bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Buffer {
    pub(crate) address: String,
    pub(crate) len: u64,
}

/// The buffers of all rings of process `pid`, sorted.
pub(crate) fn buffers(pid: u32) -> Vec<Buffer> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let mut found = Vec::new();
    for entry in fs::read_dir(proc.join("fd")).unwrap() {
        let entry = entry.unwrap();
        // It may have been closed just now.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        if target.to_string_lossy().contains("io_uring") {
            found.extend(of_ring(&proc.join("fdinfo").join(entry.file_name())));
        }
    }
    found.sort_unstable();
    found
}

fn of_ring(fdinfo: &Path) -> Vec<Buffer> {
    let deadline = Instant::now() + LIMIT;
    let text = loop {
        // A ring that has been closed meanwhile has no buffers.
        let Ok(text) = fs::read_to_string(fdinfo) else { return Vec::new() };
        if text.contains("UserBufs:") {
            break text;
        }
        assert!(Instant::now() < deadline, "{} has no list of buffers:\n{text}", fdinfo.display());
        thread::sleep(Duration::from_millis(1));
    };
    let lines = text.lines().skip_while(|line| !line.starts_with("UserBufs:")).skip(1);
    // Linux 6.12 shows an empty slot with the highest address, others with "<none>" or not at all.
    lines
        .take_while(|line| line.starts_with(char::is_whitespace))
        .filter(|line| !line.contains("0xffffffffffffffff/"))
        .filter_map(|line| {
            let (address, len) = line.split_once(": ")?.1.trim().split_once('/')?;
            Some(Buffer { address: address.to_owned(), len: len.trim().parse().ok()? })
        })
        .collect()
}
