//! What is stale after a change of owner, and what REMAP accepts (uapi-spec 8.5).

use super::*;

/// The image after an exec: the same object somewhere else, split in two VMAs.
fn successor() -> TestProcess {
    process(&[(0x20_0000, 3, 9, 0, true), (0x20_3000, 13, 9, 3, true), (0x40_0000, 16, 8, 0, true)])
}

#[test]
fn after_a_change_of_owner_mappings_are_stale_until_remapped() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.own(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let successor = successor();
    rig.device.new_owner(&successor).unwrap();
    assert_eq!(rig.last_table(), [(0, 8 * PAGE - 1, 0x10_0000, true)]);
    let old = rig.owner.clone();
    assert_eq!(rig.send(&old, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000), Err(IotlbError::NotOwner));
    // The same UPDATE range over another split of VMAs replaces the fragments (L6).
    rig.send(&successor, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000).unwrap();
    let halves = [(0, 3 * PAGE - 1, 0x20_0000, false), (3 * PAGE, 8 * PAGE - 1, 0x20_3000, false)];
    assert_eq!(rig.last_table(), halves);
    // Idempotent, and one fragment alone may be named as well.
    rig.send(&successor, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000).unwrap();
    rig.send(&successor, iotlb_type::REMAP, 0, 3 * PAGE, 0x20_0000).unwrap();
    assert_eq!(rig.last_table(), halves);
}

#[test]
fn remap_refuses_what_is_not_the_mapping_or_not_the_object() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.own(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let successor = successor();
    rig.device.new_owner(&successor).unwrap();
    let mut remap =
        |iova, size, uaddr| rig.send(&successor, iotlb_type::REMAP, iova, size, uaddr).unwrap_err();
    assert!(matches!(remap(0, 4 * PAGE, 0x20_0000), IotlbError::RemapNoMatch { .. }));
    assert!(matches!(remap(1 << 30, PAGE, 0x20_0000), IotlbError::RemapNoMatch { .. }));
    assert!(matches!(remap(0, 0, 0x20_0000), IotlbError::RemapArguments { .. }));
    assert!(matches!(remap(0, 8 * PAGE, 0x40_0000), IotlbError::RemapOtherObject { .. }), "another object");
    assert!(matches!(remap(0, 8 * PAGE, 0x20_1000), IotlbError::RemapOtherObject { .. }), "another offset");
    assert!(matches!(remap(0, 8 * PAGE, 0x900_0000), IotlbError::Unreachable { .. }));
    let with_perm =
        IotlbMsg { size: 8 * PAGE, uaddr: 0x20_0000, perm: Perm::RW, kind: iotlb_type::REMAP, iova: 0 };
    let refused = rig.device.iotlb(&successor, A0, &with_perm).unwrap_err();
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
    let successor = successor();
    rig.device.new_owner(&successor).unwrap();
    let stale = rig.last_table();
    rig.seen.lock().unwrap().refuse = 1;
    let refused = rig.send(&successor, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000);
    assert_eq!(refused, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    assert_eq!(rig.last_table(), stale);

    rig.send(&successor, iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    for i in 0..2 {
        rig.send(&successor, iotlb_type::REMAP, i << 20, 8 * PAGE, 0x20_0000).unwrap();
    }
    rig.send(&successor, iotlb_type::UPDATE, 9 << 20, PAGE, 0x20_0000).unwrap();
    rig.seen.lock().unwrap().refuse = 1;
    let end = rig.send(&successor, iotlb_type::BATCH_END, 0, 0, 0);
    assert_eq!(end, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    let mut kept = stale;
    kept.push((9 << 20, (9 << 20) + PAGE - 1, 0x20_0000, false));
    assert_eq!(rig.last_table(), kept, "the REMAPs are undone, the UPDATE stays");
}
