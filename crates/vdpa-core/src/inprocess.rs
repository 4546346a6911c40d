//! A device used in its own process without a file: the vhost-vdpa interface as function calls.
//!
//! | vhost-vdpa | here |
//! |---|---|
//! | a device file, `/dev/vhost-vdpa-N` | [`Node`] |
//! | an open file | [`InProcess`] and its [handles for others](InProcess::for_caller); the last one closes it |
//! | the process that makes a request | the [`Caller`] of the handle |
//!
//! Errors are those of a device file. In a test, two callers stand for two processes, and a caller whose address space
//! changes stands for an exec:
//!
//! ```
//! use vdpa_core::Errno;
//! use vdpa_core::inprocess::Node;
//! use vdpa_core::ops::VdpaOps;
//! use vdpa_core::testing::{RamBlk, TestProcess};
//! use vdpa_core::types::{Asid, Perm};
//!
//! # fn main() -> Result<(), Errno> {
//! let node = Node::new(RamBlk::new(8));
//! let process = TestProcess::new();
//! let uaddr = process.map_new(2 * 4096);
//!
//! let device = node.open(process.clone())?;
//! assert_eq!(node.open(TestProcess::new()).err(), Some(Errno::BUSY), "one open file per device");
//! device.set_owner()?;
//! device.dma_map(Asid(0), 0x10_0000, 2 * 4096, uaddr, Perm::RW)?;
//!
//! // A forked child holds the same open file and is not the owner.
//! let child = device.for_caller(process.fork());
//! assert_eq!(child.dma_unmap(Asid(0), 0, 0), Err(Errno::FAULT));
//!
//! // An exec makes the process another one, which takes the device over.
//! let object = process.object_at(uaddr).ok_or(Errno::FAULT)?;
//! process.exec();
//! device.new_owner()?;
//! device.dma_remap(Asid(0), 0x10_0000, 2 * 4096, process.map(&object))?;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::{Device, EventOf};
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features, Status};
use crate::host::Caller;
use crate::ops::VdpaOps;
use crate::parent::Parent;
use crate::types::{Asid, GroupIndex, IotlbMsg, IovaRange, QueueIndex, Result, VringAddr};

/// A device that can be opened, in place of a device file. Clones refer to the same device.
pub struct Node<P: Parent> {
    device: Arc<Mutex<Device<P>>>,
}

impl<P: Parent> Node<P> {
    /// A device that is not open.
    pub fn new(parent: P) -> Self {
        Self { device: Arc::new(Mutex::new(Device::new(parent))) }
    }

    /// Opens it on behalf of `caller`.
    ///
    /// # Errors
    /// `EBUSY` while it is open; an error of the reset.
    pub fn open<C: Caller<P::Host>>(&self, caller: C) -> Result<InProcess<P, C>> {
        lock(&self.device).open()?;
        Ok(InProcess { file: Arc::new(OpenFile { device: Arc::clone(&self.device) }), caller })
    }

    /// Calls `action` with the device itself, for the management side and for operations without a request. Blocks until
    /// other requests have ended, and blocks them meanwhile.
    pub fn with<R>(&self, action: impl FnOnce(&mut Device<P>) -> R) -> R {
        action(&mut lock(&self.device))
    }
}

impl<P: Parent> Clone for Node<P> {
    fn clone(&self) -> Self {
        Self { device: Arc::clone(&self.device) }
    }
}

impl<P: Parent> fmt::Debug for Node<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

/// Locks the device, since its requests never run in parallel. After a panic in a request others can use the device, as
/// after the end of a process.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One open file description.
struct OpenFile<P: Parent> {
    device: Arc<Mutex<Device<P>>>,
}

impl<P: Parent> Drop for OpenFile<P> {
    fn drop(&mut self) {
        lock(&self.device).release();
    }
}

/// An open device as one caller uses it.
pub struct InProcess<P: Parent, C> {
    file: Arc<OpenFile<P>>,
    caller: C,
}

impl<P: Parent, C> fmt::Debug for InProcess<P, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InProcess").finish_non_exhaustive()
    }
}

