//! Where values of C become values of Rust and the other way round.
//!
//! The facts that the unsafe blocks of this crate rest on are those that the header demands of its callers: a string ends with NUL,
//! an array has as many elements as its count says, and what an argument points to does not change and is not freed during the
//! call.
#![expect(unsafe_code, reason = "strings, arrays and descriptors of C programs are pointers and numbers")]

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard};

use crate::error;
use crate::failure::Failure;
use crate::failure::errno::{EIO, ENOTRECOVERABLE};
use crate::log::{self, VDPA_LIVE_LOG_ERROR};

/// Runs the body of an exported function: its value, or `-errno` and a text for `vdpa_live_error()`.
pub(crate) fn answer(body: impl FnOnce() -> Result<c_int, Failure>) -> c_int {
    // A value that a panic has left half done is behind a lock, which is poisoned then.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return value,
        Ok(Err(failure)) => failure,
        Err(panic) => bug(panic.as_ref()),
    };
    error::keep(&failure.text);
    -failure.errno
}

/// As [`answer`], for a function without a result.
pub(crate) fn quietly(body: impl FnOnce()) {
    answer(|| {
        body();
        Ok(0)
    });
}

fn bug(panic: &(dyn Any + Send)) -> Failure {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    let text = format!("this is a bug of libvdpa-live, please report it: {text}");
    log::write(VDPA_LIVE_LOG_ERROR, &text);
    Failure::new(ENOTRECOVERABLE, text)
}

/// Waits for other calls on the same object.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>, Failure> {
    mutex.lock().map_err(|_| {
        Failure::new(
            ENOTRECOVERABLE,
            "an earlier call on this object has failed by a bug of libvdpa-live: free the object",
        )
    })
}

/// What must be given.
pub(crate) fn needed<T>(value: Option<T>, what: &str) -> Result<T, Failure> {
    value.ok_or_else(|| Failure::invalid(format!("{what} is NULL")))
}

/// Where a new object goes: set to NULL at once, so that it is NULL after a failure.
pub(crate) struct Out<'a, T>(&'a mut MaybeUninit<*mut T>);

impl<'a, T> Out<'a, T> {
    pub(crate) fn new(place: Option<&'a mut MaybeUninit<*mut T>>, what: &str) -> Result<Self, Failure> {
        let place = needed(place, what)?;
        place.write(std::ptr::null_mut());
        Ok(Self(place))
    }

    /// Gives the object to the caller, who frees it by its function.
    pub(crate) fn put(self, value: T) {
        self.0.write(Box::into_raw(Box::new(value)));
    }
}

/// A string that must be given.
///
/// # Safety
/// `text` is NULL, or a string that ends with NUL and stays as it is for `'a`.
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    // SAFETY: passed on from the caller.
    needed(unsafe { optional_text(text, what) }?, what)
}

/// A string, or NULL.
///
/// # Safety
/// As [`text`].
pub(crate) unsafe fn optional_text<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: it is not NULL, and the caller says that it ends with NUL and does not change.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Failure::invalid(format!("{what} is not UTF-8")))
}

/// The strings of an array that ends with NULL, as those of execve(2).
///
/// # Safety
/// `list` is NULL, or an array of strings as for [`text`] with NULL at its end.
pub(crate) unsafe fn strings<'a>(mut list: *const *const c_char) -> Option<Vec<&'a CStr>> {
    if list.is_null() {
        return None;
    }
    let mut strings = Vec::new();
    loop {
        // SAFETY: no element before this one was NULL, so the array has it.
        let string = unsafe { *list };
        if string.is_null() {
            return Some(strings);
        }
        // SAFETY: the caller says that each element is a string that ends with NUL.
        strings.push(unsafe { CStr::from_ptr(string) });
        // SAFETY: NULL was not reached, so the array has another element.
        list = unsafe { list.add(1) };
    }
}

/// The elements of an array, which may be NULL if it has none.
///
/// # Safety
/// `first` is NULL, or the first of `count` elements that are aligned and do not change for `'a`.
pub(crate) unsafe fn array<'a, T>(first: *const T, count: usize, what: &str) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    let too_many = count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize);
    if first.is_null() || !first.is_aligned() || too_many {
        return Err(Failure::invalid(format!("{what} cannot be an array of {count} elements")));
    }
    // SAFETY: it is not NULL, aligned, and not larger than an object can be; the rest the caller says.
    Ok(unsafe { std::slice::from_raw_parts(first, count) })
}

