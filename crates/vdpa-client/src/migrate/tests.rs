//! Moves between two devices of this process: what arrives, and what is refused.

mod cut;
mod messages;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use vdpa_core::Errno;
use vdpa_core::features::{Features, Status};
use vdpa_core::inprocess::{InProcess, Node};
use vdpa_core::testing::RamBlk;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::memfd;
use vdpa_sys::process::ThisProcess;

use super::*;
use crate::device::Device;
use crate::dma::Backing;
use crate::memory::Memory;
use crate::session::{DirtyPages, Session};
use crate::state::{Section, Sections};
use crate::vring::GuestRing;

type Disk = InProcess<RamBlk<LinuxHost>, ThisProcess>;

const SIZE: u64 = 64 * 4096;
const IOVA: u64 = 0x10_0000;
const QUEUE: QueueIndex = QueueIndex(0);
const RING: GuestRing = GuestRing { size: 16, desc: IOVA, driver: IOVA + 0x1000, device: IOVA + 0x2000 };
const BASE: QueueState = QueueState::Split { avail_index: 7 };

fn node(moves: bool) -> Node<RamBlk<LinuxHost>> {
    Node::new(RamBlk::on_host(64).with(|profile| profile.moves = moves))
}

fn memory(name: &str) -> Arc<Memory> {
    Memory::map(name, memfd::create(c"ram", SIZE, None).unwrap(), 0, SIZE, false).unwrap()
}

fn bytes(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    memory.as_map().unwrap().read(0, &mut bytes).unwrap();
    bytes
}

/// A running device with a ring that has been in use, and memory with something in it.
fn running(node: &Node<RamBlk<LinuxHost>>) -> (Session<Disk>, Arc<Memory>) {
    let device = Device::from_ops(node.open(ThisProcess::default()).unwrap());
    let mut session = device.negotiate(Features::of(&[Features::BLK_FLUSH])).unwrap();
    let memory = memory("ram");
    session.map_memory("ram", &memory, 0, IOVA, SIZE, Perm::RW).unwrap();
    let events = (EventFd::new().unwrap(), EventFd::new().unwrap());
    session.add_guest_queue_at(QUEUE, RING, events.0, events.1, BASE, true).unwrap();
    // Nothing is available: the index of the driver is where the device goes on.
    memory.as_map().unwrap().write(0x1002, &7_u16.to_le_bytes()).unwrap();
    for page in 8..40 {
        memory.as_map().unwrap().write(page * 4096, &[u8::try_from(page).unwrap(); 4096]).unwrap();
    }
    session.start().unwrap();
    (session, memory)
}

/// Whether the device is served.
fn runs(node: &Node<RamBlk<LinuxHost>>) -> bool {
    node.with(|device| device.status().contains(Status::DRIVER_OK) && !device.suspended())
}

/// A machine, and what was asked of it.
#[derive(Default)]
struct Computer {
    paused: bool,
    steps: Vec<Step>,
    refuse: Option<&'static str>,
    cancel: bool,
}

impl Computer {
    fn may(&self, what: &'static str) -> Result<(), MachineError> {
        if self.refuse == Some(what) { Err(what.into()) } else { Ok(()) }
    }
}

impl Machine for Computer {
    fn track(&mut self) -> Result<(), MachineError> {
        self.may("track")
    }

    fn written(&mut self, _region: &str, _pages: &mut DirtyPages) -> Result<(), MachineError> {
        self.may("written")
    }

    fn untrack(&mut self) {}

    fn pause(&mut self) -> Result<(), MachineError> {
        self.paused = true;
        self.may("pause")
    }

    fn save(&mut self) -> Result<Sections, MachineError> {
        self.may("save")?;
        Ok(Sections::from_iter([Section::new("test/cpu", 1, b"registers".to_vec())]))
    }

    fn resume(&mut self) {
        self.paused = false;
    }

    fn step(&mut self, step: Step) {
        self.steps.push(step);
    }

    fn progress(&mut self, _progress: &Progress) -> Control {
        if self.cancel { Control::Cancel } else { Control::Continue }
    }
}

#[derive(Default)]
struct Place {
    memory: Option<Arc<Memory>>,
    cpu: Option<Vec<u8>>,
    refuse: Option<&'static str>,
    steps: Vec<Step>,
}

impl Target for Place {
    fn memory(&mut self, region: &RegionOffer) -> Result<Backing, MachineError> {
        if self.refuse == Some("memory") {
            return Err("no room".into());
        }
        let memory = memory(&region.name);
        self.memory = Some(Arc::clone(&memory));
        Ok(Backing::Memory(memory, 0))
    }

    fn load(&mut self, mut sections: Sections) -> Result<(), MachineError> {
        self.cpu = sections.take("test/cpu").map(|section| section.payload);
        if self.refuse == Some("load") { Err("unknown processor".into()) } else { Ok(()) }
    }

    fn step(&mut self, step: Step) {
        self.steps.push(step);
    }
}

/// A stream that is cut after so many bytes were written.
struct Cut(UnixStream, usize);

