//! Processes with few pages, so that ranges often overlap or adjoin.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::host::{AddressSpace, Caller, Event, Fragment, Host, MemoryObject, PAGE_SIZE, PinAccount};
use vdpa_core::types::{Perm, Result};

/// Address of the first mapping of every process.
pub const BASE: u64 = 0x10_0000;

#[derive(Clone, Debug)]
pub struct FuzzHost;

impl Host for FuzzHost {
    type AddressSpace = Space;
    type Memory = FuzzMemory;
    type Event = FuzzEvent;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuzzEvent;

impl Event for FuzzEvent {
    fn signal(&self) {}
}

/// A VMA of a process, or with `hole` a gap between two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, arbitrary::Arbitrary)]
pub struct Vma {
    pages: u8,
    hole: bool,
    object: u8,
    offset: u8,
    shared: bool,
    writable: bool,
}

/// A range of a memory object. It has no content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FuzzMemory {
    object: u8,
    offset: u64,
    size: u64,
    shared: bool,
    space: u32,
}

impl MemoryObject for FuzzMemory {
    fn is_shared(&self) -> bool {
        self.shared
    }

    fn pin_pages(&self) -> u64 {
        if self.shared { self.size.div_ceil(PAGE_SIZE) } else { 0 }
    }

    fn same_object(&self, offset: u64, other: &Self, other_offset: u64) -> bool {
        let same_offset = self.offset + offset == other.offset + other_offset;
        let same_space = self.shared || self.space == other.space;
        self.object == other.object && self.shared == other.shared && same_space && same_offset
    }
}

#[derive(Clone, Debug)]
pub struct Space {
    pub id: u32,
    vmas: Arc<[Vma]>,
    pub account: Arc<PinAccount>,
}

impl AddressSpace for Space {
    type Memory = FuzzMemory;

    fn resolve(&self, uaddr: u64, size: u64, perm: Perm) -> Result<Vec<Fragment<FuzzMemory>>> {
        let end = uaddr.checked_add(size).ok_or(Errno::FAULT)?;
        let mut fragments = Vec::new();
        let mut at = uaddr;
        let mut start = BASE;
        for vma in self.vmas.iter() {
            let stop = start + u64::from(vma.pages) * PAGE_SIZE;
            if start <= at && at < stop && at < end {
                if vma.hole || perm.write() && !vma.writable {
                    return Err(Errno::FAULT);
                }
                let size = stop.min(end) - at;
                let offset = u64::from(vma.offset) * PAGE_SIZE + at - start;
                let memory =
                    FuzzMemory { object: vma.object % 4, offset, size, shared: vma.shared, space: self.id };
                fragments.push(Fragment { size, memory });
                at += size;
            }
            start = stop;
        }
        if at == end { Ok(fragments) } else { Err(Errno::FAULT) }
    }

    fn account(&self) -> &PinAccount {
        &self.account
    }
}

/// A process. After an exec, and in a forked child, the address space and its account are new ones.
#[derive(Clone, Debug)]
pub struct Process {
    pub space: Space,
    pub limit: u64,
    /// The process cannot be examined.
    pub hidden: bool,
}

impl Process {
    pub fn new(id: u32, vmas: &[Vma]) -> Self {
        Self { space: Space { id, vmas: vmas.into(), account: Arc::default() }, limit: 64, hidden: false }
    }

    /// A child that has the same memory at the same addresses, in an address space of its own.
    pub fn fork(&self, id: u32) -> Self {
        let space = Space { id, vmas: Arc::clone(&self.space.vmas), account: Arc::default() };
        Self { space, limit: self.limit, hidden: false }
    }
}

impl Caller<FuzzHost> for Process {
    fn is(&self, owner: &Space) -> bool {
        self.space.id == owner.id
    }

    fn address_space(&self) -> Result<Space> {
        if self.hidden { Err(Errno::PERM) } else { Ok(self.space.clone()) }
    }

    fn memlock_pages(&self) -> u64 {
        self.limit
    }
}
