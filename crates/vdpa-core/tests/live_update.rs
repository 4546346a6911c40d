//! The resolutions of uapi-spec 8.4 to 8.11, one test for each number that can be tested here. O3, the numbers on the
//! wire, is tested where they are used.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its device must fail")]

use vdpa_core::Errno;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::inprocess::{InProcess, Node};
use vdpa_core::iotlb::{Mapping, RecordId};
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::{AddressMode, PrivateMemory, Profile};
use vdpa_core::ring::driver::SplitDriver;
use vdpa_core::ring::{Buffer, Memory};
use vdpa_core::testing::{RamBlk, TableArea, TableMemory, TestEvent, TestObject, TestPiece, TestProcess};
use vdpa_core::types::{Asid, IotlbMsg, IovaRange, Perm, QueueIndex, VringAddr, iotlb_type};

const PAGE: u64 = 4096;
const IOVA: u64 = 0x10_0000;
const A0: Asid = Asid(0);
const Q0: QueueIndex = QueueIndex(0);
const LIVE: BackendFeatures =
    BackendFeatures::of(&[BackendFeatures::NEW_OWNER, BackendFeatures::IOTLB_REMAP]);

/// An open device with an owner that has mapped `object`, 8 pages, at [`IOVA`].
struct Rig {
    node: Node<RamBlk>,
    device: InProcess<RamBlk, TestProcess>,
    owner: TestProcess,
    object: TestObject,
    uaddr: u64,
}

fn unmapped(blk: RamBlk) -> Rig {
    let node = Node::new(blk);
    let (owner, object) = (TestProcess::new(), TestObject::new(8 * PAGE));
    let uaddr = owner.map(&object);
    let device = node.open(owner.clone()).unwrap();
    device.set_owner().unwrap();
    Rig { node, device, owner, object, uaddr }
}

fn rig(blk: RamBlk) -> Rig {
    let rig = unmapped(blk);
    rig.device.dma_map(A0, IOVA, 8 * PAGE, rig.uaddr, Perm::RW).unwrap();
    rig
}

fn owner_addresses() -> Rig {
    rig(RamBlk::new(8))
}

fn mode(mode: AddressMode) -> RamBlk {
    RamBlk::new(8).with(|profile| {
        profile.address_mode = mode;
        profile.private_memory = PrivateMemory::Copy;
    })
}

fn pinned() -> Rig {
    rig(mode(AddressMode::PinnedPages))
}

/// Another process, which has the object mapped elsewhere.
fn successor(rig: &Rig) -> (InProcess<RamBlk, TestProcess>, u64) {
    let process = TestProcess::new();
    let _ = process.map_new(64 * PAGE);
    let uaddr = process.map(&rig.object);
    (rig.device.for_caller(process), uaddr)
}

impl Rig {
    fn parent<R>(&self, access: impl FnOnce(&mut RamBlk) -> R) -> R {
        self.node.with(|device| access(device.parent_mut()))
    }

    fn mappings(&self) -> Vec<(u64, u64, u64)> {
        self.parent(|blk| blk.mappings(A0))
    }

    fn whole(&self, uaddr: u64) -> Vec<(u64, u64, u64)> {
        vec![(IOVA, IOVA + 8 * PAGE - 1, uaddr)]
    }

    fn pins(&self) -> u64 {
        self.node.with(|device| device.pinned_pages())
    }
}

/// Queue 0 and its driver, in the object of a [`Rig`].
struct Driver {
    ring: SplitDriver<TableArea<TestPiece>>,
    call: TestEvent,
    memory: TableMemory<TestPiece>,
}

