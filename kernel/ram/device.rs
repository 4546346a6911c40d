// SPDX-License-Identifier: GPL-2.0-only

//! The device: what clients set, and when requests are served.

use super::disk::{Disk, CONFIG, FEATURES};
use super::layer::{Callback, OwnerMemory, Owner};
use super::ring::{Ring, MAX};
use crate::rules::backend;
use kernel::alloc::KVVec;
use kernel::prelude::*;

/// VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM.
const OFFERED: u64 = FEATURES | 1 << 32 | 1 << 33;
const ACCESS_PLATFORM: u64 = 1 << 33;
/// VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK.
const ENABLE_AFTER_DRIVER_OK: u64 = 1 << 6;
const DRIVER_OK: u8 = 4;
/// Requests in a row before other work of the kernel may run.
const BUDGET: u32 = 64;

/// A mapping: the device's copy.
#[derive(Clone, Copy)]
pub(crate) struct Mapped {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) address: u64,
    pub(crate) perm: u32,
}

/// All of a device but its disk's size.
pub(crate) struct State {
    disk: Disk,
    pub(crate) ring: Ring,
    pub(crate) call: Callback,
    map: KVVec<Mapped>,
    pub(crate) owner: Option<Owner>,
    pub(crate) status: u8,
    pub(crate) features: u64,
    suspended: bool,
    pub(crate) generation: u32,
}

impl State {
    pub(crate) fn new(mib: usize) -> Result<Self> {
        Ok(Self {
            disk: Disk::new(mib)?,
            ring: Ring::new(),
            call: Callback::none(),
            map: KVVec::new(),
            owner: None,
            status: 0,
            features: 0,
            suspended: false,
            generation: 0,
        })
    }

    pub(crate) const fn offered() -> u64 {
        OFFERED
    }

    /// The parent's own word: both live-update bits, since requests use addresses of the owner.
    pub(crate) const fn backend_word() -> u64 {
        ENABLE_AFTER_DRIVER_OK | backend::NEW_OWNER | backend::IOTLB_REMAP
    }

    pub(crate) const fn queue_limit() -> u16 {
        MAX
    }

    pub(crate) const fn config_size() -> usize {
        CONFIG
    }

    pub(crate) fn read_config(&self, offset: usize, buffer: &mut [u8]) {
        for (index, byte) in buffer.iter_mut().enumerate() {
            *byte = self.disk.config_byte(offset.saturating_add(index));
        }
    }

    pub(crate) fn set_features(&mut self, features: u64) -> Result {
        if features & ACCESS_PLATFORM == 0 {
            return Err(EINVAL);
        }
        self.features = features & OFFERED;
        Ok(())
    }

    pub(crate) fn set_ready(&mut self, ready: bool) {
        if ready && !self.ring.ready {
            self.ring.start();
        }
        self.ring.ready = ready;
    }

    /// A reset; `clean`: with the translation.
    pub(crate) fn reset(&mut self, clean: bool) {
        self.status = 0;
        self.features = 0;
        self.suspended = false;
        self.ring.reset();
        self.call = Callback::none();
        self.generation = self.generation.wrapping_add(1);
        if clean {
            self.map.clear();
        }
    }

    /// Nothing is in flight: requests are served with this state locked.
    pub(crate) fn suspend(&mut self) {
        self.suspended = true;
    }

    pub(crate) fn resume(&mut self) {
        self.suspended = false;
    }

    /// Replaces the translation.
    pub(crate) fn set_map(&mut self, map: KVVec<Mapped>) {
        self.map = map;
    }

    /// Serves requests. Returns whether there may be more.
    pub(crate) fn serve(&mut self) -> bool {
        let runs = self.status & DRIVER_OK != 0 && !self.suspended && self.ring.ready;
        let Some(owner) = self.owner.as_ref().filter(|_| runs) else { return false };
        // The process of the owner may be gone.
        let Some(memory) = OwnerMemory::adopt(owner, &self.map) else { return false };
        let mut count = 0;
        let more = loop {
            if count >= BUDGET {
                break true;
            }
            // What the driver has done wrong stops the queue until the next kick.
            let Ok(Some(chain)) = self.ring.pop(&memory) else { break false };
            let done = self.disk.serve(&chain, &memory).and_then(|written| self.ring.push(&memory, &chain, written));
            if done.is_err() {
                break false;
            }
            count = count.wrapping_add(1);
        };
        if count > 0 && self.ring.wants_interrupt(&memory) {
            self.call.interrupt();
        }
        more
    }
}

/// The mapping of an address, in a map in ascending order.
pub(crate) fn lookup(map: &[Mapped], iova: u64) -> Option<&Mapped> {
    let index = map.partition_point(|mapped| mapped.last < iova);
    map.get(index).filter(|mapped| mapped.first <= iova)
}
