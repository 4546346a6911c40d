// SPDX-License-Identifier: GPL-2.0-only

//! Device files: one per vDPA device, from the time the driver is bound to it; and the driver.

use super::eventfd::ConfigCall;
use super::gen;
use super::parent::{Doorbell, Parent};
use super::vhost::Vhost;
use crate::logic::{self, Message, State};
use core::cell::UnsafeCell;
use core::mem::{offset_of, MaybeUninit};
use core::ptr::{addr_of_mut, NonNull};
use kernel::alloc::KVVec;
use kernel::error::{code::*, from_result, to_result, Result};
use kernel::prelude::*;
use kernel::sync::atomic::{ordering, Atomic};

/// Number of device files there can be.
const MINORS: u32 = 1 << 20;

/// All of one device.
#[repr(C)]
pub(crate) struct Node {
    vhost: UnsafeCell<gen::vhost_dev>,
    device: UnsafeCell<gen::device>,
    cdev: UnsafeCell<gen::cdev>,
    /// Completed at every close, for a removal that waits.
    closed: UnsafeCell<gen::completion>,
    opened: Atomic<i32>,
    vdpa: NonNull<gen::vdpa_device>,
    queues: KVVec<MaybeUninit<gen::vhost_virtqueue>>,
    /// Pointers to `queues`, as vhost wants them.
    list: KVec<*mut gen::vhost_virtqueue>,
    minor: i32,
    config_call: ConfigCall,
    /// Protected by the mutex of `vhost`.
    state: UnsafeCell<State>,
}

impl Node {
    /// The parent. The driver is bound as long as a node can be reached.
    pub(crate) fn parent(&self) -> Parent<'_> {
        // SAFETY: A removal waits for the last close before the driver counts as unbound.
        unsafe { Parent::from_raw(self.vdpa) }
    }

    /// For what vhost does under locks of its own.
    pub(crate) fn vhost(&self) -> Vhost<'_> {
        let queues = NonNull::from(self.queues.as_slice()).cast();
        // SAFETY: The queues live as long as the node. Both are initialised by `open`, which precedes every other request.
        unsafe { Vhost::from_raw(NonNull::new_unchecked(self.vhost.get()), queues) }
    }

    /// Takes the mutex of the device.
    pub(crate) fn lock(&self) -> Locked<'_> {
        // SAFETY: Initialised by `open`, which precedes every other request; no caller holds it.
        unsafe { gen::mutex_lock(addr_of_mut!((*self.vhost.get()).mutex)) };
        Locked { node: self }
    }

    /// The node of an open file.
    ///
    /// # Safety
    /// `file` was opened by [`open`] and is not released.
    unsafe fn of<'a>(file: *mut gen::file) -> &'a Self {
        // SAFETY: `open` has stored it; the file keeps it.
        unsafe { &*(*file).private_data.cast::<Self>() }
    }
}

/// An open device, whose mutex is held.
pub(crate) struct Locked<'a> {
    node: &'a Node,
}

impl<'a> Locked<'a> {
    pub(crate) fn state(&mut self) -> &mut State {
        // SAFETY: The mutex is held, and `self` is borrowed for as long as the state is.
        unsafe { &mut *self.node.state.get() }
    }

    pub(crate) fn parent(&self) -> Parent<'a> {
        self.node.parent()
    }

    pub(crate) fn vhost(&self) -> Vhost<'a> {
        self.node.vhost()
    }

    pub(crate) fn config_call(&self) -> &'a ConfigCall {
        &self.node.config_call
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // SAFETY: Taken by `Node::lock`, on this thread.
        unsafe { gen::mutex_unlock(addr_of_mut!((*self.node.vhost.get()).mutex)) };
    }
}

// ---- the device file

/// A table of C that is never changed.
#[repr(transparent)]
struct Table<T>(T);
// SAFETY: Never changed.
unsafe impl<T> Sync for Table<T> {}

static FILE_OPERATIONS: Table<gen::file_operations> = Table(gen::file_operations {
    owner: module(),
    open: Some(open),
    release: Some(release),
    unlocked_ioctl: Some(ioctl),
    compat_ioctl: gen::compat_ptr_ioctl,
    write_iter: Some(write_iter),
    mmap: Some(mmap),
    // SAFETY: All fields are numbers, pointers or optional functions, for which zero is a value.
    ..unsafe { core::mem::zeroed() }
});

