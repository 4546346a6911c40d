//! Error numbers of system calls as [`vdpa_core::Errno`].

use vdpa_core::Errno;

/// No such process: the caller, or the process looked up, is not visible from here or has gone.
pub(crate) const SRCH: Errno = Errno::from_raw(libc::ESRCH);
/// No such device or address: a seek beyond the last data of a file.
pub(crate) const NXIO: Errno = Errno::from_raw(libc::ENXIO);

/// Too many open files in this process.
pub(crate) const MFILE: Errno = Errno::from_raw(libc::EMFILE);
/// Too many open files in the system.
pub(crate) const NFILE: Errno = Errno::from_raw(libc::ENFILE);

/// The same number in the other type.
pub(crate) fn from_rustix(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// The number of an I/O error; `EIO` for one that carries none.
#[expect(clippy::needless_pass_by_value, reason = "used as the argument of map_err")]
pub(crate) fn from_io(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// What the last libc call of this thread that returned -1 reported.
pub(crate) fn last() -> Errno {
    from_io(std::io::Error::last_os_error())
}
