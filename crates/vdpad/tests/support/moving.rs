//! The two programs of a migration, as roles of the test program: each with the machine of the library's example, whose guest verifies
//! what it reads. At a step they do what they are told: end, cut the connection, or kill a daemon.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, getpid, kill_process};
use vdpa_client::device::Device;
use vdpa_client::dma::Backing;
use vdpa_client::memory::Memory;
use vdpa_client::migrate::{
    self, Arrival, Arrived, Machine, MachineError, Plan, RegionOffer, SendError, Step, Target,
};
use vdpa_client::session::{DirtyPages, Session};
use vdpa_client::state::{Section, Sections};
use vdpa_control::client::Client;
use vdpa_core::features::Features;
use vdpa_core::types::Perm;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::machine::{BASE, Cpu, PLACE, QUEUE, Shared, Vcpu};
use super::robust::{receive_line, send_line, variable};

const SIZE: u64 = 8 << 20;
/// Bytes that the guest writes in a second.
const RATE: u64 = 4 << 20;
const CPU: &str = "test/cpu";
/// Time in which a guest that works has some answers.
const LIMIT: Duration = Duration::from_secs(20);

/// Environment variables of the programs.
pub(crate) const DEVICE: &str = "TEST_DEVICE";
pub(crate) const SOCKET: &str = "TEST_SOCKET";
pub(crate) const FAULT: &str = "TEST_FAULT";
pub(crate) const DAEMON_DIR: &str = "TEST_DAEMON_DIR";

/// What is done when a program has done a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The program is killed.
    Kill,
    /// The connection is cut.
    Cut,
    /// The daemon of its device is killed.
    KillDaemon,
}

/// The fault of a program, from its environment.
struct Fault {
    at: Option<(Step, Action)>,
    stream: UnixStream,
}

impl Fault {
    fn new(stream: &UnixStream) -> Self {
        let text = variable(FAULT);
        let actions = [Action::Kill, Action::Cut, Action::KillDaemon];
        let at = text.split_once(' ').map(|(step, action)| {
            let step = Step::ALL.into_iter().find(|known| format!("{known:?}") == step).unwrap();
            (step, actions.into_iter().find(|known| format!("{known:?}") == action).unwrap())
        });
        Self { at, stream: stream.try_clone().unwrap() }
    }

    fn reached(&mut self, step: Step) {
        let Some((_, action)) = self.at.take_if(|(at, _)| *at == step) else { return };
        match action {
            Action::Kill => kill_process(getpid(), Signal::KILL).unwrap(),
            Action::Cut => self.stream.shutdown(Shutdown::Both).unwrap(),
            Action::KillDaemon => {
                let client = Client::new(Path::new(&variable(DAEMON_DIR)).join("control.sock")).unwrap();
                let pid = client.daemon().unwrap().pid;
                kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
            }
        }
    }
}

struct Computer {
    memory: Arc<Memory>,
    events: [EventFd; 2],
    vcpu: Option<Vcpu>,
    shared: Arc<Shared>,
    cpu: Option<Cpu>,
    fault: Fault,
}

impl Machine for Computer {
    fn track(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn written(&mut self, _region: &str, pages: &mut DirtyPages) -> Result<(), MachineError> {
        self.shared.take_dirty(pages);
        Ok(())
    }

    fn untrack(&mut self) {}

    fn pause(&mut self) -> Result<(), MachineError> {
        self.cpu = Some(self.vcpu.take().ok_or("it does not run")?.pause()?);
        Ok(())
    }

    fn save(&mut self) -> Result<Sections, MachineError> {
        let cpu = self.cpu.as_ref().ok_or("it was not stopped")?;
        Ok(Sections::from_iter([Section::json(CPU, 1, cpu)?]))
    }

    fn resume(&mut self) {
        if let Some(cpu) = self.cpu.take() {
            let vcpu = Vcpu::resume(&self.memory, self.events.clone(), cpu).unwrap();
            self.shared = Arc::clone(&vcpu.shared);
            self.vcpu = Some(vcpu);
        }
    }

    fn step(&mut self, step: Step) {
        self.fault.reached(step);
    }
}

struct Place {
    memory: Option<Arc<Memory>>,
    cpu: Option<Cpu>,
    fault: Fault,
}

impl Target for Place {
    fn memory(&mut self, region: &RegionOffer) -> Result<Backing, MachineError> {
        let memory =
            Memory::map(&region.name, memfd::create(c"ram", region.size, None)?, 0, region.size, false)?;
        self.memory = Some(Arc::clone(&memory));
        Ok(Backing::Memory(memory, 0))
    }

