//! Effects of UPDATE, INVALIDATE and batches on the table, the parent and the pin account (uapi-spec 2.4 to 2.6, 4.6).

use super::*;

#[test]
fn memlock_limits_updates_and_a_refused_update_changes_nothing() {
    let mut rig = Rig::new(AddressMode::Pinned);
    rig.owner.set_memlock_pages(4);
    rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    let refused = rig.send(iotlb_type::UPDATE, 0x10_0000, PAGE, 0x10_4000);
    assert_eq!(refused, Err(IotlbError::MemLock { pages: 1, pinned: 4, limit: 4, what: "RLIMIT_MEMLOCK" }));
    assert_eq!(rig.device.mapped().entries, 1);
    rig.send(iotlb_type::INVALIDATE, 0, 1, 0).unwrap();
    assert_eq!(rig.device.pinned_pages(), 0);
    rig.parent.lock().unwrap().refuse = 1;
    assert_eq!(
        rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000),
        Err(IotlbError::Parent { errno: Errno::NOSPC })
    );
    assert_eq!((rig.device.pinned_pages(), rig.device.mapped().entries), (0, 0));
    assert!(rig.last_table().is_empty());
}

#[test]
fn the_profile_may_set_the_pin_limit() {
    let mut profile = profile(AddressMode::Pinned);
    profile.pin_limit = PinLimit::Pages(4);
    let mut rig = Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]));
    rig.owner.set_memlock_pages(0);
    rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert!(rig.send(iotlb_type::UPDATE, 0x10_0000, PAGE, 0x10_4000).is_err());
    let successor = limited(0);
    rig.device.new_owner(&successor).unwrap();
    assert_eq!(successor.pinned_pages(), 4);
}

#[test]
fn updates_never_overlap_and_private_memory_is_skipped_or_copied() {
    let vmas = [(0x10_0000, 2, 9, 0, true), (0x10_2000, 2, 0, 0, false)];
    let mut rig = Rig::with(profile(AddressMode::OwnerAddresses), process(&vmas));
    assert_eq!(rig.send(iotlb_type::INVALIDATE, 0, 0, 0), Err(IotlbError::NoTable { asid: A0 }));
    assert_eq!(rig.send(iotlb_type::UPDATE, 0, 0, 0).unwrap_err().errno(), Errno::INVAL);
    rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert_eq!(rig.device.mapped().bytes, 2 * PAGE);
    let range = |first, size| IovaRange::from_size(first, size).unwrap();
    assert_eq!(rig.device.private_bytes(A0, range(0, 4 * PAGE)), 2 * PAGE);
    let again = rig.send(iotlb_type::UPDATE, PAGE, PAGE, 0x10_0000).unwrap_err();
    assert!(matches!(again, IotlbError::Overlap { .. }) && again.errno() == Errno::FAULT);
    let hole = rig.send(iotlb_type::UPDATE, 1 << 32, 8 * PAGE, 0x10_0000).unwrap_err();
    assert!(matches!(hole, IotlbError::Unreachable { errno: Errno::FAULT, .. }));

    let mut copying = profile(AddressMode::Objects);
    copying.private_memory = PrivateMemory::Copy;
    let mut rig = Rig::with(copying, process(&vmas));
    rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert_eq!((rig.device.mapped().entries, rig.device.mapped().bytes), (2, 4 * PAGE));
    assert_eq!(rig.device.private_bytes(A0, range(0, 4 * PAGE)), 2 * PAGE);
    assert_eq!(rig.device.private_bytes(A0, range(PAGE, 2 * PAGE)), PAGE);
    assert_eq!(rig.device.private_bytes(A0, range(0, 2 * PAGE)), 0);
}

#[test]
fn a_table_has_at_most_max_iotlb_entries() {
    let mut rig = Rig::new(AddressMode::Objects);
    for i in 0..16 {
        rig.send(iotlb_type::UPDATE, i << 20, PAGE, 0x10_0000).unwrap();
    }
    let full = rig.send(iotlb_type::UPDATE, 99 << 20, PAGE, 0x10_0000);
    assert_eq!(full, Err(IotlbError::Full { entries: 16, limit: 16 }));
}

#[test]
fn batches_belong_to_one_address_space_and_reach_the_parent_once() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.send(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    for i in 0..3 {
        rig.send(iotlb_type::UPDATE, i << 20, PAGE, 0x10_0000).unwrap();
    }
    let owner = rig.owner.clone();
    let other = IotlbMsg { size: PAGE, kind: iotlb_type::UPDATE, ..IotlbMsg::default() };
    assert_eq!(
        rig.device.iotlb(&owner, Asid(1), &other),
        Err(IotlbError::OtherBatch { asid: Asid(1), batch: A0 })
    );
    assert!(rig.parent.lock().unwrap().tables.is_empty());
    rig.send(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    assert_eq!(rig.parent.lock().unwrap().tables.len(), 1);
    assert_eq!(rig.last_table().len(), 3);
    assert_eq!(rig.send(200, 0, 0, 0), Err(IotlbError::UnknownType { kind: 200 }));
}

#[test]
fn a_batch_without_remap_hides_the_parents_error_as_the_kernel_does() {
    for report in [false, true] {
        let mut profile = profile(AddressMode::Objects);
        profile.report_batch_errors = report;
        let mut rig = Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]));
        rig.send(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
        rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
        rig.parent.lock().unwrap().refuse = 1;
        assert_eq!(rig.send(iotlb_type::BATCH_END, 0, 0, 0).is_err(), report);
    }
}

#[test]
fn reset_clears_the_parents_map_unless_it_persists() {
    let survives_reset = |acked: u64| {
        let mut profile = profile(AddressMode::OwnerAddresses);
        profile.compat_reset = CompatReset::Clean;
        let mut rig = Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]));
        rig.device.set_backend_features(BackendFeatures(acked)).unwrap();
        rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
        rig.device.set_status(Status::RESET).unwrap();
        assert_eq!(rig.device.mapped().entries, 1, "the table of the device survives every reset");
        let parent_has = !rig.last_table().is_empty();
        rig.send(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
        rig.send(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
        assert_eq!(rig.last_table().len(), 1, "an empty batch gives the table to the parent again");
        parent_has
    };
    assert!(!survives_reset(0));
    assert!(survives_reset(0x100), "PERSIST");
    assert!(survives_reset(0x200), "NEW_OWNER implies PERSIST");
}
