//! Error numbers of the vhost-vdpa interface.

use std::fmt;

/// A Linux error number, as an ioctl or an IOTLB write would report it.
///
/// A newtype and not an enum: a parent device or a kernel may return numbers this crate does not know.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident $(as $symbol:literal)? = $value:literal, $text:literal;)*) => {
        impl Errno {
            $(#[doc = concat!($text, " (", stringify!($value), ").")] pub const $name: Self = Self($value);)*

            /// The symbolic name without its `E`, when this crate knows it.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $($value => Some(errnos!(@symbol $name $($symbol)?)),)* _ => None }
            }

            /// What `strerror` says, without the name; `"unknown error"` when this crate does not know it.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self.0 { $($value => $text,)* _ => "unknown error" }
            }
        }
    };
    (@symbol $name:ident) => { stringify!($name) };
    (@symbol $name:ident $symbol:literal) => { $symbol };
}

errnos! {
    PERM = 1, "Operation not permitted";
    NOENT = 2, "No such file or directory";
    SRCH = 3, "No such process";
    INTR = 4, "Interrupted system call";
    IO = 5, "Input/output error";
    TOOBIG as "2BIG" = 7, "Argument list too long";
    NOEXEC = 8, "Exec format error";
    BADF = 9, "Bad file descriptor";
    AGAIN = 11, "Resource temporarily unavailable";
    NOMEM = 12, "Cannot allocate memory";
    ACCESS as "ACCES" = 13, "Permission denied";
    FAULT = 14, "Bad address";
    BUSY = 16, "Device or resource busy";
    EXIST = 17, "File exists";
    NODEV = 19, "No such device";
    NOTDIR = 20, "Not a directory";
    ISDIR = 21, "Is a directory";
    INVAL = 22, "Invalid argument";
    NFILE = 23, "Too many open files in system";
    MFILE = 24, "Too many open files";
    NOTTY = 25, "Inappropriate ioctl for device";
    TXTBSY = 26, "Text file busy";
    NOSPC = 28, "No space left on device";
    SPIPE = 29, "Illegal seek";
    ROFS = 30, "Read-only file system";
    RANGE = 34, "Numerical result out of range";
    NAMETOOLONG = 36, "File name too long";
    NOSYS = 38, "Function not implemented";
    LOOP = 40, "Too many levels of symbolic links";
    OVERFLOW = 75, "Value too large for defined data type";
    MSGSIZE = 90, "Message too long";
    OPNOTSUPP = 95, "Operation not supported";
    CONNABORTED = 103, "Software caused connection abort";
    NOBUFS = 105, "No buffer space available";
    NOTCONN = 107, "Transport endpoint is not connected";
    TIMEDOUT = 110, "Connection timed out";
    CANCELED = 125, "Operation canceled";
    NOTSUPP = 524, "Operation not supported (kernel-internal ENOTSUPP)";
}

impl Errno {
    /// Wraps a positive error number; anything else becomes `EIO`, since 0 or a negative number is no error.
    #[must_use]
    pub const fn from_raw(value: i32) -> Self {
        if value > 0 { Self(value) } else { Self::IO }
    }

    /// The positive error number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{} (E{name})", self.text()),
            None => write!(f, "error {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "E{name}"),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(Errno::FAULT.raw(), 14);
        assert_eq!(format!("{:?}", Errno::NOTSUPP), "ENOTSUPP");
        assert_eq!(Errno::PERM.to_string(), "Operation not permitted (EPERM)");
        assert_eq!(Errno::ACCESS.to_string(), "Permission denied (EACCES)");
        assert_eq!(format!("{:?}", Errno::TOOBIG), "E2BIG");
        assert_eq!(Errno::from_raw(200).to_string(), "error 200");
        assert_eq!(Errno::from_raw(0), Errno::IO);
    }
}
