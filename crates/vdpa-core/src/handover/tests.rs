//! Tests of two devices on one parent. The memory of the test platform has the number of the lookup that returned it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::device::Device;
use crate::features::{BackendFeatures, Status};
use crate::host::{AddressSpace, Caller, Event, Fragment, MemoryObject, PinAccount};
use crate::types::{IotlbMsg, Perm, VringAddr, iotlb_type};

const PAGE: u64 = 4096;
const A0: Asid = Asid(0);
const Q0: QueueIndex = QueueIndex(0);

#[derive(Clone, Debug)]
struct CountingHost;

impl Host for CountingHost {
    type AddressSpace = Process;
    type Memory = CountedMemory;
    type Event = NumberedEvent;
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct NumberedEvent(u8);

impl Event for NumberedEvent {
    fn signal(&self) {}
}

/// Memory of an object. The results of two lookups differ in `lookup` only.
#[derive(Clone, Debug)]
struct CountedMemory {
    object: u64,
    offset: u64,
    lookup: u64,
}

impl MemoryObject for CountedMemory {
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

/// A process. The upper 32 bits of a user address are the number of the object that is mapped there.
#[derive(Clone, Debug)]
struct Process(Arc<PinAccount>);

impl AddressSpace for Process {
    type Memory = CountedMemory;

    fn resolve(&self, uaddr: u64, size: u64, _perm: Perm) -> Result<Vec<Fragment<CountedMemory>>> {
        static LOOKUPS: AtomicU64 = AtomicU64::new(0);
        let lookup = LOOKUPS.fetch_add(1, Ordering::Relaxed);
        Ok(vec![Fragment {
            size,
            memory: CountedMemory { object: uaddr >> 32, offset: uaddr & 0xffff_ffff, lookup },
        }])
    }
    fn account(&self) -> &PinAccount {
        &self.0
    }
}

impl Caller<CountingHost> for Process {
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

/// The state of the test parent.
#[derive(Debug, Default)]
struct ParentState {
    /// First address, object and lookup of each entry.
    table: Vec<(u64, u64, u64)>,
    tables_set: usize,
    refuse: usize,
    /// Position of the queue, if it runs.
    running: Option<u16>,
    negotiated: Features,
    /// Bytes written to the configuration space since the last reset.
    written: BTreeMap<u32, u8>,
    owner: Option<Process>,
    config_call: Option<NumberedEvent>,
    /// It had an error since the last reset.
    broken: bool,
}

#[derive(Debug)]
struct TestParent(Profile, Arc<Mutex<ParentState>>);

impl TestParent {
    fn state(&self) -> MutexGuard<'_, ParentState> {
        self.1.lock().unwrap()
    }
}

impl Parent for TestParent {
    type Host = CountingHost;

    fn profile(&self) -> &Profile {
        &self.0
    }
    fn read_config(&self, _offset: u32, out: &mut [u8]) {
        out.fill(7);
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.state().written.extend((offset..).zip(data.iter().copied()));
    }
    fn reset(&mut self) {
        self.state().written.clear();
        self.state().broken = false;
    }
    fn needs_reset(&self) -> bool {
        self.state().broken
    }
    fn set_config_call(&mut self, event: Option<&NumberedEvent>) {
        self.state().config_call = event.cloned();
    }
    fn negotiate(&mut self, features: Features) -> Result<Features> {
        self.state().negotiated = features;
        Ok(features)
    }
    fn start_queue(&mut self, _: QueueIndex, _: &QueueSetup<CountingHost>, state: QueueState) -> Result<()> {
        let QueueState::Split { avail_index } = state else { return Err(Errno::INVAL) };
        assert_eq!(self.state().running.replace(avail_index), None, "the queue runs already");
        Ok(())
    }
    fn stop_queue(&mut self, _: QueueIndex) -> Result<Option<QueueState>> {
        // The queue has served ten requests.
        Ok(self.state().running.take().map(|index| QueueState::Split { avail_index: index + 10 }))
    }
    fn dma(&mut self) -> Dma<'_, CountingHost> {
        Dma::SetMap(self)
    }
    fn bind_owner(&mut self, owner: Option<&Process>) -> Result<()> {
        self.state().owner = owner.cloned();
        Ok(())
    }
}

impl SetMap<CountingHost> for TestParent {
    fn set_map(&mut self, _asid: Asid, table: &Table<CountedMemory>) -> Result<()> {
        let mut state = self.state();
        if let Some(left) = state.refuse.checked_sub(1) {
            state.refuse = left;
            return Err(Errno::NOMEM);
        }
        state.tables_set += 1;
        state.table = table.iter().map(|e| (e.range.first(), e.memory.object, e.memory.lookup)).collect();
        Ok(())
    }
}

/// One client: its device and its process.
struct Client {
    device: Device<Handle<TestParent>>,
    space: Process,
}

struct Rig {
    handover: Handover<TestParent>,
    parent: Arc<Mutex<ParentState>>,
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
        let parent = Arc::new(Mutex::new(ParentState::default()));
        let handover = Handover::new(TestParent(profile(), Arc::clone(&parent))).unwrap();
        Self { handover, parent }
    }

