//! Taking over the ring of a process that has died.
//!
//! A ring lives as long as somebody has its descriptor, and with it the buffers that were registered: their pages stay
//! pinned. A successor maps the queues of that same ring again and goes on with it. Registered buffers keep the addresses
//! of the process that registered them; nothing needs to be mapped there.
#![expect(
    unsafe_code,
    reason = "the parameters of a ring and its entries are given by structure and address"
)]

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use io_uring::squeue::Flags;
use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{IoUring, Parameters, cqueue, opcode};
use vdpa_core::Errno;

use super::Ring;
use super::ring::{BARE, INTERNAL, errno};
use super::told::Queues;
use crate::mmap::{Prot, SharedMap};
use crate::process::describe_fd;

/// Upper half of the `user_data` of the request that completes when all before it have.
const MARK: u64 = BARE | 0x7fff_fffe << 32;
/// Setup flags of rings that this module makes, and with which a ring works in more than one process: `CQSIZE`, `CLAMP`,
/// `SUBMIT_ALL`, `COOP_TASKRUN`, `TASKRUN_FLAG`.
const KNOWN_FLAGS: u32 = 1 << 3 | 1 << 4 | 1 << 7 | 1 << 8 | 1 << 9;
/// How long to wait for completions before what is left is cancelled once more.
const ROUND: Duration = Duration::from_millis(50);
/// Where the entries of the submission queue are mapped (`IORING_OFF_SQES`).
const SUBMISSIONS: u64 = 0x1000_0000;
/// Bytes of such an entry.
const SUBMISSION: u32 = 64;
/// The largest queues the kernel makes (`IORING_MAX_CQ_ENTRIES`).
const MAX_ENTRIES: u32 = 65536;

/// What a successor must know of a ring besides its descriptor: `struct io_uring_params` as the kernel filled it in.
/// Valid as long as the ring exists, and on no other kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingRecord([u8; Self::SIZE]);

/// A ring that was taken over, with nothing in flight.
#[derive(Debug)]
pub struct Adopted {
    /// It. Registered buffers are as they were; registered files are gone.
    pub ring: Ring,
    /// Completions that the last process has not seen, in the order they came.
    pub leftovers: Vec<Leftover>,
    /// Requests the last process had queued and the kernel had not taken: they never started and never will.
    pub withdrawn: u32,
}

/// A completion of a request of the last process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Its name, for requests between a registered file and a registered buffer. That of others died with the process.
    pub token: Option<u64>,
    /// Bytes or 0; or the error, `ECANCELED` for what had not started.
    pub result: Result<u32, Errno>,
}

/// Why a ring was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The descriptor or the record is not that of a ring of [`Ring::new`] on this kernel.
    #[error("the ring cannot be adopted: {what}")]
    NotThisRing {
        /// What is wrong.
        what: &'static str,
    },
    /// Requests of the last process are still in flight: a slow disk has some of them, or the process lives.
    #[error("requests of the last process are still in flight after {waited:?}")]
    Unsettled {
        /// How long they were waited for.
        waited: Duration,
        /// What has completed. It will not be told again; the ring can be adopted again later.
        leftovers: Vec<Leftover>,
    },
    /// A system call failed.
    #[error("cannot adopt the ring: {errno}")]
    Io {
        /// The reason.
        errno: Errno,
    },
}

impl RingRecord {
    /// Bytes of a record.
    pub const SIZE: usize = 120;

    /// The bytes to keep.
    #[must_use]
    pub const fn to_bytes(&self) -> [u8; Self::SIZE] {
        self.0
    }

    /// The record in bytes that were kept; `None` when there are too few or too many. Checked by [`Ring::adopt`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The field at byte `at`.
    pub(super) fn word(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }
}