impl<P: Parent, C: Clone> Clone for InProcess<P, C> {
    /// A duplicate, as by `dup(2)`.
    fn clone(&self) -> Self {
        self.for_caller(self.caller.clone())
    }
}

impl<P: Parent, C> InProcess<P, C> {
    /// The same open file used by another process, as through an inherited or passed descriptor.
    pub fn for_caller<D>(&self, caller: D) -> InProcess<P, D> {
        InProcess { file: Arc::clone(&self.file), caller }
    }

    /// A weak reference, which does not keep the file open.
    pub fn downgrade(&self) -> WeakFile<P> {
        WeakFile(Arc::downgrade(&self.file))
    }

    /// The caller on whose behalf requests are made.
    pub const fn caller(&self) -> &C {
        &self.caller
    }

    /// Makes all further requests of this handle on behalf of `caller`, as after an exec of its process.
    pub fn set_caller(&mut self, caller: C) {
        self.caller = caller;
    }

    /// Access to the device itself and the caller, for requests that [`VdpaOps`] does not have.
    pub fn with<R>(&self, action: impl FnOnce(&mut Device<P>, &C) -> R) -> R {
        action(&mut lock(&self.file.device), &self.caller)
    }
}

/// A weak reference to an open file, for tables of open files.
pub struct WeakFile<P: Parent>(std::sync::Weak<OpenFile<P>>);

impl<P: Parent> WeakFile<P> {
    /// A handle for `caller`; `None` once the file is closed.
    pub fn upgrade<C>(&self, caller: C) -> Option<InProcess<P, C>> {
        self.0.upgrade().map(|file| InProcess { file, caller })
    }
}

impl<P: Parent> fmt::Debug for WeakFile<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakFile").finish_non_exhaustive()
    }
}

impl<P: Parent, C: Caller<P::Host>> VdpaOps for InProcess<P, C> {
    type Event = EventOf<P>;

    fn device_id(&self) -> Result<u32> {
        Ok(self.with(|device, _| device.profile().device_id))
    }

    fn status(&self) -> Result<Status> {
        Ok(self.with(|device, _| device.status()))
    }

    fn set_status(&self, status: Status) -> Result<()> {
        self.with(|device, _| device.set_status(status))
    }

    fn features(&self) -> Result<Features> {
        Ok(self.with(|device, _| device.profile().features))
    }

    fn set_features(&self, features: Features) -> Result<()> {
        self.with(|device, _| device.set_features(features))
    }

    fn backend_features(&self) -> Result<BackendFeatures> {
        Ok(self.with(|device, _| device.backend_features()))
    }

    fn set_backend_features(&self, features: BackendFeatures) -> Result<()> {
        self.with(|device, _| device.set_backend_features(features))
    }

    fn vqs_count(&self) -> Result<u32> {
        Ok(self.with(|device, _| device.profile().queues.into()))
    }

    fn group_num(&self) -> Result<u32> {
        Ok(self.with(|device, _| device.profile().groups))
    }

    fn as_num(&self) -> Result<u32> {
        Ok(self.with(|device, _| device.profile().address_spaces))
    }

    fn iova_range(&self) -> Result<IovaRange> {
        Ok(self.with(|device, _| device.iova_range()))
    }

    fn config_size(&self) -> Result<u32> {
        Ok(self.with(|device, _| device.profile().config_size))
    }

