// SPDX-License-Identifier: GPL-2.0-only

//! `vhost_dev` and its queues (drivers/vhost/vhost.c): owner, eventfds, what the client has set.

use super::gen;
use super::memory::OwnedMm;
use super::parent::{Position, Queue};
use crate::uapi::RING_PACKED;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::ptr::{addr_of_mut, NonNull};
use kernel::error::{code::EBUSY, to_result, Error, Result};

/// An initialised `vhost_dev`.
#[derive(Clone, Copy)]
pub(crate) struct Vhost<'a> {
    dev: NonNull<gen::vhost_dev>,
    queues: NonNull<gen::vhost_virtqueue>,
    _device: PhantomData<&'a gen::vhost_dev>,
}

/// Turns a result of vhost's ioctls, 0 or a negative errno, into one of Rust.
fn result(code: kernel::ffi::c_long) -> Result {
    match i32::try_from(code) {
        Ok(code) => to_result(code),
        Err(_) => Err(Error::from_errno(-22)),
    }
}

impl<'a> Vhost<'a> {
    /// # Safety
    /// Both exist and are initialised for `'a`; `queues` are as many as the parent has. Functions that change anything are called
    /// with the mutex of the device held.
    pub(super) unsafe fn from_raw(dev: NonNull<gen::vhost_dev>, queues: NonNull<gen::vhost_virtqueue>) -> Self {
        Self { dev, queues, _device: PhantomData }
    }

    /// The queue of this index.
    pub(crate) fn queue(self, queue: Queue) -> Vq<'a> {
        // SAFETY: A `Queue` is below the number of queues.
        let raw = unsafe { self.queues.add(usize::from(queue.index())) };
        Vq { raw, _device: PhantomData }
    }

    /// vhost's own requests, of which vhost-vdpa uses SET_OWNER and those of the owner's memory table.
    pub(crate) fn ioctl(self, request: u32, argument: usize) -> Result {
        // SAFETY: Initialised; the device's mutex is held; any request and argument may come from a client.
        result(unsafe { gen::vhost_dev_ioctl(self.dev.as_ptr(), request, argument as *mut c_void) })
    }

    /// vhost's requests for a queue.
    pub(crate) fn queue_ioctl(self, request: u32, argument: usize) -> Result {
        // SAFETY: As in `ioctl`.
        result(unsafe { gen::vhost_vring_ioctl(self.dev.as_ptr(), request, argument as *mut c_void) })
    }

    /// The backend features that the client has acknowledged.
    pub(crate) fn acknowledged(self) -> u64 {
        // SAFETY: A queue exists, as the bus registers no device without; a word that a client may change at any time.
        unsafe { addr_of_mut!((*self.queues.as_ptr()).acked_backend_features).read_volatile() }
    }

    /// Stores the acknowledged backend features. Needs no lock: vhost takes those of the queues.
    pub(crate) fn acknowledge(self, features: u64) {
        // SAFETY: Initialised.
        unsafe { gen::vhost_set_backend_features(self.dev.as_ptr(), features) };
    }

    /// Whether the caller is the owner.
    pub(crate) fn is_owner(self) -> bool {
        // SAFETY: Initialised, with the mutex held.
        unsafe { gen::vhost_dev_check_owner(self.dev.as_ptr()) == 0 }
    }

    /// The owner.
    pub(crate) fn owner(self) -> Option<OwnedMm> {
        // SAFETY: Initialised, with the mutex held, under which alone the owner changes.
        let raw = NonNull::new(unsafe { (*self.dev.as_ptr()).mm })?;
        // SAFETY: The device has a reference, so that another can be taken.
        unsafe {
            gen::mmgrab(raw.as_ptr());
            Some(OwnedMm::from_raw(raw))
        }
    }

    /// Makes another address space the owner.
    pub(crate) fn replace_owner(self, owner: OwnedMm) {
        // SAFETY: Initialised, with the mutex held. A device without workers has an `mmgrab` reference, which is swapped.
        unsafe {
            let previous = core::mem::replace(&mut (*self.dev.as_ptr()).mm, owner.into_raw());
            if let Some(previous) = NonNull::new(previous) {
                drop(OwnedMm::from_raw(previous));
            }
        }
    }

    /// Forgets the owner and all that was negotiated, after a SET_OWNER that failed in the parent.
    pub(crate) fn forget_owner(self) {
        // SAFETY: Initialised, with the mutex held; no memory table is taken over.
        unsafe { gen::vhost_dev_reset_owner(self.dev.as_ptr(), core::ptr::null_mut()) };
    }

    /// Waits for the workers, of which a vhost-vdpa device has none today.
    pub(crate) fn flush(self) {
        // SAFETY: Initialised.
        unsafe { gen::vhost_dev_flush(self.dev.as_ptr()) };
    }

    /// Stops watching the kick eventfds.
    pub(crate) fn stop(self) {
        // SAFETY: Initialised, with the mutex held.
        unsafe { gen::vhost_dev_stop(self.dev.as_ptr()) };
    }

    /// Drops eventfds, owner and everything negotiated.
    pub(crate) fn cleanup(self) {
        // SAFETY: Initialised, stopped, and closing: nobody else uses it.
        unsafe { gen::vhost_dev_cleanup(self.dev.as_ptr()) };
    }
}

