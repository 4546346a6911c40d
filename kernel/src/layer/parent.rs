// SPDX-License-Identifier: GPL-2.0-only

//! The parent of a device: the table of operations that its driver has given to the vDPA bus.

use super::eventfd::ConfigCall;
use super::gen;
use super::iotlb::Iotlb;
use super::memory::{OwnedMm, Origin};
use super::vhost::Vq;
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::error::{code::EOPNOTSUPP, to_result, Result};
use kernel::str::{CStr, CStrExt};

/// A registered vDPA device, as long as the driver of this module is bound to it.
#[derive(Clone, Copy)]
pub(crate) struct Parent<'a> {
    vdpa: NonNull<gen::vdpa_device>,
    _device: PhantomData<&'a gen::vdpa_device>,
}

/// The index of a queue that exists.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queue(u16);

impl Queue {
    pub(crate) fn index(self) -> u16 {
        self.0
    }
}

/// The position of a queue.
#[derive(Clone, Copy)]
pub(crate) enum Position {
    Split { avail: u16 },
    /// Each with the wrap counter in bit 15.
    Packed { avail: u16, used: u16 },
}

// `vdpa_vq_state` is passed as two words.
const _: () = assert!(core::mem::size_of::<gen::vdpa_vq_state>() == 4 && core::mem::align_of::<gen::vdpa_vq_state>() == 2);

impl Position {
    /// In `vdpa_vq_state`, a packed ring's indices lie above their wrap counters.
    fn from_words([first, second]: [u16; 2], packed: bool) -> Self {
        match packed {
            true => Self::Packed { avail: first.rotate_right(1), used: second.rotate_right(1) },
            false => Self::Split { avail: first },
        }
    }

    fn to_words(self) -> [u16; 2] {
        match self {
            Self::Packed { avail, used } => [avail.rotate_left(1), used.rotate_left(1)],
            Self::Split { avail } => [avail, 0],
        }
    }
}

/// A doorbell page.
pub(crate) struct Doorbell {
    pub(crate) address: u64,
    pub(crate) size: u64,
}

/// Calls an operation with the device and these arguments; `None` if the parent does not have it.
macro_rules! operation {
    ($parent:ident.$name:ident($($argument:expr),*)) => {
        // SAFETY: The table is valid and constant as long as the device, which outlives `Parent`. The operations may be called
        // by a driver that is bound to the device; queues exist (`Queue`), pointers are to values of this function's frame or
        // to values that the caller keeps for as long as the operation's contract says.
        $parent.table().$name.map(|operation| unsafe { operation($parent.vdpa.as_ptr() $(, $argument)*) })
    };
}

impl<'a> Parent<'a> {
    /// # Safety
    /// The driver of this module is bound to the device for `'a`.
    pub(super) unsafe fn from_raw(vdpa: NonNull<gen::vdpa_device>) -> Self {
        Self { vdpa, _device: PhantomData }
    }

