//! Tests of the device over an in-memory platform: no operating system, every transition.

mod rollback;
mod translation;

use std::sync::{Arc, Mutex};

use super::*;
use crate::iotlb::Mapping;
use crate::parent::{AddressMode, Dma, PinLimit, PrivateMemory, SetMap};
use crate::testing::{TestHost, TestObject, TestPiece, TestProcess, TestSpace};
use crate::types::{IotlbMsg, Perm, VringAddr, iotlb_type};
use crate::vq::{QueueSetup, QueueState};

const PAGE: u64 = 4096;

/// A process with these mappings: address, pages, number of the object, page of the object, shared. A number means the same
/// object everywhere in a test.
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

/// A process with nothing mapped that may pin `pages` pages.
fn limited(pages: u64) -> TestProcess {
    let process = TestProcess::new();
    process.set_memlock_pages(pages);
    process
}

/// What the parent saw: (first, last, uaddr, stale) of each table it was given, and whether to refuse.
#[derive(Debug, Default)]
struct Seen {
    tables: Vec<Vec<(u64, u64, u64, bool)>>,
    refuse: usize,
    running: Vec<bool>,
    index: u16,
    stop_fails: bool,
    refuse_owner: bool,
}

#[derive(Debug)]
struct TestParent {
    profile: Profile,
    seen: Arc<Mutex<Seen>>,
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
    fn start_queue(&mut self, index: QueueIndex, _: &QueueSetup<TestHost>, state: QueueState) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        seen.running[usize::from(index.0)] = true;
        let QueueState::Split { avail_index } = state else { return Err(Errno::INVAL) };
        seen.index = avail_index;
        Ok(())
    }
    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        let mut seen = self.seen.lock().unwrap();
        if seen.stop_fails {
            return Err(Errno::IO);
        }
        let ran = std::mem::take(&mut seen.running[usize::from(index.0)]);
        Ok(ran.then_some(QueueState::Split { avail_index: seen.index }))
    }
    fn dma(&mut self) -> Dma<'_, TestHost> {
        Dma::SetMap(self)
    }
    fn bind_owner(&mut self, owner: Option<&TestSpace>) -> Result<()> {
        if owner.is_some() && self.seen.lock().unwrap().refuse_owner { Err(Errno::IO) } else { Ok(()) }
    }
}

impl SetMap<TestHost> for TestParent {
    fn set_map(&mut self, _asid: Asid, table: &Table<TestPiece>) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        if seen.refuse > 0 {
            seen.refuse -= 1;
            return Err(Errno::NOSPC);
        }
        let row = |e: &Mapping<TestPiece>| (e.range.first(), e.range.last(), e.uaddr, e.stale);
        seen.tables.push(table.iter().map(row).collect());
        Ok(())
    }
}