/// A queue as vhost knows it.
#[derive(Clone, Copy)]
pub(crate) struct Vq<'a> {
    raw: NonNull<gen::vhost_virtqueue>,
    _device: PhantomData<&'a gen::vhost_virtqueue>,
}

impl Vq<'_> {
    /// Reads or changes the queue under its mutex.
    fn locked<T>(&self, act: impl FnOnce(&mut gen::vhost_virtqueue) -> T) -> T {
        // SAFETY: The queue exists and is initialised; nobody calls this from `act`.
        unsafe { gen::mutex_lock(addr_of_mut!((*self.raw.as_ptr()).mutex)) };
        // SAFETY: The mutex is held. The fields that others use without it (the poll entry) are not touched through this.
        let result = act(unsafe { &mut *self.raw.as_ptr() });
        // SAFETY: Taken above.
        unsafe { gen::mutex_unlock(addr_of_mut!((*self.raw.as_ptr()).mutex)) };
        result
    }

    /// Stores the features in force.
    pub(crate) fn set_features(&self, features: u64) {
        // SAFETY: The union's views are the same words.
        self.locked(|vq| unsafe { *vq.__bindgen_anon_1.acked_features.as_mut() = features });
    }

    pub(crate) fn is_packed(&self) -> bool {
        // SAFETY: Both views of the union are the feature words.
        self.locked(|vq| unsafe { *vq.__bindgen_anon_1.acked_features.as_ref() } & RING_PACKED != 0)
    }

    /// Stores the number of elements.
    pub(crate) fn set_size(&self, size: u32) -> Result {
        self.locked(|vq| {
            if !vq.private_data.is_null() {
                return Err(EBUSY);
            }
            vq.num = size;
            Ok(())
        })
    }

    /// Descriptors, available and used ring: I/O addresses, though vhost keeps them as pointers.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        self.locked(|vq| [vq.desc as u64, vq.avail as u64, vq.used as u64])
    }

    /// The position that the client has set.
    pub(crate) fn position(&self, packed: bool) -> Position {
        self.locked(|vq| match packed {
            true => Position::Packed { avail: vq.last_avail_idx, used: vq.last_used_idx },
            false => Position::Split { avail: vq.last_avail_idx },
        })
    }

    /// Stores the position that the parent reports, from where vhost gives it to the client.
    pub(crate) fn store_position(&self, position: Position) {
        self.locked(|vq| match position {
            Position::Split { avail } => vq.last_avail_idx = avail,
            Position::Packed { avail, used } => {
                vq.last_avail_idx = avail;
                vq.last_used_idx = used;
            }
        });
    }

    /// Whether the client has given an eventfd for interrupts.
    pub(crate) fn has_call(&self) -> bool {
        self.locked(|vq| !vq.call_ctx.ctx.is_null())
    }

    /// What the parent calls to interrupt the client: nothing without an eventfd.
    pub(super) fn callback(&self) -> gen::vdpa_callback {
        let trigger = self.locked(|vq| vq.call_ctx.ctx);
        if trigger.is_null() {
            return gen::vdpa_callback { callback: None, private: core::ptr::null_mut(), trigger };
        }
        gen::vdpa_callback { callback: Some(interrupt), private: self.raw.as_ptr().cast(), trigger }
    }

    /// Lets the interrupt go to a guest directly, where the eventfd's other side can take it.
    pub(crate) fn connect_interrupt(&self, irq: i32) -> Result {
        self.locked(|vq| {
            let (producer, event) = (addr_of_mut!(vq.call_ctx.producer), vq.call_ctx.ctx);
            // SAFETY: The producer is registered nowhere, and stays where it is until `disconnect_interrupt`; the eventfd exists.
            to_result(unsafe { gen::irq_bypass_register_producer(producer, event, irq) })
        })
    }

    /// Undoes [`connect_interrupt`](Self::connect_interrupt); does nothing before it.
    pub(crate) fn disconnect_interrupt(&self) {
        // SAFETY: The producer exists; one that is not registered is ignored.
        self.locked(|vq| unsafe { gen::irq_bypass_unregister_producer(addr_of_mut!(vq.call_ctx.producer)) });
    }
}

/// Signals the eventfd of a queue. Called by parents, in any context, with what [`Vq::callback`] gave.
unsafe extern "C" fn interrupt(private: *mut c_void) -> gen::irqreturn_t {
    let vq = private.cast::<gen::vhost_virtqueue>();
    // SAFETY: The parent was given a queue that exists until the device is gone. A client that replaces the eventfd tells the
    // parent before the old one is released.
    unsafe {
        let event = addr_of_mut!((*vq).call_ctx.ctx).read_volatile();
        if !event.is_null() {
            gen::eventfd_signal_mask(event, 0);
        }
    }
    gen::IRQ_HANDLED
}
