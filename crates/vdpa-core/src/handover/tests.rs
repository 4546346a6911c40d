//! Two devices on one parent, on a platform whose memory knows how often it was looked up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::device::Device;
use crate::features::{BackendFeatures, Status};
use crate::host::{AddressSpace, Caller, Event, Fragment, PinAccount};
use crate::types::{IotlbMsg, Perm, VringAddr, iotlb_type};

const PAGE: u64 = 4096;
const A0: Asid = Asid(0);
const Q0: QueueIndex = QueueIndex(0);

#[derive(Clone, Debug)]
struct Here;

impl Host for Here {
    type AddressSpace = Space;
    type Memory = Piece;
    type Event = Silence;
}

#[derive(Clone, Debug)]
struct Silence;

impl Event for Silence {
    fn signal(&self) {}
}

/// Memory of an object; two look-ups differ in `lookup` only.
#[derive(Clone, Debug)]
struct Piece {
    object: u64,
    offset: u64,
    lookup: u64,
}

impl MemoryObject for Piece {
    fn is_shared(&self) -> bool {
        true
    }
    fn pin_pages(&self) -> u64 {
        1
    }
    fn same_object(&self, offset: u64, other: &Self, other_offset: u64) -> bool {
        self.object == other.object && self.offset + offset == other.offset + other_offset
    }
}

/// A process: the upper half of an address is the number of the object there.
#[derive(Clone, Debug)]
struct Space(Arc<PinAccount>);

impl AddressSpace for Space {
    type Memory = Piece;

    fn resolve(&self, uaddr: u64, size: u64, _perm: Perm) -> Result<Vec<Fragment<Piece>>> {
        static LOOKUPS: AtomicU64 = AtomicU64::new(0);
        let lookup = LOOKUPS.fetch_add(1, Ordering::Relaxed);
        Ok(vec![Fragment {
            size,
            memory: Piece { object: uaddr >> 32, offset: uaddr & 0xffff_ffff, lookup },
        }])
    }
    fn account(&self) -> &PinAccount {
        &self.0
    }
}

impl Caller<Here> for Space {
    fn is(&self, owner: &Self) -> bool {
        Arc::ptr_eq(&self.0, &owner.0)
    }
    fn address_space(&self) -> Result<Self> {
        Ok(self.clone())
    }
    fn memlock_pages(&self) -> u64 {
        1000
    }
}

/// What the parent has: (first address, object, look-up) of its entries, where its queue is, what it negotiated.
#[derive(Debug, Default)]
struct Seen {
    table: Vec<(u64, u64, u64)>,
    told: usize,
    refuse: usize,
    running: Option<u16>,
    negotiated: Features,
    /// Bytes of configuration space, until a reset.
    written: BTreeMap<u32, u8>,
    owner: Option<Space>,
}

#[derive(Debug)]
struct Below(Profile, Arc<Mutex<Seen>>);

impl Below {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.1.lock().unwrap()
    }
}

impl Parent for Below {
    type Host = Here;

    fn profile(&self) -> &Profile {
        &self.0
    }
    fn read_config(&self, _offset: u32, out: &mut [u8]) {
        out.fill(7);
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.seen().written.extend((offset..).zip(data.iter().copied()));
    }
    fn reset(&mut self) {
        self.seen().written.clear();
    }
    fn negotiate(&mut self, features: Features) -> Result<Features> {
        self.seen().negotiated = features;
        Ok(features)
    }
    fn start_queue(&mut self, _: QueueIndex, _: &QueueSetup<Here>, state: QueueState) -> Result<()> {
        let QueueState::Split { avail_index } = state else { return Err(Errno::INVAL) };
        assert_eq!(self.seen().running.replace(avail_index), None, "two drive one queue");
        Ok(())
    }
    fn stop_queue(&mut self, _: QueueIndex) -> Result<Option<QueueState>> {
        // It has served ten requests.
        Ok(self.seen().running.take().map(|index| QueueState::Split { avail_index: index + 10 }))
    }
    fn dma(&mut self) -> Dma<'_, Here> {
        Dma::SetMap(self)
    }
    fn bind_owner(&mut self, owner: Option<&Space>) -> Result<()> {
        self.seen().owner = owner.cloned();
        Ok(())
    }
}

impl SetMap<Here> for Below {
    fn set_map(&mut self, _asid: Asid, table: &Table<Piece>) -> Result<()> {
        let mut seen = self.seen();
        if let Some(left) = seen.refuse.checked_sub(1) {
            seen.refuse = left;
            return Err(Errno::NOMEM);
        }
        seen.told += 1;
        seen.table = table.iter().map(|e| (e.range.first(), e.memory.object, e.memory.lookup)).collect();
        Ok(())
    }
}

/// One client: its device and its process.
struct Client {
    device: Device<Handle<Below>>,
    space: Space,
}

struct Rig {
    handover: Handover<Below>,
    seen: Arc<Mutex<Seen>>,
}

fn profile() -> Profile {
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    Profile {
        backend_features: BackendFeatures::NONE.with(BackendFeatures::NEW_OWNER),
        address_mode: AddressMode::Pinned,
        identity_map: false,
        status_unsuspends: false,
        ..Profile::simulator(2, features, 1, 60)
    }
}