    fn config(&self, offset: u32, out: &mut [u8]) -> Result<()> {
        self.with(|device, _| device.config(offset, out))
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> Result<()> {
        self.with(|device, _| device.set_config(offset, data))
    }

    fn set_config_call(&self, event: Option<&Self::Event>) -> Result<()> {
        self.with(|device, _| device.set_config_call(event.cloned()));
        Ok(())
    }

    fn vring_num(&self) -> Result<u16> {
        Ok(self.with(|device, _| device.profile().queue_size_max))
    }

    fn set_owner(&self) -> Result<()> {
        self.with(|device, caller| device.set_owner(caller))
    }

    fn new_owner(&self) -> Result<()> {
        self.with(|device, caller| device.new_owner(caller))
    }

    fn reset_owner(&self) -> Result<()> {
        self.with(|device, caller| device.reset_owner(caller))
    }

    fn set_vring_num(&self, index: QueueIndex, num: u32) -> Result<()> {
        self.with(|device, caller| device.set_vring_num(caller, index, num))
    }

    fn set_vring_addr(&self, index: QueueIndex, addr: &VringAddr) -> Result<()> {
        self.with(|device, caller| device.set_vring_addr(caller, index, addr))
    }

    fn set_vring_base(&self, index: QueueIndex, num: u32) -> Result<()> {
        self.with(|device, caller| device.set_vring_base(caller, index, num))
    }

    fn vring_base(&self, index: QueueIndex) -> Result<u32> {
        self.with(|device, caller| device.vring_base(caller, index))
    }

    fn set_vring_enable(&self, index: QueueIndex, enable: bool) -> Result<()> {
        self.with(|device, caller| device.set_vring_enable(caller, index, enable))
    }

    fn set_vring_kick(&self, index: QueueIndex, event: Option<&Self::Event>) -> Result<()> {
        self.with(|device, caller| device.set_vring_kick(caller, index, event.cloned()))
    }

    fn set_vring_call(&self, index: QueueIndex, event: Option<&Self::Event>) -> Result<()> {
        self.with(|device, caller| device.set_vring_call(caller, index, event.cloned()))
    }

    fn set_vring_err(&self, index: QueueIndex, event: Option<&Self::Event>) -> Result<()> {
        self.with(|device, caller| device.set_vring_err(caller, index, event.cloned()))
    }

    fn vring_group(&self, index: QueueIndex) -> Result<GroupIndex> {
        self.with(|device, caller| device.vring_group(caller, index))
    }

    fn vring_desc_group(&self, index: QueueIndex) -> Result<GroupIndex> {
        self.with(|device, caller| device.vring_desc_group(caller, index))
    }

    fn set_group_asid(&self, group: GroupIndex, asid: Asid) -> Result<()> {
        self.with(|device, caller| device.set_group_asid(caller, group, asid))
    }

    fn vring_size(&self, index: QueueIndex) -> Result<u32> {
        self.with(|device, caller| device.vring_size(caller, index))
    }

    fn suspend(&self) -> Result<()> {
        self.with(|device, _| device.suspend())
    }

    fn resume(&self) -> Result<()> {
        self.with(|device, _| device.resume())
    }

    fn state_save(&self) -> Result<Vec<u8>> {
        self.with(|device, caller| device.state_save(caller).map_err(|error| error.errno()))
    }

    fn state_load(&self, state: &[u8]) -> Result<()> {
        self.with(|device, caller| device.state_load(caller, state).map_err(|error| error.errno()))
    }

    /// As on a file: a message can name an address space other than 0 only once IOTLB_ASID is acknowledged.
    fn iotlb(&self, asid: Asid, msg: &IotlbMsg) -> Result<()> {
        self.with(|device, caller| {
            if asid.0 != 0 && !device.acked_backend_features().has(BackendFeatures::IOTLB_ASID) {
                return Err(Errno::INVAL);
            }
            device.iotlb(caller, asid, msg).map_err(|error| error.errno())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RamBlk, TestProcess};

    #[test]
    fn the_last_handle_closes_the_device() {
        let node = Node::new(RamBlk::new(1));
        let device = node.open(TestProcess::new()).unwrap();
        let inherited = device.for_caller(TestProcess::new());
        device.set_owner().unwrap();
        drop(device);
        assert_eq!(inherited.set_owner(), Err(Errno::BUSY), "the owner is recorded while the file is open");
        assert_eq!(node.open(TestProcess::new()).err(), Some(Errno::BUSY));
        drop(inherited);
        node.open(TestProcess::new()).unwrap().set_owner().unwrap();
    }

    #[test]
    fn a_panic_in_a_request_leaves_the_device_usable() {
        let node = Node::new(RamBlk::new(1));
        let device = node.open(TestProcess::new()).unwrap();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            device.with(|_, _| panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        assert_eq!(device.status(), Ok(Status::RESET));
    }
}
