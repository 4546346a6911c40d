#![expect(unsafe_code, reason = "the tests make and read mappings of their own")]
use std::fs::{self, File as StdFile, OpenOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vdpa_core::Errno;

use super::*;
use crate::shared_words::SharedWords;

const TIMEOUT: Option<Duration> = Some(Duration::from_secs(10));

/// Anonymous memory, and a flag that is set when it is unmapped.
struct Anon {
    base: usize,
    len: usize,
    unmapped: Arc<AtomicBool>,
}

// SAFETY: mapped in `new`, unmapped in `drop`, and only accessed through raw pointers.
unsafe impl StableMemory for Anon {
    fn base(&self) -> usize {
        self.base
    }
    fn len(&self) -> usize {
        self.len
    }
}

impl Anon {
    fn new(len: usize) -> (Arc<Self>, Arc<AtomicBool>) {
        let unmapped = Arc::new(AtomicBool::new(false));
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }.unwrap();
        (Arc::new(Self { base: base.expose_provenance(), len, unmapped: Arc::clone(&unmapped) }), unmapped)
    }

    fn fill(&self, byte: u8) {
        // SAFETY: the mapping has `len` bytes and nothing is in flight.
        unsafe { std::ptr::with_exposed_provenance_mut::<u8>(self.base).write_bytes(byte, self.len) }
    }

    fn byte(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: inside the mapping, checked above.
        unsafe { std::ptr::with_exposed_provenance::<u8>(self.base + at).read_volatile() }
    }
}

impl Drop for Anon {
    fn drop(&mut self) {
        self.unmapped.store(true, Ordering::SeqCst);
        // SAFETY: mapped in `new` with this length; the last reference is gone.
        unsafe { munmap(std::ptr::with_exposed_provenance_mut(self.base), self.len) }.unwrap();
    }
}

fn set(memory: &Arc<Anon>) -> Arc<MemorySet> {
    let memory: Arc<dyn StableMemory> = Arc::clone(memory) as _;
    Arc::new(MemorySet::new([memory]))
}

fn temp() -> Arc<OwnedFd> {
    Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()))
}

fn one(ring: &mut Ring) -> Completion {
    ring.submit_and_wait(1, TIMEOUT).unwrap();
    ring.next_completion().expect("a completion within 10 s")
}

fn none(ring: &mut Ring) {
    ring.submit_and_wait(1, Some(Duration::from_millis(50))).unwrap();
    assert!(ring.next_completion().is_none());
}

#[test]
fn ranges_of_guest_memory_are_scattered_and_gathered() {
    let mut ring = Ring::new(8).unwrap();
    let fd = temp();
    let (memory, _) = Anon::new(8192);
    memory.fill(7);
    let iovecs = |at: [(usize, usize); 2]| {
        let iovecs = at.map(|(at, len)| IoVec { addr: memory.base + at, len });
        GuestIoVecs::new(iovecs, set(&memory)).unwrap()
    };
    let write = Op::Write {
        file: File::Fd(Arc::clone(&fd)),
        buffers: iovecs([(0, 100), (5000, 411)]).into(),
        offset: 1,
    };
    ring.submit(write, 42).unwrap();
    assert_eq!(ring.in_flight(), 1);
    let done = one(&mut ring);
    assert_eq!((done.token, done.result, done.more), (42, Ok(511), false));
    memory.fill(0);
    let read = Op::Read { file: File::Fd(fd), buffers: iovecs([(8191, 1), (10, 600)]).into(), offset: 1 };
    ring.submit(read, 43).unwrap();
    assert_eq!(one(&mut ring).result, Ok(511));
    assert_eq!(ring.in_flight(), 0);
    let seen = [9, 10, 519, 520, 8190, 8191].map(|at| memory.byte(at));
    assert_eq!(seen, [0, 7, 7, 0, 0, 7]);
}

#[test]
fn an_owned_buffer_is_returned_with_its_completion() {
    let mut ring = Ring::new(8).unwrap();
    let fd = temp();
    ring.submit(
        Op::Write { file: File::Fd(Arc::clone(&fd)), buffers: b"hello".to_vec().into(), offset: 0 },
        1,
    )
    .unwrap();
    let done = one(&mut ring);
    assert_eq!((done.result, done.buffer.as_deref()), (Ok(5), Some(&b"hello"[..])));
    let buffer = AlignedBuf::new(512, 512).unwrap();
    ring.submit(Op::Read { file: File::Fd(fd), buffers: buffer.into(), offset: 1 }, 2).unwrap();
    let done = one(&mut ring);
    assert_eq!((done.result, &done.buffer.as_deref().unwrap()[..5]), (Ok(4), &b"ello\0"[..]));
}

