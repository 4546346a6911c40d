// SPDX-License-Identifier: GPL-2.0-only

//! The parent's side of the vDPA bus, and the owner's memory: all unsafe code of this module.

use super::device::{lookup, Mapped, State};
use super::ring::Memory;
use core::ffi::c_void;
use core::ptr::{addr_of_mut, NonNull};
use kernel::alloc::KVVec;
use kernel::error::{from_err_ptr, from_result, to_result};
use kernel::mm::{Mm, MmWithUser};
use kernel::prelude::*;
use kernel::str::CStrExt;
use kernel::sync::aref::ARef;
use kernel::sync::barrier::{smp_mb, Full, Read, Write};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::uaccess::{UserPtr, UserSlice};
use kernel::workqueue::{self, impl_has_work, new_work, Work, WorkItem};

#[allow(
    clippy::all,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused
)]
#[path = "../src/layer/gen.rs"]
mod gen;

/// The disk, virtio device 2.
const BLOCK: u32 = 2;

// ---- the owner's memory

/// The address space that requests use.
pub(crate) struct Owner(ARef<Mm>);

/// The owner's memory while a worker has adopted it.
pub(crate) struct OwnerMemory<'a> {
    mm: ARef<MmWithUser>,
    map: &'a [Mapped],
}

impl<'a> OwnerMemory<'a> {
    /// Makes the owner's address space that of this thread, a worker of the kernel. `None` if it is gone.
    pub(crate) fn adopt(owner: &Owner, map: &'a [Mapped]) -> Option<Self> {
        let mm = owner.0.mmget_not_zero()?;
        // SAFETY: A worker has no address space, and gives this one back in `drop`; the reference keeps it until then.
        unsafe { gen::kthread_use_mm(mm.as_raw()) };
        Some(Self { mm, map })
    }

    /// Calls `act` for each part of `length` bytes at `iova` that lies in one mapping: its address, and which bytes.
    fn parts(&self, iova: u64, length: usize, perm: u32, mut act: impl FnMut(usize, usize, usize) -> Result) -> Result {
        let mut done = 0;
        while done < length {
            let at = iova.wrapping_add(done as u64);
            let mapped = lookup(self.map, at).filter(|mapped| mapped.perm & perm != 0).ok_or(EFAULT)?;
            let room = usize::try_from(mapped.last.wrapping_sub(at)).unwrap_or(usize::MAX).saturating_add(1);
            let size = room.min(length.wrapping_sub(done));
            act(mapped.address.wrapping_add(at.wrapping_sub(mapped.first)) as usize, done, size)?;
            done = done.wrapping_add(size);
        }
        Ok(())
    }
}

impl Memory for OwnerMemory<'_> {
    fn read(&self, iova: u64, bytes: &mut [u8]) -> Result {
        self.parts(iova, bytes.len(), 1, |address, at, size| {
            let part = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..size)).ok_or(EFAULT)?;
            UserSlice::new(UserPtr::from_addr(address), size).reader().read_slice(part)
        })
    }

    fn write(&self, iova: u64, bytes: &[u8]) -> Result {
        self.parts(iova, bytes.len(), 2, |address, at, size| {
            let part = bytes.get(at..).and_then(|rest| rest.get(..size)).ok_or(EFAULT)?;
            UserSlice::new(UserPtr::from_addr(address), size).writer().write_slice(part)
        })
    }

    fn read_barrier(&self) {
        smp_mb(Read);
    }

    fn write_barrier(&self) {
        smp_mb(Write);
        smp_mb(Full);
    }
}

impl Drop for OwnerMemory<'_> {
    fn drop(&mut self) {
        // SAFETY: Adopted by `adopt`, on this thread: nothing sends the value.
        unsafe { gen::kthread_unuse_mm(self.mm.as_raw()) };
    }
}

/// What an interrupt of the queue calls.
pub(crate) struct Callback(Option<(unsafe extern "C" fn(*mut c_void) -> gen::irqreturn_t, *mut c_void)>);

// SAFETY: The bus lets a parent call it on any thread.
unsafe impl Send for Callback {}

impl Callback {
    pub(crate) const fn none() -> Self {
        Self(None)
    }

    pub(crate) fn interrupt(&self) {
        if let Some((call, private)) = self.0 {
            // SAFETY: The bus lets a parent call it until another is set, or a reset, which both lock the state that this is in.
            unsafe { call(private) };
        }
    }
}

// ---- a device

/// What a device and its work share.
#[pin_data]
struct Inner {
    #[pin]
    state: Mutex<State>,
    #[pin]
    work: Work<Inner>,
}

impl_has_work! {
    impl HasWork<Self> for Inner { self.work }
}

impl WorkItem for Inner {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let more = this.state.lock().serve();
        if more {
            kick(this);
        }
    }
}

