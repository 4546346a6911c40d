//! Client memory: `SET_MEM_TABLE`, and what the log says of memory that is private.

use std::sync::atomic::Ordering;

use vdpa_core::Errno;
use vdpa_core::device::{Device, MemRegion, MemTableError, VhostLogError};
use vdpa_core::parent::PrivateMemory;
use vdpa_core::types::{Asid, IotlbMsg, IovaRange, Perm, Result, iotlb_type};
use vdpa_sys::process::{Caller, ProcessCaller};
use vdpa_sys::uapi::vhost as uapi;
use zerocopy::IntoBytes;

use super::{AnyParent, VhostVdpaFile, wire};
use crate::front::fuse::{IoctlCall, IoctlReply};

impl VhostVdpaFile {
    /// `VHOST_SET_MEM_TABLE`, which has an effect only where the device says so.
    pub(super) fn set_mem_table(
        &self,
        device: &mut Device<AnyParent>,
        call: &IoctlCall<'_>,
        caller: &ProcessCaller<'_>,
    ) -> Result<IoctlReply> {
        let regions = regions(call, caller.caller)?;
        if !device.profile().mem_table {
            return Ok(IoctlReply::default());
        }
        let result = device.set_mem_table(caller, &regions);
        tracing::trace!(device = %self.name, tid = call.tid, ?regions, ?result, "memory table");
        if let Err(error) = &result
            && let Some(suppressed) = self.refusals.allow()
        {
            tracing::warn!(device = %self.name, tid = call.tid, suppressed, "memory table refused: {error}");
        }
        result.map_err(MemTableError::errno)?;
        for MemRegion { iova, size, uaddr } in regions {
            let msg = IotlbMsg { iova, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
            self.warn_private_memory(device, call.tid, Asid(0), &msg);
        }
        Ok(IoctlReply::default())
    }

    /// `VHOST_SET_LOG_BASE`.
    pub(super) fn set_log_base(
        &self,
        device: &mut Device<AnyParent>,
        call: &IoctlCall<'_>,
        caller: &ProcessCaller<'_>,
    ) -> Result<IoctlReply> {
        let base: u64 = wire::argument(call.input)?;
        let result = device.set_log_base(caller, base);
        if let Err(error) = &result
            && let Some(suppressed) = self.refusals.allow()
        {
            tracing::warn!(device = %self.name, tid = call.tid, suppressed, "log of dirty pages refused: {error}");
        }
        result.map(|()| IoctlReply::default()).map_err(VhostLogError::errno)
    }

    /// Warns in the log, once per owner, of a large mapping of memory that only the client's address space has.
    pub(super) fn warn_private_memory(
        &self,
        device: &Device<AnyParent>,
        tid: u32,
        asid: Asid,
        msg: &IotlbMsg,
    ) {
        /// Bytes of a mapping that is worth a warning. Firmware and frame buffers are smaller, and private in every hypervisor.
        const MUCH: u64 = 32 << 20;
        let Some(range) = IovaRange::from_size(msg.iova, msg.size) else { return };
        if msg.size < MUCH || self.private_memory_logged.load(Ordering::Relaxed) {
            return;
        }
        let bytes = device.private_bytes(asid, range);
        if bytes < MUCH {
            return;
        }
        self.private_memory_logged.store(true, Ordering::Relaxed);
        let fate = match device.profile().private_memory {
            PrivateMemory::Copy => {
                "it is reached by copying, which is slower, and not at all after an exec of the client"
            }
            PrivateMemory::Skip | PrivateMemory::Refuse => {
                "this device cannot reach it, and requests in it fail"
            }
        };
        tracing::warn!(
            device = %self.name, tid, %range, bytes,
            "client memory is private: {fate}. Give the client shared memory (QEMU: -object \
             memory-backend-memfd,id=ram,share=on,size=... -machine memory-backend=ram)"
        );
    }
}

/// The regions of `SET_MEM_TABLE` (uapi-spec 1.6a), checked as the kernel checks them. They are behind the header, which alone is the
/// argument as far as the number of the request says.
fn regions(call: &IoctlCall<'_>, caller: &Caller) -> Result<Vec<MemRegion>> {
    /// The module parameter `max_mem_regions` of vhost.
    const REGIONS_MAX: u32 = 64;
    let header: uapi::MemoryHeader = wire::argument(call.input)?;
    if header.padding != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    if header.nregions > REGIONS_MAX {
        return Err(Errno::TOOBIG);
    }
    let mut at = call.arg.checked_add(8).ok_or(Errno::FAULT)?;
    let mut regions = Vec::new();
    for _ in 0..header.nregions {
        let mut region = uapi::MemoryRegion::default();
        caller.read_mem(at, region.as_mut_bytes())?;
        let uapi::MemoryRegion { guest_phys_addr: iova, memory_size: size, userspace_addr: uaddr, .. } =
            region;
        IovaRange::from_size(iova, size).ok_or(Errno::FAULT)?;
        regions.push(MemRegion { iova, size, uaddr });
        at = at.checked_add(size_of::<uapi::MemoryRegion>() as u64).ok_or(Errno::FAULT)?;
    }
    Ok(regions)
}
