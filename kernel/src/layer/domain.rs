// SPDX-License-Identifier: GPL-2.0-only

//! The platform's IOMMU, for parents that do no DMA translation themselves.

use super::gen;
use super::memory::PinnedRun;
use super::parent::Parent;
use core::ptr::NonNull;
use kernel::error::{code::ENOTSUPP, from_err_ptr, to_result, Result};

const READ: i32 = 1;
const WRITE: i32 = 2;
const CACHE: i32 = 4;

/// A domain that the parent's device is attached to.
pub(crate) struct Domain {
    raw: NonNull<gen::iommu_domain>,
    device: NonNull<gen::device>,
}

impl Domain {
    /// Allocates a domain and attaches the parent's device.
    pub(crate) fn attach(parent: Parent<'_>) -> Result<Self> {
        let device = parent.dma_device().ok_or(ENOTSUPP)?;
        // SAFETY: The device does DMA for a registered vDPA device, which holds it.
        if !unsafe { gen::vvl_dma_coherent(device.as_ptr()) } {
            return Err(ENOTSUPP);
        }
        // SAFETY: As above.
        let raw = from_err_ptr(unsafe { gen::vvl_domain_alloc(device.as_ptr()) })?;
        let raw = NonNull::new(raw).ok_or(ENOTSUPP)?;
        // SAFETY: Both exist; the domain was made for the device and is attached to nothing.
        if let Err(error) = to_result(unsafe { gen::iommu_attach_device(raw.as_ptr(), device.as_ptr()) }) {
            // SAFETY: Not attached, and nobody else knows it.
            unsafe { gen::iommu_domain_free(raw.as_ptr()) };
            return Err(error);
        }
        Ok(Self { raw, device })
    }

    /// First and last address that can be mapped.
    pub(crate) fn aperture(&self) -> (u64, u64) {
        // SAFETY: The domain exists as long as `self`.
        unsafe { (gen::vvl_aperture(self.raw.as_ptr(), false), gen::vvl_aperture(self.raw.as_ptr(), true)) }
    }

    /// Maps pages that stay pinned until [`unmap`](Self::unmap), because their table keeps them.
    pub(crate) fn map(&self, iova: u64, run: &PinnedRun, perm: u32) -> Result {
        let access = match perm {
            1 => READ,
            2 => WRITE,
            3 => READ | WRITE,
            // As in Linux: a mapping without access.
            _ => 0,
        };
        let size = usize::try_from(run.bytes())?;
        // SAFETY: The domain exists; the pages are pinned.
        to_result(unsafe { gen::vvl_iommu_map(self.raw.as_ptr(), iova, run.address(), size, access | CACHE) })
    }

    /// Unmaps what [`map`](Self::map) has mapped.
    pub(crate) fn unmap(&self, iova: u64, size: u64) {
        // SAFETY: The domain exists; unmapping what is not mapped does nothing.
        unsafe { gen::iommu_unmap(self.raw.as_ptr(), iova as usize, size as usize) };
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: Attached by `attach`, and detached only here.
        unsafe { gen::iommu_detach_device(self.raw.as_ptr(), self.device.as_ptr()) };
        // SAFETY: Detached; nobody else knows it.
        unsafe { gen::iommu_domain_free(self.raw.as_ptr()) };
    }
}
