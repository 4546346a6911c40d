//! Stale mappings after a change of owner, and the arguments that REMAP accepts (uapi-spec 8.5).

use super::*;

/// The process after an exec: it maps the same object at another address, in two VMAs.
fn successor() -> TestProcess {
    process(&[(0x20_0000, 3, 9, 0, true), (0x20_3000, 13, 9, 3, true), (0x40_0000, 16, 8, 0, true)])
}

#[test]
fn after_a_change_of_owner_mappings_are_stale_until_remapped() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.send(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let successor = successor();
    rig.device.new_owner(&successor).unwrap();
    assert_eq!(rig.last_table(), [(0, 8 * PAGE - 1, 0x10_0000, true)]);
    let old = rig.owner.clone();
    assert_eq!(rig.send_as(&old, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000), Err(IotlbError::NotOwner));
    // REMAP of the whole UPDATE range replaces its fragments, also if the VMAs are split differently (L6).
    rig.send_as(&successor, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000).unwrap();
    let halves = [(0, 3 * PAGE - 1, 0x20_0000, false), (3 * PAGE, 8 * PAGE - 1, 0x20_3000, false)];
    assert_eq!(rig.last_table(), halves);
    // REMAP is idempotent, and it may name a single fragment.
    rig.send_as(&successor, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000).unwrap();
    rig.send_as(&successor, iotlb_type::REMAP, 0, 3 * PAGE, 0x20_0000).unwrap();
    assert_eq!(rig.last_table(), halves);
}

#[test]
fn remap_refuses_what_is_not_the_mapping_or_not_the_object() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    rig.send(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let successor = successor();
    rig.device.new_owner(&successor).unwrap();
    let mut remap =
        |iova, size, uaddr| rig.send_as(&successor, iotlb_type::REMAP, iova, size, uaddr).unwrap_err();
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
    pinned.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    assert_eq!(pinned.send(iotlb_type::REMAP, 0, PAGE, 0x10_0000), Err(IotlbError::RemapNotOffered));
    assert_eq!(pinned.device.pinned_pages(), 1);
}

#[test]
fn a_refused_remap_is_rolled_back_outside_and_inside_a_batch() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    for i in 0..2 {
        rig.send(iotlb_type::UPDATE, i << 20, 8 * PAGE, 0x10_0000).unwrap();
    }
    let successor = successor();
    rig.device.new_owner(&successor).unwrap();
    let stale = rig.last_table();
    rig.parent.lock().unwrap().refuse = 1;
    let refused = rig.send_as(&successor, iotlb_type::REMAP, 0, 8 * PAGE, 0x20_0000);
    assert_eq!(refused, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    assert_eq!(rig.last_table(), stale);

    rig.send_as(&successor, iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    for i in 0..2 {
        rig.send_as(&successor, iotlb_type::REMAP, i << 20, 8 * PAGE, 0x20_0000).unwrap();
    }
    rig.send_as(&successor, iotlb_type::UPDATE, 9 << 20, PAGE, 0x20_0000).unwrap();
    rig.parent.lock().unwrap().refuse = 1;
    let end = rig.send_as(&successor, iotlb_type::BATCH_END, 0, 0, 0);
    assert_eq!(end, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    let mut kept = stale;
    kept.push((9 << 20, (9 << 20) + PAGE - 1, 0x20_0000, false));
    assert_eq!(rig.last_table(), kept, "the REMAPs are undone, the UPDATE stays");
}