static DOORBELL_OPERATIONS: Table<gen::vm_operations_struct> = Table(gen::vm_operations_struct {
    fault: Some(fault),
    // SAFETY: All fields are numbers, pointers or optional functions, for which zero is a value.
    ..unsafe { core::mem::zeroed() }
});

const fn module() -> *mut gen::module {
    kernel::module::this_module::<crate::Live>().as_ptr()
}

unsafe extern "C" fn open(inode: *mut gen::inode, file: *mut gen::file) -> i32 {
    // SAFETY: Called for an inode whose character device is one of ours, which a reference keeps while a file is open.
    let node = unsafe { &*kernel::container_of!(gen::vvl_cdev(inode).cast::<UnsafeCell<gen::cdev>>(), Node, cdev) };
    if node.opened.cmpxchg(0, 1, ordering::Full).is_err() {
        return EBUSY.to_errno();
    }
    from_result(|| {
        node.prepare();
        let mut locked = node.lock();
        let opened = logic::open(&mut locked);
        drop(locked);
        if opened.is_err() {
            node.opened.store(0, ordering::Release);
        }
        opened?;
        // SAFETY: The file is being opened, by this function alone.
        unsafe { (*file).private_data = core::ptr::from_ref(node).cast_mut().cast() };
        Ok(0)
    })
}

impl Node {
    /// Initialises what vhost keeps per open file. The caller has made sure that the device is not open.
    fn prepare(&self) {
        for queue in &self.list {
            // SAFETY: The queues exist, and nobody uses them while the device is not open.
            unsafe {
                (**queue).handle_kick = Some(kicked);
                (**queue).call_ctx.ctx = core::ptr::null_mut();
            }
        }
        // SAFETY: As above; the list lives as long as the node. Without workers, as vhost-vdpa has none.
        unsafe {
            let list = self.list.as_ptr().cast_mut();
            gen::vhost_dev_init(self.vhost.get(), list, self.list.len() as i32, 0, 0, 0, false, Some(message));
        }
    }
}

unsafe extern "C" fn release(_inode: *mut gen::inode, file: *mut gen::file) -> i32 {
    // SAFETY: Opened by `open`, and released once.
    let node = unsafe { Node::of(file) };
    let mut locked = node.lock();
    // SAFETY: The last user of the file.
    unsafe { (*file).private_data = core::ptr::null_mut() };
    logic::close(&mut locked);
    drop(locked);
    node.opened.store(0, ordering::Release);
    // SAFETY: Initialised by `probe`. The file still keeps the node.
    unsafe { gen::complete(node.closed.get()) };
    0
}

unsafe extern "C" fn ioctl(file: *mut gen::file, request: u32, argument: kernel::ffi::c_ulong) -> kernel::ffi::c_long {
    // SAFETY: Called for an open file.
    let node = unsafe { Node::of(file) };
    logic::ioctl(node, request, argument).map_or_else(|error| error.to_errno() as kernel::ffi::c_long, |()| 0)
}

unsafe extern "C" fn write_iter(request: *mut gen::kiocb, from: *mut gen::iov_iter) -> isize {
    // SAFETY: Called for an open file.
    let node = unsafe { Node::of((*request).ki_filp) };
    // SAFETY: Initialised; vhost decodes the message and calls `message`.
    unsafe { gen::vhost_chr_write_iter(node.vhost.get(), from) as isize }
}

/// An IOTLB message, decoded by vhost.
unsafe extern "C" fn message(dev: *mut gen::vhost_dev, asid: u32, message: *mut gen::vhost_iotlb_msg) -> i32 {
    // SAFETY: vhost passes the device of an open file, which is a field of its node.
    let node = unsafe { &*kernel::container_of!(dev.cast::<UnsafeCell<gen::vhost_dev>>(), Node, vhost) };
    // SAFETY: vhost passes a message in its own memory.
    let raw = unsafe { &*message };
    let message = Message { iova: raw.iova, size: raw.size, uaddr: raw.uaddr, perm: raw.perm, kind: raw.type_ };
    from_result(|| logic::message(&mut node.lock(), asid, &message).map(|()| 0))
}