fn drive(rig: &Rig) -> Driver {
    let (device, call) = (&rig.device, TestEvent::default());
    let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    device.set_features(features).unwrap();
    device.set_status(Status(11)).unwrap();
    device.set_vring_num(Q0, 8).unwrap();
    let addr = VringAddr { desc: IOVA, avail: IOVA + PAGE, used: IOVA + 2 * PAGE, ..VringAddr::default() };
    device.set_vring_addr(Q0, &addr).unwrap();
    device.set_vring_kick(Q0, Some(&TestEvent::default())).unwrap();
    device.set_vring_call(Q0, Some(&call)).unwrap();
    device.set_vring_enable(Q0, true).unwrap();
    device.set_status(Status(15)).unwrap();
    let memory = view_of(&rig.object);
    let area = |at, size| memory.area(at, size, Perm::RW).unwrap();
    let ring =
        SplitDriver::new(8, features, area(IOVA, 128), area(IOVA + PAGE, 22), area(IOVA + 2 * PAGE, 70));
    Driver { ring: ring.unwrap(), call, memory: memory.clone() }
}

fn view_of(object: &TestObject) -> TableMemory<TestPiece> {
    let process = TestProcess::new();
    let uaddr = process.map(object);
    use vdpa_core::host::AddressSpace as _;
    let [fragment] = process.space().resolve(uaddr, object.size(), Perm::RW).unwrap().try_into().unwrap();
    let range = IovaRange::from_size(IOVA, object.size()).unwrap();
    let (perm, stale, record) = (Perm::RW, false, RecordId::default());
    TableMemory::new(
        [Mapping { range, uaddr, perm, memory: fragment.memory, stale, record }].into_iter().collect(),
    )
}

impl Driver {
    /// Submits a read of sector 0 and kicks. Returns whether it completed.
    fn read(&mut self, rig: &Rig) -> bool {
        let header = RequestHeader { kind: kind::IN, ioprio: 0, sector: 0 };
        self.memory.write(IOVA + 3 * PAGE, &header.encode()).unwrap();
        let buffer = |at, len| Buffer { iova: IOVA + at, len };
        let writable = [buffer(4 * PAGE, 512), buffer(5 * PAGE, 1)];
        self.ring.add(&[buffer(3 * PAGE, 16)], &writable, 1).unwrap();
        self.ring.publish().unwrap();
        self.kick(rig)
    }

    fn kick(&mut self, rig: &Rig) -> bool {
        rig.parent(RamBlk::serve);
        self.ring.pop_used().unwrap().is_some()
    }
}

#[test]
fn n1_the_owner_itself_is_refused_before_its_pages_are_charged() {
    let rig = pinned();
    rig.owner.set_memlock_pages(8);
    assert_eq!(rig.device.new_owner(), Err(Errno::BUSY));
}

#[test]
fn n2_a_new_owner_that_the_parent_refuses_changes_nothing() {
    let rig = pinned();
    let (successor, _) = successor(&rig);
    rig.parent(|blk| blk.refuse_owner(true));
    assert_eq!(successor.new_owner(), Err(Errno::IO));
    assert_eq!((rig.owner.pinned_pages(), successor.caller().pinned_pages()), (8, 0));
    assert_eq!(rig.device.set_vring_num(Q0, 8), Ok(()));
    rig.parent(|blk| blk.refuse_owner(false));
    successor.new_owner().unwrap();
}

#[test]
fn n3_a_parent_without_backend_features_offers_neither() {
    let rig = rig(RamBlk::new(8).with(|p| p.backend_features = BackendFeatures::NONE));
    assert_eq!(rig.device.backend_features().unwrap() & LIVE, BackendFeatures::NONE);
    assert_eq!(successor(&rig).0.new_owner(), Err(Errno::OPNOTSUPP));
    assert_eq!(rig.device.dma_remap(A0, IOVA, 8 * PAGE, rig.uaddr), Err(Errno::FAULT));
}

#[test]
fn n4_the_old_owner_may_keep_running_and_loses_its_rights() {
    let rig = owner_addresses();
    let (successor, _) = successor(&rig);
    successor.new_owner().unwrap();
    assert_eq!(rig.device.set_vring_num(Q0, 8), Err(Errno::PERM));
    assert_eq!(rig.device.dma_unmap(A0, IOVA, 1), Err(Errno::FAULT));
    assert_eq!(rig.device.status(), Ok(Status::RESET), "requests that need no owner still work");
}

