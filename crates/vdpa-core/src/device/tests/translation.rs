//! The table with which a parent translates: whole pages, the identity map, resets (uapi-spec 3.3, 4.5, 4.6, 6.1).

use super::*;

const ALL: (u64, u64, u64, bool) = (0, u64::MAX, 0, false);

fn identity_mapped() -> Rig {
    let mut profile = profile(AddressMode::OwnerAddresses);
    profile.identity_map = true;
    profile.compat_reset = CompatReset::Clean;
    Rig::with(profile, process(&[(0x10_0000, 16, 9, 0, true)]))
}

#[test]
fn the_identity_map_lasts_until_the_first_mapping() {
    let mut rig = identity_mapped();
    assert_eq!(rig.last_table(), [ALL], "installed together with the owner");
    rig.send(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    assert_eq!(rig.last_table(), [ALL], "inside a batch the parent keeps its table");
    rig.send(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    assert_eq!(rig.last_table(), [(0, PAGE - 1, 0x10_0000, false)]);
    rig.send(iotlb_type::INVALIDATE, 0, 0, 0).unwrap();
    assert!(rig.last_table().is_empty(), "the identity map is not restored");

    let mut rig = identity_mapped();
    rig.send(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    rig.send(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    assert!(rig.last_table().is_empty(), "an empty batch installs an empty table");
}

#[test]
fn a_reset_that_clears_the_map_restores_the_identity_map() {
    let mut rig = identity_mapped();
    rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    rig.device.set_backend_features(BackendFeatures(0x100)).unwrap();
    rig.device.set_status(Status::RESET).unwrap();
    assert_eq!(rig.last_table().len(), 1, "PERSIST");
    assert_ne!(rig.last_table(), [ALL]);
    rig.device.set_backend_features(BackendFeatures::NONE).unwrap();
    rig.device.set_status(Status::RESET).unwrap();
    assert_eq!(rig.last_table(), [ALL]);
    assert!(rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).is_err(), "the table of the device stays");
}

#[test]
fn the_next_owner_after_a_close_gets_the_identity_map() {
    let mut rig = identity_mapped();
    rig.send(iotlb_type::UPDATE, 0, PAGE, 0x10_0000).unwrap();
    rig.device.release();
    assert!(rig.last_table().is_empty(), "no owner has addresses to translate");
    rig.device.open().unwrap();
    rig.device.set_owner(&rig.owner.clone()).unwrap();
    assert_eq!(rig.last_table(), [ALL]);
}

#[test]
fn the_identity_map_is_installed_again_for_a_new_owner() {
    let mut rig = identity_mapped();
    let tables_set = |rig: &Rig| rig.parent.lock().unwrap().tables.len();
    let before = tables_set(&rig);
    rig.device.new_owner(&process(&[])).unwrap();
    assert!(tables_set(&rig) > before);
    assert_eq!(rig.last_table(), [ALL], "never stale: it uses the addresses of the current owner");

    let mut pinned = profile(AddressMode::PinnedPages);
    pinned.identity_map = true;
    assert!(
        Rig::with(pinned, process(&[])).last_table().is_empty(),
        "there is no identity map of physical addresses"
    );
}

#[test]
fn whole_pages_are_mapped_and_charged() {
    let mut rig = Rig::new(AddressMode::PinnedPages);
    // 0x20 bytes over a page border, and a user address with another offset in its page.
    rig.send(iotlb_type::UPDATE, 2 * PAGE - 0x10, 0x20, 0x10_0123).unwrap();
    assert_eq!(rig.last_table(), [(PAGE, 3 * PAGE - 1, 0x10_0000, false)]);
    assert_eq!((rig.device.pinned_pages(), rig.owner.pinned_pages()), (2, 2));
    let again = rig.send(iotlb_type::UPDATE, PAGE, 1, 0x10_4000).unwrap_err();
    assert!(matches!(again, IotlbError::Overlap { .. }), "another byte of the same page");
    rig.send(iotlb_type::UPDATE, 3 * PAGE, 1, 0x10_0000).unwrap();
    assert_eq!(rig.device.pinned_pages(), 3, "a page mapped twice is charged twice");
    rig.send(iotlb_type::INVALIDATE, 2 * PAGE, 1, 0).unwrap();
    assert_eq!(rig.device.pinned_pages(), 1);
    rig.send(iotlb_type::UPDATE, u64::MAX - 1, 1, 0x10_0000).unwrap();
    assert_eq!(rig.last_table().last().unwrap().1, u64::MAX, "the last page ends at 2^64");
}

#[test]
fn private_pages_are_pinned_too() {
    let mut profile = profile(AddressMode::PinnedPages);
    profile.private_memory = PrivateMemory::Copy;
    let mut rig = Rig::with(profile, process(&[(0x10_0000, 4, 0, 0, false)]));
    rig.owner.set_memlock_pages(3);
    assert!(matches!(rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000), Err(IotlbError::MemLock { .. })));
    rig.send(iotlb_type::UPDATE, 0, 3 * PAGE, 0x10_0000).unwrap();
    assert_eq!(rig.device.pinned_pages(), 3);
}

#[test]
fn a_refused_owner_leaves_no_owner_and_no_backend_features() {
    let mut rig = Rig::new(AddressMode::Objects);
    rig.device.release();
    rig.device.open().unwrap();
    rig.device.set_backend_features(BackendFeatures(0x10e)).unwrap();
    rig.parent.lock().unwrap().refuse_owner = true;
    assert_eq!(rig.device.set_owner(&rig.owner.clone()), Err(Errno::IO));
    assert!(rig.device.owner().is_none());
    assert_eq!(rig.device.acked_backend_features(), BackendFeatures::NONE);
}
