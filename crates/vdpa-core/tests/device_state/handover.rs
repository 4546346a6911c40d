//! Two opens of one device, saved and restored in the middle of a hand-over.

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::device::state::{Record, RestoreError, decode_all, encode_all};
use vdpa_core::features::{Features, Status};
use vdpa_core::handover::{Handle, Handover};
use vdpa_core::parent::Parent as _;
use vdpa_core::testing::{TestObject, TestObjects, TestProcess};
use vdpa_core::types::{Asid, IotlbMsg, Perm, QueueIndex, VringAddr, iotlb_type};

use super::parent::{Book, Kind};
use super::world::PAGE;

const KIND: Kind = Kind {
    way: 0,
    mode: 2,
    flags: [false, true, false, false, false, false, false, false, false],
    entries: 16,
    room: 16,
};
const Q0: QueueIndex = QueueIndex(0);

struct Shared {
    handover: Handover<Book>,
    devices: Vec<Device<Handle<Book>>>,
    objects: TestObjects,
    clients: Vec<TestProcess>,
}

/// A device that is set up but does not run yet.
fn bring_up(device: &mut Device<Handle<Book>>, who: &TestProcess, uaddr: u64) {
    device.open().unwrap();
    device.set_owner(who).unwrap();
    device.set_features(Features(0x3_0000_0000)).unwrap();
    device.set_vring_num(who, Q0, 8).unwrap();
    device.set_vring_addr(who, Q0, &VringAddr::default()).unwrap();
    device.set_vring_enable(who, Q0, true).unwrap();
    let msg = IotlbMsg { iova: 0, size: 2 * PAGE, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
    device.iotlb(who, Asid(0), &msg).unwrap();
}

impl Shared {
    /// The predecessor runs, and its successor is prepared.
    fn new() -> Self {
        let handover = Handover::new(Book::new(&KIND)).unwrap();
        let object = TestObject::new(4 * PAGE);
        let clients: Vec<_> = (0..2).map(|_| TestProcess::new()).collect();
        let mut devices = Vec::new();
        for client in &clients {
            let mut device = Device::new(handover.handle());
            bring_up(&mut device, client, client.map(&object));
            if devices.is_empty() {
                device.set_config(0, &[9]).unwrap();
                device.set_status(Status(15)).unwrap();
            }
            devices.push(device);
        }
        Self { handover, devices, objects: TestObjects::new(), clients }
    }

    fn snapshots(&mut self) -> Vec<Vec<Record>> {
        let objects = &mut self.objects;
        let shared = self.handover.snapshot(objects).unwrap();
        let devices = self.devices.iter().map(|device| device.snapshot(objects).unwrap());
        std::iter::once(shared).chain(devices.collect::<Vec<_>>()).collect()
    }

    fn restore(&mut self) -> Self {
        let saved = self.snapshots();
        let mut objects = self.objects.in_successor();
        let bytes = encode_all(&saved[0]).unwrap();
        let records = decode_all(&bytes).unwrap();
        let (handover, handles) = Handover::restore(Book::new(&KIND), &records, &mut objects).unwrap();
        let mut devices = Vec::new();
        for (handle, records) in handles.into_iter().zip(&saved[1..]) {
            let mut device = Device::restore(handle, records, &mut objects).unwrap();
            device.resume_queues(&[]).unwrap();
            devices.push(device);
        }
        let clients = self.clients.iter().map(|client| objects.client(client)).collect();
        Self { handover, devices, objects, clients }
    }

    fn running(&self) -> [bool; 2] {
        [0, 1].map(|at| self.devices[at].vring_infos().any(|info| info.running))
    }
}

/// Everything up to the successor's claim, and what comes of each.
fn hand_over(shared: &mut Shared) -> Vec<String> {
    let mut seen = Vec::new();
    let [old, new] = &mut shared.devices[..] else { panic!("two devices") };
    seen.push(format!("{:?}", new.set_status(Status(15))));
    seen.push(format!("{:?} {:?}", old.suspend(), new.set_status(Status(15))));
    seen.push(format!("{:?} {:?}", old.resume(), new.parent().id()));
    let mut config = [0];
    new.config(0, &mut config).unwrap();
    seen.push(format!("{config:?} {:?}", shared.running()));
    seen.push(format!("{:?}", shared.clients.iter().map(TestProcess::pinned_pages).collect::<Vec<_>>()));
    seen
}

#[test]
fn a_hand_over_goes_on_after_a_restore() {
    let mut original = Shared::new();
    let mut restored = original.restore();
    assert_eq!(original.running(), [true, false]);
    assert_eq!(restored.running(), [true, false]);
    assert_eq!(restored.clients[0].pinned_pages(), 2);
    assert_eq!(restored.devices[0].parent().save_state(), original.devices[0].parent().save_state());
    assert_eq!(hand_over(&mut original), hand_over(&mut restored));
}

#[test]
fn nothing_changes_by_saving_and_restoring() {
    let mut original = Shared::new();
    original.devices[0].quiesce().unwrap();
    let saved = original.snapshots();
    let mut objects = original.objects.in_successor();
    let (handover, _handles) = Handover::restore(Book::new(&KIND), &saved[0], &mut objects).unwrap();
    assert_eq!(handover.snapshot(&mut objects).unwrap(), saved[0]);
    original.devices[0].resume_queues(&[]).unwrap();
    assert_eq!(original.running(), [true, false]);
}

#[test]
fn a_handover_is_checked_as_a_device_is() {
    let mut original = Shared::new();
    let saved = original.snapshots();
    let mut objects = original.objects.in_successor();
    let mut refuse = |records: &[Record]| {
        Handover::restore(Book::new(&KIND), records, &mut objects).map(drop).unwrap_err()
    };
    assert!(matches!(refuse(&saved[1]), RestoreError::Stray { kind: "device" }));
    let mut records = saved[0].clone();
    let Record::Handover(state) = &mut records[0] else { panic!("it comes first") };
    state.active = Some(7);
    assert!(matches!(refuse(&records), RestoreError::Invalid { .. }));
    let Record::Handover(state) = &mut records[0] else { panic!("it comes first") };
    (state.active, state.written) = (Some(0), vec![(1000, 1)]);
    assert!(matches!(refuse(&records), RestoreError::Invalid { .. }));
    let single = Book::new(&Kind { way: 1, ..KIND });
    let error = Handover::restore(single, &saved[0], &mut original.objects).map(drop).unwrap_err();
    assert_eq!(error, RestoreError::Parent { what: "handover", errno: Errno::OPNOTSUPP });
}
