//! What a parent translates with: whole pages, the 1:1 map, resets (uapi-spec 3.3, 4.5, 4.6, 6.1).

use super::*;

const ALL: (u64, u64, u64, bool) = (0, u64::MAX, 0, false);

fn passing() -> Rig {
    let mut profile = profile(AddressMode::OwnerAddresses);
    profile.identity_map = true;
    profile.compat_reset = CompatReset::Clean;
    Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]))
}

#[test]
fn addresses_pass_through_until_the_first_mapping() {
    let mut rig = passing();
    assert_eq!(rig.last_table(), [ALL], "with the owner");
    rig.own(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    assert_eq!(rig.last_table(), [ALL], "in a batch the parent knows nothing yet");
    rig.own(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    assert_eq!(rig.last_table(), [(0, PAGE - 1, 0x10_0000, false)]);
    rig.own(iotlb_type::INVALIDATE, 0, 0, 0).unwrap();
    assert!(rig.last_table().is_empty(), "it does not come back by itself");

    let mut rig = passing();
    rig.own(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    rig.own(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    assert!(rig.last_table().is_empty(), "an empty batch is a mapping of nothing");
}

#[test]
fn a_reset_that_cleans_the_map_passes_through_again() {
    let mut rig = passing();
    rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    rig.device.set_backend_features(BackendFeatures(0x100)).unwrap();
    rig.device.set_status(Status::RESET).unwrap();
    assert_eq!(rig.last_table().len(), 1, "PERSIST");
    assert_ne!(rig.last_table(), [ALL]);
    rig.device.set_backend_features(BackendFeatures::NONE).unwrap();
    rig.device.set_status(Status::RESET).unwrap();
    assert_eq!(rig.last_table(), [ALL]);
    assert!(rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).is_err(), "the interface's table stays");
}

#[test]
fn close_restores_the_default_for_the_next_owner() {
    let mut rig = passing();
    rig.own(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    rig.device.release();
    assert!(rig.last_table().is_empty(), "nobody's addresses");
    rig.device.open().unwrap();
    rig.device.set_owner(&rig.owner.clone()).unwrap();
    assert_eq!(rig.last_table(), [ALL]);
}

#[test]
fn the_1_1_map_follows_the_owner_and_other_tables_do_not() {
    let mut rig = passing();
    let told = |rig: &Rig| rig.seen.lock().unwrap().tables.len();
    let before = told(&rig);
    rig.device.new_owner(&process(&[])).unwrap();
    assert!(told(&rig) > before);
    assert_eq!(rig.last_table(), [ALL], "never stale: it is of whoever owns the device");

    let mut pinned = profile(AddressMode::PinnedPages);
    pinned.identity_map = true;
    assert!(Rig::with(pinned, process(&[])).last_table().is_empty(), "physical addresses are out of reach");
}

#[test]
fn whole_pages_are_mapped_and_charged() {
    let mut rig = Rig::new(AddressMode::PinnedPages);
    // 0x20 bytes over a page border, and a user address with another offset in its page.
    rig.own(iotlb_type::UPDATE, 2 * PAGE - 0x10, 0x20, 0x10_0123).unwrap();
    assert_eq!(rig.last_table(), [(PAGE, 3 * PAGE - 1, 0x10_0000, false)]);
    assert_eq!((rig.device.pinned_pages(), rig.owner.pinned_pages()), (2, 2));
    let again = rig.own(iotlb_type::UPDATE, PAGE, 1, 0x10_4000).unwrap_err();
    assert!(matches!(again, IotlbError::Overlap { .. }), "another byte of the same page");
    rig.own(iotlb_type::UPDATE, 3 * PAGE, 1, 0x10_0000).unwrap();
    assert_eq!(rig.device.pinned_pages(), 3, "a page mapped twice is charged twice");
    rig.own(iotlb_type::INVALIDATE, 2 * PAGE, 1, 0).unwrap();
    assert_eq!(rig.device.pinned_pages(), 1);
    rig.own(iotlb_type::UPDATE, u64::MAX - 1, 1, 0x10_0000).unwrap();
    assert_eq!(rig.last_table().last().unwrap().1, u64::MAX, "the last page ends at 2^64");
}

#[test]
fn private_pages_are_pinned_too() {
    let mut profile = profile(AddressMode::PinnedPages);
    profile.private_memory = PrivateMemory::Copy;
    let mut rig = Rig::with(profile, process(&[(0x10_0000, 4, 0, 0, false)]));
    rig.owner.set_memlock_pages(3);
    assert!(matches!(rig.own(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000), Err(IotlbError::MemLock { .. })));
    rig.own(iotlb_type::UPDATE, 0, 3 * PAGE, 0x10_0000).unwrap();
    assert_eq!(rig.device.pinned_pages(), 3);
}

#[test]
fn a_parent_that_refuses_the_owner_makes_the_device_forget() {
    let mut rig = Rig::new(AddressMode::Objects);
    rig.device.release();
    rig.device.open().unwrap();
    rig.device.set_backend_features(BackendFeatures(0x10e)).unwrap();
    rig.seen.lock().unwrap().refuse_owner = true;
    assert_eq!(rig.device.set_owner(&rig.owner.clone()), Err(Errno::IO));
    assert!(rig.device.owner().is_none());
    assert_eq!(rig.device.acked_backend_features(), BackendFeatures::NONE);
}