    fn load(&mut self, mut sections: Sections) -> Result<(), MachineError> {
        self.cpu = Some(sections.take(CPU).ok_or("no registers")?.parse(1)?);
        Ok(sections.ensure_consumed()?)
    }

    fn step(&mut self, step: Step) {
        self.fault.reached(step);
    }
}

/// Lets a guest run until it has some more answers, and each of them is right; then stops it.
fn verify(vcpu: Vcpu) {
    const MORE: u64 = 600;
    let done = || vcpu.shared.done.load(std::sync::atomic::Ordering::Relaxed);
    let (first, begun) = (done(), std::time::Instant::now());
    while done() < first + MORE && vcpu.is_alive() {
        assert!(begun.elapsed() < LIMIT, "the guest has had {} answers", done() - first);
        std::thread::sleep(Duration::from_millis(2));
    }
    vcpu.pause().unwrap();
    send_line("verified");
}

/// Makes the machine, tells of it, and has it move when it is told to.
pub(crate) fn source() {
    let memory = Memory::map("ram", memfd::create(c"ram", SIZE, None).unwrap(), 0, SIZE, false).unwrap();
    let device = Device::<VhostVdpaFd>::open(variable(DEVICE)).unwrap();
    let mut session = device.negotiate(Features::NONE).unwrap();
    session.map_memory("ram", &memory, 0, BASE, SIZE, Perm::RW).unwrap();
    let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
    let [kick, call] = events.clone();
    session.add_guest_queue(QUEUE, PLACE, kick, call).unwrap();
    session.start().unwrap();
    let vcpu = Vcpu::boot(&memory, events.clone(), RATE).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let mut stream = UnixStream::connect(variable(SOCKET)).unwrap();
    let fault = Fault::new(&stream);
    let shared = Arc::clone(&vcpu.shared);
    let mut computer = Computer { memory, events, vcpu: Some(vcpu), shared, cpu: None, fault };
    match migrate::send(&mut session, &mut computer, &mut stream, &Plan::default()) {
        Ok(_) => {
            send_line("moved");
        }
        Err(SendError::Here(error)) => {
            send_line(&format!("here {}", vdpa_client::error::chain(&error)));
            drop(stream);
            verify(computer.vcpu.take().unwrap());
        }
        Err(SendError::Undecided { source, .. }) => {
            send_line(&format!("undecided {source}"));
            decided(&mut session, &mut computer);
        }
        Err(error) => send_line(&format!("lost {}", vdpa_client::error::chain(&error))),
    }
    receive_line();
}

/// What whoever knows has decided.
fn decided(session: &mut Session<VhostVdpaFd>, computer: &mut Computer) {
    if receive_line() == "resume" {
        migrate::resume(session, computer).unwrap();
        verify(computer.vcpu.take().unwrap());
    }
}

/// Waits for a machine, and runs it.
pub(crate) fn destination() {
    let listener = UnixListener::bind(variable(SOCKET)).unwrap();
    send_line("listens");
    let (stream, _) = listener.accept().unwrap();
    let mut place = Place { memory: None, cpu: None, fault: Fault::new(&stream) };
    let arrived = Arrival::accept(stream).and_then(|arrival| {
        let device = Device::<VhostVdpaFd>::open(variable(DEVICE))?;
        arrival.prepare(device, true, &mut place)?.receive(&mut place)
    });
    let landed = match arrived {
        Ok(Arrived::Landed(landed)) => Some(landed),
        Ok(Arrived::Waiting(waiting)) => {
            send_line(&format!("waiting {}", waiting.reason));
            if receive_line() == "start" {
                Some(waiting.start(&mut place).unwrap())
            } else {
                waiting.abandon();
                None
            }
        }
        Err(error) => {
            send_line(&format!("failed {}", vdpa_client::error::chain(&error)));
            None
        }
    };
    if let Some(landed) = &landed {
        send_line("landed");
        let queue = landed.session.guest_queue(QUEUE).unwrap();
        let events = [queue.kick().clone(), queue.call().clone()];
        let memory = place.memory.take().unwrap();
        verify(Vcpu::resume(&memory, events, place.cpu.take().unwrap()).unwrap());
    }
    // The device stays as it is until then.
    receive_line();
}
