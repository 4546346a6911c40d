//! Memory of this process that devices may write: which addresses a request to a device may name.
//!
//! An UPDATE or REMAP names memory by its address, and from then on the device writes there. If any address would do, safe code
//! could have the bytes behind a `&[u8]` overwritten. So every [`SharedMap`] is listed here while it exists, and
//! [`VhostVdpaFd`](crate::vhost_vdpa::VhostVdpaFd) refuses a message for memory that is not listed with `EFAULT`, as the device
//! does for memory that does not exist. It keeps what it maps until the mapping is removed or the device closed.
//!
//! What no check here can prevent is what Rust's own library cannot prevent either: a program that writes the bytes of a message
//! to the device file by other means, as it could write to `/proc/self/mem`.

use std::collections::BTreeMap;
use std::sync::Weak;

use parking_lot::Mutex;
use vdpa_core::types::{IotlbMsg, iotlb_type};

use crate::mmap::{Mapped, SharedMap};

/// End of the addresses that memory of a program can have: 47 bits on x86-64, at most 52 elsewhere. Beyond, the kernel maps
/// nothing unless it is asked for such an address.
const END: u64 = if cfg!(target_arch = "x86_64") { (1 << 47) - 4096 } else { 1 << 52 };
/// Nothing can be mapped below (`vm.mmap_min_addr`).
const BEGIN: u64 = 1 << 16;

/// Mappings by address and number. Two values over the same memory have the same address.
static MAPPINGS: Mutex<BTreeMap<(usize, u64), Weak<Mapped>>> = Mutex::new(BTreeMap::new());

pub(crate) fn list(addr: usize, number: u64, mapping: Weak<Mapped>) {
    MAPPINGS.lock().insert((addr, number), mapping);
}

pub(crate) fn remove(addr: usize, number: u64) {
    MAPPINGS.lock().remove(&(addr, number));
}

/// The mapping that has the byte at `addr`.
fn at(addr: usize) -> Option<SharedMap> {
    let mappings = MAPPINGS.lock();
    let candidates = mappings.range(..=(addr, u64::MAX)).rev();
    let mut maps = candidates.filter_map(|(_, mapping)| mapping.upgrade().map(SharedMap::from_mapped));
    maps.find(|map| addr - map.addr() < map.len())
}

/// What a device may be told of memory of this process.
#[derive(Debug)]
pub(crate) enum Permission {
    /// All of it is listed; keep this for as long as the device has it mapped.
    Keep(Vec<SharedMap>),
    /// The message gives the device no memory that it could write.
    Harmless,
    /// Memory that is not listed.
    Refused,
}

/// Checks a message. Its kind is that of [`iotlb_type`]; one that is not known here counts as REMAP, since the device may have
/// been given other numbers.
pub(crate) fn check(message: &IotlbMsg) -> Permission {
    use iotlb_type::{ACCESS_FAIL, BATCH_BEGIN, BATCH_END, INVALIDATE, MISS};
    let &IotlbMsg { size, uaddr, perm, kind, .. } = message;
    if size == 0 || matches!(kind, MISS | INVALIDATE | ACCESS_FAIL | BATCH_BEGIN | BATCH_END) {
        return Permission::Harmless;
    }
    // At an address at which nothing can be there is no memory for a device that takes all or nothing.
    if !is_memory(uaddr, size) {
        return Permission::Harmless;
    }
    match hold(uaddr, size) {
        Some(maps) => Permission::Keep(maps),
        // A device that only reads cannot break what the language promises.
        None if kind == iotlb_type::UPDATE && !perm.write() => Permission::Harmless,
        None => Permission::Refused,
    }
}

/// Whether memory can be mapped at these addresses.
pub(crate) fn is_memory(uaddr: u64, size: u64) -> bool {
    uaddr >= BEGIN && uaddr.checked_add(size).is_some_and(|end| end <= END)
}

/// Memory that the argument of a request names.
#[derive(Debug)]
pub(crate) enum Named {
    /// None.
    Nothing,
    /// That of the regions of a memory table.
    Table(Vec<SharedMap>),
    /// That of a log of vhost.
    Log(Vec<SharedMap>),
}

/// The mappings that together have all of `size` bytes from `uaddr`.
pub(crate) fn hold(uaddr: u64, size: u64) -> Option<Vec<SharedMap>> {
    let mut next = usize::try_from(uaddr).ok()?;
    let end = usize::try_from(uaddr.checked_add(size)?).ok()?;
    let mut maps = Vec::with_capacity(1);
    while next < end {
        let map = at(next)?;
        next = map.addr() + map.len();
        maps.push(map);
    }
    Some(maps)
}

/// The memory that one open device has mapped, by address space and I/O virtual address.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    mapped: BTreeMap<(u32, u64), (u64, Vec<SharedMap>)>,
    /// Removed in a batch, which the device carries out at its end.
    removed: Vec<Vec<SharedMap>>,
    in_batch: bool,
    /// That of the last memory table. What was mapped before stays listed, because a device may ignore tables.
    table: Vec<SharedMap>,
    /// That of the log.
    log: Vec<SharedMap>,
}