fn profile(mode: AddressMode) -> Profile {
    let mut live = BackendFeatures::NONE.with(BackendFeatures::NEW_OWNER);
    if mode == AddressMode::OwnerAddresses {
        live = live.with(BackendFeatures::IOTLB_REMAP);
    }
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    Profile {
        backend_features: live.with(BackendFeatures::ENABLE_AFTER_DRIVER_OK),
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
    seen: Arc<Mutex<Seen>>,
    owner: TestProcess,
}

const A0: Asid = Asid(0);

impl Rig {
    fn new(mode: AddressMode) -> Self {
        Self::with(profile(mode), process(&[(0x10_0000, 16, 9, 0, true)]))
    }

    fn with(profile: Profile, owner: TestProcess) -> Self {
        let seen = Arc::new(Mutex::new(Seen { running: vec![false; 2], ..Seen::default() }));
        let mut device = Device::new(TestParent { profile, seen: Arc::clone(&seen) });
        device.open().unwrap();
        device.set_owner(&owner).unwrap();
        Self { device, seen, owner }
    }

    fn send(
        &mut self,
        who: &TestProcess,
        kind: u8,
        iova: u64,
        size: u64,
        uaddr: u64,
    ) -> Result<(), IotlbError> {
        let perm = if kind == iotlb_type::UPDATE { Perm::RW } else { Perm::NONE };
        self.device.iotlb(who, A0, &IotlbMsg { iova, size, uaddr, perm, kind })
    }

    fn own(&mut self, kind: u8, iova: u64, size: u64, uaddr: u64) -> Result<(), IotlbError> {
        let owner = self.owner.clone();
        self.send(&owner, kind, iova, size, uaddr)
    }

    fn last_table(&self) -> Vec<(u64, u64, u64, bool)> {
        self.seen.lock().unwrap().tables.last().cloned().unwrap_or_default()
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
        self.seen.lock().unwrap().running[0]
    }
}

#[test]
fn the_device_is_exclusive_and_close_undoes_everything() {
    let mut rig = Rig::new(AddressMode::Pinned);
    assert_eq!(rig.device.open(), Err(Errno::BUSY));
    rig.own(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    rig.start_queue_0();
    rig.device.set_backend_features(BackendFeatures(0x10e)).unwrap();
    assert_eq!(rig.owner.pinned_pages(), 4);
    rig.device.release();
    assert_eq!(rig.owner.pinned_pages(), 0);
    assert!(!rig.running() && rig.last_table().is_empty());
    rig.device.open().unwrap();
    assert!(rig.device.owner().is_none());
    assert_eq!(rig.device.acked_backend_features(), BackendFeatures::NONE);
    assert_eq!(rig.device.status(), Status::RESET);
    assert_eq!(rig.device.mapped(), Mapped::default());
}

#[test]
fn only_the_owner_may_touch_vrings_and_mappings() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    let child = process(&[(0x10_0000, 16, 9, 0, true)]);
    assert_eq!(rig.device.set_vring_num(&child, QueueIndex(0), 64), Err(Errno::PERM));
    assert_eq!(rig.device.reset_owner(&child), Err(Errno::PERM));
    assert_eq!(rig.device.reset_owner(&rig.owner.clone()), Err(Errno::FAULT));
    assert_eq!(rig.send(&child, iotlb_type::UPDATE, 0, PAGE, 0x10_0000), Err(IotlbError::NotOwner));
    assert_eq!(rig.device.set_owner(&child), Err(Errno::BUSY));
    assert_eq!(rig.device.set_vring_num(&rig.owner.clone(), QueueIndex(9), 64), Err(Errno::NOBUFS));
    rig.device.new_owner(&child).unwrap();
    assert_eq!(rig.device.new_owner(&child), Err(Errno::BUSY));
    assert_eq!(rig.device.set_vring_num(&rig.owner.clone(), QueueIndex(0), 64), Err(Errno::PERM));
    rig.device.set_vring_num(&child, QueueIndex(0), 64).unwrap();
}

#[test]
fn new_owner_needs_an_offer_and_an_owner_and_moves_the_charge() {
    let mut plain = profile(AddressMode::Pinned);
    plain.backend_features = BackendFeatures::NONE;
    let heir = process(&[]);
    assert_eq!(Rig::with(plain, process(&[])).device.new_owner(&heir), Err(Errno::OPNOTSUPP));

    let mut rig = Rig::new(AddressMode::Pinned);
    rig.own(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let poor = limited(7);
    assert_eq!(rig.device.new_owner(&poor), Err(Errno::NOMEM));
    assert!(rig.device.check_owner(&rig.owner).is_ok(), "a refused heir changes nothing");
    rig.device.new_owner(&heir).unwrap();
    assert_eq!((rig.owner.pinned_pages(), heir.pinned_pages()), (0, 8));
    assert_eq!(rig.device.pinned_pages(), 8);
    rig.device.release();
    assert_eq!(heir.pinned_pages(), 0);
    rig.device.open().unwrap();
    assert_eq!(rig.device.new_owner(&heir), Err(Errno::INVAL));
}

#[test]
fn strict_mode_wants_a_suspended_device() {
    let mut strict = profile(AddressMode::Objects);
    strict.strict_new_owner = true;
    let mut rig = Rig::with(strict, process(&[]));
    rig.start_queue_0();
    let heir = process(&[]);
    assert_eq!(rig.device.new_owner(&heir), Err(Errno::BUSY));
    rig.device.suspend().unwrap();
    rig.device.new_owner(&heir).unwrap();
}

#[test]
fn memlock_limits_updates_and_a_refusal_leaves_no_trace() {
    let mut rig = Rig::new(AddressMode::Pinned);
    rig.owner.set_memlock_pages(4);
    rig.own(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    let refused = rig.own(iotlb_type::UPDATE, 0x10_0000, PAGE, 0x10_4000);
    assert_eq!(refused, Err(IotlbError::MemLock { pages: 1, pinned: 4, limit: 4, what: "RLIMIT_MEMLOCK" }));
    assert_eq!(rig.device.mapped().entries, 1);
    rig.own(iotlb_type::INVALIDATE, 0, 1, 0).unwrap();
    assert_eq!(rig.device.pinned_pages(), 0);
    rig.seen.lock().unwrap().refuse = 1;
    assert_eq!(
        rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000),
        Err(IotlbError::Parent { errno: Errno::NOSPC })
    );
    assert_eq!((rig.device.pinned_pages(), rig.device.mapped().entries), (0, 0));
    assert!(rig.last_table().is_empty());
}

#[test]
fn whoever_made_the_device_may_set_the_limit() {
    let mut profile = profile(AddressMode::Pinned);
    profile.pin_limit = PinLimit::Pages(4);
    let mut rig = Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]));
    rig.owner.set_memlock_pages(0);
    rig.own(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert!(rig.own(iotlb_type::UPDATE, 0x10_0000, PAGE, 0x10_4000).is_err());
    let heir = limited(0);
    rig.device.new_owner(&heir).unwrap();
    assert_eq!(heir.pinned_pages(), 4);
}

