//! What one process leaves behind when it is killed, and the next one goes on with.
//!
//! A test starts this binary again with `PART` set; the test function of that name then plays the part.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use vdpa_sys::journal::{self, Journal};
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uring::{AdoptError, File, FixedIoVec, IoVec, MemorySet, Op, Ring, RingRecord};
use vdpa_sys::{exec, inherit, memfd};

const PART: &str = "VDPA_SYS_SUCCESSOR_PART";
const TIMEOUT: Duration = Duration::from_secs(10);

/// A process that plays a part; killed when dropped.
struct Part {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Part {
    /// `arguments` are for the part; descriptors are inherited under their numbers.
    fn start(name: &str, arguments: &str, keep: Vec<OwnedFd>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
        command.env(PART, arguments).stdout(Stdio::piped());
        exec::terminate_with_parent(&mut command);
        let mut child = exec::spawn(&mut command, keep).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    /// The next line that is for the test and not of the test runner.
    fn line(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the part has ended");
            if let Some((_, said)) = line.split_once("SAYS ") {
                return said.trim().to_owned();
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the process was started for, in a process that plays a part.
fn arguments() -> Option<Vec<String>> {
    std::env::var(PART).ok().map(|text| text.split(' ').map(str::to_owned).collect())
}

fn say(text: impl std::fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "SAYS {text}").and_then(|()| out.flush()).unwrap();
}

fn inherited(number: &str) -> OwnedFd {
    inherit::take(number.parse::<RawFd>().unwrap()).unwrap()
}

fn copy(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

const MEMORY: usize = 64 << 20;

/// Makes a ring with registered memory and leaves requests in every state.
#[test]
fn part_ring() {
    let Some(arguments) = arguments() else { return };
    let (memory, pipe, file) =
        (inherited(&arguments[0]), inherited(&arguments[1]), Arc::new(inherited(&arguments[2])));
    let map = SharedMap::map(&memory, 0, MEMORY, Prot::RW, true).unwrap();
    let set = MemorySet::new([Arc::new(map.clone()) as _]);
    let mut ring = Ring::new(8).unwrap();
    ring.registrar().reserve_buffers(2).unwrap();
    let slot = ring.registrar().add_file(&file).unwrap();
    ring.registrar().set_buffer(1, IoVec { addr: map.addr(), len: MEMORY }, &set).unwrap();
    let pipe = Arc::new(pipe);
    ring.submit(Op::PollMultishot { fd: Arc::clone(&pipe) }, 1).unwrap();
    ring.submit(Op::Read { file: File::Fd(pipe), buffers: vec![0; 16].into(), offset: 0 }, 2).unwrap();
    let to = FixedIoVec { slot: 1, iovec: IoVec { addr: map.addr(), len: 4096 } };
    ring.submit(Op::ReadFixed { file: slot.file(), to, offset: 0 }, 33).unwrap();
    ring.submit_and_wait(0, None).unwrap();
    // Queued and never submitted.
    ring.submit(Op::Write { file: File::Fd(file), buffers: vec![0xee; 512].into(), offset: 0 }, 3).unwrap();
    say(format!("{} {} {}", ring.as_fd().as_raw_fd(), map.addr(), hex(&ring.save().to_bytes())));
    thread::sleep(Duration::from_secs(60));
}

fn pinned_pages() -> i64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap();
    let field =
        |name| -> i64 { text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap() };
    field("nr_foll_pin_acquired ") - field("nr_foll_pin_released ")
}

#[test]
fn the_ring_of_a_killed_process_is_used_on_with_its_pinned_memory() {
    const PAGES: i64 = (MEMORY / 4096) as i64;
    let memory = memfd::create(c"guest", MEMORY as u64, None).unwrap();
    let (pipe, _keep) = rustix::pipe::pipe().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 4096], 0).unwrap();
    let file = OwnedFd::from(file);
    let before = pinned_pages();
    let keep = vec![copy(&memory), copy(&pipe), copy(&file)];
    let numbers = keep.iter().map(|fd| fd.as_raw_fd().to_string()).collect::<Vec<_>>().join(" ");
    let mut part = Part::start("part_ring", &numbers, keep);
    let said = part.line();
    let words: Vec<_> = said.split(' ').collect();
    let (number, addr) = (words[0].parse::<RawFd>().unwrap(), words[1].parse::<usize>().unwrap());
    let record = RingRecord::from_bytes(&unhex(words[2])).unwrap();
    let pidfd = pidfd_open(part.pid(), PidfdFlags::empty()).unwrap();
    let kept = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).unwrap();
    part.kill();
    // Others on this machine may pin as well, but hardly as much.
    let pinned = pinned_pages() - before;
    assert!((PAGES * 3 / 4..PAGES * 2).contains(&pinned), "{pinned} of {PAGES} pages are pinned");

    let mut other = record.to_bytes();
    other[4] ^= 0xff;
    let error = Ring::adopt(copy(&kept), &RingRecord::from_bytes(&other).unwrap(), TIMEOUT).unwrap_err();
    assert!(matches!(error, AdoptError::NotThisRing { .. }), "{error}");
    let error = Ring::adopt(copy(&memory), &record, TIMEOUT).unwrap_err();
    assert!(matches!(error, AdoptError::NotThisRing { .. }), "{error}");

