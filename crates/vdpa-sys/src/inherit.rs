//! Descriptors inherited from the previous image of this process.
#![expect(unsafe_code, reason = "a number is turned into an owned descriptor")]

use parking_lot::Mutex;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use vdpa_core::Errno;

use crate::errno;

/// Serialises check and change of the flag, so that only one of two callers gets the descriptor.
static TAKING: Mutex<()> = Mutex::new(());

/// Adopts the inherited descriptor `number` and sets its close-on-exec flag.
///
/// The flag is clear in a descriptor that was inherited through an exec, and set in every one that this process opened through
/// Rust's library or this crate. So it shows whether the number may be adopted; a second attempt fails. Descriptors that
/// foreign code in this process opened without the flag look the same, so adopt before such code runs.
///
/// # Errors
/// `EBADF` when there is no such descriptor, or it is not inherited, adopted already, or one of the standard
/// three.
pub fn take(number: RawFd) -> Result<OwnedFd, Errno> {
    let _taking = TAKING.lock();
    if number <= 2 {
        return Err(Errno::BADF);
    }
    // SAFETY: borrowed for the two calls below only; the kernel answers EBADF for a number that is not open,
    // and nothing but the flag is read or changed.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(fd).map_err(errno::from_rustix)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(Errno::BADF);
    }
    fcntl_setfd(fd, flags | FdFlags::CLOEXEC).map_err(errno::from_rustix)?;
    // SAFETY: the descriptor is open, and nobody owns it: what this process opened has close-on-exec set, and
    // this one had not until now. The lock excludes a second adoption in between.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn only_inherited_descriptors_are_taken_and_only_once() {
        let ours = crate::memfd::create(c"ours", 0, None).unwrap();
        assert_eq!(take(ours.as_raw_fd()).unwrap_err(), Errno::BADF);
        assert_eq!(take(1).unwrap_err(), Errno::BADF);
        assert_eq!(take(-1).unwrap_err(), Errno::BADF);
        assert_eq!(take(1 << 20).unwrap_err(), Errno::BADF);

        fcntl_setfd(&ours, FdFlags::empty()).unwrap();
        let number = ours.into_raw_fd();
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(fcntl_getfd(&taken).unwrap().contains(FdFlags::CLOEXEC));
        assert_eq!(take(number).unwrap_err(), Errno::BADF);
    }
}