    fn open(&self) -> Client {
        let mut device = Device::new(self.handover.handle());
        device.open().unwrap();
        let space = Process(Arc::default());
        device.set_owner(&space).unwrap();
        Client { device, space }
    }

    /// A client whose queue runs from position 0 and that has mapped these objects, one page each, and a second client that
    /// has the device open.
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

    fn parent(&self) -> MutexGuard<'_, ParentState> {
        self.parent.lock().unwrap()
    }

    fn running(&self) -> Option<u16> {
        self.parent().running
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

    /// Makes all requests up to DRIVER_OK and returns the result of that one.
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

/// The event for changes of the configuration, and an error of the device, are the business of the client in charge.
#[test]
fn the_client_in_charge_hears_of_errors() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    let needs_reset = |client: &Client| client.device.status().contains(Status::NEEDS_RESET);
    old.device.set_config_call(Some(NumberedEvent(1)));
    new.device.set_config_call(Some(NumberedEvent(2)));
    assert_eq!(rig.parent().config_call, Some(NumberedEvent(1)));
    rig.parent().broken = true;
    assert!(needs_reset(&old) && !needs_reset(&new));
    new.map(0, 1).unwrap();
    old.device.suspend().unwrap();
    new.start(0).unwrap();
    assert_eq!(rig.parent().config_call, Some(NumberedEvent(2)), "of the client that has taken over");
    rig.parent().broken = true;
    assert!(needs_reset(&new) && !needs_reset(&old));
    old.device.set_config_call(None);
    assert_eq!(rig.parent().config_call, Some(NumberedEvent(2)));
    drop(old);
    new.device.set_config_call(Some(NumberedEvent(3)));
    assert_eq!(rig.parent().config_call, Some(NumberedEvent(3)));
    new.device.release();
    assert_eq!(rig.parent().config_call, None);
}

#[test]
fn a_single_handle_passes_every_call_to_the_parent() {
    let rig = Rig::new();
    let mut client = rig.open();
    client.map(0, 1).unwrap();
    assert_eq!(rig.parent().table.len(), 1, "an UPDATE reaches the parent at once");
    rig.parent().refuse = 1;
    assert!(client.map(PAGE, 2).is_err(), "a refusal of the parent reaches the client");
    client.start(5).unwrap();
    assert_eq!(rig.running(), Some(5));
    client.device.suspend().unwrap();
    assert_eq!((rig.running(), client.base()), (None, 15));
    client.device.resume().unwrap();
    client.unmap(0);
    assert!(rig.parent().table.is_empty());
    client.device.release();
    assert_eq!(rig.running(), None);
    assert!(rig.parent().owner.is_none());
    assert_eq!(client.space.0.pages(), 0);
}

#[test]
fn the_successor_cannot_start_while_the_predecessor_runs() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 1).unwrap();
    let tables_set = rig.parent().tables_set;
    assert_eq!(new.start(15), Err(Errno::BUSY));
    assert_eq!(new.device.status(), Status(11), "a refused status is not set");
    assert_eq!(
        (rig.running(), rig.parent().tables_set),
        (Some(0), tables_set),
        "the predecessor is not affected"
    );
    old.device.suspend().unwrap();
    let base = old.base();
    new.device.set_vring_base(&new.space, Q0, base).unwrap();
    new.device.set_status(Status(15)).unwrap();
    assert_eq!(rig.running(), Some(10), "the position at which the predecessor stopped");
    assert!(new.space.is(rig.parent().owner.as_ref().unwrap()));
}

/// The guest has written the configuration space. It does not notice the new client and does not write it again.
#[test]
fn the_successor_has_the_configuration_that_the_driver_has_written() {
    let rig = Rig::new();
    let written = || rig.parent().written.clone().into_iter().collect::<Vec<_>>();
    let mut old = rig.open();
    old.start(0).unwrap();
    old.device.set_config(3, &[1, 2]).unwrap();
    let mut new = rig.open();
    new.device.set_config(4, &[9]).unwrap();
    assert_eq!(written(), [(3, 1), (4, 2)], "writes of the successor wait until it starts");
    // As QEMU does: the predecessor resets the device at its end, and again when it closes it.
    old.device.suspend().unwrap();
    old.device.set_status(Status(0)).unwrap();
    old.device.release();
    assert_eq!(written(), []);
    new.start(10).unwrap();
    assert_eq!(written(), [(3, 1), (4, 9)]);
    drop(old);
    new.device.set_status(Status(0)).unwrap();
    assert_eq!(written(), []);

    // The driver itself resets the device while a successor waits: the configuration starts empty again.
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
fn the_same_memory_at_the_same_address_is_not_pinned_again() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1, 2]);
    let before = rig.parent().table.clone();
    // As QEMU does: the predecessor removes all its mappings before the successor maps memory.
    old.device.set_status(Status(0)).unwrap();
    old.unmap(0);
    old.unmap(PAGE);
    assert_eq!(old.space.0.pages(), 0, "its account is not charged any more");
    assert_eq!(rig.parent().table, before, "the parent keeps the old entries for the successor");
    new.map(0, 1).unwrap();
    new.map(PAGE, 3).unwrap();
    new.start(10).unwrap();
    let after = rig.parent().table.clone();
    assert_eq!(after.first(), before.first(), "the same memory keeps its old entry");
    assert_eq!(after.get(1).map(|entry| entry.1), Some(3), "other memory has the entry of the successor");
    new.unmap(0);
    assert_eq!(rig.parent().table.len(), 1);
}