#[test]
fn o_direct_takes_an_aligned_buffer() {
    // In the build directory: tmpfs may refuse O_DIRECT.
    let path = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let fd = Arc::new(OwnedFd::from(direct));
    let mut ring = Ring::new(8).unwrap();
    let mut buffer = AlignedBuf::new(4096, 4096).unwrap();
    buffer.fill(9);
    ring.submit(Op::Write { file: File::Fd(fd), buffers: buffer.into(), offset: 0 }, 1).unwrap();
    assert_eq!(one(&mut ring).result, Ok(4096));
    assert_eq!(fs::read(&path).unwrap(), vec![9; 4096]);
}

#[test]
fn registered_buffers_move_bytes_and_keep_their_bounds() {
    let mut ring = Ring::new(8).unwrap();
    let registrar = ring.registrar();
    registrar.reserve_buffers(4).unwrap();
    let (memory, _) = Anon::new(8192);
    memory.fill(5);
    let whole = IoVec { addr: memory.base, len: 4096 };
    // From another thread, as the control thread does.
    let (from_thread, kept) = (registrar.clone(), set(&memory));
    std::thread::spawn(move || from_thread.set_buffer(2, whole, &kept)).join().unwrap().unwrap();
    let fd = temp();
    let op = |slot, addr| {
        let from = FixedIoVec { slot, iovec: IoVec { addr, len: 512 } };
        Op::WriteFixed { file: File::Fd(Arc::clone(&fd)), from, offset: 0 }
    };
    ring.submit(op(2, memory.base + 3584), 1).unwrap();
    assert_eq!(one(&mut ring).result, Ok(512));
    ring.submit(op(2, memory.base + 3585), 2).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::FAULT), "beyond the registered range");
    ring.submit(op(1, memory.base), 3).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::FAULT), "an empty slot");
    memory.fill(0);
    let to = FixedIoVec { slot: 2, iovec: whole };
    ring.submit(Op::ReadFixed { file: File::Fd(Arc::clone(&fd)), to, offset: 0 }, 4).unwrap();
    assert_eq!(one(&mut ring).result, Ok(512));
    assert_eq!((memory.byte(511), memory.byte(512)), (5, 0));
    registrar.clear_buffer(2).unwrap();
    ring.submit(op(2, memory.base), 5).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::FAULT), "a cleared slot");
    assert_eq!(registrar.set_buffer(4, whole, &set(&memory)), Err(Errno::INVAL), "no such slot");
    let outside = IoVec { addr: memory.base + 8000, len: 4096 };
    assert_eq!(registrar.set_buffer(0, outside, &set(&memory)), Err(Errno::FAULT));
}

#[test]
fn registered_files_are_used_by_slot() {
    let mut ring = Ring::new(8).unwrap();
    let registrar = ring.registrar();
    registrar.reserve_files(2).unwrap();
    registrar.set_file(1, Some(&temp())).unwrap();
    let write = |slot| Op::Write { file: File::Registered(slot), buffers: b"x".to_vec().into(), offset: 0 };
    ring.submit(write(1), 1).unwrap();
    assert_eq!(one(&mut ring).result, Ok(1), "the descriptor is closed, but the file is registered");
    ring.submit(write(0), 2).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::BADF));
    registrar.set_file(1, None).unwrap();
    ring.submit(write(1), 3).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::BADF));
}

#[test]
fn a_hole_is_punched_and_synced() {
    let mut ring = Ring::new(8).unwrap();
    let file = tempfile::tempfile().unwrap();
    let fd = Arc::new(OwnedFd::from(file.try_clone().unwrap()));
    ring.submit(Op::Write { file: File::Fd(Arc::clone(&fd)), buffers: vec![1; 65536].into(), offset: 0 }, 1)
        .unwrap();
    assert_eq!(one(&mut ring).result, Ok(65536));
    ring.submit(Op::Fsync { file: File::Fd(Arc::clone(&fd)), data_only: true }, 2).unwrap();
    assert_eq!(one(&mut ring).result, Ok(0));
    let before = file.metadata().unwrap().blocks();
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    ring.submit(Op::Fallocate { file: File::Fd(fd), mode, offset: 0, len: 32768 }, 3).unwrap();
    assert_eq!(one(&mut ring).result, Ok(0));
    assert_eq!(file.metadata().unwrap().blocks(), before - 64);
    assert_eq!(file.metadata().unwrap().len(), 65536);
}