    fn table(&self) -> &'a gen::vdpa_config_ops {
        // SAFETY: The bus does not register a device without a table; it is valid and constant as long as the device.
        unsafe { &*self.device().config }
    }

    fn device(&self) -> &'a gen::vdpa_device {
        // SAFETY: Exists for `'a`. The fields that are read here do not change while a driver is bound.
        unsafe { self.vdpa.as_ref() }
    }

    // ---- what it is

    pub(crate) fn queues(self) -> u32 {
        self.device().nvqs
    }

    pub(crate) fn groups(self) -> u32 {
        self.device().ngroups
    }

    pub(crate) fn address_spaces(self) -> u32 {
        self.device().nas
    }

    pub(crate) fn uses_addresses(self) -> bool {
        self.device().use_va
    }

    /// The queue with this index, which is also safe from speculation.
    pub(crate) fn queue(self, index: u64) -> Option<Queue> {
        let count = u64::from(self.queues());
        if index >= count {
            return None;
        }
        // SAFETY: Calculates with two numbers.
        u16::try_from(unsafe { gen::vvl_nospec(index, count) }).ok().map(Queue)
    }

    /// By which names a list can refer to the parent: the driver of the device behind it, the management device's driver, the
    /// management device.
    pub(crate) fn names(self) -> impl Iterator<Item = &'a CStr> {
        let management = NonNull::new(self.device().mdev);
        // SAFETY: A management device exists as long as devices that were added through it.
        let management = management.and_then(|device| NonNull::new(unsafe { device.as_ref() }.device));
        let behind = NonNull::new(self.device().dev.parent);
        let driver = |device: NonNull<gen::device>| {
            // SAFETY: The device exists as long as the vDPA device, whose parent it is or through which it was added.
            unsafe { gen::vvl_driver_name(device.as_ptr()) }
        };
        // SAFETY: As above.
        let name = |device: NonNull<gen::device>| unsafe { gen::dev_name(device.as_ptr()) };
        let names = [behind.map(driver), management.map(driver), management.map(name)];
        names.into_iter().flatten().filter(|name| !name.is_null()).map(|name| {
            // SAFETY: A terminated string, which lives as long as the driver or the device.
            unsafe { CStr::from_char_ptr(name) }
        })
    }

    pub(super) fn dma_device(self) -> Option<NonNull<gen::device>> {
        // SAFETY: Parents without operations for DMA set the union to the device that does it.
        NonNull::new(unsafe { self.device().vmap.dma_dev })
    }

    pub(crate) fn device_id(self) -> u32 {
        operation!(self.get_device_id()).unwrap_or(0)
    }

    pub(crate) fn device_features(self) -> u64 {
        operation!(self.get_device_features()).unwrap_or(0)
    }

    pub(crate) fn driver_features(self) -> u64 {
        operation!(self.get_driver_features()).unwrap_or(0)
    }

    pub(crate) fn backend_word(self) -> u64 {
        operation!(self.get_backend_features()).unwrap_or(0)
    }

    pub(crate) fn iova_range(self) -> Option<(u64, u64)> {
        operation!(self.get_iova_range()).map(|range| (range.first, range.last))
    }

    pub(crate) fn queue_size_limit(self) -> u16 {
        operation!(self.get_vq_num_max()).unwrap_or(0)
    }

    // ---- which operations it has

    pub(crate) fn takes_tables(self) -> bool {
        self.table().set_map.is_some()
    }

    pub(crate) fn takes_mappings(self) -> bool {
        self.table().dma_map.is_some()
    }

    pub(crate) fn can_suspend(self) -> bool {
        self.table().suspend.is_some()
    }

    pub(crate) fn can_resume(self) -> bool {
        self.table().resume.is_some()
    }

    pub(crate) fn has_descriptor_groups(self) -> bool {
        self.table().get_vq_desc_group.is_some()
    }

    pub(crate) fn can_reset_map(self) -> bool {
        self.table().reset_map.is_some()
    }

    // ---- status, features, configuration

    pub(crate) fn status(self) -> u8 {
        operation!(self.get_status()).unwrap_or(0)
    }

    pub(crate) fn set_status(self, status: u8) {
        // SAFETY: The device is registered, and this driver bound to it.
        unsafe { gen::vdpa_set_status(self.vdpa.as_ptr(), status) };
    }

    /// Resets the device; `clean`: and its translation, where the parent can (`compat_reset`).
    pub(crate) fn reset(self, clean: bool) -> Result {
        let flags = if clean { gen::VDPA_RESET_F_CLEAN_MAP } else { 0 };
        let compat = clean && self.table().compat_reset.is_some();
        let result = self.exclusively(false, || {
            let result = if compat { operation!(self.compat_reset(flags)) } else { operation!(self.reset()) };
            result.unwrap_or(0)
        });
        to_result(result)
    }

    pub(crate) fn set_driver_features(self, features: u64) -> Result {
        to_result(self.exclusively(true, || operation!(self.set_driver_features(features)).unwrap_or(0)))
    }

    /// Calls `act` with the configuration locked, after the bus's mark whether features are valid was set.
    fn exclusively(self, features_valid: bool, act: impl FnOnce() -> i32) -> i32 {
        // SAFETY: The lock is one of the device, which exists; this thread does not hold it.
        unsafe { gen::vvl_down_write(core::ptr::addr_of_mut!((*self.vdpa.as_ptr()).cf_lock)) };
        // SAFETY: The lock, which protects the mark, is held.
        unsafe { (*self.vdpa.as_ptr()).features_valid = features_valid };
        let result = act();
        // SAFETY: Taken above.
        unsafe { gen::vvl_up_write(core::ptr::addr_of_mut!((*self.vdpa.as_ptr()).cf_lock)) };
        result
    }

    pub(crate) fn config_size(self) -> usize {
        operation!(self.get_config_size()).unwrap_or(0)
    }

    /// Reads the configuration from `offset` on; the caller has checked that it ends within.
    pub(crate) fn read_config(self, offset: u32, buffer: &mut [u8]) {
        let Ok(length) = u32::try_from(buffer.len()) else { return };
        // SAFETY: The device is registered; the buffer has so many bytes.
        unsafe { gen::vdpa_get_config(self.vdpa.as_ptr(), offset, buffer.as_mut_ptr().cast(), length) };
    }

    /// Writes the configuration.
    pub(crate) fn write_config(self, offset: u32, buffer: &[u8]) {
        let Ok(length) = u32::try_from(buffer.len()) else { return };
        // SAFETY: The device is registered; the buffer has so many bytes.
        unsafe { gen::vdpa_set_config(self.vdpa.as_ptr(), offset, buffer.as_ptr().cast(), length) };
    }

    /// Sets what configuration interrupts call.
    pub(crate) fn set_config_call(self, call: &ConfigCall) {
        let mut callback = gen::vdpa_callback {
            callback: Some(ConfigCall::callback),
            private: call.private(),
            trigger: core::ptr::null_mut(),
        };
        // The parent copies it. A reset, at the latest that of the last close, makes it forget it.
        let _ = operation!(self.set_config_cb(&mut callback));
    }

    pub(crate) fn suspend(self) -> Result {
        operation!(self.suspend()).map_or(Err(EOPNOTSUPP), to_result)
    }

    pub(crate) fn resume(self) -> Result {
        operation!(self.resume()).map_or(Err(EOPNOTSUPP), to_result)
    }

    // ---- queues

    pub(crate) fn kick(self, queue: Queue) {
        let _ = operation!(self.kick_vq(queue.0));
    }

    pub(crate) fn set_address(self, queue: Queue, [desc, avail, used]: [u64; 3]) -> Result {
        operation!(self.set_vq_address(queue.0, desc, avail, used)).map_or(Err(EOPNOTSUPP), to_result)
    }

    pub(crate) fn set_size(self, queue: Queue, size: u32) {
        let _ = operation!(self.set_vq_num(queue.0, size));
    }

    pub(crate) fn set_ready(self, queue: Queue, ready: bool) {
        let _ = operation!(self.set_vq_ready(queue.0, ready));
    }

    /// Reads the position of a queue; `packed`: as that of a packed ring.
    pub(crate) fn position(self, queue: Queue, packed: bool) -> Result<Position> {
        let mut words = [0_u16; 2];
        to_result(operation!(self.get_vq_state(queue.0, words.as_mut_ptr().cast())).ok_or(EOPNOTSUPP)?)?;
        Ok(Position::from_words(words, packed))
    }

    pub(crate) fn set_position(self, queue: Queue, position: Position) -> Result {
        let words = position.to_words();
        operation!(self.set_vq_state(queue.0, words.as_ptr().cast())).map_or(Err(EOPNOTSUPP), to_result)
    }

    /// Tells the parent to call the queue's eventfd, or nobody.
    pub(crate) fn set_call(self, queue: Queue, vq: &Vq<'_>) {
        let mut callback = vq.callback();
        // The parent copies it. It is replaced before the eventfd goes, and a reset makes it forget it.
        let _ = operation!(self.set_vq_cb(queue.0, &mut callback));
    }

    pub(crate) fn group(self, queue: Queue) -> Option<u32> {
        operation!(self.get_vq_group(queue.0))
    }

    pub(crate) fn descriptor_group(self, queue: Queue) -> Option<u32> {
        operation!(self.get_vq_desc_group(queue.0))
    }

    pub(crate) fn set_group_asid(self, group: u32, asid: u32) -> Result {
        operation!(self.set_group_asid(group, asid)).map_or(Err(EOPNOTSUPP), to_result)
    }

    pub(crate) fn queue_size(self, queue: Queue) -> Option<u16> {
        operation!(self.get_vq_size(queue.0))
    }

    /// The host's interrupt of a queue.
    pub(crate) fn interrupt(self, queue: Queue) -> Option<i32> {
        operation!(self.get_vq_irq(queue.0)).filter(|irq| *irq >= 0)
    }

    pub(crate) fn has_doorbells(self) -> bool {
        self.table().get_vq_notification.is_some()
    }

    pub(crate) fn doorbell(self, queue: Queue) -> Option<Doorbell> {
        operation!(self.get_vq_notification(queue.0)).map(|area| Doorbell { address: area.addr, size: area.size })
    }

    // ---- memory

    /// Gives the parent a whole table. It keeps a copy of what it needs.
    pub(crate) fn set_map(self, asid: u32, table: &Iotlb) -> Result {
        operation!(self.set_map(asid, table.as_raw())).map_or(Ok(()), to_result)
    }

    /// Gives the parent one mapping. `origin` is kept by the table, which outlives the mapping in the parent.
    pub(crate) fn map(self, asid: u32, iova: u64, size: u64, addr: u64, perm: u32, origin: Option<&Origin>) -> Result {
        let opaque = origin.map_or(core::ptr::null_mut(), |origin| core::ptr::from_ref(origin).cast_mut().cast());
        operation!(self.dma_map(asid, iova, size, addr, perm, opaque)).map_or(Ok(()), to_result)
    }

    pub(crate) fn unmap(self, asid: u32, iova: u64, size: u64) {
        // As in Linux, an error has nobody to go to.
        let _ = operation!(self.dma_unmap(asid, iova, size));
    }

    pub(crate) fn reset_map(self, asid: u32) {
        let _ = operation!(self.reset_map(asid));
    }

    /// Makes the parent use another address space, if it uses addresses.
    pub(crate) fn bind(self, mm: &OwnedMm) -> Result {
        if !self.uses_addresses() {
            return Ok(());
        }
        operation!(self.bind_mm(mm.as_raw())).map_or(Ok(()), to_result)
    }

    pub(crate) fn unbind(self) {
        if self.uses_addresses() {
            let _ = operation!(self.unbind_mm());
        }
    }
}