/// Bytes at which `struct io_uring_params` has its fields (include/uapi/linux/io_uring.h).
pub(super) mod at {
    pub(in crate::uring) const SQ_ENTRIES: usize = 0;
    pub(in crate::uring) const CQ_ENTRIES: usize = 4;
    pub(in crate::uring) const FLAGS: usize = 8;
    pub(in crate::uring) const FEATURES: usize = 20;
    pub(in crate::uring) const SQ_HEAD: usize = 40;
    pub(in crate::uring) const SQ_TAIL: usize = 44;
    pub(in crate::uring) const SQ_MASK: usize = 48;
    pub(in crate::uring) const SQ_FLAGS: usize = 56;
    pub(in crate::uring) const SQ_ARRAY: usize = 64;
    pub(in crate::uring) const CQ_HEAD: usize = 80;
    pub(in crate::uring) const CQ_TAIL: usize = 84;
    pub(in crate::uring) const CQ_MASK: usize = 88;
    pub(in crate::uring) const CQ_CQES: usize = 100;
    /// Offsets in the queues that are the same for every ring of a kernel; `SQ_ARRAY` is not.
    pub(in crate::uring) const FIXED: [usize; 12] =
        [SQ_HEAD, SQ_TAIL, SQ_MASK, 52, SQ_FLAGS, 60, CQ_HEAD, CQ_TAIL, CQ_MASK, 92, 96, CQ_CQES];
}

const _: () = assert!(size_of::<Parameters>() == RingRecord::SIZE);

impl Ring {
    /// What a successor needs to [`adopt`](Self::adopt) this ring; of no use for one that is made of [threads](Self::on_threads).
    #[must_use]
    pub fn save(&self) -> RingRecord {
        self.io_uring().map_or(RingRecord([0; RingRecord::SIZE]), |ring| record_of(ring))
    }

    /// Takes over the ring behind `fd`, whose last process has died, and waits until none of that process's requests is in
    /// flight: after that nothing the process had submitted reaches a file. What can be cancelled is.
    ///
    /// # Errors
    /// [`AdoptError`].
    pub fn adopt(fd: OwnedFd, record: &RingRecord, timeout: Duration) -> Result<Adopted, AdoptError> {
        let mut ring = Self::map(fd, record)?;
        let Settled { leftovers, withdrawn } = ring.settle(timeout)?;
        Ok(Adopted { ring, leftovers, withdrawn })
    }

    /// Maps the ring behind `fd`, which another process still uses. Changes nothing. Until [`settle`](Self::settle) every
    /// request is refused with `EAGAIN`.
    ///
    /// # Errors
    /// [`AdoptError`].
    pub fn map(fd: OwnedFd, record: &RingRecord) -> Result<Self, AdoptError> {
        let (queues, submissions) = check(&fd, record)?;
        // SAFETY: any bytes are a valid `io_uring_params`, which has integers only; the sizes are asserted above.
        let parameters = unsafe { std::mem::transmute::<[u8; RingRecord::SIZE], Parameters>(record.0) };
        // SAFETY: the descriptor is owned and of a ring, and the parameters are those the kernel gave for it: `check` has
        // reached the ends of its queues, and has compared the sizes with that ring and the offsets with those of this kernel.
        let ring = unsafe { IoUring::from_fd(fd.into_raw_fd(), parameters) }.map_err(|error| io(&error))?;
        let mut ring = Self::with(Arc::new(ring));
        ring.unsettled = Some(Box::new(Unsettled { queues, submissions, record: *record }));
        Ok(ring)
    }

    /// Whether it is in use here: not one that was [mapped](Self::map) and not settled.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.unsettled.is_none()
    }

    /// Begins to use a ring that was [mapped](Self::map): as [`adopt`](Self::adopt) does. The other process has died, or does not
    /// use the ring any more. If it follows from what that one has [said](Self::share) that nothing but polls is in flight, this does
    /// not wait for their ends. Does nothing the second time.
    ///
    /// # Errors
    /// [`AdoptError`]; it can be tried again.
    pub fn settle(&mut self, timeout: Duration) -> Result<Settled, AdoptError> {
        let Some(Unsettled { queues, submissions, record }) = self.unsettled.as_deref() else {
            return Ok(Settled::default());
        };
        let failed = |errno| AdoptError::Io { errno };
        let ring = self.io_uring().ok_or(failed(Errno::OPNOTSUPP))?;
        let view = Queues { queues, submissions, record };
        let told = self.told().map_or(Ok(false), |told| told.only_polls(&view)).map_err(failed)?;
        let withdrawn = withdraw(queues, record)?;
        let mut leftovers = Vec::new();
        // Late completions of polls are told apart.
        if self.only_polls() || told {
            collect(ring, MARK, &mut leftovers);
        } else if !settle(ring, timeout, &mut leftovers)? {
            return Err(AdoptError::Unsettled { waited: timeout, leftovers });
        }
        match ring.submitter().unregister_files() {
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => return Err(io(&error)),
            _ => {}
        }
        let positions = view.positions().map_err(failed)?;
        self.unsettled = None;
        self.begin_epoch(positions);
        Ok(Settled { leftovers, withdrawn })
    }
}