#[test]
fn updates_never_overlap_and_private_memory_is_skipped_or_copied() {
    let vmas = [(0x10_0000, 2, 9, 0, true), (0x10_2000, 2, 0, 0, false)];
    let mut rig = Rig::with(profile(AddressMode::OwnerAddresses), process(&vmas));
    assert_eq!(rig.own(iotlb_type::INVALIDATE, 0, 0, 0), Err(IotlbError::NoTable { asid: A0 }));
    assert_eq!(rig.own(iotlb_type::UPDATE, 0, 0, 0).unwrap_err().errno(), Errno::INVAL);
    rig.own(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert_eq!(rig.device.mapped().bytes, 2 * PAGE);
    let range = |first, size| IovaRange::from_size(first, size).unwrap();
    assert_eq!(rig.device.private_bytes(A0, range(0, 4 * PAGE)), 2 * PAGE);
    let again = rig.own(iotlb_type::UPDATE, PAGE, PAGE, 0x10_0000).unwrap_err();
    assert!(matches!(again, IotlbError::Overlap { .. }) && again.errno() == Errno::FAULT);
    let hole = rig.own(iotlb_type::UPDATE, 1 << 32, 8 * PAGE, 0x10_0000).unwrap_err();
    assert!(matches!(hole, IotlbError::Unreachable { errno: Errno::FAULT, .. }));

    let mut copying = profile(AddressMode::Objects);
    copying.private_memory = PrivateMemory::Copy;
    let mut rig = Rig::with(copying, process(&vmas));
    rig.own(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert_eq!((rig.device.mapped().entries, rig.device.mapped().bytes), (2, 4 * PAGE));
    assert_eq!(rig.device.private_bytes(A0, range(0, 4 * PAGE)), 2 * PAGE);
    assert_eq!(rig.device.private_bytes(A0, range(PAGE, 2 * PAGE)), PAGE);
    assert_eq!(rig.device.private_bytes(A0, range(0, 2 * PAGE)), 0);
}

#[test]
fn a_table_has_a_limit() {
    let mut rig = Rig::new(AddressMode::Objects);
    for i in 0..16 {
        rig.own(iotlb_type::UPDATE, i << 20, PAGE, 0x10_0000).unwrap();
    }
    let full = rig.own(iotlb_type::UPDATE, 99 << 20, PAGE, 0x10_0000);
    assert_eq!(full, Err(IotlbError::Full { entries: 16, limit: 16 }));
}

#[test]
fn batches_belong_to_one_address_space_and_reach_the_parent_once() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.own(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    for i in 0..3 {
        rig.own(iotlb_type::UPDATE, i << 20, PAGE, 0x10_0000).unwrap();
    }
    let owner = rig.owner.clone();
    let other = IotlbMsg { size: PAGE, kind: iotlb_type::UPDATE, ..IotlbMsg::default() };
    assert_eq!(
        rig.device.iotlb(&owner, Asid(1), &other),
        Err(IotlbError::OtherBatch { asid: Asid(1), batch: A0 })
    );
    assert!(rig.seen.lock().unwrap().tables.is_empty());
    rig.own(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    assert_eq!(rig.seen.lock().unwrap().tables.len(), 1);
    assert_eq!(rig.last_table().len(), 3);
    assert_eq!(rig.own(200, 0, 0, 0), Err(IotlbError::UnknownType { kind: 200 }));
}

/// The image after an exec: the same object somewhere else, split in two VMAs.
fn heir() -> TestProcess {
    process(&[(0x20_0000, 3, 9, 0, true), (0x20_3000, 13, 9, 3, true), (0x40_0000, 16, 8, 0, true)])
}

#[test]
fn after_a_change_of_owner_mappings_are_stale_until_remapped() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.own(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let heir = heir();
    rig.device.new_owner(&heir).unwrap();
    assert_eq!(rig.last_table(), [(0, 8 * PAGE - 1, 0x10_0000, true)]);
    let old = rig.owner.clone();
    assert_eq!(rig.send(&old, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000), Err(IotlbError::NotOwner));
    // The same UPDATE range over another split of VMAs replaces the fragments (L6).
    rig.send(&heir, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000).unwrap();
    let halves = [(0, 3 * PAGE - 1, 0x20_0000, false), (3 * PAGE, 8 * PAGE - 1, 0x20_3000, false)];
    assert_eq!(rig.last_table(), halves);
    // Idempotent, and one fragment alone may be named as well.
    rig.send(&heir, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000).unwrap();
    rig.send(&heir, iotlb_type::REMAP, 0, 3 * PAGE, 0x20_0000).unwrap();
    assert_eq!(rig.last_table(), halves);
}

#[test]
fn remap_refuses_what_is_not_the_mapping_or_not_the_object() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.own(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let heir = heir();
    rig.device.new_owner(&heir).unwrap();
    let mut remap = |iova, size, uaddr| rig.send(&heir, iotlb_type::REMAP, iova, size, uaddr).unwrap_err();
    assert!(matches!(remap(0, 4 * PAGE, 0x20_0000), IotlbError::RemapNoMatch { .. }));
    assert!(matches!(remap(1 << 30, PAGE, 0x20_0000), IotlbError::RemapNoMatch { .. }));
    assert!(matches!(remap(0, 0, 0x20_0000), IotlbError::RemapArguments { .. }));
    assert!(matches!(remap(0, 8 * PAGE, 0x40_0000), IotlbError::RemapOtherObject { .. }), "another object");
    assert!(matches!(remap(0, 8 * PAGE, 0x20_1000), IotlbError::RemapOtherObject { .. }), "another offset");
    assert!(matches!(remap(0, 8 * PAGE, 0x900_0000), IotlbError::Unreachable { .. }));
    let with_perm =
        IotlbMsg { size: 8 * PAGE, uaddr: 0x20_0000, perm: Perm::RW, kind: iotlb_type::REMAP, iova: 0 };
    let refused = rig.device.iotlb(&heir, A0, &with_perm).unwrap_err();
    assert!(matches!(refused, IotlbError::RemapArguments { perm: 3, .. }));
    assert_eq!(rig.device.mapped().stale, 1, "refusals change nothing");

    let mut pinned = Rig::new(AddressMode::Pinned);
    pinned.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    assert_eq!(pinned.own(iotlb_type::REMAP, 0, PAGE, 0x10_0000), Err(IotlbError::RemapNotOffered));
    assert_eq!(pinned.device.pinned_pages(), 1);
}

#[test]
fn a_refused_remap_is_rolled_back_alone_and_in_a_batch() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    for i in 0..2 {
        rig.own(iotlb_type::UPDATE, i << 20, 8 * PAGE, 0x10_0000).unwrap();
    }
    let heir = heir();
    rig.device.new_owner(&heir).unwrap();
    let stale = rig.last_table();
    rig.seen.lock().unwrap().refuse = 1;
    let refused = rig.send(&heir, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000);
    assert_eq!(refused, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    assert_eq!(rig.last_table(), stale);

    rig.send(&heir, iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    for i in 0..2 {
        rig.send(&heir, iotlb_type::REMAP, i << 20, 8 * PAGE, 0x20_0000).unwrap();
    }
    rig.send(&heir, iotlb_type::UPDATE, 9 << 20, PAGE, 0x20_0000).unwrap();
    rig.seen.lock().unwrap().refuse = 1;
    let end = rig.send(&heir, iotlb_type::BATCH_END, 0, 0, 0);
    assert_eq!(end, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    let mut kept = stale;
    kept.push((9 << 20, (9 << 20) + PAGE - 1, 0x20_0000, false));
    assert_eq!(rig.last_table(), kept, "the REMAPs are undone, the UPDATE stays");
}

#[test]
fn a_batch_without_remap_hides_the_parents_error_as_the_kernel_does() {
    for report in [false, true] {
        let mut profile = profile(AddressMode::Objects);
        profile.report_batch_errors = report;
        let mut rig = Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]));
        rig.own(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
        rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
        rig.seen.lock().unwrap().refuse = 1;
        assert_eq!(rig.own(iotlb_type::BATCH_END, 0, 0, 0).is_err(), report);
    }
}

#[test]
fn reset_drops_the_parents_map_only_where_it_must() {
    let clean = |acked: u64| {
        let mut profile = profile(AddressMode::OwnerAddresses);
        profile.compat_reset = CompatReset::Clean;
        let mut rig = Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]));
        rig.device.set_backend_features(BackendFeatures(acked)).unwrap();
        rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
        rig.device.set_status(Status::RESET).unwrap();
        assert_eq!(rig.device.mapped().entries, 1, "the interface's table always survives");
        let parent_has = !rig.last_table().is_empty();
        rig.own(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
        rig.own(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
        assert_eq!(rig.last_table().len(), 1, "an empty batch installs it again");
        parent_has
    };
    assert!(!clean(0));
    assert!(clean(0x100), "PERSIST");
    assert!(clean(0x200), "NEW_OWNER implies PERSIST");
}

#[test]
fn the_state_matrix() {
    let mut rig = Rig::new(AddressMode::Objects);
    rig.start_queue_0();
    assert!(rig.running());
    let owner = rig.owner.clone();
    let (device, q) = (&mut rig.device, QueueIndex(0));
    assert_eq!(device.set_features(Features::NONE), Err(Errno::BUSY));
    assert_eq!(device.set_vring_addr(&owner, q, &VringAddr::default()), Err(Errno::INVAL));
    assert_eq!(device.set_vring_base(&owner, q, 1), Err(Errno::INVAL));
    assert_eq!(device.set_group_asid(&owner, GroupIndex(0), A0), Err(Errno::BUSY));
    assert_eq!(device.set_vring_num(&owner, q, 64), Ok(()));
    assert_eq!(device.vring_base(&owner, q), Ok(5));
    assert_eq!(device.set_status(Status(7)), Err(Errno::INVAL), "a bit may not go");
    device.suspend().unwrap();
    device.set_vring_enable(&owner, q, true).unwrap();
    device.set_status(Status(15)).unwrap();
    assert!(!rig.running(), "neither ENABLE nor a status write ends a suspension");
    rig.device.set_vring_base(&owner, q, 77).unwrap();
    assert_eq!(rig.device.vring_base(&owner, q), Ok(77));
    assert_eq!(rig.device.set_group_asid(&owner, GroupIndex(0), A0), Err(Errno::BUSY));
    rig.device.resume().unwrap();
    assert!(rig.running() && rig.seen.lock().unwrap().index == 77);
    rig.device.set_status(Status::RESET).unwrap();
    assert!(!rig.running());
    assert_eq!(rig.device.vring_base(&owner, q), Ok(0));
    assert_eq!(rig.device.suspend(), Ok(()), "no-op without DRIVER_OK");
}

#[test]
fn a_suspend_that_fails_leaves_the_device_running() {
    let mut rig = Rig::new(AddressMode::Objects);
    rig.start_queue_0();
    rig.seen.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.suspend(), Err(Errno::IO));
    assert!(!rig.device.suspended() && rig.running());
    rig.seen.lock().unwrap().stop_fails = false;
    rig.device.suspend().unwrap();
    assert!(rig.device.suspended() && !rig.running());
}

/// A status write has started the queues again, as in the simulator, while SUSPEND is still in force.
#[test]
fn a_second_suspend_that_fails_leaves_the_device_running() {
    let profile = Profile { status_unsuspends: true, ..profile(AddressMode::Objects) };
    let mut rig = Rig::with(profile, process(&[]));
    rig.start_queue_0();
    rig.device.suspend().unwrap();
    rig.device.set_status(Status(15)).unwrap();
    assert!(rig.device.suspended() && rig.running());
    rig.seen.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.suspend(), Err(Errno::IO));
    assert_eq!(rig.device.check_invariants(), Ok(()), "not at rest while a queue runs");
    rig.seen.lock().unwrap().stop_fails = false;
    rig.device.suspend().unwrap();
    assert!(!rig.running());
}