impl Rig {
    fn new() -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let handover = Handover::new(Below(profile(), Arc::clone(&seen))).unwrap();
        Self { handover, seen }
    }

    fn open(&self) -> Client {
        let mut device = Device::new(self.handover.handle());
        device.open().unwrap();
        let space = Space(Arc::default());
        device.set_owner(&space).unwrap();
        Client { device, space }
    }

    /// One client at work since position 0, with these objects page after page, and another one that has the device open.
    fn with_successor(objects: &[u64]) -> (Self, Client, Client) {
        let rig = Self::new();
        let mut old = rig.open();
        for (page, object) in (0..).zip(objects) {
            old.map(page * PAGE, *object).unwrap();
        }
        old.start(0).unwrap();
        let new = rig.open();
        (rig, old, new)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    fn running(&self) -> Option<u16> {
        self.seen().running
    }
}

impl Client {
    fn map(&mut self, iova: u64, object: u64) -> Result<(), crate::device::IotlbError> {
        let msg =
            IotlbMsg { iova, size: PAGE, uaddr: object << 32, perm: Perm::RW, kind: iotlb_type::UPDATE };
        self.device.iotlb(&self.space, A0, &msg)
    }

    fn unmap(&mut self, iova: u64) {
        let msg = IotlbMsg { iova, size: PAGE, uaddr: 0, perm: Perm::NONE, kind: iotlb_type::INVALIDATE };
        self.device.iotlb(&self.space, A0, &msg).unwrap();
    }

    /// Everything up to DRIVER_OK, whose answer is returned.
    fn start(&mut self, base: u32) -> Result<()> {
        let (device, space) = (&mut self.device, &self.space);
        device.set_features(Features::of(&[Features::ACCESS_PLATFORM, Features::VERSION_1])).unwrap();
        device.set_status(Status(11)).unwrap();
        device.set_vring_num(space, Q0, 128).unwrap();
        device.set_vring_addr(space, Q0, &VringAddr::default()).unwrap();
        device.set_vring_base(space, Q0, base).unwrap();
        device.set_vring_enable(space, Q0, true).unwrap();
        device.set_status(Status(15))
    }

    fn base(&mut self) -> u32 {
        self.device.vring_base(&self.space, Q0).unwrap()
    }
}

#[test]
fn alone_a_handle_is_the_parent() {
    let rig = Rig::new();
    let mut client = rig.open();
    client.map(0, 1).unwrap();
    assert_eq!(rig.seen().table.len(), 1, "an UPDATE reaches the parent at once");
    rig.seen().refuse = 1;
    assert!(client.map(PAGE, 2).is_err(), "and its refusal the client");
    client.start(5).unwrap();
    assert_eq!(rig.running(), Some(5));
    client.device.suspend().unwrap();
    assert_eq!((rig.running(), client.base()), (None, 15));
    client.device.resume().unwrap();
    client.unmap(0);
    assert!(rig.seen().table.is_empty());
    client.device.release();
    assert_eq!(rig.running(), None);
    assert!(rig.seen().owner.is_none());
    assert_eq!(client.space.0.pages(), 0);
}

#[test]
fn the_successor_waits_for_the_rest_of_the_predecessor() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 1).unwrap();
    let told = rig.seen().told;
    assert_eq!(new.start(15), Err(Errno::BUSY));
    assert_eq!(new.device.status(), Status(11), "a refused status is not set");
    assert_eq!((rig.running(), rig.seen().told), (Some(0), told), "the predecessor has noticed nothing");
    old.device.suspend().unwrap();
    let base = old.base();
    new.device.set_vring_base(&new.space, Q0, base).unwrap();
    new.device.set_status(Status(15)).unwrap();
    assert_eq!(rig.running(), Some(10), "where the predecessor has stopped, not where it was");
    assert!(new.space.is(rig.seen().owner.as_ref().unwrap()));
}

/// A guest has written configuration space, and does not hear of the change.
#[test]
fn the_successor_has_the_configuration_that_the_driver_has_written() {
    let rig = Rig::new();
    let written = || rig.seen().written.clone().into_iter().collect::<Vec<_>>();
    let mut old = rig.open();
    old.start(0).unwrap();
    old.device.set_config(3, &[1, 2]).unwrap();
    let mut new = rig.open();
    new.device.set_config(4, &[9]).unwrap();
    assert_eq!(written(), [(3, 1), (4, 2)], "what a successor writes before its time waits");
    // As QEMU does it: a reset at the end, and another one with the close.
    old.device.suspend().unwrap();
    old.device.set_status(Status(0)).unwrap();
    old.device.release();
    assert_eq!(written(), []);
    new.start(10).unwrap();
    assert_eq!(written(), [(3, 1), (4, 9)]);
    drop(old);
    new.device.set_status(Status(0)).unwrap();
    assert_eq!(written(), []);

    // A reset by the driver itself, while somebody waits: it is to start again with nothing.
    new.start(0).unwrap();
    new.device.set_config(5, &[5]).unwrap();
    let mut next = rig.open();
    new.device.set_status(Status(0)).unwrap();
    new.start(0).unwrap();
    new.device.suspend().unwrap();
    next.start(20).unwrap();
    assert_eq!(written(), []);
}

