//! Requests that each state allows, and the state after a failure (uapi-spec 1.7, 1.8).

use super::*;

#[test]
fn each_state_allows_its_requests() {
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
    assert_eq!(device.set_status(Status(7)), Err(Errno::INVAL), "a status bit may not be cleared");
    device.suspend().unwrap();
    device.set_vring_enable(&owner, q, true).unwrap();
    device.set_status(Status(15)).unwrap();
    assert!(!rig.running(), "neither ENABLE nor a status write ends a suspension");
    rig.device.set_vring_base(&owner, q, 77).unwrap();
    assert_eq!(rig.device.vring_base(&owner, q), Ok(77));
    assert_eq!(rig.device.set_group_asid(&owner, GroupIndex(0), A0), Err(Errno::BUSY));
    rig.device.resume().unwrap();
    assert!(rig.running() && rig.parent.lock().unwrap().index == 77);
    rig.device.set_status(Status::RESET).unwrap();
    assert!(!rig.running());
    assert_eq!(rig.device.vring_base(&owner, q), Ok(0));
    assert_eq!(rig.device.suspend(), Ok(()), "no-op without DRIVER_OK");
}

#[test]
fn a_suspend_that_fails_leaves_the_device_running() {
    let mut rig = Rig::new(AddressMode::Objects);
    rig.start_queue_0();
    rig.parent.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.suspend(), Err(Errno::IO));
    assert!(!rig.device.suspended() && rig.running());
    rig.parent.lock().unwrap().stop_fails = false;
    rig.device.suspend().unwrap();
    assert!(rig.device.suspended() && !rig.running());
}

/// A status write has started the queues again, as in the simulator, while the device is still suspended.
#[test]
fn a_second_suspend_that_fails_leaves_the_device_running() {
    let profile = Profile { status_unsuspends: true, ..profile(AddressMode::Objects) };
    let mut rig = Rig::with(profile, process(&[]));
    rig.start_queue_0();
    rig.device.suspend().unwrap();
    rig.device.set_status(Status(15)).unwrap();
    assert!(rig.device.suspended() && rig.running());
    rig.parent.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.suspend(), Err(Errno::IO));
    assert_eq!(
        rig.device.check_invariants(),
        Ok(()),
        "a device with a running queue does not count as stopped"
    );
    rig.parent.lock().unwrap().stop_fails = false;
    rig.device.suspend().unwrap();
    assert!(!rig.running());
}

/// The same state: the queue goes on from the new position at once, and the next stop does not undo it.
#[test]
fn a_running_queue_of_a_suspended_device_takes_a_new_base() {
    let profile = Profile { status_unsuspends: true, ..profile(AddressMode::Objects) };
    let mut rig = Rig::with(profile, process(&[]));
    let owner = rig.owner.clone();
    rig.start_queue_0();
    rig.device.suspend().unwrap();
    rig.device.set_status(Status(15)).unwrap();
    rig.device.set_vring_base(&owner, QueueIndex(0), 7).unwrap();
    assert!(rig.device.suspended() && rig.running());
    rig.device.set_vring_enable(&owner, QueueIndex(0), false).unwrap();
    assert_eq!(rig.device.vring_base(&owner, QueueIndex(0)), Ok(7));
    rig.device.set_vring_enable(&owner, QueueIndex(0), true).unwrap();
    rig.parent.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.set_vring_base(&owner, QueueIndex(0), 8), Err(Errno::IO));
}

#[test]
fn a_queue_that_fails_to_stop_is_stopped_before_the_next_open() {
    let mut rig = Rig::new(AddressMode::Objects);
    let owner = rig.owner.clone();
    rig.start_queue_0();
    rig.parent.lock().unwrap().stop_fails = true;
    assert_eq!(rig.device.set_vring_enable(&owner, QueueIndex(0), false), Err(Errno::IO));
    assert_eq!(rig.device.check_invariants(), Ok(()), "a queue that runs is enabled");
    rig.device.release();
    assert_eq!(rig.device.open(), Err(Errno::IO), "the queue of the last client still runs");
    rig.parent.lock().unwrap().stop_fails = false;
    rig.device.open().unwrap();
    assert!(!rig.running());
    assert_eq!(rig.device.check_invariants(), Ok(()));
}
