//! The ring and its slab of requests in flight.
#![expect(unsafe_code, reason = "entries of the ring name memory by address; the slab keeps it alive")]

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::types::{CancelBuilder, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, types};
use vdpa_core::Errno;
use vdpa_core::ring::inflight::LogMemory as _;

use super::adopt::Unsettled;
use super::completion::{Completion, SubmitError};
use super::op::Resources;
use super::registrar::Files;
use super::slab::{Slab, Slot};
use super::threads::Threads;
use super::told::Told;
use super::{File, FixedIoVec, IoVec, Op, Registrar};
use crate::shared_words::SharedWords;

/// How long the drop of a ring waits for requests in flight. Requests that have not ended then are leaked, not freed.
const DROP_TIMEOUT: Duration = Duration::from_secs(30);

/// `user_data` of requests that the ring makes itself.
pub(super) const INTERNAL: u64 = u64::MAX;

/// Set in the `user_data` of requests that own nothing and so are not in the slab; the other bits are the token.
pub(super) const BARE: u64 = 1 << 63;

/// In the words that [`Ring::share`] is given: requests in flight that are no polls.
const IN_FLIGHT: usize = 0;
/// Processes that have used the ring.
const EPOCH: usize = 1;
/// [`Told`].
const TOLD: usize = 2;

/// What carries the requests out.
enum Engine {
    Kernel(Arc<IoUring>),
    Threads(Box<Threads>),
}

/// An io_uring; see the module.
pub struct Ring {
    engine: Engine,
    slab: ManuallyDrop<Slab>,
    /// Requests in flight that are not in the slab.
    bare: usize,
    files: Arc<Mutex<Files>>,
    /// What a successor is told of the ring.
    shared: Option<SharedWords>,
    /// Position of the next completion, and behind the last submission, as the kernel counts.
    positions: (u32, u32),
    /// Another process still uses the ring.
    pub(super) unsettled: Option<Box<Unsettled>>,
}

impl Ring {
    /// Words that [`share`](Self::share) needs.
    pub const SHARED_WORDS: usize = 3;

    /// A ring whose submission queue has `entries` (a power of two; others are rounded up) and whose completion
    /// queue has four times as many, for polls that complete more than once.
    ///
    /// # Errors
    /// `EPERM` where io_uring is forbidden (`kernel.io_uring_disabled`, seccomp), `ENOSYS` where it is absent,
    /// `ENOMEM` under a tight `RLIMIT_MEMLOCK` on kernels before 5.12.
    pub fn new(entries: u32) -> Result<Self, Errno> {
        const CQ_FACTOR: u32 = 4;
        let mut builder = IoUring::builder();
        builder.setup_cqsize(entries.saturating_mul(CQ_FACTOR)).setup_clamp().dontfork();
        // Both are later than the oldest kernel served and only save interrupts of the worker.
        let tuned =
            builder.clone().setup_submit_all().setup_coop_taskrun().setup_taskrun_flag().build(entries);
        let ring = match tuned {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => builder.build(entries),
            other => other,
        };
        let ring = Arc::new(ring.map_err(|error| errno(&error))?);
        Ok(Self::with(ring))
    }

    /// A ring in which nothing is in flight.
    pub(super) fn with(ring: Arc<IoUring>) -> Self {
        Self::on(Engine::Kernel(ring))
    }

    /// Threads in the place of an io_uring, where the kernel does not allow one: slower, nothing can be registered (`EOPNOTSUPP`) or pinned,
    /// and it does not outlive this process.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`.
    pub fn on_threads() -> Result<Self, Errno> {
        Ok(Self::on(Engine::Threads(Box::new(Threads::new()?))))
    }

    /// Whether it is made of [threads](Self::on_threads).
    #[must_use]
    pub const fn is_on_threads(&self) -> bool {
        matches!(self.engine, Engine::Threads(_))
    }

    fn on(engine: Engine) -> Self {
        let slab = ManuallyDrop::new(Slab::default());
        Self {
            engine,
            slab,
            bare: 0,
            files: Arc::default(),
            shared: None,
            positions: (0, 0),
            unsettled: None,
        }
    }