#[test]
fn n5_the_limit_is_the_new_owners_soft_memlock() {
    let rig = pinned();
    let (successor, _) = successor(&rig);
    successor.caller().set_memlock_pages(7);
    assert_eq!(successor.new_owner(), Err(Errno::NOMEM));
    assert_eq!(rig.device.set_vring_num(Q0, 8), Ok(()), "ownership is unchanged");
    successor.caller().set_memlock_pages(8);
    successor.new_owner().unwrap();
    assert_eq!((rig.owner.pinned_pages(), successor.caller().pinned_pages(), rig.pins()), (0, 8, 8));
}

#[test]
fn r1_the_parent_gets_the_new_address() {
    let rig = owner_addresses();
    let (successor, uaddr) = successor(&rig);
    successor.new_owner().unwrap();
    successor.dma_remap(A0, IOVA, 8 * PAGE, uaddr).unwrap();
    assert_eq!(rig.mappings(), rig.whole(uaddr));
    rig.parent(|blk| blk.refuse_mappings(1));
    assert_eq!(
        successor.dma_remap(A0, IOVA, 8 * PAGE, successor.caller().map(&rig.object)),
        Err(Errno::FAULT)
    );
    assert_eq!(rig.mappings(), rig.whole(uaddr), "a refusal restores the address");
}

/// An owner with the object in two adjoining mappings of 3 and 5 pages, mapped for the device by one UPDATE.
fn in_two_fragments() -> (Rig, u64) {
    let rig = unmapped(RamBlk::new(8));
    let uaddr = rig.owner.map_part(&rig.object, 0, 3 * PAGE, true);
    let _ = rig.owner.map_next(&rig.object, 3 * PAGE, 5 * PAGE, true);
    rig.device.dma_map(A0, IOVA, 8 * PAGE, uaddr, Perm::RW).unwrap();
    assert_eq!(rig.mappings().len(), 2);
    (rig, uaddr)
}

#[test]
fn r2_o4_remap_names_a_whole_update_or_one_fragment() {
    let (rig, uaddr) = in_two_fragments();
    let remap =
        |at: u64, pages: u64| rig.device.dma_remap(A0, IOVA + at * PAGE, pages * PAGE, uaddr + at * PAGE);
    assert_eq!(remap(0, 8), Ok(()), "the UPDATE");
    assert_eq!((remap(0, 3), remap(3, 5)), (Ok(()), Ok(())), "each fragment");
    for (at, pages) in [(0, 4), (0, 2), (1, 7), (0, 9)] {
        assert_eq!(remap(at, pages), Err(Errno::FAULT), "{at} {pages}");
    }
    rig.device.dma_unmap(A0, IOVA, 1).unwrap();
    assert_eq!(remap(0, 8), Err(Errno::FAULT), "the record is broken");
    assert_eq!(remap(3, 5), Ok(()), "the fragment that is left can be named");
}

#[test]
fn r3_pinned_pages_are_never_remapped_whatever_the_parent_claims() {
    for mode_ in [AddressMode::PinnedPages, AddressMode::Pinned, AddressMode::Objects] {
        let rig = rig(mode(mode_));
        assert_eq!(rig.device.backend_features().unwrap() & LIVE, BackendFeatures(0x200));
        let pins = rig.pins();
        assert_eq!(rig.device.dma_remap(A0, IOVA, 8 * PAGE, rig.uaddr), Err(Errno::FAULT));
        let (successor, _) = successor(&rig);
        successor.new_owner().unwrap();
        assert_eq!((rig.pins(), rig.mappings().len()), (pins, 1), "nothing is stale");
    }
}

#[test]
fn r4_fragments_follow_the_new_address_space() {
    let (rig, _) = in_two_fragments();
    let (successor, uaddr) = successor(&rig);
    successor.new_owner().unwrap();
    successor.dma_remap(A0, IOVA, 8 * PAGE, uaddr).unwrap();
    assert_eq!(rig.mappings(), rig.whole(uaddr), "two fragments became one");

    let rig = unverified();
    let partly = rig.owner.map_part(&rig.object, 0, 3 * PAGE, true);
    let _ = rig.owner.map_next(&rig.object, 3 * PAGE, 5 * PAGE, false);
    rig.device.dma_remap(A0, IOVA, 8 * PAGE, partly).unwrap();
    assert_eq!(rig.mappings(), [(IOVA, IOVA + 3 * PAGE - 1, partly)], "the private part stays unmapped");
    let private = rig.owner.map_part(&rig.object, 0, 8 * PAGE, false);
    assert_eq!(
        rig.device.dma_remap(A0, IOVA, 8 * PAGE, private),
        Err(Errno::FAULT),
        "no page would be mapped"
    );
}