impl Read for Cut {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Cut {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = buf.len().min(self.1);
        if len == 0 && !buf.is_empty() {
            let _ = self.0.shutdown(std::net::Shutdown::Both);
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let written = self.0.write(&buf[..len])?;
        self.1 -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn plan() -> Plan {
    Plan { track: false, ..Plan::default() }
}

struct Outcome {
    sent: Result<Report, SendError>,
    arrived: Result<Arrived<Disk>, MigrateError>,
    session: Session<Disk>,
    machine: Computer,
    place: Place,
    before: Vec<u8>,
    nodes: [Node<RamBlk<LinuxHost>>; 2],
}

/// Moves a machine; each side's stream is cut after so many bytes.
fn move_it(machine: Computer, place: Place, limits: [usize; 2], early: bool) -> Outcome {
    let nodes = [node(true), node(true)];
    let (mut session, memory) = running(&nodes[0]);
    let before = bytes(&memory);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let target = nodes[1].clone();
    let destination = thread::spawn(move || {
        let mut place = place;
        let arrived = Arrival::accept(Cut(theirs, limits[1])).and_then(|arrival| {
            let device = Device::from_ops(target.open(ThisProcess::default()).unwrap());
            arrival.prepare(device, early, &mut place)?.receive(&mut place)
        });
        (arrived, place)
    });
    let mut machine = machine;
    let mut stream = Cut(ours, limits[0]);
    let sent = send(&mut session, &mut machine, &mut stream, &plan());
    drop(stream);
    let (arrived, place) = destination.join().unwrap();
    Outcome { sent, arrived, session, machine, place, before, nodes }
}

const ALL: [usize; 2] = [usize::MAX; 2];

fn check_landed(outcome: &Outcome, session: &Session<Disk>) {
    assert!(runs(&outcome.nodes[1]) && !runs(&outcome.nodes[0]));
    assert_eq!(bytes(outcome.place.memory.as_ref().unwrap()), outcome.before);
    assert_eq!(outcome.place.cpu.as_deref(), Some(&b"registers"[..]));
    assert_eq!(session.vring_base(QUEUE).unwrap(), BASE);
    assert_eq!(session.guest_queue(QUEUE).unwrap().ring(), RING);
    assert_eq!(session.features(), outcome.session.features());
}

/// Who has the machine after the connection was cut, with what both sides say.
fn settle(mut outcome: Outcome) -> &'static str {
    let arrived = std::mem::replace(&mut outcome.arrived, Err(MigrateError::Cancelled));
    match (&outcome.sent, arrived) {
        (Ok(_), Ok(Arrived::Landed(landed))) => {
            check_landed(&outcome, &landed.session);
            "there"
        }
        (Err(SendError::Here(_)), arrived) => {
            assert!(runs(&outcome.nodes[0]) && !runs(&outcome.nodes[1]));
            assert!(!outcome.machine.paused);
            if let Ok(Arrived::Waiting(waiting)) = arrived {
                waiting.abandon();
            } else {
                assert!(arrived.is_err());
            }
            assert!(!runs(&outcome.nodes[1]));
            "here"
        }
        (Err(SendError::Undecided { .. }), Ok(Arrived::Landed(landed))) => {
            check_landed(&outcome, &landed.session);
            assert!(outcome.machine.paused);
            "there, and the source asks"
        }
        (Err(SendError::Undecided { id, .. }), Ok(Arrived::Waiting(waiting))) => {
            assert!(!runs(&outcome.nodes[0]) && !runs(&outcome.nodes[1]));
            let (mut ours, mut theirs) = UnixStream::pair().unwrap();
            let known = id.clone();
            let source = thread::spawn(move || {
                answer(&mut ours, |id| if id == known { Fate::NotMine } else { Fate::Unknown }).unwrap()
            });
            assert_eq!(ask(&mut theirs, waiting.id()).unwrap(), Fate::NotMine);
            source.join().unwrap();
            let landed = waiting.start(&mut outcome.place).unwrap();
            check_landed(&outcome, &landed.session);
            "there, after it has asked"
        }
        (sent, arrived) => panic!("{sent:?}, and there {arrived:?}"),
    }
}

#[test]
fn a_machine_moves() {
    for early in [true, false] {
        let mut outcome = move_it(Computer::default(), Place::default(), ALL, early);
        let report = outcome.sent.as_ref().unwrap();
        assert_eq!((report.last.pages, report.last.bytes), (64, 33 * 4096), "pages of zeros need no data");
        assert!(outcome.machine.paused);
        let Ok(Arrived::Landed(landed)) =
            std::mem::replace(&mut outcome.arrived, Err(MigrateError::Cancelled))
        else {
            panic!("it has not arrived")
        };
        check_landed(&outcome, &landed.session);
        assert_eq!(landed.id, report.id);
        // An interrupt and a kick that were on their way.
        let queue = landed.session.guest_queue(QUEUE).unwrap();
        assert!(queue.kick().drain() > 0 && queue.call().drain() > 0);
        let passed = |steps: &[Step], of| {
            let all = Step::ALL.into_iter().filter(|step| step.is_of_destination() == of);
            let all: Vec<_> = all.filter(|step| !matches!(step, Step::Tracking | Step::Round)).collect();
            assert_eq!(steps, all);
        };
        passed(&outcome.machine.steps, false);
        passed(&outcome.place.steps, true);
    }
}

#[test]
fn whoever_refuses_says_why_and_the_machine_runs_on() {
    for what in ["pause", "save"] {
        let machine = Computer { refuse: Some(what), ..Computer::default() };
        let outcome = move_it(machine, Place::default(), ALL, true);
        let Err(MigrateError::Refused { reason }) = &outcome.arrived else { panic!("{:?}", outcome.arrived) };
        assert!(reason.contains(what), "{reason}");
        assert_eq!(settle(outcome), "here");
    }
    for (what, text) in [("memory", "no room"), ("load", "unknown processor")] {
        let place = Place { refuse: Some(what), ..Place::default() };
        let outcome = move_it(Computer::default(), place, ALL, true);
        let Err(SendError::Here(MigrateError::Refused { reason })) = &outcome.sent else {
            panic!("{:?}", outcome.sent)
        };
        assert!(reason.contains(text), "{reason}");
        assert_eq!(settle(outcome), "here");
    }
}

/// Offers a machine, and gets the answer of a destination that has `device`.
fn answer_of(session: &mut Session<Disk>, node: &Node<RamBlk<LinuxHost>>, plan: &Plan) -> SendError {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let target = node.clone();
    let destination = thread::spawn(move || {
        let arrival = Arrival::accept(theirs)?;
        let device = Device::from_ops(target.open(ThisProcess::default()).unwrap());
        arrival.prepare(device, true, &mut Place::default())?.receive(&mut Place::default()).map(drop)
    });
    let sent = send(session, &mut Computer::default(), &mut ours, plan).unwrap_err();
    drop(ours);
    assert!(destination.join().unwrap().is_err());
    sent
}

#[test]
fn what_cannot_move_is_told_before_anything_stops() {
    let text = |error: SendError| crate::error::chain(&error);
    let (mut session, _) = running(&node(true));
    let fixed = text(answer_of(&mut session, &node(false), &plan()));
    assert!(fixed.contains("does not offer DEVICE_STATE"), "{fixed}");
    let poor = Node::new(RamBlk::on_host(64).with(|profile| {
        profile.moves = true;
        profile.features = profile.features.without(Features::BLK_FLUSH);
    }));
    let lacks = text(answer_of(&mut session, &poor, &plan()));
    assert!(lacks.contains("lacks 0x200"), "{lacks}");
    let untracked = text(answer_of(&mut session, &node(true), &Plan::default()));
    assert!(untracked.contains("DIRTY_LOG") && untracked.contains("Plan::track"), "{untracked}");
    session.suspend().unwrap();
    assert!(text(answer_of(&mut session, &node(true), &plan())).contains("is suspended"));
    session.resume().unwrap();
    let small = Node::new(RamBlk::on_host(32).with(|profile| profile.moves = true));
    let capacity = text(answer_of(&mut session, &small, &plan()));
    assert!(capacity.contains("VDPA_STATE_LOAD") && capacity.contains(Errno::INVAL.text()), "{capacity}");
    let (mut own, memory) = running(&node(true));
    own.map_at(&memory, 0, 0x4000_0000, 4096, Perm::RW).unwrap();
    assert!(text(answer_of(&mut own, &node(true), &plan())).contains("mappings without a name"));
}

#[test]
fn a_migration_is_cancelled() {
    let machine = Computer { cancel: true, ..Computer::default() };
    let nodes = [node(true), node(true)];
    let (mut session, memory) = running(&nodes[0]);
    // More than is sent at a time.
    let big = Memory::map("big", memfd::create(c"big", 8 << 20, None).unwrap(), 0, 8 << 20, false).unwrap();
    big.as_map().unwrap().write(0, &vec![1; 8 << 20]).unwrap();
    session.map_memory("big", &big, 0, 0x8000_0000, 8 << 20, Perm::RO).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let target = nodes[1].clone();
    let destination = thread::spawn(move || {
        let device = Device::from_ops(target.open(ThisProcess::default()).unwrap());
        let mut place = Roomy;
        Arrival::accept(theirs)?.prepare(device, true, &mut place)?.receive(&mut place).map(drop)
    });
    let mut machine = machine;
    let sent = send(&mut session, &mut machine, &mut ours, &plan());
    assert!(matches!(sent, Err(SendError::Here(MigrateError::Cancelled))), "{sent:?}");
    drop(ours);
    assert!(destination.join().unwrap().is_err());
    assert!(runs(&nodes[0]) && !runs(&nodes[1]) && !machine.paused);
    drop(memory);
}

struct Roomy;

impl Target for Roomy {
    fn memory(&mut self, region: &RegionOffer) -> Result<Backing, MachineError> {
        Ok(Backing::Object(memfd::create(c"ram", region.size, None)?))
    }

    fn load(&mut self, _sections: Sections) -> Result<(), MachineError> {
        Ok(())
    }
}