#[test]
fn a_queue_that_does_not_come_to_rest_is_not_forgotten() {
    let mut rig = Rig::new(AddressMode::Objects);
    let owner = rig.owner.clone();
    rig.start_queue_0();
    rig.seen.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.set_vring_enable(&owner, QueueIndex(0), false), Err(Errno::IO));
    assert_eq!(rig.device.check_invariants(), Ok(()), "a queue that runs is enabled");
    rig.device.release();
    assert_eq!(rig.device.open(), Err(Errno::IO), "the queue of the last client still runs");
    rig.seen.lock().unwrap().stop_fails = false;
    rig.device.open().unwrap();
    assert!(!rig.running());
    assert_eq!(rig.device.check_invariants(), Ok(()));
}

#[test]
fn vring_arguments_are_checked_in_the_kernels_order() {
    let mut rig = Rig::new(AddressMode::Objects);
    let owner = rig.owner.clone();
    let (device, q) = (&mut rig.device, QueueIndex(0));
    for num in [0, 3, 512, 65536] {
        assert_eq!(device.set_vring_num(&owner, q, num), Err(Errno::INVAL));
    }
    let addr = |flags, desc, used, avail| VringAddr { flags, desc, used, avail, log: 0 };
    assert_eq!(device.set_vring_addr(&owner, q, &addr(2, 0, 0, 0)), Err(Errno::OPNOTSUPP));
    assert_eq!(device.set_vring_addr(&owner, q, &addr(0, 0, 2, 0)), Err(Errno::INVAL));
    assert_eq!(device.set_vring_addr(&owner, q, &addr(0, 0, 0, 1)), Err(Errno::INVAL));
    assert_eq!(device.set_vring_addr(&owner, q, &addr(0, 1, 0, 0)), Ok(()));
    assert_eq!(device.set_vring_base(&owner, q, 65536), Err(Errno::INVAL));
    assert_eq!(device.set_group_asid(&owner, GroupIndex(2), A0), Err(Errno::NOBUFS));
    assert_eq!(device.set_group_asid(&owner, GroupIndex(1), A0), Err(Errno::INVAL));
    assert_eq!(device.set_group_asid(&owner, GroupIndex(0), Asid(2)), Err(Errno::INVAL));
    assert_eq!(device.vring_size(&owner, q), Err(Errno::OPNOTSUPP));
    assert_eq!(device.vring_desc_group(&owner, q), Err(Errno::OPNOTSUPP));
}