fn unverified() -> Rig {
    rig(RamBlk::new(8).with(|profile| profile.verify_remap = false))
}

#[test]
fn r5_o6_end_reports_the_parent_only_after_a_remap() {
    for remaps in [false, true] {
        let rig = owner_addresses();
        rig.device.batch_begin(A0).unwrap();
        if remaps {
            rig.device.dma_remap(A0, IOVA, 8 * PAGE, rig.uaddr).unwrap();
        }
        rig.device.dma_map(A0, 0, PAGE, rig.uaddr, Perm::RW).unwrap();
        rig.parent(|blk| blk.refuse_mappings(1));
        let expected = if remaps { Err(Errno::FAULT) } else { Ok(()) };
        assert_eq!(rig.device.batch_end(A0), expected);
    }
}

#[test]
fn r6_a_failed_end_reverts_the_remaps_and_nothing_else() {
    let rig = owner_addresses();
    let second = IOVA + (1 << 20);
    rig.device.dma_map(A0, second, 8 * PAGE, rig.uaddr, Perm::RW).unwrap();
    let elsewhere = rig.owner.map(&rig.object);
    rig.device.batch_begin(A0).unwrap();
    rig.device.dma_remap(A0, IOVA, 8 * PAGE, elsewhere).unwrap();
    rig.device.dma_map(A0, 0, PAGE, rig.uaddr, Perm::RW).unwrap();
    rig.device.dma_unmap(A0, second, 1).unwrap();
    rig.parent(|blk| blk.refuse_mappings(1));
    assert_eq!(rig.device.batch_end(A0), Err(Errno::FAULT));
    let kept = [(0, PAGE - 1, rig.uaddr), (IOVA, IOVA + 8 * PAGE - 1, rig.uaddr)];
    assert_eq!(rig.mappings(), kept);
}

#[test]
fn r6_mappings_invalidated_in_the_batch_are_not_restored() {
    let rig = owner_addresses();
    let split = rig.owner.map_part(&rig.object, 0, 3 * PAGE, true);
    let _ = rig.owner.map_next(&rig.object, 3 * PAGE, 5 * PAGE, true);
    rig.device.batch_begin(A0).unwrap();
    rig.device.dma_remap(A0, IOVA, 8 * PAGE, split).unwrap();
    rig.device.dma_unmap(A0, IOVA, 1).unwrap();
    rig.device.dma_map(A0, IOVA, PAGE, rig.uaddr + 7 * PAGE, Perm::RW).unwrap();
    rig.parent(|blk| blk.refuse_mappings(1));
    assert_eq!(rig.device.batch_end(A0), Err(Errno::FAULT));
    let rest = (IOVA + 3 * PAGE, IOVA + 8 * PAGE - 1, split + 3 * PAGE);
    assert_eq!(rig.mappings(), [(IOVA, IOVA + PAGE - 1, rig.uaddr + 7 * PAGE), rest]);
}

#[test]
fn r7_o8_after_new_owner_a_mapping_counts_as_unmapped_until_remap() {
    let rig = owner_addresses();
    let mut driver = drive(&rig);
    assert!(driver.read(&rig));
    // A forked child has the same address mapped, but the mapping is stale all the same.
    let child = rig.device.for_caller(rig.owner.fork());
    child.new_owner().unwrap();
    assert!(rig.mappings().is_empty() && !driver.read(&rig));
    assert_eq!(child.dma_map(A0, IOVA, PAGE, rig.uaddr, Perm::RW), Err(Errno::FAULT), "the range is taken");
    child.dma_remap(A0, IOVA, 8 * PAGE, rig.uaddr).unwrap();
    assert!(driver.kick(&rig), "the request is served after the REMAP");
    rig.device.new_owner().unwrap();
    rig.device.dma_unmap(A0, IOVA, 1).unwrap();
    rig.device.dma_map(A0, IOVA, 8 * PAGE, rig.uaddr, Perm::RW).unwrap();
    assert!(driver.read(&rig), "a new mapping is not stale");
}

