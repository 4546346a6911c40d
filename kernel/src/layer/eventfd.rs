// SPDX-License-Identifier: GPL-2.0-only

//! The eventfd of configuration interrupts.

use super::gen;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ptr::NonNull;
use kernel::error::{from_err_ptr, Result};

/// A reference to an eventfd.
pub(crate) struct EventFd(NonNull<gen::eventfd_ctx>);

impl EventFd {
    /// Takes a reference to the eventfd behind a descriptor of the caller.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: Takes any number; gives a counted reference or an error.
        let raw = from_err_ptr(unsafe { gen::eventfd_ctx_fdget(fd) })?;
        NonNull::new(raw).map(Self).ok_or(kernel::error::code::EBADF)
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: The reference that `from_fd` has taken.
        unsafe { gen::eventfd_ctx_put(self.0.as_ptr()) };
    }
}

/// What a configuration interrupt signals. An interrupt may come on any processor while the eventfd is replaced.
pub(crate) struct ConfigCall {
    lock: UnsafeCell<gen::spinlock_t>,
    current: UnsafeCell<Option<EventFd>>,
}

impl ConfigCall {
    /// Initialises the lock.
    ///
    /// # Safety
    /// `self` stays where it is, and nobody uses it yet.
    pub(super) unsafe fn init(&self) {
        // SAFETY: By the requirements of this function.
        unsafe { gen::vvl_spin_lock_init(self.lock.get()) };
    }

    /// Installs another eventfd, or none. The previous one is released after no interrupt can reach it.
    pub(crate) fn replace(&self, mut next: Option<EventFd>) {
        self.locked(|current| core::mem::swap(current, &mut next));
    }

    fn signal(&self) {
        self.locked(|current| {
            if let Some(event) = current {
                // SAFETY: A counted reference, which cannot be dropped while the lock is held.
                unsafe { gen::eventfd_signal_mask(event.0.as_ptr(), 0) };
            }
        });
    }

    fn locked(&self, act: impl FnOnce(&mut Option<EventFd>)) {
        // SAFETY: Initialised by `init`; not held by this processor, because interrupts are off while it is.
        let flags = unsafe { gen::vvl_spin_lock_irqsave(self.lock.get()) };
        // SAFETY: The lock is held, so that nobody else uses the value.
        act(unsafe { &mut *self.current.get() });
        // SAFETY: Taken above.
        unsafe { gen::vvl_spin_unlock_irqrestore(self.lock.get(), flags) };
    }

    /// The callback for parents: `private` is a `ConfigCall`.
    ///
    /// # Safety
    /// Called only with what [`private`](Self::private) has returned, as long as that exists.
    pub(super) unsafe extern "C" fn callback(private: *mut c_void) -> gen::irqreturn_t {
        // SAFETY: By the requirements of this function.
        unsafe { &*private.cast::<Self>() }.signal();
        gen::IRQ_HANDLED
    }

    /// The argument of [`callback`](Self::callback).
    pub(super) fn private(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

// SAFETY: The value is only reached with the spin lock held.
unsafe impl Sync for ConfigCall {}
