//! Tests of the device on an in-memory platform, without an operating system.

mod arguments;
mod mappings;
mod mem_table;
mod ownership;
mod remap;
mod rollback;
mod states;
mod translation;
mod whole_table;

use std::sync::{Arc, Mutex};

use super::*;
use crate::iotlb::Mapping;
use crate::parent::{AddressMode, Dma, PinLimit, PrivateMemory, SetMap};
use crate::testing::{TestHost, TestObject, TestPiece, TestProcess, TestSpace};
use crate::types::{IotlbMsg, Perm, VringAddr, iotlb_type};
use crate::vq::{QueueSetup, QueueState};

const PAGE: u64 = 4096;

/// A process with these mappings: address, pages, number of the object, page of the object, shared. Within a test,
/// equal numbers are the same object.
fn process(vmas: &[(u64, u64, usize, u64, bool)]) -> TestProcess {
    thread_local! {
        static OBJECTS: [TestObject; 10] = std::array::from_fn(|_| TestObject::new(16 * PAGE));
    }
    let process = TestProcess::new();
    for &(start, pages, object, first, shared) in vmas {
        OBJECTS.with(|objects| {
            process.map_at(start, &objects[object], first * PAGE, pages * PAGE, shared);
        });
    }
    process
}

/// A process without mappings that may pin `pages` pages.
fn limited(pages: u64) -> TestProcess {
    let process = TestProcess::new();
    process.set_memlock_pages(pages);
    process
}

/// What the device passed to the test parent, and which calls the parent fails.
#[derive(Debug, Default)]
struct ParentState {
    /// Each table that was set, as rows of (first, last, uaddr, stale).
    tables: Vec<Vec<(u64, u64, u64, bool)>>,
    /// Number of the next tables to refuse.
    refuse: usize,
    running: Vec<bool>,
    index: u16,
    stop_fails: bool,
    refuse_owner: bool,
}

#[derive(Debug)]
struct TestParent {
    profile: Profile,
    state: Arc<Mutex<ParentState>>,
}

impl Parent for TestParent {
    type Host = TestHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }
    fn read_config(&self, _offset: u32, out: &mut [u8]) {
        out.fill(7);
    }
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}
    fn negotiate(&mut self, features: Features) -> Result<Features> {
        self.profile.mask_features(features)
    }
    fn start_queue(&mut self, index: QueueIndex, _: &QueueSetup<TestHost>, start: QueueState) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        state.running[usize::from(index.0)] = true;
        let QueueState::Split { avail_index } = start else { return Err(Errno::INVAL) };
        state.index = avail_index;
        Ok(())
    }
    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        let mut state = self.state.lock().unwrap();
        if state.stop_fails {
            return Err(Errno::IO);
        }
        let ran = std::mem::take(&mut state.running[usize::from(index.0)]);
        Ok(ran.then_some(QueueState::Split { avail_index: state.index }))
    }
    fn dma(&mut self) -> Dma<'_, TestHost> {
        Dma::SetMap(self)
    }
    fn bind_owner(&mut self, owner: Option<&TestSpace>) -> Result<()> {
        if owner.is_some() && self.state.lock().unwrap().refuse_owner { Err(Errno::IO) } else { Ok(()) }
    }
}

impl SetMap<TestHost> for TestParent {
    fn set_map(&mut self, _asid: Asid, table: &Table<TestPiece>) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.refuse > 0 {
            state.refuse -= 1;
            return Err(Errno::NOSPC);
        }
        let row = |e: &Mapping<TestPiece>| (e.range.first(), e.range.last(), e.uaddr, e.stale);
        state.tables.push(table.iter().map(row).collect());
        Ok(())
    }
}

fn profile(mode: AddressMode) -> Profile {
    let mut backend_features = BackendFeatures::NONE.with(BackendFeatures::NEW_OWNER);
    if mode == AddressMode::OwnerAddresses {
        backend_features = backend_features.with(BackendFeatures::IOTLB_REMAP);
    }
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    Profile {
        backend_features: backend_features.with(BackendFeatures::ENABLE_AFTER_DRIVER_OK),
        address_spaces: 2,
        compat_reset: CompatReset::Keep,
        address_mode: mode,
        max_iotlb_entries: 16,
        identity_map: false,
        status_unsuspends: false,
        ..Profile::simulator(2, features, 2, 60)
    }
}

/// An opened device with `owner` as its owner.
struct Rig {
    device: Device<TestParent>,
    parent: Arc<Mutex<ParentState>>,
    owner: TestProcess,
}

const A0: Asid = Asid(0);

impl Rig {
    fn new(mode: AddressMode) -> Self {
        Self::with(profile(mode), process(&[(0x10_0000, 16, 9, 0, true)]))
    }

    fn with(profile: Profile, owner: TestProcess) -> Self {
        let parent = ParentState { running: vec![false; 2], ..ParentState::default() };
        let parent = Arc::new(Mutex::new(parent));
        let mut device = Device::new(TestParent { profile, state: Arc::clone(&parent) });
        device.open().unwrap();
        device.set_owner(&owner).unwrap();
        Self { device, parent, owner }
    }

    fn send_as(
        &mut self,
        caller: &TestProcess,
        kind: u8,
        iova: u64,
        size: u64,
        uaddr: u64,
    ) -> Result<(), IotlbError> {
        let perm = if kind == iotlb_type::UPDATE { Perm::RW } else { Perm::NONE };
        self.device.iotlb(caller, A0, &IotlbMsg { iova, size, uaddr, perm, kind })
    }

    fn send(&mut self, kind: u8, iova: u64, size: u64, uaddr: u64) -> Result<(), IotlbError> {
        let owner = self.owner.clone();
        self.send_as(&owner, kind, iova, size, uaddr)
    }

    fn last_table(&self) -> Vec<(u64, u64, u64, bool)> {
        self.parent.lock().unwrap().tables.last().cloned().unwrap_or_default()
    }

    fn start_queue_0(&mut self) {
        let (device, owner) = (&mut self.device, &self.owner);
        device.set_features(Features::of(&[Features::ACCESS_PLATFORM, Features::VERSION_1])).unwrap();
        device.set_status(Status(11)).unwrap();
        device.set_vring_num(owner, QueueIndex(0), 128).unwrap();
        device.set_vring_addr(owner, QueueIndex(0), &VringAddr::default()).unwrap();
        device.set_vring_base(owner, QueueIndex(0), 5).unwrap();
        device.set_vring_enable(owner, QueueIndex(0), true).unwrap();
        assert!(!self.running(), "nothing runs before DRIVER_OK");
        self.device.set_status(Status(15)).unwrap();
    }

    fn running(&self) -> bool {
        self.parent.lock().unwrap().running[0]
    }
}