/// What [`Ring::settle`] has found.
#[derive(Clone, Debug, Default)]
pub struct Settled {
    /// As [`Adopted::leftovers`].
    pub leftovers: Vec<Leftover>,
    /// As [`Adopted::withdrawn`].
    pub withdrawn: u32,
}

/// What is needed to begin to use the ring of another process.
pub(super) struct Unsettled {
    /// The mapping of both queues.
    pub(super) queues: SharedMap,
    /// The mapping of the submissions themselves.
    pub(super) submissions: SharedMap,
    pub(super) record: RingRecord,
}

fn record_of(ring: &IoUring) -> RingRecord {
    let parameters: *const Parameters = ring.params();
    // SAFETY: `Parameters` is a transparent wrapper of `io_uring_params`, 120 bytes without padding.
    RingRecord(unsafe { parameters.cast::<[u8; RingRecord::SIZE]>().read() })
}

/// Checks that the descriptor is a ring of this kernel, and the record that ring's. Returns the mappings of its queues,
/// and of its submissions.
fn check(fd: &OwnedFd, record: &RingRecord) -> Result<(SharedMap, SharedMap), AdoptError> {
    let wrong = |what| Err(AdoptError::NotThisRing { what });
    if describe_fd(fd) != "anon_inode:[io_uring]" {
        return wrong("the descriptor is no io_uring");
    }
    if record.word(at::FLAGS) & !KNOWN_FLAGS != 0 {
        return wrong("it was set up in a way that other processes cannot use");
    }
    let sample = sample()?;
    if at::FIXED.iter().any(|&field| record.word(field) != sample.word(field)) {
        return wrong("its queues are laid out as by another kernel");
    }
    let (sq, cq) = (record.word(at::SQ_ENTRIES), record.word(at::CQ_ENTRIES));
    if sq.max(cq) > MAX_ENTRIES || !sq.is_power_of_two() || !cq.is_power_of_two() {
        return wrong("its queues have impossible sizes");
    }
    // The array follows the completions, at a multiple of a cache line.
    const ALIGNMENT: u32 = 256;
    const COMPLETION: u32 = 16;
    let (array, end) = (record.word(at::SQ_ARRAY), record.word(at::CQ_CQES) + cq * COMPLETION);
    if array < end || array - end >= ALIGNMENT || array % 4 != 0 {
        return wrong("the array of its submission queue is elsewhere");
    }
    if record.word(at::FEATURES) != sample.word(at::FEATURES) {
        return wrong("it has the features of another kernel");
    }
    let queues = reachable(fd, 0, array + sq * 4)?;
    let submissions = reachable(fd, SUBMISSIONS, sq * SUBMISSION)?;
    let field = |at: usize| queues.load_u32(record.word(at) as usize).map(u32::from_le);
    if field(at::SQ_MASK) != Ok(sq - 1) || field(at::CQ_MASK) != Ok(cq - 1) {
        return wrong("its queues have other sizes");
    }
    Ok((queues, submissions))
}

/// The record of some ring of this kernel.
fn sample() -> Result<&'static RingRecord, AdoptError> {
    static SAMPLE: OnceLock<RingRecord> = OnceLock::new();
    if let Some(sample) = SAMPLE.get() {
        return Ok(sample);
    }
    let ring = IoUring::new(1).map_err(|error| io(&error))?;
    Ok(SAMPLE.get_or_init(|| record_of(&ring)))
}