    /// Tells a successor in the first [`SHARED_WORDS`](Self::SHARED_WORDS) of `words`, which are zero for a new ring, whether requests
    /// are in flight: if there are only polls, it need not wait for them, which takes the kernel milliseconds. For a ring that
    /// was [mapped](Self::map), before it is settled.
    pub fn share(&mut self, words: SharedWords) {
        self.shared = Some(words);
    }

    /// Whether the last process has said that nothing but polls is in flight.
    pub(super) fn only_polls(&self) -> bool {
        self.shared.as_ref().is_some_and(|words| words.load(IN_FLIGHT) == 0)
    }

    /// What the last process has said at its last submission.
    pub(super) fn told(&self) -> Option<Told> {
        let words = self.shared.as_ref()?;
        Told::unpack(words.load(TOLD), words.load(EPOCH))
    }

    /// Begins to use a ring that another process has used, at these positions of the next completion and submission.
    pub(super) fn begin_epoch(&mut self, positions: (u32, u32)) {
        self.positions = positions;
        if let Some(words) = &self.shared {
            let epoch = words.load(EPOCH).wrapping_add(1);
            words.store(EPOCH, epoch);
            // 16 bits: late completions are of the last few processes.
            self.slab.epoch = u16::try_from(epoch & u64::from(u16::MAX)).unwrap_or(0);
        }
    }

    /// Before requests are submitted: says that they are in flight.
    #[inline]
    fn tell(&self) {
        if let Some(words) = &self.shared {
            let in_flight = self.in_flight() - self.slab.polls;
            let (completion, submission) = self.positions;
            let told = u32::try_from(in_flight).ok().and_then(|in_flight| {
                Told { in_flight, completion, submission, epoch: words.load(EPOCH) }.pack()
            });
            words.store(TOLD, told.unwrap_or(0));
            words.store(IN_FLIGHT, in_flight as u64);
        }
    }

    /// `None` for threads.
    pub(super) const fn io_uring(&self) -> Option<&Arc<IoUring>> {
        if let Engine::Kernel(ring) = &self.engine { Some(ring) } else { None }
    }

    /// The handle that registers buffers and files.
    #[must_use]
    pub fn registrar(&self) -> Registrar {
        Registrar { ring: self.io_uring().cloned(), files: Arc::clone(&self.files) }
    }

    /// Lets the kernel create up to `count` worker threads for requests of the calling thread that may block on files; its
    /// default is 4 per processor. Further requests wait for a free thread. Call it from the thread that submits.
    ///
    /// # Errors
    /// `EINVAL` on kernels before 5.15.
    pub fn allow_kernel_threads(&self, count: u32) -> Result<(), Errno> {
        let Some(ring) = self.io_uring() else { return Ok(()) };
        // 0 leaves the other kind, for files that can be polled, as it is.
        ring.submitter().register_iowq_max_workers(&mut [count, 0]).map_err(|error| errno(&error))
    }