#[test]
fn a_predecessor_never_runs_again_and_its_close_changes_nothing() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 1).unwrap();
    old.device.suspend().unwrap();
    new.start(10).unwrap();
    let table = rig.parent().table.clone();
    let tables_set = rig.parent().tables_set;
    assert_eq!(old.device.resume(), Err(Errno::IO));
    old.unmap(0);
    old.device.set_status(Status(0)).unwrap();
    assert_eq!(old.start(10), Err(Errno::IO));
    new.device.suspend().unwrap();
    assert_eq!(old.device.resume(), Ok(()), "without DRIVER_OK a RESUME has no effect");
    assert_eq!(old.device.set_status(Status(15)), Err(Errno::IO), "also while the successor is suspended");
    old.device.release();
    drop(old);
    new.device.resume().unwrap();
    assert_eq!((rig.running(), rig.parent().tables_set), (Some(20), tables_set));
    assert_eq!(rig.parent().table, table);
    // The successor can have a successor.
    let mut next = rig.open();
    next.map(0, 1).unwrap();
    new.device.release();
    drop(new);
    next.start(30).unwrap();
    assert_eq!((rig.running(), rig.parent().table.clone()), (Some(30), table));
}

#[test]
fn a_successor_that_closes_without_a_start_changes_nothing() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1, 1]);
    new.map(0, 2).unwrap();
    old.device.suspend().unwrap();
    old.unmap(PAGE);
    assert_eq!(rig.parent().table.len(), 2);
    new.device.release();
    drop(new);
    assert_eq!(rig.parent().table.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>(), [(0, 1)]);
    old.device.resume().unwrap();
    assert_eq!(rig.running(), Some(10));
}

#[test]
fn the_predecessor_may_resume_until_the_successor_starts() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 2).unwrap();
    new.device.set_features(Features::of(&[Features::ACCESS_PLATFORM])).unwrap();
    assert!(rig.parent().negotiated.has(Features::VERSION_1), "the running device keeps what it negotiated");
    old.device.suspend().unwrap();
    old.map(PAGE, 1).unwrap();
    assert_eq!(
        rig.parent().table.len(),
        1,
        "new mappings of a suspended device wait while two clients have it open"
    );
    old.device.resume().unwrap();
    assert_eq!(rig.running(), Some(10));
    assert_eq!(rig.parent().table.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>(), [(0, 1), (PAGE, 1)]);
}

#[test]
fn a_start_that_the_parent_refuses_restores_the_predecessor() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    new.map(0, 2).unwrap();
    old.device.suspend().unwrap();
    let before = rig.parent().table.clone();
    rig.parent().refuse = 1;
    assert_eq!(new.start(10), Err(Errno::NOMEM));
    assert_eq!(rig.parent().table, before);
    assert!(old.space.is(rig.parent().owner.as_ref().unwrap()));
    old.device.resume().unwrap();
    assert_eq!((rig.running(), rig.parent().table.clone()), (Some(10), before));
    old.device.suspend().unwrap();
    new.device.set_status(Status(15)).unwrap();
    assert_eq!(rig.running(), Some(10));
    assert_eq!(rig.parent().table.first().map(|e| e.1), Some(2));
}

#[test]
fn mappings_that_no_successor_took_over_are_unpinned_at_the_last_close() {
    let (rig, mut old, mut new) = Rig::with_successor(&[1]);
    old.device.release();
    drop(old);
    assert_eq!((rig.running(), rig.parent().table.len()), (None, 1));
    new.device.release();
    assert!(rig.parent().table.is_empty());
    // The device can be opened again.
    new.device.open().unwrap();
    new.device.set_owner(&new.space).unwrap();
    new.map(0, 3).unwrap();
    assert_eq!(rig.parent().table.len(), 1);
    new.start(1).unwrap();
    assert_eq!(rig.running(), Some(1));
}

#[test]
fn a_parent_that_uses_addresses_of_its_owner_cannot_be_shared() {
    let profile = Profile { address_mode: AddressMode::OwnerAddresses, ..profile() };
    assert_eq!(Handover::new(TestParent(profile, Arc::default())).map(drop), Err(Errno::OPNOTSUPP));
}