/// Maps `len` bytes of a ring from `offset` on, all of which must exist. The kernel shows the sizes in fdinfo as well, together
/// with every registered buffer, which takes milliseconds.
fn reachable(fd: &OwnedFd, offset: u64, len: u32) -> Result<SharedMap, AdoptError> {
    let io = |errno| AdoptError::Io { errno };
    // Guarded, since an access beyond the end would end this process.
    let map = SharedMap::map_guest(fd, offset, len as usize, Prot::RW, false).map_err(io)?;
    let mut byte = [0];
    match map.read(len as usize - 1, &mut byte) {
        Ok(()) => Ok(map),
        Err(_) => Err(AdoptError::NotThisRing { what: "its queues are smaller" }),
    }
}

/// Takes back what was queued and not submitted: it names memory of the process that has died.
fn withdraw(queue: &SharedMap, record: &RingRecord) -> Result<u32, AdoptError> {
    let io = |errno| AdoptError::Io { errno };
    let (head_at, tail_at) = (record.word(at::SQ_HEAD) as usize, record.word(at::SQ_TAIL) as usize);
    let head = queue.load_u32(head_at).map_err(|_| io(Errno::FAULT))?;
    let tail = queue.load_u32(tail_at).map_err(|_| io(Errno::FAULT))?;
    queue.store_u32(tail_at, head).map_err(|_| io(Errno::FAULT))?;
    Ok(u32::from_le(tail).wrapping_sub(u32::from_le(head)))
}

/// Cancels what is in flight and collects completions until there can be no more; whether that was in time.
fn settle(ring: &IoUring, timeout: Duration, leftovers: &mut Vec<Leftover>) -> Result<bool, AdoptError> {
    let deadline = Instant::now() + timeout;
    let mark = MARK | u64::from(std::process::id());
    let cancel = opcode::AsyncCancel2::new(CancelBuilder::any().all()).build().user_data(INTERNAL);
    // The kernel starts it when all requests before it have completed, whoever submitted them.
    let last = opcode::Nop::new().build().flags(Flags::IO_DRAIN).user_data(mark);
    for entry in [cancel, last] {
        // SAFETY: nobody else uses the queue: the ring has just been made of its descriptor here, and its process is dead.
        let mut queue = unsafe { ring.submission_shared() };
        // SAFETY: neither entry points to memory.
        if unsafe { queue.push(&entry) }.is_err() {
            drop(queue);
            ring.submit().map_err(|error| io(&error))?;
            // SAFETY: as above.
            let mut queue = unsafe { ring.submission_shared() };
            // SAFETY: as above.
            unsafe { queue.push(&entry) }.map_err(|_| AdoptError::Io { errno: Errno::BUSY })?;
        }
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let time = Timespec::from(left.min(ROUND));
        match ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time)) {
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) => {}
            Err(error) => return Err(io(&error)),
        }
        if collect(ring, mark, leftovers) {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
        // A request that was being queued by a kernel thread when the first one was served.
        let _ = ring.submitter().register_sync_cancel(Some(Timespec::new()), CancelBuilder::any().all());
    }
}

/// Takes the completions that are there; whether `mark` was among them.
fn collect(ring: &IoUring, mark: u64, leftovers: &mut Vec<Leftover>) -> bool {
    let mut settled = false;
    // SAFETY: as for the submission queue in `settle`.
    for entry in unsafe { ring.completion_shared() } {
        let name = entry.user_data();
        if name == mark {
            settled = true;
        } else if name != INTERNAL && name & !u64::from(u32::MAX) != MARK && !cqueue::more(entry.flags()) {
            let result = u32::try_from(entry.result());
            leftovers.push(Leftover {
                token: (name & BARE != 0).then_some(name & !BARE),
                result: result.map_err(|_| Errno::from_raw(entry.result().saturating_neg())),
            });
        }
    }
    settled
}

fn io(error: &std::io::Error) -> AdoptError {
    AdoptError::Io { errno: errno(error) }
}