#[test]
fn r8_the_feature_bit_shows_support_for_remap_and_the_error_does_not() {
    let refused = |rig: &Rig, kind| {
        let msg = IotlbMsg { iova: IOVA, size: 8 * PAGE, uaddr: rig.uaddr, kind, ..IotlbMsg::default() };
        rig.device.iotlb(A0, &msg)
    };
    let without = rig(mode(AddressMode::Objects));
    assert_eq!(refused(&without, iotlb_type::REMAP), refused(&without, 200));
    assert!(!without.device.backend_features().unwrap().has(BackendFeatures::IOTLB_REMAP));
    let with = owner_addresses();
    assert_eq!(refused(&with, iotlb_type::REMAP), Ok(()));
    assert!(with.device.backend_features().unwrap().has(BackendFeatures::IOTLB_REMAP));
}

#[test]
fn r9_o5_the_bits_follow_the_translation() {
    let offered = |blk: RamBlk| unmapped(blk).device.backend_features().unwrap() & LIVE;
    assert_eq!(offered(RamBlk::new(8)).0, 0x600, "owner addresses, whole tables: both");
    assert_eq!(
        offered(RamBlk::new(8).with_single_mappings()).0,
        0,
        "owner addresses, single mappings: neither"
    );
    assert_eq!(offered(mode(AddressMode::PinnedPages)).0, 0x200, "pinned: NEW_OWNER");
    let half = |profile: &mut Profile| profile.backend_features = BackendFeatures(0x200);
    assert_eq!(offered(RamBlk::new(8).with(half)).0, 0, "owner addresses: both or neither");
    let single = rig(RamBlk::new(8).with_single_mappings());
    assert_eq!(single.device.dma_remap(A0, IOVA, 8 * PAGE, single.uaddr), Err(Errno::FAULT));
    assert_eq!(successor(&single).0.new_owner(), Err(Errno::OPNOTSUPP));
    assert_eq!(single.device.set_backend_features(LIVE), Err(Errno::OPNOTSUPP));
}

#[test]
fn o1_o2_any_process_with_the_device_may_become_owner_while_it_runs() {
    let rig = owner_addresses();
    let _driver = drive(&rig);
    successor(&rig).0.new_owner().unwrap();
}

#[test]
fn o2_strict_mode_requires_a_suspended_device() {
    let rig = rig(RamBlk::new(8).with(|profile| profile.strict_new_owner = true));
    let _driver = drive(&rig);
    let (successor, _) = successor(&rig);
    assert_eq!(successor.new_owner(), Err(Errno::BUSY));
    successor.suspend().unwrap();
    successor.new_owner().unwrap();
}

#[test]
fn o7_new_owner_acknowledged_implies_persist() {
    for (acknowledged, kept) in [(0x000, false), (0x100, true), (0x600, true)] {
        let rig = owner_addresses();
        rig.device.set_backend_features(BackendFeatures(acknowledged)).unwrap();
        let before = rig.mappings();
        rig.device.set_status(Status::RESET).unwrap();
        // Mappings that are not kept are replaced by the identity map (uapi-spec 6.1).
        let after = if kept { before } else { vec![(0, u64::MAX, 0)] };
        assert_eq!(rig.mappings(), after, "{acknowledged:#x}");
    }
}

#[test]
fn o9_eventfds_of_the_old_process_keep_working() {
    let rig = rig(mode(AddressMode::Objects));
    let mut driver = drive(&rig);
    successor(&rig).0.new_owner().unwrap();
    let _ = driver.call.take();
    assert!(driver.read(&rig));
    assert_eq!(driver.call.take(), 1);
}