/// Lets a worker serve the queue; does nothing if one will. May be called with interrupts off.
fn kick(inner: Arc<Inner>) {
    let _ = workqueue::system_unbound().enqueue(inner);
}

/// A device as the bus has it.
#[repr(C)]
struct Device {
    vdpa: gen::vdpa_device,
    inner: Arc<Inner>,
}

/// The inner device.
///
/// # Safety
/// `vdpa` is the beginning of a [`Device`], which is not freed during the call.
unsafe fn inner<'a>(vdpa: *const gen::vdpa_device) -> &'a Arc<Inner> {
    // SAFETY: By the requirements of this function.
    unsafe { &(*vdpa.cast::<Device>()).inner }
}

/// An operation of the bus: `name(vdpa, arguments...) -> result`, with the state locked as `state`.
macro_rules! operation {
    ($name:ident($state:ident $(, $argument:ident: $type:ty)*) $(-> $result:ty)? $body:block) => {
        unsafe extern "C" fn $name(vdpa: *mut gen::vdpa_device $(, $argument: $type)*) $(-> $result)? {
            // SAFETY: The bus calls its operations with devices that `add` has made, until they are freed.
            let mut $state = unsafe { inner(vdpa) }.state.lock();
            $body
        }
    };
    ($name:ident(ref $state:ident $(, $argument:ident: $type:ty)*) -> $result:ty $body:block) => {
        unsafe extern "C" fn $name(vdpa: *mut gen::vdpa_device $(, $argument: $type)*) -> $result {
            // SAFETY: As above.
            let $state = unsafe { inner(vdpa) }.state.lock();
            $body
        }
    };
}

operation!(set_vq_address(state, _queue: u16, descriptors: u64, available: u64, used: u64) -> i32 {
    let ring = &mut state.ring;
    (ring.descriptors, ring.available, ring.used) = (descriptors, available, used);
    0
});
operation!(set_vq_num(state, _queue: u16, size: u32) { state.ring.size = u16::try_from(size).unwrap_or(0); });
operation!(set_vq_ready(state, _queue: u16, ready: bool) { state.set_ready(ready); });
operation!(get_vq_ready(ref state, _queue: u16) -> bool { state.ring.ready });
operation!(set_driver_features(state, features: u64) -> i32 { from_result(|| state.set_features(features).map(|()| 0)) });
operation!(get_driver_features(ref state) -> u64 { state.features });
operation!(get_status(ref state) -> u8 { state.status });
operation!(reset(state) -> i32 { state.reset(false); 0 });
operation!(compat_reset(state, flags: u32) -> i32 { state.reset(flags & gen::VDPA_RESET_F_CLEAN_MAP != 0); 0 });
operation!(suspend(state) -> i32 { state.suspend(); 0 });
operation!(get_generation(ref state) -> u32 { state.generation });
operation!(reset_map(state, _asid: u32) -> i32 { state.set_map(KVVec::new()); 0 });
operation!(unbind_mm(state) { state.owner = None; });

unsafe extern "C" fn set_vq_state(vdpa: *mut gen::vdpa_device, _queue: u16, position: *const gen::vdpa_vq_state) -> i32 {
    // SAFETY: As in `operation`; the bus passes a position, of a split ring since no other is offered.
    unsafe { inner(vdpa).state.lock().ring.next = position.cast::<u16>().read() };
    0
}

unsafe extern "C" fn get_vq_state(vdpa: *mut gen::vdpa_device, _queue: u16, position: *mut gen::vdpa_vq_state) -> i32 {
    // SAFETY: As in `operation`; the bus passes room for a position.
    unsafe { position.cast::<u16>().write(inner(vdpa).state.lock().ring.next) };
    0
}

unsafe extern "C" fn set_vq_cb(vdpa: *mut gen::vdpa_device, _queue: u16, callback: *mut gen::vdpa_callback) {
    // SAFETY: As in `operation`; the bus passes a callback.
    let (call, private) = unsafe { ((*callback).callback, (*callback).private) };
    // SAFETY: As above.
    unsafe { inner(vdpa).state.lock().call = Callback(call.map(|call| (call, private))) };
}

unsafe extern "C" fn kick_vq(vdpa: *mut gen::vdpa_device, _queue: u16) {
    // SAFETY: As in `operation`.
    kick(unsafe { inner(vdpa) }.clone());
}

unsafe extern "C" fn set_status(vdpa: *mut gen::vdpa_device, status: u8) {
    // SAFETY: As in `operation`.
    let inner = unsafe { inner(vdpa) };
    inner.state.lock().status = status;
    // Kicks that came before are served now.
    kick(inner.clone());
}

unsafe extern "C" fn resume(vdpa: *mut gen::vdpa_device) -> i32 {
    // SAFETY: As in `operation`.
    let inner = unsafe { inner(vdpa) };
    inner.state.lock().resume();
    kick(inner.clone());
    0
}

