//! What a process that was killed has open stays open until the kernel has torn it down.

use std::thread;
use std::time::{Duration, Instant};

use vdpa_core::Errno;

/// For how long attempts are repeated.
const TIMEOUT: Duration = Duration::from_secs(1);
const PAUSE_FIRST: Duration = Duration::from_micros(50);
const PAUSE_LAST: Duration = Duration::from_millis(5);

/// Repeats an attempt for a second while it fails in a way that `passes`: a process that was killed keeps its locks and queues
/// until the kernel has torn down its io_uring, which happens asynchronously. Blocks.
///
/// # Errors
/// That of the last attempt.
pub(super) fn wait<T>(
    passes: impl Fn(Errno) -> bool,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let deadline = Instant::now() + TIMEOUT;
    let mut pause = PAUSE_FIRST;
    loop {
        match attempt() {
            Err(errno) if passes(errno) && Instant::now() < deadline => {}
            result => return result,
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_LAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_tried_again_and_nothing_else() {
        let mut left = 3;
        let busy = |errno| errno == Errno::BUSY;
        let result = wait(busy, || {
            left -= 1;
            if left > 0 { Err(Errno::BUSY) } else { Ok(left) }
        });
        assert_eq!(result, Ok(0));
        let mut tries = 0;
        let result = wait(busy, || -> Result<(), Errno> {
            tries += 1;
            Err(Errno::NODEV)
        });
        assert_eq!((result, tries), (Err(Errno::NODEV), 1));
    }
}