/// The kick of a queue, in the context of whoever writes its eventfd.
unsafe extern "C" fn kicked(work: *mut gen::vhost_work) {
    // SAFETY: vhost passes the work of a queue's poll entry.
    let queue = unsafe { work.byte_sub(offset_of!(gen::vhost_virtqueue, poll.work)).cast::<gen::vhost_virtqueue>() };
    // SAFETY: A queue of an open device, which is a field of its node.
    let node = unsafe { &*kernel::container_of!((*queue).dev.cast::<UnsafeCell<gen::vhost_dev>>(), Node, vhost) };
    let bytes = (queue as usize).wrapping_sub(node.queues.as_ptr() as usize);
    let index = bytes / core::mem::size_of::<gen::vhost_virtqueue>();
    if let Some(queue) = node.parent().queue(index as u64) {
        node.parent().kick(queue);
    }
}

// ---- doorbells

unsafe extern "C" fn mmap(file: *mut gen::file, vma: *mut gen::vm_area_struct) -> i32 {
    // SAFETY: Called for an open file.
    let node = unsafe { Node::of(file) };
    // SAFETY: An area that is being made, which nobody else uses.
    let (start, end, flags, page) = unsafe {
        let range = (*vma).__bindgen_anon_1.__bindgen_anon_1;
        (range.vm_start, range.vm_end, gen::vvl_vma_flags(vma), (*vma).vm_pgoff)
    };
    let shared = flags & gen::VM_SHARED as u64 != 0;
    let readable = flags & gen::VM_READ as u64 != 0;
    from_result(|| {
        logic::check_doorbell(node.parent(), end.wrapping_sub(start) as u64, shared, readable, page as u64)?;
        // SAFETY: As above; the table is static.
        unsafe { gen::vvl_map_doorbell(vma, &DOORBELL_OPERATIONS.0) };
        Ok(0)
    })
}

unsafe extern "C" fn fault(fault: *mut gen::vm_fault) -> gen::vm_fault_t {
    // SAFETY: A fault in an area that `mmap` has made, whose file is open therefore.
    let (vma, address) = unsafe { ((*fault).__bindgen_anon_1.vma, (*fault).__bindgen_anon_1.address) };
    // SAFETY: As above.
    let (node, page) = unsafe { (Node::of((*vma).vm_file), (*vma).vm_pgoff) };
    match logic::doorbell(node.parent(), page as u64) {
        // SAFETY: The area is one of page frames; the doorbell is a page of the device.
        Ok(Doorbell { address: doorbell, .. }) => unsafe { gen::vmf_insert_pfn(vma, address & !4095, (doorbell >> 12) as usize) },
        Err(_) => gen::vm_fault_reason_VM_FAULT_SIGBUS,
    }
}

// ---- the driver

impl Node {
    /// A node whose parts of C are still zero.
    fn new(vdpa: NonNull<gen::vdpa_device>, count: usize) -> Result<KBox<Self>> {
        // In place: a queue of vhost is larger than a stack of the kernel.
        let mut queues = KVVec::<MaybeUninit<gen::vhost_virtqueue>>::zeroed(count, GFP_KERNEL)?;
        let mut list = KVec::with_capacity(count, GFP_KERNEL)?;
        for queue in &mut queues {
            list.push(queue.as_mut_ptr(), GFP_KERNEL)?;
        }
        // Zeroed in place: the structures of C are too large to build on a stack of the kernel.
        let node = KBox::into_raw(KBox::<Self>::new_uninit(GFP_KERNEL | __GFP_ZERO)?).cast::<Self>();
        // SAFETY: Takes nothing.
        let minor = unsafe { gen::vvl_minor_alloc(MINORS) };
        // SAFETY: Allocated above. Zero is a value of what is not written: structures of C, which are initialised before they are
        // used, and no eventfd.
        let node = unsafe {
            addr_of_mut!((*node).opened).write(Atomic::new(0));
            addr_of_mut!((*node).vdpa).write(vdpa);
            addr_of_mut!((*node).queues).write(queues);
            addr_of_mut!((*node).list).write(list);
            addr_of_mut!((*node).minor).write(minor);
            addr_of_mut!((*node).state).write(UnsafeCell::new(State::new()));
            KBox::from_raw(node)
        };
        to_result(minor.min(0))?;
        Ok(node)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.minor >= 0 {
            // SAFETY: The minor of this node.
            unsafe { gen::vvl_minor_free(self.minor) };
        }
    }
}

