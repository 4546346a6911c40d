//! What the library tells besides results: which devices it has got, how an update went, what was lost.
#![expect(unsafe_code, reason = "a function of the C program is called")]

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{PoisonError, RwLock};

use crate::border::{answer, c_text};
use crate::failure::Failure;
use crate::failure::errno::EBUSY;

/// A device is lost, or the library has a bug.
pub const VDPA_LIVE_LOG_ERROR: c_int = 3;
/// An update was rolled back.
pub const VDPA_LIVE_LOG_WARNING: c_int = 4;
/// A device was opened, an update has succeeded.
pub const VDPA_LIVE_LOG_INFO: c_int = 6;

/// A function that gets the messages. level is one of VDPA_LIVE_LOG_ERROR, VDPA_LIVE_LOG_WARNING and VDPA_LIVE_LOG_INFO, which are
/// those of syslog(3). text has no newline and is valid during the call. It is called in the thread in which the library was
/// called, by several threads at a time if several call the library. It cannot call vdpa_live_set_log(); what
/// other calls in it would log is left out.
pub type vdpa_live_log = Option<unsafe extern "C" fn(opaque: *mut c_void, level: c_int, text: *const c_char)>;

struct Target {
    log: vdpa_live_log,
    opaque: *mut c_void,
}

// SAFETY: the pointer is not used here but given to the function, which the header says is called in any thread.
unsafe impl Send for Target {}
// SAFETY: as above; the function may be called by several threads at a time.
unsafe impl Sync for Target {}

static TARGET: RwLock<Target> = RwLock::new(Target { log: None, opaque: std::ptr::null_mut() });

thread_local! {
    /// Whether this thread is in the function.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Gives a message to the function, if there is one.
pub(crate) fn write(level: c_int, text: &str) {
    if INSIDE.get() {
        return;
    }
    let target = TARGET.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(log) = target.log {
        let text = c_text(text.lines().next().unwrap_or_default());
        INSIDE.set(true);
        // SAFETY: the caller of `vdpa_live_set_log` has promised that the function can be called with this pointer until it is
        // replaced, which waits for the lock that is held here; the text lives beyond the call.
        unsafe { log(target.opaque, level, text.as_ptr()) };
        INSIDE.set(false);
    }
}

/// Has log called with opaque for each message; NULL ends that. When it returns, the function given before is not called any
/// more. It need not be called: without it, nothing is written anywhere.
///
/// Returns 0, or -EBUSY when log itself calls it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_set_log(log: vdpa_live_log, opaque: *mut c_void) -> c_int {
    answer(|| {
        if INSIDE.get() {
            return Err(Failure::new(
                EBUSY,
                "vdpa_live_set_log() was called by the function that it has set",
            ));
        }
        *TARGET.write().unwrap_or_else(PoisonError::into_inner) = Target { log, opaque };
        Ok(0)
    })
}
