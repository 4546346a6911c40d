//! Which process may use a device, and changes of its owner (uapi-spec 1.6a, 8.4).

use super::*;

#[test]
fn the_device_opens_once_and_close_clears_its_state() {
    let mut rig = Rig::new(AddressMode::Pinned);
    assert_eq!(rig.device.open(), Err(Errno::BUSY));
    rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
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
fn only_the_owner_may_change_vrings_and_mappings() {
    let mut rig = Rig::new(AddressMode::OwnerAddresses);
    let child = process(&[(0x10_0000, 16, 9, 0, true)]);
    assert_eq!(rig.device.set_vring_num(&child, QueueIndex(0), 64), Err(Errno::PERM));
    assert_eq!(rig.device.reset_owner(&child), Err(Errno::PERM));
    assert_eq!(rig.device.reset_owner(&rig.owner.clone()), Err(Errno::FAULT));
    assert_eq!(rig.send_as(&child, iotlb_type::UPDATE, 0, PAGE, 0x10_0000), Err(IotlbError::NotOwner));
    assert_eq!(rig.device.set_owner(&child), Err(Errno::BUSY));
    assert_eq!(rig.device.set_vring_num(&rig.owner.clone(), QueueIndex(9), 64), Err(Errno::NOBUFS));
    rig.device.new_owner(&child).unwrap();
    assert_eq!(rig.device.new_owner(&child), Err(Errno::BUSY));
    assert_eq!(rig.device.set_vring_num(&rig.owner.clone(), QueueIndex(0), 64), Err(Errno::PERM));
    rig.device.set_vring_num(&child, QueueIndex(0), 64).unwrap();
}

#[test]
fn new_owner_needs_the_feature_and_an_owner_and_moves_the_charge() {
    let mut plain = profile(AddressMode::Pinned);
    plain.backend_features = BackendFeatures::NONE;
    let successor = process(&[]);
    assert_eq!(Rig::with(plain, process(&[])).device.new_owner(&successor), Err(Errno::OPNOTSUPP));

    let mut rig = Rig::new(AddressMode::Pinned);
    rig.send(iotlb_type::UPDATE, 0, 8 * PAGE, 0x10_0000).unwrap();
    let limited = limited(7);
    assert_eq!(rig.device.new_owner(&limited), Err(Errno::NOMEM));
    assert!(rig.device.check_owner(&rig.owner).is_ok(), "a refused NEW_OWNER changes nothing");
    rig.device.new_owner(&successor).unwrap();
    assert_eq!((rig.owner.pinned_pages(), successor.pinned_pages()), (0, 8));
    assert_eq!(rig.device.pinned_pages(), 8);
    rig.device.release();
    assert_eq!(successor.pinned_pages(), 0);
    rig.device.open().unwrap();
    assert_eq!(rig.device.new_owner(&successor), Err(Errno::INVAL));
}

#[test]
fn strict_mode_requires_a_suspended_device() {
    let mut strict = profile(AddressMode::Objects);
    strict.strict_new_owner = true;
    let mut rig = Rig::with(strict, process(&[]));
    rig.start_queue_0();
    let successor = process(&[]);
    assert_eq!(rig.device.new_owner(&successor), Err(Errno::BUSY));
    rig.device.suspend().unwrap();
    rig.device.new_owner(&successor).unwrap();
}