unsafe extern "C" fn release_device(device: *mut gen::device) {
    // SAFETY: The device of a node that `probe` has made, whose last reference is gone.
    unsafe {
        let node = kernel::container_of!(device.cast::<UnsafeCell<gen::device>>(), Node, device);
        drop(KBox::from_raw(node));
    }
}

unsafe extern "C" fn probe(vdpa: *mut gen::vdpa_device) -> i32 {
    from_result(|| {
        let vdpa = NonNull::new(vdpa).ok_or(ENODEV)?;
        // SAFETY: The bus binds the driver to a registered device.
        let parent = unsafe { Parent::from_raw(vdpa) };
        logic::check_parent(parent)?;
        let node = KBox::into_raw(Node::new(vdpa, parent.queues() as usize)?);
        // SAFETY: Made above; nobody else knows it. From `device_initialize` on, the device's references keep it.
        unsafe {
            (*node).config_call.init();
            gen::init_completion((*node).closed.get());
            let device = (*node).device.get();
            gen::device_initialize(device);
            (*device).release = Some(release_device);
            (*device).parent = addr_of_mut!((*vdpa.as_ptr()).dev);
            (*device).devt = crate::first_number() | (*node).minor as u32;
            let cdev = (*node).cdev.get();
            gen::cdev_init(cdev, &FILE_OPERATIONS.0);
            (*cdev).owner = module();
            gen::dev_set_drvdata(addr_of_mut!((*vdpa.as_ptr()).dev), node.cast());
            let mut code = gen::dev_set_name(device, c"vhost-vdpa-%u".as_char_ptr(), (*node).minor);
            if code == 0 {
                code = gen::cdev_device_add(cdev, device);
            }
            if code != 0 {
                gen::dev_set_drvdata(addr_of_mut!((*vdpa.as_ptr()).dev), core::ptr::null_mut());
                gen::put_device(device);
            }
            to_result(code)?;
        }
        Ok(0)
    })
}

unsafe extern "C" fn remove(vdpa: *mut gen::vdpa_device) {
    // SAFETY: Bound by `probe`, which has stored the node.
    unsafe {
        let node = &*gen::dev_get_drvdata(addr_of_mut!((*vdpa).dev)).cast::<Node>();
        gen::cdev_device_del(node.cdev.get(), node.device.get());
        // Nobody can open it any more; whoever has it open keeps it until the close.
        while node.opened.cmpxchg(0, 1, ordering::Full).is_err() {
            gen::wait_for_completion(node.closed.get());
        }
        gen::put_device(node.device.get());
    }
}

/// The driver, of which there is one. It has the name of the one that it replaces, so that the bus refuses to have both.
pub(crate) struct Driver(KBox<UnsafeCell<gen::vdpa_driver>>);

// SAFETY: Only the bus uses it after `register`.
unsafe impl Send for Driver {}
// SAFETY: As above.
unsafe impl Sync for Driver {}

impl Driver {
    /// Registers the driver, which is bound to all vDPA devices without another driver.
    pub(crate) fn register() -> Result<Self> {
        // SAFETY: Zero is a value of the table: no name, no operation.
        let mut driver: gen::vdpa_driver = unsafe { core::mem::zeroed() };
        driver.driver.name = c"vhost_vdpa".as_char_ptr();
        driver.probe = Some(probe);
        driver.remove = Some(remove);
        let driver = KBox::new(UnsafeCell::new(driver), GFP_KERNEL)?;
        // SAFETY: It stays where it is until `drop`.
        to_result(unsafe { gen::__vdpa_register_driver(driver.get(), module()) })?;
        Ok(Self(driver))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // SAFETY: Registered by `register`. Waits until it is unbound from all devices.
        unsafe { gen::vdpa_unregister_driver(self.0.get()) };
    }
}

/// The numbers of device files.
pub(crate) struct Numbers(u32);

impl Numbers {
    /// Reserves them.
    pub(crate) fn reserve() -> Result<Self> {
        let mut first = 0;
        // SAFETY: Stores one number.
        to_result(unsafe { gen::alloc_chrdev_region(&mut first, 0, MINORS, c"vhost-vdpa".as_char_ptr()) })?;
        Ok(Self(first))
    }

    /// The first.
    pub(crate) fn first(&self) -> u32 {
        self.0
    }
}

impl Drop for Numbers {
    fn drop(&mut self) {
        // SAFETY: Reserved by `reserve`.
        unsafe { gen::unregister_chrdev_region(self.0, MINORS) };
    }
}
