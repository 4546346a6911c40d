//! The text of the last error, and the version.
#![expect(unsafe_code, reason = "functions are exported by their names")]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};

use crate::border::c_text;

thread_local! {
    static LAST: RefCell<CString> = RefCell::new(CString::default());
}

/// Keeps the text of an error of this thread.
pub(crate) fn keep(text: &str) {
    // A thread that ends has no text any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = c_text(text));
}

/// The text of the last error in this thread, in English, without a newline: what was wrong and what would be right. An empty
/// string before the first one. It is valid until the next call of this library in this thread that fails.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The version of the library that runs, as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}