    let begin = Instant::now();
    let adopted = Ring::adopt(copy(&kept), &record, TIMEOUT).unwrap();
    println!("adopted in {:?}: {:?}", begin.elapsed(), adopted.leftovers);
    assert_eq!(adopted.withdrawn, 1);
    let fixed = adopted.leftovers.iter().find(|leftover| leftover.token == Some(33)).unwrap();
    assert_eq!(fixed.result, Ok(4096));
    let others = adopted.leftovers.iter().filter(|leftover| leftover.token.is_none());
    assert!(others.clone().count() == 2 && others.clone().all(|leftover| leftover.result.is_err()));

    let mut ring = adopted.ring;
    let file = Arc::new(file);
    let to = FixedIoVec { slot: 1, iovec: IoVec { addr: addr + MEMORY - 4096, len: 4096 } };
    ring.submit(Op::ReadFixed { file: File::Fd(Arc::clone(&file)), to, offset: 0 }, 1).unwrap();
    let slot = ring.registrar().add_file(&file).unwrap();
    ring.submit(
        Op::ReadFixed {
            file: slot.file(),
            to: FixedIoVec { iovec: IoVec { addr: addr + 8192, len: 512 }, ..to },
            offset: 0,
        },
        2,
    )
    .unwrap();
    ring.submit_and_wait(2, Some(TIMEOUT)).unwrap();
    let results: Vec<_> = ring.completions().map(|done| (done.token, done.result)).collect();
    assert_eq!(results.len(), 2);
    assert!(results.contains(&(1, Ok(4096))) && results.contains(&(2, Ok(512))), "{results:?}");
    let map = SharedMap::map(&memory, 0, MEMORY, Prot::RO, false).unwrap();
    let byte = |at| {
        let mut byte = [0];
        map.read(at, &mut byte).unwrap();
        byte[0]
    };
    assert_eq!([0, MEMORY - 1, MEMORY - 4097, 8192, 8192 + 512].map(byte), [7, 7, 0, 7, 0]);
    drop((slot, ring, kept));
    let deadline = Instant::now() + TIMEOUT;
    while pinned_pages() - before > PAGES / 4 {
        assert!(Instant::now() < deadline, "pages are unpinned with the last descriptor of the ring");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Writes records and checkpoints without end, and tells the last number in the first word of a page.
#[test]
fn part_journal() {
    let Some(arguments) = arguments() else { return };
    let (file, page) = (inherited(&arguments[0]), inherited(&arguments[1]));
    let committed = SharedMap::map(&page, 0, 4096, Prot::RW, false).unwrap();
    let (mut journal, contents) = Journal::open(file, JOURNAL_MAX).unwrap();
    let first = contents.records.last().map_or(1, |record| record.kind + 1);
    say("ready");
    for number in first.. {
        let payload = payload(number);
        if journal.append(number, &payload).is_err() {
            journal.checkpoint([(number, &*payload)]).unwrap();
        }
        committed.store_u32(0, number).unwrap();
    }
}

const JOURNAL_MAX: usize = 128 << 10;

fn payload(number: u32) -> Vec<u8> {
    let len = number.wrapping_mul(2_654_435_761) >> 21;
    number.to_le_bytes().into_iter().cycle().take(usize::try_from(len).unwrap()).collect()
}

#[test]
fn a_journal_whose_writer_is_killed_is_whole() {
    let fd = {
        let journal = Journal::create(c"journal", 8 << 10, JOURNAL_MAX).unwrap();
        journal.as_fd().try_clone_to_owned().unwrap()
    };
    let page = memfd::create(c"committed", 4096, None).unwrap();
    let committed = SharedMap::map(&page, 0, 4096, Prot::RW, false).unwrap();
    let (mut checkpoints, mut records) = (0, 0);
    for round in 0..60_u64 {
        let keep = vec![copy(&fd), copy(&page)];
        let numbers = format!("{} {}", keep[0].as_raw_fd(), keep[1].as_raw_fd());
        let mut part = Part::start("part_journal", &numbers, keep);
        part.line();
        thread::sleep(Duration::from_micros(round.wrapping_mul(7919) % 4000));
        part.kill();
        let contents = journal::read(&fd).unwrap();
        assert_eq!(contents.damage, None);
        let first = contents.records.first().map_or(1, |record| record.kind);
        for (record, number) in contents.records.iter().zip(first..) {
            assert_eq!((record.kind, &record.payload), (number, &payload(number)), "round {round}");
        }
        let last = contents.records.last().map_or(0, |record| record.kind);
        let told = committed.load_u32(0).unwrap();
        assert!(last == told || last == told + 1, "{told} was committed, the last one is {last}");
        (checkpoints, records) = (contents.generation, last);
    }
    println!("{records} records and {checkpoints} checkpoints under 60 kills");
    assert!(checkpoints > 60);
}