unsafe extern "C" fn get_config(vdpa: *mut gen::vdpa_device, offset: u32, buffer: *mut c_void, length: u32) {
    // SAFETY: The bus passes a buffer of this length.
    let buffer = unsafe { core::slice::from_raw_parts_mut(buffer.cast::<u8>(), length as usize) };
    // SAFETY: As in `operation`.
    unsafe { inner(vdpa) }.state.lock().read_config(offset as usize, buffer);
}

unsafe extern "C" fn bind_mm(vdpa: *mut gen::vdpa_device, mm: *mut gen::mm_struct) -> i32 {
    // SAFETY: The bus passes an address space that lives during the call, so that a reference can be taken.
    let owner = Owner(ARef::from(unsafe { Mm::from_raw(mm) }));
    // SAFETY: As in `operation`.
    unsafe { inner(vdpa) }.state.lock().owner = Some(owner);
    0
}

unsafe extern "C" fn set_map(vdpa: *mut gen::vdpa_device, _asid: u32, table: *mut gen::vhost_iotlb) -> i32 {
    from_result(|| {
        let mut map = KVVec::new();
        // SAFETY: The bus passes a table that does not change during the call; its mappings come in ascending order.
        unsafe {
            let mut next = gen::vhost_iotlb_itree_first(table, 0, u64::MAX);
            while let Some(entry) = next.as_ref() {
                let mapped = Mapped { first: entry.start, last: entry.last, address: entry.addr, perm: entry.perm };
                map.push(mapped, GFP_KERNEL)?;
                next = gen::vhost_iotlb_itree_next(next, 0, u64::MAX);
            }
        }
        // SAFETY: As in `operation`.
        unsafe { inner(vdpa) }.state.lock().set_map(map);
        Ok(0)
    })
}

/// The device is gone: what the bus did not allocate is dropped.
unsafe extern "C" fn free(vdpa: *mut gen::vdpa_device) {
    // SAFETY: As in `operation`. No kick comes any more, so that no work runs after this, in a module that may go.
    unsafe { gen::flush_work(Work::raw_get(&inner(vdpa).work)) };
    // SAFETY: Called once, for a device that `add` has made, when nobody uses it any more.
    unsafe { core::ptr::drop_in_place(addr_of_mut!((*vdpa.cast::<Device>()).inner)) };
}

unsafe extern "C" fn device_features(_vdpa: *mut gen::vdpa_device) -> u64 {
    State::offered()
}
unsafe extern "C" fn ignore_config_cb(_vdpa: *mut gen::vdpa_device, _callback: *mut gen::vdpa_callback) {}
unsafe extern "C" fn ignore_config(_vdpa: *mut gen::vdpa_device, _offset: u32, _buffer: *const c_void, _length: u32) {}
unsafe extern "C" fn vq_align(_vdpa: *mut gen::vdpa_device) -> u32 {
    4096
}
unsafe extern "C" fn vq_group(_vdpa: *mut gen::vdpa_device, _queue: u16) -> u32 {
    0
}
/// There is one group and one address space.
unsafe extern "C" fn set_group_asid(_vdpa: *mut gen::vdpa_device, _group: u32, _asid: u32) -> i32 {
    0
}
unsafe extern "C" fn backend_features(_vdpa: *const gen::vdpa_device) -> u64 {
    State::backend_word()
}
unsafe extern "C" fn vq_num_max(_vdpa: *mut gen::vdpa_device) -> u16 {
    State::queue_limit()
}
unsafe extern "C" fn device_id(_vdpa: *mut gen::vdpa_device) -> u32 {
    BLOCK
}
unsafe extern "C" fn vendor_id(_vdpa: *mut gen::vdpa_device) -> u32 {
    0
}
unsafe extern "C" fn config_size(_vdpa: *mut gen::vdpa_device) -> usize {
    State::config_size()
}

/// A table of C that is never changed.
#[repr(transparent)]
struct Table<T>(T);
// SAFETY: Never changed.
unsafe impl<T> Sync for Table<T> {}