impl Kept {
    /// Records what a message has changed that the device has accepted.
    pub(crate) fn accepted(&mut self, asid: u32, message: &IotlbMsg, permission: Permission) {
        let &IotlbMsg { iova, size, kind, .. } = message;
        if let Permission::Keep(maps) = permission {
            let before = self.mapped.insert((asid, iova), (size, maps));
            self.removed.extend(before.map(|(_, maps)| maps));
        }
        match kind {
            iotlb_type::INVALIDATE => self.invalidate(asid, iova, size),
            iotlb_type::BATCH_BEGIN => self.in_batch = true,
            iotlb_type::BATCH_END => self.in_batch = false,
            _ => {}
        }
        if !self.in_batch {
            self.removed.clear();
        }
    }

    /// Records the memory of a request that the device has accepted.
    pub(crate) fn accepted_named(&mut self, named: Named) {
        match named {
            Named::Nothing => {}
            Named::Table(maps) => self.table = maps,
            Named::Log(maps) => self.log = maps,
        }
    }

    /// Removes every mapping that overlaps the range, as the device does.
    fn invalidate(&mut self, asid: u32, iova: u64, size: u64) {
        let Some(last) = size.checked_sub(1).map(|more| iova.saturating_add(more)) else { return };
        while let Some((&key, (have, _))) = self.mapped.range((asid, 0)..=(asid, last)).next_back() {
            if key.1.saturating_add(have.saturating_sub(1)) < iova {
                break;
            }
            self.removed.extend(self.mapped.remove(&key).map(|(_, maps)| maps));
        }
    }

    /// The device has forgotten all mappings.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use vdpa_core::types::Perm;

    use super::*;
    use crate::memfd;
    use crate::mmap::Prot;

    const PAGE: usize = 4096;

    fn map(pages: usize) -> SharedMap {
        let fd = memfd::create(c"dma", (pages * PAGE) as u64, None).unwrap();
        SharedMap::map(&fd, 0, pages * PAGE, Prot::RW, false).unwrap()
    }

    fn update(iova: u64, uaddr: usize, size: usize) -> IotlbMsg {
        let (uaddr, size) = (uaddr as u64, size as u64);
        IotlbMsg { iova, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE }
    }

    #[test]
    fn only_memory_that_is_listed_may_be_written() {
        let shared = map(4);
        let inside = update(0, shared.addr() + PAGE, 3 * PAGE);
        assert!(matches!(check(&inside), Permission::Keep(maps) if maps.len() == 1));
        let heap = vec![0_u8; 2 * PAGE];
        let message = update(0, heap.as_ptr().addr(), PAGE);
        assert!(matches!(check(&message), Permission::Refused));
        assert!(matches!(check(&IotlbMsg { kind: iotlb_type::REMAP, ..message }), Permission::Refused));
        assert!(matches!(check(&IotlbMsg { perm: Perm::RO, ..message }), Permission::Harmless));
        assert!(matches!(check(&IotlbMsg { kind: iotlb_type::INVALIDATE, ..message }), Permission::Harmless));
        let behind = update(0, shared.addr() + PAGE, 1 << 30);
        assert!(matches!(check(&behind), Permission::Refused), "the memory behind it is that of others");
        for nothing in
            [update(0, 0x1000, PAGE), update(0, usize::MAX - PAGE, 2 * PAGE), update(0, 1 << 62, PAGE)]
        {
            assert!(matches!(check(&nothing), Permission::Harmless));
        }
        let addr = shared.addr();
        drop(shared);
        assert!(matches!(check(&update(0, addr, PAGE)), Permission::Refused), "it does not exist any more");
    }

    #[test]
    fn memory_is_kept_until_the_device_does_not_have_it() {
        let mut kept = Kept::default();
        let (first, second) = (map(2), map(2));
        let held = |map: &SharedMap| hold(map.addr() as u64, 1).is_some_and(|maps| !maps.is_empty());
        let addrs = [first.addr() as u64, second.addr() as u64];
        for (iova, map) in [(0, &first), (0x1_0000, &second)] {
            let message = update(iova, map.addr(), 2 * PAGE);
            kept.accepted(0, &message, check(&message));
            assert!(held(map));
        }
        drop((first, second));
        assert!(addrs.iter().all(|&addr| hold(addr, 1).is_some()));
        let invalidate =
            IotlbMsg { iova: 0x1fff, size: 1, kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
        kept.accepted(1, &invalidate, Permission::Harmless);
        assert!(hold(addrs[0], 1).is_some(), "another address space");
        let batch = |kind| IotlbMsg { kind, ..IotlbMsg::default() };
        kept.accepted(0, &batch(iotlb_type::BATCH_BEGIN), Permission::Harmless);
        kept.accepted(0, &invalidate, Permission::Harmless);
        assert!(hold(addrs[0], 1).is_some(), "the device removes it at the end of the batch");
        kept.accepted(0, &batch(iotlb_type::BATCH_END), Permission::Harmless);
        assert!(hold(addrs[0], 1).is_none() && hold(addrs[1], 1).is_some());
        kept.forget();
        assert!(hold(addrs[1], 1).is_none());
    }
}