#[test]
fn an_eventfd_that_is_never_read_gives_one_completion_per_signal() {
    let mut ring = Ring::new(8).unwrap();
    let event = Arc::new(eventfd(0, EventfdFlags::empty()).unwrap());
    ring.submit(Op::PollMultishot { fd: Arc::clone(&event) }, 7).unwrap();
    none(&mut ring);
    for _ in 0..100 {
        rustix::io::write(&*event, &1u64.to_ne_bytes()).unwrap();
        let done = one(&mut ring);
        assert_eq!((done.token, done.result, done.more), (7, Ok(1), true));
        assert!(ring.next_completion().is_none());
    }
    none(&mut ring);
    ring.cancel(|token| token == 7).unwrap();
    let done = one(&mut ring);
    assert_eq!((done.token, done.result, done.more), (7, Err(Errno::from_raw(libc::ECANCELED)), false));
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn an_eventfd_signalled_before_completes_at_once() {
    let mut ring = Ring::new(8).unwrap();
    let event = Arc::new(eventfd(3, EventfdFlags::empty()).unwrap());
    ring.submit(Op::PollMultishot { fd: event }, 7).unwrap();
    assert!(one(&mut ring).more);
    none(&mut ring);
}

#[test]
fn waiting_ends_at_the_timeout() {
    let mut ring = Ring::new(8).unwrap();
    let begin = Instant::now();
    ring.submit_and_wait(1, Some(Duration::from_millis(30))).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(30));
}

#[test]
fn more_requests_than_entries_are_taken() {
    let mut ring = Ring::new(2).unwrap();
    let fd = temp();
    for token in 0..50 {
        let write =
            Op::Write { file: File::Fd(Arc::clone(&fd)), buffers: vec![0; 8].into(), offset: token * 8 };
        ring.submit(write, token).unwrap();
    }
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    while seen.len() < 50 && Instant::now() < deadline {
        ring.submit_and_wait(1, TIMEOUT).unwrap();
        seen.extend(ring.completions().map(|done| done.token));
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..50).collect::<Vec<_>>());
}

/// A read of an empty pipe never completes by itself: its memory must stay mapped until the ring has cancelled it.
#[test]
fn dropping_a_ring_waits_for_requests_in_flight() {
    let mut ring = Ring::new(8).unwrap();
    let (pipe, mut writer) = std::io::pipe().unwrap();
    let fd = Arc::new(OwnedFd::from(pipe));
    let (memory, unmapped) = Anon::new(4096);
    let iovecs = GuestIoVecs::new([IoVec { addr: memory.base, len: 4096 }], set(&memory)).unwrap();
    drop(memory);
    ring.submit(Op::Read { file: File::Fd(Arc::clone(&fd)), buffers: iovecs.into(), offset: u64::MAX }, 1)
        .unwrap();
    ring.submit(
        Op::Read { file: File::Fd(Arc::clone(&fd)), buffers: vec![0; 64].into(), offset: u64::MAX },
        2,
    )
    .unwrap();
    none(&mut ring);
    assert_eq!((ring.in_flight(), unmapped.load(Ordering::SeqCst)), (2, false));
    assert_eq!(Arc::strong_count(&fd), 3);
    drop(ring);
    assert!(unmapped.load(Ordering::SeqCst), "memory released once nothing was in flight");
    assert_eq!(Arc::strong_count(&fd), 1);
    std::io::Write::write_all(&mut writer, b"still there").unwrap();
    let mut rest = [0; 11];
    std::io::Read::read_exact(&mut StdFile::from(Arc::into_inner(fd).unwrap()), &mut rest).unwrap();
    assert_eq!(&rest, b"still there", "no cancelled read consumed it");
}

