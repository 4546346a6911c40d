//! Limits on the requests and bytes of a device in a second.
//!
//! A bucket of tokens, as the generic cell rate algorithm has it: instead of tokens, the bucket keeps the time at which it would be
//! full, and each request moves that time on by what it costs. Nothing is to be done while nothing happens, and a device without
//! limits pays one load for each pass over its rings.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vdpa_core::Errno;
use vdpa_core::types::Result;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::uring::Op;

/// Picoseconds of a second: what a request costs at a million requests in a second is a whole number.
const SECOND: u64 = 1_000_000_000_000;

/// How much of what was not used is kept, unless the operator says otherwise, in milliseconds.
pub(crate) const BURST_MS: u64 = 100;

/// The longest time that a device waits without a look: a limit may be changed, or the device be stopped, meanwhile.
const WAIT_MAX: u64 = SECOND / 50;

/// The shortest time: at high rates several requests pass after each wait.
const WAIT_MIN: u64 = SECOND / 2000;

/// Limits of a device; 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Requests in a second.
    pub(crate) iops: u64,
    /// Bytes in a second.
    pub(crate) bps: u64,
    /// For how many milliseconds what is not used is kept.
    pub(crate) burst_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { iops: 0, bps: 0, burst_ms: BURST_MS }
    }
}

impl Limits {
    /// Bytes of what [`save`](Self::save) makes.
    pub(crate) const SAVED: usize = 24;

    /// As saved state has them.
    pub(crate) fn save(self) -> [u8; Self::SAVED] {
        let mut out = [0; Self::SAVED];
        let words = [self.iops, self.bps, self.burst_ms].into_iter().flat_map(u64::to_le_bytes);
        out.iter_mut().zip(words).for_each(|(to, from)| *to = from);
        out
    }

    /// What was saved; `None` for anything else.
    pub(crate) fn saved(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        let [iops, bps, burst_ms] = *words else { return None };
        let word = u64::from_le_bytes;
        let limits = Self { iops: word(iops), bps: word(bps), burst_ms: word(burst_ms) };
        (rest.is_empty() && (1..=MAX_BURST_MS).contains(&limits.burst_ms)).then_some(limits)
    }
}

/// The longest burst, in milliseconds.
pub(crate) const MAX_BURST_MS: u64 = 60_000;

/// The limits, which the thread that serves the device reads and an operator changes.
#[derive(Debug)]
pub(crate) struct SharedLimits {
    iops: AtomicU64,
    bps: AtomicU64,
    burst_ms: AtomicU64,
    /// Moved on by each change.
    version: AtomicU64,
}

impl Default for SharedLimits {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl SharedLimits {
    pub(crate) fn new(limits: Limits) -> Self {
        let Limits { iops, bps, burst_ms } = limits;
        let [iops, bps, burst_ms] = [iops, bps, burst_ms].map(AtomicU64::new);
        Self { iops, bps, burst_ms, version: AtomicU64::new(1) }
    }

    pub(crate) fn get(&self) -> Limits {
        let [iops, bps, burst_ms] =
            [&self.iops, &self.bps, &self.burst_ms].map(|word| word.load(Ordering::Relaxed));
        Limits { iops, bps, burst_ms }
    }

    /// They count from the next pass over the rings on.
    pub(crate) fn set(&self, limits: Limits) {
        self.iops.store(limits.iops, Ordering::Relaxed);
        self.bps.store(limits.bps, Ordering::Relaxed);
        self.burst_ms.store(limits.burst_ms, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// A bucket, in picoseconds of `CLOCK_MONOTONIC`.
#[derive(Debug, Default)]
struct Bucket {
    /// What one costs; 0: nothing is limited.
    cost: u128,
    burst: u128,
    /// When the bucket would be full.
    full: u128,
}

impl Bucket {
    fn set(&mut self, rate: u64, burst_ms: u64) {
        self.cost = u128::from(SECOND).checked_div(rate.into()).unwrap_or(0);
        // Below that, a rate could not be had.
        self.burst = (u128::from(burst_ms) * u128::from(SECOND / 1000)).max(u128::from(WAIT_MIN));
    }

    /// How long it takes until there is something in it again; 0 if there is. It may be overdrawn by one request, which may be of
    /// any size.
    fn wait(&self, now: u128) -> u128 {
        if self.cost == 0 { 0 } else { self.full.saturating_sub(now + self.burst) }
    }

    fn take(&mut self, now: u128, count: u64) {
        if self.cost > 0 {
            self.full = self.full.max(now) + self.cost * u128::from(count);
        }
    }
}

/// The limits of a device, on its thread.
#[derive(Debug)]
pub(crate) struct Limiter {
    shared: Arc<SharedLimits>,
    version: u64,
    requests: Bucket,
    bytes: Bucket,
    /// When the pass over the rings has begun.
    now: u128,
    timer: Option<Arc<OwnedFd>>,
    /// The timer runs: nothing is taken from the rings.
    waits: bool,
}

impl Limiter {
    pub(crate) fn new(shared: Arc<SharedLimits>) -> Self {
        let (requests, bytes) = (Bucket::default(), Bucket::default());
        Self { shared, version: 0, requests, bytes, now: 0, timer: None, waits: false }
    }

    /// A pass over the rings begins.
    #[inline]
    pub(crate) fn begin_pass(&mut self) {
        let version = self.shared.version.load(Ordering::Acquire);
        if version != self.version {
            self.version = version;
            let Limits { iops, bps, burst_ms } = self.shared.get();
            self.requests.set(iops, burst_ms);
            self.bytes.set(bps, burst_ms);
        }
        if self.is_active() {
            self.now = u128::from(monotonic_ns()) * 1000;
        }
    }

    #[inline]
    const fn is_active(&self) -> bool {
        self.requests.cost > 0 || self.bytes.cost > 0
    }

    /// Whether nothing is to be taken from the rings before the timer has expired.
    #[inline]
    pub(crate) const fn waits(&self) -> bool {
        self.waits
    }

    /// Whether a request may be taken now. It counts with [`take`](Self::take).
    #[inline]
    pub(crate) fn admits(&self) -> bool {
        !self.is_active() || self.wait() == 0
    }

    fn wait(&self) -> u128 {
        self.requests.wait(self.now).max(self.bytes.wait(self.now))
    }

    /// Counts a request that was taken.
    #[inline]
    pub(crate) fn take(&mut self, bytes: u64) {
        if self.is_active() {
            self.requests.take(self.now, 1);
            self.bytes.take(self.now, bytes);
        }
    }

    /// Starts the timer. Returns the operation that completes when something may be taken again.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`.
    pub(crate) fn start(&mut self) -> Result<Op> {
        let system = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
        let timer = match &self.timer {
            Some(timer) => Arc::clone(timer),
            None => {
                let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
                let new = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(system)?;
                Arc::clone(self.timer.insert(Arc::new(new)))
            }
        };
        let wait = self.wait().clamp(WAIT_MIN.into(), WAIT_MAX.into());
        let wait = Duration::from_nanos(u64::try_from(wait / 1000).unwrap_or(1));
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 1_000_000 });
        let time = Itimerspec { it_interval: none, it_value };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &time).map_err(system)?;
        self.waits = true;
        Ok(Op::PollOnce { fd: timer, writable: false })
    }