/// The bytes of an array to be filled, which may be uninitialised.
///
/// # Safety
/// `first` is NULL, or the first of `count` bytes that nobody else accesses for `'a`.
pub(crate) unsafe fn fill(first: *mut u8, bytes: &[u8], what: &str) -> Result<(), Failure> {
    if first.is_null() && !bytes.is_empty() {
        return Err(Failure::invalid(format!("{what} is NULL")));
    }
    if !bytes.is_empty() {
        // SAFETY: the caller has room for as many bytes, which cannot overlap with a value of this library.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), first, bytes.len()) };
    }
    Ok(())
}

/// A copy of a descriptor, which is close-on-exec. The caller keeps its own.
pub(crate) fn descriptor(fd: c_int, what: &str) -> Result<OwnedFd, Failure> {
    if fd < 0 {
        return Err(Failure::invalid(format!("{what} is {fd}, which is no descriptor")));
    }
    // SAFETY: the number is not -1. It is used for one system call, which tells whether a file is open under it; the header
    // forbids to close it meanwhile.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|e| {
        Failure::new(e.raw_os_error().unwrap_or(EIO), format!("{what} ({fd}) cannot be used: {e}"))
    })
}

/// A text for C, without its NUL bytes.
pub(crate) fn c_text(text: &str) -> CString {
    let bytes: Vec<u8> = text.bytes().filter(|&byte| byte != 0).collect();
    CString::new(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::vdpa_live_error;
    use crate::failure::errno::EINVAL;

    fn error() -> String {
        // SAFETY: the text of this thread, and nothing fails before it is copied.
        unsafe { CStr::from_ptr(vdpa_live_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_an_error_and_the_object_is_not_used_again() {
        let object = Mutex::new(0);
        let panics = |object: &Mutex<i32>| {
            answer(|| {
                let mut value = lock(object)?;
                *value = 1;
                panic!("half done: {}", *value)
            })
        };
        assert_eq!(panics(&object), -ENOTRECOVERABLE);
        assert_eq!(error(), "this is a bug of libvdpa-live, please report it: half done: 1");
        assert_eq!(answer(|| Ok(*lock(&object)?)), -ENOTRECOVERABLE);
        assert!(error().ends_with("free the object"), "{}", error());
    }

    #[test]
    fn what_is_no_argument_is_named() {
        let check = |result: Result<(), Failure>, expected: &str| {
            assert_eq!(answer(|| result.map(|()| 0)), -EINVAL);
            assert_eq!(error(), expected);
        };
        // SAFETY: NULL, and strings of the program.
        unsafe {
            check(text(std::ptr::null(), "name").map(drop), "name is NULL");
            check(text(c"\xff".as_ptr(), "name").map(drop), "name is not UTF-8");
            check(
                array::<u64>(std::ptr::null(), 3, "regions").map(drop),
                "regions cannot be an array of 3 elements",
            );
            check(
                array(c"x".as_ptr(), usize::MAX, "data").map(drop),
                "data cannot be an array of 18446744073709551615 elements",
            );
            assert!(array::<u64>(std::ptr::null(), 0, "regions").unwrap().is_empty());
        }
        check(descriptor(-1, "kick").map(drop), "kick is -1, which is no descriptor");
        let not_open = answer(|| descriptor(1 << 20, "kick").map(|_| 0));
        assert_eq!((not_open, error().starts_with("kick (1048576) cannot be used: ")), (-9, true));
        check(Out::<u8>::new(None, "session").map(drop), "session is NULL");
    }

    #[test]
    fn arrays_of_strings_end_with_null() {
        let list = [c"one".as_ptr(), c"two".as_ptr(), std::ptr::null()];
        // SAFETY: the array ends with NULL.
        assert_eq!(unsafe { strings(list.as_ptr()) }, Some(vec![c"one", c"two"]));
        // SAFETY: NULL is no array.
        assert_eq!(unsafe { strings(std::ptr::null()) }, None);
    }
}