#[test]
fn a_request_without_resources_is_counted_and_keeps_its_token() {
    let mut ring = Ring::new(8).unwrap();
    let registrar = ring.registrar();
    registrar.reserve_buffers(1).unwrap();
    let (memory, _) = Anon::new(4096);
    memory.fill(9);
    let whole = IoVec { addr: memory.base, len: 4096 };
    registrar.set_buffer(0, whole, &set(&memory)).unwrap();
    let (fd, other) = (temp(), temp());
    let slot = registrar.add_file(&fd).unwrap();
    let op = |file| Op::WriteFixed { file, from: FixedIoVec { slot: 0, iovec: whole }, offset: 0 };
    // Tokens of all kinds, including those that collide with values that the ring uses itself.
    for token in [0, 7, 1 << 62, (1 << 63) - 2, (1 << 63) - 1, 1 << 63, u64::MAX] {
        ring.submit(op(slot.file()), token).unwrap();
        assert_eq!(ring.in_flight(), 1);
        let done = one(&mut ring);
        assert_eq!((done.token, done.result, done.more), (token, Ok(4096), false));
        assert_eq!(ring.in_flight(), 0);
    }
    let mut found = [0; 4];
    rustix::io::pread(&fd, &mut found, 4092).unwrap();
    assert_eq!(found, [9; 4]);
    // A dropped slot is used for another file; a retired slot is not used again.
    let File::Registered(number) = slot.file() else { panic!("{slot:?}") };
    drop(slot);
    ring.submit(op(File::Registered(number)), 1).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::BADF));
    let again = registrar.add_file(&other).unwrap();
    assert!(matches!(again.file(), File::Registered(same) if same == number), "{again:?}");
    again.retire();
    ring.submit(op(File::Registered(number)), 2).unwrap();
    assert_eq!(one(&mut ring).result, Err(Errno::BADF));
    let next = registrar.add_file(&other).unwrap();
    assert!(!matches!(next.file(), File::Registered(same) if same == number), "{next:?}");
}

#[test]
fn a_transfer_by_the_caller_moves_bytes_within_its_memory_only() {
    let (memory, _) = Anon::new(8192);
    memory.fill(5);
    let (fd, kept) = (temp(), set(&memory));
    let iovec = |offset: usize, len| IoVec { addr: memory.base + offset, len };
    let now = |direction, iovecs: &[IoVec], offset| {
        transfer_now(&fd, direction, Wait::Allowed, iovecs, &kept, offset)
    };
    assert_eq!(now(Direction::Write, &[iovec(0, 512)], 0), Ok(512));
    assert_eq!(now(Direction::Write, &[iovec(100, 100), iovec(300, 300)], 512), Ok(400));
    memory.fill(0);
    assert_eq!(now(Direction::Read, &[iovec(0, 4096)], 0), Ok(912), "the file has no more");
    assert_eq!((memory.byte(911), memory.byte(912)), (5, 0));
    assert_eq!(now(Direction::Read, &[iovec(4096, 4), iovec(8000, 4)], 0), Ok(8));
    assert_eq!((memory.byte(8003), memory.byte(8004)), (5, 0));
    assert_eq!(now(Direction::Read, &[iovec(8000, 4096)], 0), Err(Errno::FAULT), "outside");
    assert_eq!(now(Direction::Read, &vec![iovec(0, 1); MAX_IOVECS + 1], 0), Err(Errno::INVAL));
    assert_eq!(now(Direction::Write, &[iovec(0, 1)], u64::MAX), Err(Errno::INVAL));
}

/// A read that may not wait gives the right bytes, or it fails: the page is not cached, or the file does not support it.
#[test]
fn a_transfer_that_may_not_wait_succeeds_or_reports_why() {
    let (memory, _) = Anon::new(8192);
    let kept = set(&memory);
    let iovec = IoVec { addr: memory.base, len: 4096 };
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &[7; 4096]).unwrap();
    file.sync_all().unwrap();
    for cached in [true, false] {
        if !cached {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        memory.fill(0);
        match transfer_now(&file, Direction::Read, Wait::Refused, &[iovec], &kept, 0) {
            Ok(moved) => assert_eq!((moved, memory.byte(4095)), (4096, 7)),
            Err(error) => assert!([Errno::AGAIN, Errno::OPNOTSUPP].contains(&error), "{error}"),
        }
        assert_eq!(transfer_now(&file, Direction::Read, Wait::Allowed, &[iovec], &kept, 0), Ok(4096));
        assert_eq!((memory.byte(0), memory.byte(4095)), (7, 7));
    }
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let refused = transfer_now(&pipe, Direction::Read, Wait::Refused, &[iovec], &kept, 0);
    assert_eq!(refused, Err(Errno::from_raw(libc::ESPIPE)));
}