    /// The timer has expired, or was not started.
    pub(crate) const fn end(&mut self) {
        self.waits = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(limits: Limits) -> Limiter {
        let mut limiter = Limiter::new(Arc::new(SharedLimits::new(limits)));
        limiter.begin_pass();
        // Any time, long after the start of the machine.
        limiter.now = 1 << 80;
        limiter
    }

    /// Takes what is admitted in `ms` milliseconds of requests of `bytes` bytes, looking every 0.1 ms. Returns how many.
    fn run(limiter: &mut Limiter, ms: u64, bytes: u64) -> u64 {
        let mut taken = 0;
        for _ in 0..ms * 10 {
            while limiter.admits() {
                limiter.take(bytes);
                taken += 1;
            }
            limiter.now += u128::from(SECOND / 10_000);
        }
        taken
    }

    #[test]
    fn a_rate_is_held_after_a_burst() {
        for iops in [100, 1000, 33_333, 100_000, 1_000_000] {
            let mut limiter = limiter(Limits { iops, bps: 0, burst_ms: 100 });
            let first = run(&mut limiter, 1000, 4096);
            assert!((first as f64 - iops as f64 * 1.1).abs() <= iops as f64 * 0.011 + 2.0, "{iops}: {first}");
            let then = run(&mut limiter, 10_000, 4096);
            assert!((then as f64 / 10.0 - iops as f64).abs() <= iops as f64 * 0.001 + 1.0, "{iops}: {then}");
            // Nothing for a while: the burst is there again, and no more.
            limiter.now += u128::from(60 * SECOND);
            let again = run(&mut limiter, 1, 4096);
            assert!(again <= iops / 10 + iops / 1000 + 2, "{iops}: {again}");
        }
    }

    #[test]
    fn bytes_are_limited_beside_requests() {
        let mut limiter = limiter(Limits { iops: 1000, bps: 1 << 20, burst_ms: 10 });
        run(&mut limiter, 1000, 4096);
        assert_eq!(run(&mut limiter, 4000, 4096).abs_diff(1024), 0);
        // Larger than the burst: one passes, and is paid for.
        let large = run(&mut limiter, 8000, 1 << 20);
        assert!((7..=9).contains(&large), "{large}");
        run(&mut limiter, 2000, 0);
        assert!(run(&mut limiter, 1000, 0).abs_diff(1000) <= 1);
    }

    #[test]
    fn limits_change_and_end() {
        let mut limiter = limiter(Limits { iops: 10, bps: 0, burst_ms: 100 });
        while limiter.admits() {
            limiter.take(1);
        }
        limiter.shared.set(Limits::default());
        let now = limiter.now;
        limiter.begin_pass();
        assert!(limiter.admits() && limiter.now == now, "it does not even look at the clock");
    }

    #[test]
    fn saved_limits_are_read_and_nothing_else_is() {
        let limits = Limits { iops: 5, bps: 1 << 40, burst_ms: 250 };
        assert_eq!(Limits::saved(&limits.save()), Some(limits));
        assert_eq!(limits.save()[..9], [5, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Limits::saved(&[0; 24]), None);
        assert_eq!(Limits::saved(&[1; 23]), None);
        assert_eq!(Limits::saved(&[1; 32]), None);
    }
}