#[test]
fn the_same_bytes_at_the_same_address_are_not_pinned_again() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1, 2]);
    let before = rig.seen().table.clone();
    // As QEMU does it: the predecessor takes everything back before the successor maps anything.
    old.device.set_status(Status(0)).unwrap();
    old.unmap(0);
    old.unmap(PAGE);
    assert_eq!(old.space.0.pages(), 0, "its account is not charged any more");
    assert_eq!(rig.seen().table, before, "the parent keeps what it had for the successor");
    new.map(0, 1).unwrap();
    new.map(PAGE, 3).unwrap();
    new.start(10).unwrap();
    let after = rig.seen().table.clone();
    assert_eq!(after.first(), before.first(), "the same memory is the parent's old one");
    assert_eq!(after.get(1).map(|entry| entry.1), Some(3), "other memory is what the successor has mapped");
    new.unmap(0);
    assert_eq!(rig.seen().table.len(), 1);
}

#[test]
fn a_predecessor_is_one_for_ever_and_its_end_touches_nothing() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 1).unwrap();
    old.device.suspend().unwrap();
    new.start(10).unwrap();
    let table = rig.seen().table.clone();
    let told = rig.seen().told;
    assert_eq!(old.device.resume(), Err(Errno::IO));
    old.unmap(0);
    old.device.set_status(Status(0)).unwrap();
    assert_eq!(old.start(10), Err(Errno::IO));
    new.device.suspend().unwrap();
    assert_eq!(old.device.resume(), Ok(()), "without DRIVER_OK a RESUME does nothing, as ever");
    assert_eq!(old.device.set_status(Status(15)), Err(Errno::IO), "also while the successor rests");
    old.device.release();
    drop(old);
    new.device.resume().unwrap();
    assert_eq!((rig.running(), rig.seen().told), (Some(20), told));
    assert_eq!(rig.seen().table, table);
    // And the successor has a successor.
    let mut next = rig.open();
    next.map(0, 1).unwrap();
    new.device.release();
    drop(new);
    next.start(30).unwrap();
    assert_eq!((rig.running(), rig.seen().table.clone()), (Some(30), table));
}

#[test]
fn a_successor_that_goes_without_having_driven_leaves_everything_as_it_was() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1, 1]);
    new.map(0, 2).unwrap();
    old.device.suspend().unwrap();
    old.unmap(PAGE);
    assert_eq!(rig.seen().table.len(), 2);
    new.device.release();
    drop(new);
    assert_eq!(rig.seen().table.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>(), [(0, 1)]);
    old.device.resume().unwrap();
    assert_eq!(rig.running(), Some(10));
}

#[test]
fn the_predecessor_may_go_on_until_the_successor_drives() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 2).unwrap();
    new.device.set_features(Features::of(&[Features::ACCESS_PLATFORM])).unwrap();
    assert!(rig.seen().negotiated.has(Features::VERSION_1), "the running device keeps what it negotiated");
    old.device.suspend().unwrap();
    old.map(PAGE, 1).unwrap();
    assert_eq!(rig.seen().table.len(), 1, "while both are there, mappings at rest wait");
    old.device.resume().unwrap();
    assert_eq!(rig.running(), Some(10));
    assert_eq!(rig.seen().table.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>(), [(0, 1), (PAGE, 1)]);
}

#[test]
fn a_take_over_that_the_parent_refuses_gives_the_predecessor_everything_back() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 2).unwrap();
    old.device.suspend().unwrap();
    let before = rig.seen().table.clone();
    rig.seen().refuse = 1;
    assert_eq!(new.start(10), Err(Errno::NOMEM));
    assert_eq!(rig.seen().table, before);
    assert!(old.space.is(rig.seen().owner.as_ref().unwrap()));
    old.device.resume().unwrap();
    assert_eq!((rig.running(), rig.seen().table.clone()), (Some(10), before));
    old.device.suspend().unwrap();
    new.device.set_status(Status(15)).unwrap();
    assert_eq!(rig.running(), Some(10));
    assert_eq!(rig.seen().table.first().map(|e| e.1), Some(2));
}

#[test]
fn what_nobody_took_over_is_unpinned_when_the_last_one_closes() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    old.device.release();
    drop(old);
    assert_eq!((rig.running(), rig.seen().table.len()), (None, 1));
    new.device.release();
    assert!(rig.seen().table.is_empty());
    // The device is there for the next one.
    new.device.open().unwrap();
    new.device.set_owner(&new.space).unwrap();
    new.map(0, 3).unwrap();
    assert_eq!(rig.seen().table.len(), 1);
    new.start(1).unwrap();
    assert_eq!(rig.running(), Some(1));
}

#[test]
fn a_parent_that_uses_addresses_of_its_owner_cannot_be_shared() {
    let profile = Profile { address_mode: AddressMode::OwnerAddresses, ..profile() };
    assert_eq!(Handover::new(Below(profile, Arc::default())).map(drop), Err(Errno::OPNOTSUPP));
}
