//! Arguments that requests check in every state (uapi-spec 1.4 to 1.6).

use super::*;

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
fn config_requests_are_bounded_and_the_first_read_negotiates_no_features() {
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
