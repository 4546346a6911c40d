//! A device in front of another one: what reaches the one behind, and what does not.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::features::{Features, Status};
use vdpa_core::handover::Handover;
use vdpa_core::inprocess::{InProcess, Node};
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::{AddressMode, Dma, Parent, Profile, Upstream};
use vdpa_core::testing::{RamBlk, TestHost, TestProcess};
use vdpa_core::types::{Asid, GroupIndex, QueueIndex, Result, VringAddr};
use vdpa_core::vq::{QueueSetup, QueueState};

const Q: QueueIndex = QueueIndex(0);
const RUNNING: Status = Status(0xf);

/// Serves a device on that it has open.
#[derive(Debug)]
struct Front {
    profile: Profile,
    behind: Arc<InProcess<RamBlk, TestProcess>>,
    lost: bool,
}

impl Parent for Front {
    type Host = TestHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.behind.config(offset, out).unwrap();
    }

    fn write_config(&mut self, _: u32, _: &[u8]) {}

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        self.behind.set_features(features).map(|()| features)
    }

    fn start_queue(&mut self, _: QueueIndex, _: &QueueSetup<TestHost>, _: QueueState) -> Result<()> {
        Ok(())
    }

    fn stop_queue(&mut self, _: QueueIndex) -> Result<Option<QueueState>> {
        Ok(None)
    }

    fn dma(&mut self) -> Dma<'_, TestHost> {
        Dma::Platform
    }

    fn fail(&mut self) -> Result<()> {
        self.lost = true;
        Ok(())
    }

    fn upstream(&mut self) -> Option<Upstream<'_, TestHost>> {
        (!self.lost).then_some(&*self.behind)
    }
}

fn front(
    change: impl FnOnce(&mut Profile),
) -> (Device<Front>, Arc<InProcess<RamBlk, TestProcess>>, TestProcess) {
    let behind = Arc::new(Node::new(RamBlk::new(8).with(change)).open(TestProcess::new()).unwrap());
    behind.set_owner().unwrap();
    let mut profile = behind.with(|device, _| device.profile().clone());
    profile.address_mode = AddressMode::Objects;
    profile.identity_map = false;
    let mut device = Device::new(Front { profile, behind: Arc::clone(&behind), lost: false });
    let owner = TestProcess::new();
    device.open().unwrap();
    device.set_owner(&owner).unwrap();
    (device, behind, owner)
}

fn run(device: &mut Device<Front>, owner: &TestProcess) {
    let features = device.profile().features;
    device.set_status(Status(3)).unwrap();
    device.set_features(features).unwrap();
    device.set_status(Status(0xb)).unwrap();
    device.set_vring_num(owner, Q, 8).unwrap();
    let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
    device.set_vring_addr(owner, Q, &addr).unwrap();
    device.set_vring_base(owner, Q, 5).unwrap();
    device.set_vring_enable(owner, Q, true).unwrap();
    device.set_status(RUNNING).unwrap();
}

#[test]
fn requests_reach_the_device_behind() {
    let (mut device, behind, owner) = front(|_| ());
    run(&mut device, &owner);
    assert_eq!(behind.status(), Ok(RUNNING));
    let info = behind.with(|device, _| device.vring_infos().next().unwrap());
    assert_eq!((info.size, info.enabled, info.running), (8, true, true));
    assert_eq!((behind.vring_base(Q), device.vring_base(&owner, Q)), (Ok(5), Ok(5)));
    device.suspend().unwrap();
    assert!(behind.with(|device, _| device.suspended()));
    device.set_vring_base(&owner, Q, 7).unwrap();
    assert_eq!(behind.vring_base(Q), Ok(7));
    device.resume().unwrap();
    assert!(!behind.with(|device, _| device.suspended()));
    device.set_vring_enable(&owner, Q, false).unwrap();
    assert!(!behind.with(|device, _| device.vring_infos().next().unwrap().running));
    device.set_status(Status::RESET).unwrap();
    assert_eq!(behind.status(), Ok(Status::RESET));
    // A close resets it too; its owner stays whoever serves it on.
    run(&mut device, &owner);
    device.release();
    assert_eq!((behind.status(), behind.set_owner()), (Ok(Status::RESET), Err(Errno::BUSY)));
}

#[test]
fn what_is_illegal_does_not_reach_it_and_what_it_refuses_is_the_answer() {
    let (mut device, behind, owner) = front(|profile| {
        profile.suspend = false;
        profile.resume = false;
    });
    let other = TestProcess::new();
    assert_eq!(device.set_vring_num(&other, Q, 8), Err(Errno::PERM));
    assert_eq!(device.set_vring_num(&owner, Q, 7), Err(Errno::INVAL));
    assert_eq!(behind.with(|device, _| device.vring_infos().next().unwrap().size), 0);
    run(&mut device, &owner);
    assert_eq!(device.suspend(), Err(Errno::OPNOTSUPP));
    assert_eq!(device.set_group_asid(&owner, GroupIndex(0), Asid(0)), Err(Errno::BUSY));
    assert_eq!(device.set_status(Status(3)), Err(Errno::INVAL));
    assert_eq!(behind.status(), Ok(RUNNING));
    // The device behind was reset by somebody else: its answers count.
    behind.set_status(Status::RESET).unwrap();
    assert_eq!(device.vring_base(&owner, Q), behind.vring_base(Q));
}

#[test]
fn one_that_is_lost_is_not_asked() {
    let (mut device, behind, owner) = front(|_| ());
    run(&mut device, &owner);
    device.fail().unwrap();
    assert!(device.status().contains(Status::NEEDS_RESET));
    device.set_status(Status::RESET).unwrap();
    device.set_vring_num(&owner, Q, 4).unwrap();
    assert_eq!(behind.status(), Ok(RUNNING), "whoever has lost it has no say");
}

#[test]
fn it_is_not_shared_between_clients() {
    let (device, behind, _) = front(|_| ());
    let profile = device.profile().clone();
    drop(device);
    assert_eq!(Handover::new(Front { profile, behind, lost: false }).err(), Some(Errno::OPNOTSUPP));
}