/// What another process would find that looks at `ring` now: whether only polls are in flight.
fn finds_only_polls(ring: &Ring, words: &SharedWords) -> bool {
    let fd = ring.as_fd().try_clone_to_owned().unwrap();
    let mut other = std::mem::ManuallyDrop::new(Ring::map(fd, &ring.save()).unwrap());
    other.share(words.slice(0, Ring::SHARED_WORDS).unwrap());
    let left = other.unsettled.as_deref().unwrap();
    let queues = told::Queues { queues: &left.queues, submissions: &left.submissions, record: &left.record };
    other.told().is_some_and(|told| told.only_polls(&queues).unwrap())
}

#[test]
fn a_successor_knows_whether_anything_but_polls_is_in_flight() {
    let (_fd, words) = SharedWords::create(c"ring", Ring::SHARED_WORDS).unwrap();
    let mut ring = Ring::new(8).unwrap();
    ring.share(words.slice(0, Ring::SHARED_WORDS).unwrap());
    assert!(!finds_only_polls(&ring, &words), "nothing was said yet");
    let event = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
    ring.submit(Op::PollMultishot { fd: Arc::clone(&event) }, 1).unwrap();
    ring.submit_and_wait(0, None).unwrap();
    assert!(finds_only_polls(&ring, &words));
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let file = Arc::new(OwnedFd::from(file));
    let (pipe, end) = rustix::pipe::pipe().unwrap();
    let pipe = Arc::new(pipe);
    // More than the queues have entries, so that positions pass their ends.
    for round in 0..50_u64 {
        let read = |file: &Arc<OwnedFd>| Op::Read {
            file: File::Fd(Arc::clone(file)),
            buffers: vec![0; 16].into(),
            offset: 0,
        };
        ring.submit(read(&file), 2).unwrap();
        assert!(finds_only_polls(&ring, &words), "{round}: it never begins");
        rustix::io::write(&event, &1_u64.to_ne_bytes()).unwrap();
        ring.submit_and_wait(1, TIMEOUT).unwrap();
        while ring.in_flight() > 1 {
            assert!(finds_only_polls(&ring, &words) || !ring.has_completions(), "{round}: it is complete");
            ring.submit_and_wait(1, TIMEOUT).unwrap();
            let _ = ring.next_completion().unwrap();
        }
        assert!(finds_only_polls(&ring, &words), "{round}: its completion is taken");
        ring.submit(read(&pipe), 3).unwrap();
        ring.submit_and_wait(0, None).unwrap();
        assert!(!finds_only_polls(&ring, &words), "{round}: it waits for the pipe");
        ring.submit(read(&file), 2).unwrap();
        assert!(!finds_only_polls(&ring, &words), "{round}: one waits, the other never begins");
        rustix::io::write(&end, &[0; 16]).unwrap();
        while ring.in_flight() > 1 {
            ring.submit_and_wait(1, TIMEOUT).unwrap();
            let _ = ring.next_completion();
        }
        assert!(finds_only_polls(&ring, &words), "{round}: both are complete");
        while ring.next_completion().is_some() {}
    }
    // What is not taken by the one who had submitted it is taken, and told, by its successor.
    ring.submit(Op::Read { file: File::Fd(file), buffers: vec![0; 16].into(), offset: 0 }, 2).unwrap();
    ring.submit_and_wait(1, TIMEOUT).unwrap();
    let fd = ring.as_fd().try_clone_to_owned().unwrap();
    let record = ring.save();
    std::mem::forget(ring);
    let mut next = Ring::map(fd, &record).unwrap();
    next.share(words);
    let settled = next.settle(Duration::from_secs(10)).unwrap();
    assert_eq!(settled.leftovers.iter().filter(|leftover| leftover.result == Ok(16)).count(), 1);
    assert!(!next.has_completions());
    next.submit(Op::PollMultishot { fd: event }, 7).unwrap();
    next.submit_and_wait(1, TIMEOUT).unwrap();
    let done: Vec<_> = next.completions().map(|done| done.token).collect();
    assert_eq!(done, [7], "the poll of the one before is told apart");
}