#[test]
fn o10_o11_o12_owners_and_devices_without_owner_are_refused() {
    let rig = owner_addresses();
    assert_eq!(rig.device.new_owner(), Err(Errno::BUSY), "O10");
    let (successor, _) = successor(&rig);
    assert_eq!(successor.set_owner(), Err(Errno::BUSY), "O12");
    let unowned = Node::new(RamBlk::new(8));
    assert_eq!(unowned.open(TestProcess::new()).unwrap().new_owner(), Err(Errno::INVAL), "O11");
}

#[test]
fn o13_new_owner_is_for_all_address_spaces_and_remap_for_one() {
    let rig = rig(RamBlk::new(8).with(|profile| profile.address_spaces = 2));
    rig.device.set_backend_features(BackendFeatures(0x60e)).unwrap();
    rig.device.dma_map(Asid(1), IOVA, 8 * PAGE, rig.uaddr, Perm::RW).unwrap();
    let (successor, uaddr) = successor(&rig);
    successor.new_owner().unwrap();
    successor.dma_remap(Asid(1), IOVA, 8 * PAGE, uaddr).unwrap();
    assert!(rig.mappings().is_empty(), "address space 0 is still stale");
    assert_eq!(rig.parent(|blk| blk.mappings(Asid(1))), rig.whole(uaddr));
}

#[test]
fn o14_remap_requires_permission_0() {
    let rig = owner_addresses();
    for perm in [Perm::RW, Perm::RO] {
        let msg = IotlbMsg { iova: IOVA, size: 8 * PAGE, uaddr: rig.uaddr, perm, kind: iotlb_type::REMAP };
        assert_eq!(rig.device.iotlb(A0, &msg), Err(Errno::FAULT), "{perm:?}");
    }
}

#[test]
fn o15_the_alignment_of_the_address_is_not_checked() {
    let rig = unverified();
    let object = TestObject::new(16 * PAGE);
    let uaddr = rig.owner.map(&object) + 0x123;
    rig.device.dma_remap(A0, IOVA, 8 * PAGE, uaddr).unwrap();
    assert_eq!(rig.mappings(), rig.whole(uaddr));
}

#[test]
fn o16_a_running_device_can_be_remapped() {
    let rig = owner_addresses();
    let mut driver = drive(&rig);
    assert!(driver.read(&rig));
    rig.device.dma_remap(A0, IOVA, 8 * PAGE, rig.owner.map(&rig.object)).unwrap();
    assert!(driver.read(&rig));
}

#[test]
fn o17_the_account_of_the_image_before_an_exec_is_uncharged() {
    let rig = pinned();
    let old = rig.owner.space();
    rig.owner.exec();
    assert_eq!(rig.device.set_vring_num(Q0, 8), Err(Errno::PERM), "another address space");
    rig.device.new_owner().unwrap();
    use vdpa_core::host::AddressSpace as _;
    assert_eq!((old.account().pages(), rig.owner.pinned_pages()), (0, 8));
}

#[test]
fn o18_new_owner_ignores_fork_from_owner() {
    let node = Node::new(RamBlk::new(8));
    let device = node.open(TestProcess::new()).unwrap();
    device.with(|device, _| device.set_fork_from_owner(0)).unwrap();
    device.set_owner().unwrap();
    device.for_caller(TestProcess::new()).new_owner().unwrap();
    assert_eq!(node.with(|device| device.fork_from_owner()), 0);
}

#[test]
fn reset_owner_leaves_an_open_device_without_owner_and_mappings() {
    let kernel = owner_addresses();
    assert_eq!(kernel.device.reset_owner(), Err(Errno::FAULT));
    let rig = rig(mode(AddressMode::PinnedPages).with(|profile| profile.reset_owner = true));
    let mut driver = drive(&rig);
    assert!(driver.read(&rig));
    assert_eq!(successor(&rig).0.reset_owner(), Err(Errno::PERM));
    rig.device.reset_owner().unwrap();
    assert_eq!((rig.pins(), rig.owner.pinned_pages(), rig.mappings()), (0, 0, vec![]));
    assert_eq!(rig.device.status(), Ok(Status::RESET));
    assert!(rig.node.open(TestProcess::new()).is_err(), "the device is still open");
    successor(&rig).0.set_owner().unwrap();
}