    /// Number of requests in flight: queued or submitted, and their completion not reaped.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        if let Engine::Threads(threads) = &self.engine {
            threads.in_flight()
        } else {
            self.slab.used + self.bare
        }
    }

    /// Queues a request with a `token`, which need not be unique. It starts at the next
    /// [`Ring::submit_and_wait`], or earlier when the queue is full. Does not wait for completions.
    ///
    /// # Errors
    /// [`SubmitError`].
    pub fn submit(&mut self, op: Op, token: u64) -> Result<(), SubmitError> {
        if let Engine::Threads(threads) = &mut self.engine {
            return threads.submit(op, token);
        }
        if let Op::ReadFixed { file: File::Registered(file), to, offset } = op {
            return self.read_fixed(file, to, offset, token);
        }
        let poll = matches!(op, Op::PollMultishot { .. } | Op::PollOnce { .. });
        let (entry, resources) = op.prepare().map_err(|errno| SubmitError::Request { errno })?;
        if matches!(resources, Resources::Nothing) && token < INTERNAL & !BARE {
            self.push(&entry.user_data(token | BARE)).map_err(|errno| SubmitError::Full { errno })?;
            self.bare += 1;
            return Ok(());
        }
        self.push_owned(entry, Slot { token, resources, poll })
    }

    /// Queues an entry together with the resources it needs until its completion.
    fn push_owned(&mut self, entry: Entry, slot: Slot) -> Result<(), SubmitError> {
        let key = self.slab.insert(slot);
        if let Err(errno) = self.push(&entry.user_data(key)) {
            self.slab.remove(key);
            return Err(SubmitError::Full { errno });
        }
        Ok(())
    }

    /// [`submit`](Self::submit) of an [`Op::ReadFixed`] of a registered file, by its slot. A fast path that avoids
    /// copies of the request.
    ///
    /// # Errors
    /// As `submit`.
    #[inline]
    pub fn read_fixed(
        &mut self,
        file: u32,
        to: FixedIoVec,
        offset: u64,
        token: u64,
    ) -> Result<(), SubmitError> {
        let FixedIoVec { slot, iovec: IoVec { addr, len } } = to;
        let len = u32::try_from(len).map_err(|_| SubmitError::Request { errno: Errno::INVAL })?;
        let at = std::ptr::with_exposed_provenance_mut(addr);
        let entry = opcode::ReadFixed::new(types::Fixed(file), at, len, slot).offset(offset).build();
        if token >= INTERNAL & !BARE {
            return self.push_owned(entry, Slot { token, resources: Resources::Nothing, poll: false });
        }
        self.push(&entry.user_data(token | BARE)).map_err(|errno| SubmitError::Full { errno })?;
        self.bare += 1;
        Ok(())
    }

    /// Requests the cancellation of the requests whose tokens are `wanted`, except transfers between a registered file and a
    /// registered buffer, which the ring does not record. Each still completes: with `ECANCELED`, or with its result if it was
    /// too late. Storage I/O that has reached the device cannot be cancelled. Takes time in proportion to the requests in
    /// flight.
    ///
    /// # Errors
    /// [`SubmitError::Full`].
    pub fn cancel(&mut self, wanted: impl Fn(u64) -> bool) -> Result<(), SubmitError> {
        if let Engine::Threads(threads) = &mut self.engine {
            threads.cancel(wanted);
            return Ok(());
        }
        for key in self.slab.keys_of(wanted) {
            let entry = opcode::AsyncCancel::new(key).build().user_data(INTERNAL);
            self.push(&entry).map_err(|errno| SubmitError::Full { errno })?;
        }
        Ok(())
    }

    /// Whether completions are available, or would be after entering the kernel (`IORING_SQ_TASKRUN`). Costs two loads, for
    /// busy-polling. Kernels before 5.19 show available completions only.
    #[must_use]
    pub fn has_completions(&mut self) -> bool {
        if self.unsettled.is_some() {
            return false;
        }
        let ring = match &mut self.engine {
            Engine::Kernel(ring) => ring,
            Engine::Threads(threads) => return threads.has_completions(),
        };
        // SAFETY: `&mut self` makes this the only completion queue: registrars use the submitter only.
        let arrived = !unsafe { ring.completion_shared() }.is_empty();
        // SAFETY: as above, for the submission queue; its flags are read only.
        let queue = unsafe { ring.submission_shared() };
        arrived || queue.taskrun() || queue.cq_overflow()
    }

    /// Whether requests are queued and not submitted.
    fn has_queued(&mut self) -> bool {
        if self.unsettled.is_some() {
            return false;
        }
        let Some(ring) = self.io_uring() else { return false };
        // SAFETY: as in `has_completions`.
        !unsafe { ring.submission_shared() }.is_empty()
    }

    /// Submits the queued requests and blocks until at least `want` completions are available (0 does not block) or the timeout
    /// has passed. `None` waits without a limit.
    ///
    /// # Errors
    /// Those of `io_uring_enter`. A timeout, a signal and a full completion queue are not errors: call
    /// [`Ring::next_completion`].
    pub fn submit_and_wait(&mut self, want: usize, timeout: Option<Duration>) -> Result<(), Errno> {
        if self.unsettled.is_some() {
            return Err(Errno::AGAIN);
        }
        if let Engine::Threads(threads) = &mut self.engine {
            return threads.wait(want, timeout);
        }
        if want == 0 && !self.has_queued() && !self.has_completions() {
            return Ok(());
        }
        self.tell();
        let Some(ring) = self.io_uring() else { return Ok(()) };
        let submitter = ring.submitter();
        let result = match timeout {
            Some(timeout) if want > 0 => {
                let time = Timespec::from(timeout);
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&time))
            }
            _ => submitter.submit_and_wait(want),
        };
        match result {
            Ok(_) => Ok(()),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(errno(&error)),
        }
    }

    /// The next available completion. Does not block.
    pub fn next_completion(&mut self) -> Option<Completion> {
        if self.unsettled.is_some() {
            return None;
        }
        loop {
            let ring = match &mut self.engine {
                Engine::Kernel(ring) => ring,
                Engine::Threads(threads) => return threads.next_completion(),
            };
            // SAFETY: `&mut self` makes this the only completion queue: the other holders of the Arc are
            // registrars, which use the submitter only.
            let entry = unsafe { ring.completion_shared() }.next()?;
            self.positions.0 = self.positions.0.wrapping_add(1);
            if let Some(completion) = self.complete(entry.user_data(), entry.result(), entry.flags()) {
                return Some(completion);
            }
        }
    }

    /// All available completions. Does not block.
    pub fn completions(&mut self) -> impl Iterator<Item = Completion> {
        std::iter::from_fn(|| self.next_completion())
    }

    fn complete(&mut self, key: u64, result: i32, flags: u32) -> Option<Completion> {
        let result = u32::try_from(result).map_err(|_| Errno::from_raw(result.saturating_neg()));
        if key & BARE != 0 && key != INTERNAL {
            self.bare = self.bare.saturating_sub(1);
            return Some(Completion { token: key & !BARE, result, more: false, buffer: None });
        }
        if cqueue::more(flags) {
            let token = self.slab.token(key)?;
            return Some(Completion { token, result, more: true, buffer: None });
        }
        let slot = self.slab.remove(key)?;
        Some(Completion { token: slot.token, result, more: false, buffer: slot.resources.into_buffer() })
    }

    /// Queues an entry whose memory the slab owns, or that has none.
    #[inline]
    fn push(&mut self, entry: &Entry) -> Result<(), Errno> {
        if self.try_push(entry) {
            return Ok(());
        }
        self.push_to_full(entry)
    }

    #[cold]
    fn push_to_full(&mut self, entry: &Entry) -> Result<(), Errno> {
        if self.unsettled.is_some() {
            return Err(Errno::AGAIN);
        }
        self.tell();
        let Some(ring) = self.io_uring() else { return Err(Errno::OPNOTSUPP) };
        let submitted = ring.submit();
        if self.try_push(entry) {
            return Ok(());
        }
        Err(submitted.err().map_or(Errno::BUSY, |error| errno(&error)))
    }

    #[inline]
    fn try_push(&mut self, entry: &Entry) -> bool {
        if self.unsettled.is_some() {
            return false;
        }
        let Engine::Kernel(ring) = &self.engine else { return false };
        // SAFETY: `&mut self` makes this the only submission queue (registrars use the submitter only).
        let mut queue = unsafe { ring.submission_shared() };
        // SAFETY: everything the entry points to is owned by the slab until the completion is seen, and the slab is
        // freed only when nothing is in flight (see Drop); a cancel entry points to nothing.
        let pushed = unsafe { queue.push(entry) }.is_ok();
        self.positions.1 = self.positions.1.wrapping_add(u32::from(pushed));
        pushed
    }

    /// Cancels all requests and waits up to `timeout`; returns whether no request is in flight afterwards.
    fn drain(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.in_flight() > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            // Repeated in each round, since the kernel may have queued a request since the last one.
            let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(INTERNAL);
            let pushed = self.push(&cancel).is_ok();
            let waited = self.submit_and_wait(1, Some(Duration::from_millis(100)));
            while self.next_completion().is_some() {}
            if !pushed && waited.is_err() {
                return false;
            }
        }
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Threads own what their requests use.
        if self.is_on_threads() || self.drain(DROP_TIMEOUT) {
            // SAFETY: dropped here for the only time; self is gone after this.
            unsafe { ManuallyDrop::drop(&mut self.slab) }
        }
        // Otherwise the kernel may still use memory in the slab, so it must be leaked.
    }
}

impl AsFd for Ring {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let ring = match &self.engine {
            Engine::Kernel(ring) => ring,
            Engine::Threads(threads) => return threads.as_fd(),
        };
        // SAFETY: the descriptor is open as long as the ring, which outlives the borrow of self.
        unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("fd", &self.as_fd().as_raw_fd())
            .field("in_flight", &self.in_flight())
            .finish()
    }
}

pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