#[test]
fn backend_features_are_acknowledged_as_the_kernel_checks_them() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    assert_eq!(rig.device.backend_features().0, 0x77e);
    for (word, expected) in [
        (0x1, Err(Errno::OPNOTSUPP)),
        (0x8000, Err(Errno::OPNOTSUPP)),
        (0x80, Err(Errno::INVAL)),
        (0x88, Err(Errno::OPNOTSUPP)),
        (0x77e, Ok(())),
        (0, Ok(())),
    ] {
        assert_eq!(rig.device.set_backend_features(BackendFeatures(word)), expected, "{word:#x}");
    }
    let mut pinned = Rig::new(AddressMode::Pinned);
    assert_eq!(pinned.device.backend_features().0, 0x37e);
    assert_eq!(pinned.device.set_backend_features(BackendFeatures(0x400)), Err(Errno::OPNOTSUPP));
}

#[test]
fn config_requests_are_bounded_and_the_first_read_negotiates_nothing() {
    let mut rig = Rig::new(AddressMode::Objects);
    let mut out = [0; 61];
    for (offset, len) in [(60, 1), (61, 1), (0, 61), (0, 0)] {
        assert_eq!(rig.device.config(offset, &mut out[..len]), Err(Errno::INVAL), "{offset} {len}");
    }
    assert_eq!(rig.device.negotiated_features(), None);
    rig.device.config(58, &mut out[..2]).unwrap();
    assert_eq!(out[..2], [7, 7]);
    assert_eq!(rig.device.negotiated_features(), Some(Features::NONE));
    rig.device.peek_config(0, &mut out[..60]).unwrap();
}