static OPERATIONS: Table<gen::vdpa_config_ops> = Table(gen::vdpa_config_ops {
    set_vq_address: Some(set_vq_address),
    set_vq_num: Some(set_vq_num),
    kick_vq: Some(kick_vq),
    set_vq_cb: Some(set_vq_cb),
    set_vq_ready: Some(set_vq_ready),
    get_vq_ready: Some(get_vq_ready),
    set_vq_state: Some(set_vq_state),
    get_vq_state: Some(get_vq_state),
    get_vq_align: Some(vq_align),
    get_vq_group: Some(vq_group),
    get_device_features: Some(device_features),
    get_backend_features: Some(backend_features),
    set_driver_features: Some(set_driver_features),
    get_driver_features: Some(get_driver_features),
    set_config_cb: Some(ignore_config_cb),
    get_vq_num_max: Some(vq_num_max),
    get_device_id: Some(device_id),
    get_vendor_id: Some(vendor_id),
    get_status: Some(get_status),
    set_status: Some(set_status),
    reset: Some(reset),
    compat_reset: Some(compat_reset),
    suspend: Some(suspend),
    resume: Some(resume),
    get_config_size: Some(config_size),
    get_config: Some(get_config),
    set_config: Some(ignore_config),
    get_generation: Some(get_generation),
    set_map: Some(set_map),
    reset_map: Some(reset_map),
    set_group_asid: Some(set_group_asid),
    bind_mm: Some(bind_mm),
    unbind_mm: Some(unbind_mm),
    free: Some(free),
    // SAFETY: All fields are optional functions, for which zero is none.
    ..unsafe { core::mem::zeroed() }
});

// ---- the management device

unsafe extern "C" fn add(
    management: *mut gen::vdpa_mgmt_dev,
    name: *const kernel::ffi::c_char,
    _config: *const gen::vdpa_dev_set_config,
) -> i32 {
    from_result(|| {
        let state = State::new(crate::disk_mib())?;
        let shared = Arc::pin_init(
            pin_init!(Inner {
                state <- new_mutex!(state, "vdpa_ram::state"),
                work <- new_work!("vdpa_ram::work"),
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The management device's own device exists; the table is static; the size is that of the whole device.
        let vdpa = from_err_ptr(unsafe {
            let size = core::mem::size_of::<Device>();
            gen::__vdpa_alloc_device((*management).device, &OPERATIONS.0, core::ptr::null(), 1, 1, size, name, true)
        })?;
        // SAFETY: Allocated above; nobody knows it yet. `free` drops what is written here.
        let code = unsafe {
            addr_of_mut!((*vdpa.cast::<Device>()).inner).write(shared);
            (*vdpa).mdev = management;
            (*vdpa).vmap.dma_dev = (*management).device;
            gen::_vdpa_register_device(vdpa, 1)
        };
        if code != 0 {
            // SAFETY: Not registered: this is the only reference.
            unsafe { gen::put_device(addr_of_mut!((*vdpa).dev)) };
        }
        to_result(code).map(|()| 0)
    })
}

unsafe extern "C" fn delete(_management: *mut gen::vdpa_mgmt_dev, vdpa: *mut gen::vdpa_device) {
    // SAFETY: Registered by `add`.
    unsafe { gen::_vdpa_unregister_device(vdpa) };
}

static MANAGEMENT: Table<gen::vdpa_mgmtdev_ops> =
    // SAFETY: All fields are optional functions, for which zero is none.
    Table(gen::vdpa_mgmtdev_ops { dev_add: Some(add), dev_del: Some(delete), ..unsafe { core::mem::zeroed() } });

static KINDS: Table<[gen::virtio_device_id; 2]> = Table([
    gen::virtio_device_id { device: BLOCK, vendor: u32::MAX },
    gen::virtio_device_id { device: 0, vendor: 0 },
]);

/// The management device `vdpa_ram`.
pub(crate) struct Management(KBox<gen::vdpa_mgmt_dev>);

// SAFETY: Only the bus uses it after `register`.
unsafe impl Send for Management {}
// SAFETY: As above.
unsafe impl Sync for Management {}

impl Management {
    pub(crate) fn register() -> Result<Self> {
        // SAFETY: Zero is a value of the structure.
        let empty = unsafe { core::mem::zeroed() };
        let mut management: KBox<gen::vdpa_mgmt_dev> = KBox::new(empty, GFP_KERNEL)?;
        let owner = kernel::module::this_module::<crate::Ram>().as_ptr();
        // SAFETY: A name and the module that owns the device.
        let device = from_err_ptr(unsafe { gen::__root_device_register(c"vdpa_ram".as_char_ptr(), owner) })?;
        management.device = device;
        management.ops = &MANAGEMENT.0;
        management.id_table = KINDS.0.as_ptr().cast_mut();
        management.supported_features = State::offered();
        management.max_supported_vqs = 1;
        // SAFETY: It stays where it is until `drop`.
        let registered = to_result(unsafe { gen::vdpa_mgmtdev_register(&mut *management) });
        if registered.is_err() {
            // SAFETY: Registered above.
            unsafe { gen::root_device_unregister(device) };
        }
        registered.map(|()| Self(management))
    }
}

impl Drop for Management {
    fn drop(&mut self) {
        // SAFETY: Registered by `register`. Removes all devices.
        unsafe {
            gen::vdpa_mgmtdev_unregister(&mut *self.0);
            gen::root_device_unregister(NonNull::new(self.0.device).map_or(core::ptr::null_mut(), NonNull::as_ptr));
        }
    }
}
