//! A driver of `net` replaces itself while packets come and go: by each way, with each strategy.
//!
//! `VDPA_TEST_UPDATES` is the number of updates of each test (`just net-updates` makes a hundred), 10 by default. With it, time-outs of TCP
//! are errors too.
#![expect(unsafe_code, reason = "a descriptor is inherited by its number")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/guest.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod guest;
#[path = "support/held.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod held;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/streams.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod streams;
#[path = "support/tap.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod tap;
#[expect(dead_code, reason = "the parts of another test")]
#[path = "support/updating.rs"]
mod updating;

use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{getpid, set_child_subreaper};
use vdpa_client::update::{self, Devices, Image, Incoming, Plan, Restored, Strategy, Via, Way};
use vdpa_core::features::Features;
use vdpa_sys::exec::set_close_on_exec;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use guest::{FEATURES, Guest, Namespace, host_side, tcp_counter};
use robust::{RoleProcess, Vdpad, has_role, receive_line, send_line, variable};
use updating::{SOCKET, WAITS, WAY};

const DEVICE: &str = "TEST_DEVICE";
/// Number of the descriptor of the guest's interface.
const INTERFACE: &str = "TEST_INTERFACE";
const PACKED: &str = "TEST_PACKED";
/// Number of updates, on a machine that has nothing else to do.
const UPDATES: &str = "VDPA_TEST_UPDATES";

/// A driver that passes packets on, and replaces itself when it is told to.
#[test]
fn driver() {
    if !has_role("driver") {
        return;
    }
    let way: Way = variable(WAY).parse().unwrap();
    let restored = if std::env::var_os(WAITS).is_some() {
        let listener = UnixListener::bind(variable(SOCKET)).unwrap();
        let socket = listener.accept().unwrap().0;
        std::fs::remove_file(variable(SOCKET)).unwrap();
        Some(Incoming::receive(socket).unwrap().take_over().unwrap())
    } else {
        update::restore::<VhostVdpaFd>().unwrap()
    };
    let mut guest = match restored {
        None => {
            set_child_subreaper(Some(getpid())).unwrap();
            // SAFETY: the test has left it open for this process, which uses the number once.
            let interface = unsafe { OwnedFd::from_raw_fd(variable(INTERFACE).parse().unwrap()) };
            set_close_on_exec(&interface, true).unwrap();
            let packed = std::env::var_os(PACKED).is_some();
            let features = if packed { FEATURES.with(Features::RING_PACKED) } else { FEATURES };
            Guest::start(Path::new(&variable(DEVICE)), interface, features)
        }
        Some(Restored { mut devices, mut sections, mut descriptors, report, .. }) => {
            assert_eq!(report.way, way);
            let section = sections.take(guest::SECTION).unwrap();
            sections.ensure_consumed().unwrap();
            let session = devices.take("net0").unwrap();
            report.report_to_server("net0", &session).unwrap();
            Guest::adopt(session, descriptors.remove("interface").unwrap(), &section)
        }
    };
    send_line("ready");
    let input = std::io::stdin();
    guest.run(Some(input.as_fd()), |_| !readable());
    let line = receive_line();
    if line.is_empty() || line == "end" {
        return;
    }
    replace(way, line.parse().unwrap(), guest);
}

/// Whether the test has said something.
fn readable() -> bool {
    let input = std::io::stdin();
    poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&Timespec::default())).unwrap() > 0
}

#[expect(clippy::zombie_processes, reason = "the successor outlives this process")]
fn replace(way: Way, strategy: Strategy, guest: Guest) {
    let image = Image::new("/proc/self/exe");
    let via = match way {
        Way::Exec => Via::Exec(image),
        Way::Fork => Via::Fork(image),
        Way::HandOver => {
            let mut command = Command::new("/proc/self/exe");
            command.args(std::env::args().skip(1)).env(WAITS, "1").stdin(Stdio::inherit()).spawn().unwrap();
            Via::HandOver(updating::connect(Path::new(&variable(SOCKET))))
        }
    };
    let plan = Plan::new().strategy(strategy).late_section(guest::SECTION, 1, false);
    let plan = plan.descriptor("interface", guest.tap());
    let late = guest.late();
    let devices = Devices::one("net0", guest.session);
    let prepared = plan.prepare(&devices, via).unwrap();
    prepared.switch(devices, late).map_err(|failed| failed.error).unwrap();
}

/// A card with a driver, in the network namespaces of host and guest.
struct Ground {
    vdpad: Vdpad,
    guest: Namespace,
    driver: RoleProcess,
}

impl Ground {
    fn new(way: Way, packed: bool) -> Option<Self> {
        tap::namespace(false)?;
        host_side(1500);
        let vdpad = Vdpad::start(Duration::from_secs(if updates() > 20 { 1800 } else { 110 }));
        let path = vdpad.add("net0", "net", "tap tap0 mac 52:54:11:12:34:56 packed on");
        let (guest, interface) = Namespace::new(1500);
        set_close_on_exec(&interface, false).unwrap();
        let number = interface.as_raw_fd().to_string();
        let socket = vdpad.dir().join("next");
        let mut variables = vec![
            (DEVICE, path.to_str().unwrap()),
            (WAY, way.name()),
            (INTERFACE, number.as_str()),
            (SOCKET, socket.to_str().unwrap()),
        ];
        if packed {
            variables.push((PACKED, "1"));
        }
        let mut driver = RoleProcess::start("driver", &variables);
        driver.receive("ready");
        Some(Self { vdpad, guest, driver })
    }

    fn update(&mut self, strategy: Strategy) {
        self.driver.send(strategy.name());
        self.driver.receive("ready");
    }

    fn end(mut self) {
        self.driver.send("end");
        self.driver.end_of_all();
        let update = self.vdpad.client().update("net0").unwrap();
        assert_eq!((update.updates, update.rolled_back), (updates(), 0));
    }
}

fn updates() -> u64 {
    std::env::var(UPDATES).map_or(10, |number| number.parse().unwrap())
}

/// Pings from the host, one every millisecond, until they end.
struct Pings {
    ends: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<()>,
    receiver: JoinHandle<(u64, Duration)>,
}

/// What has become of pings.
#[derive(Debug)]
struct Answers {
    sent: u64,
    answered: u64,
    /// The longest time between two answers.
    gap: Duration,
}

impl Pings {
    /// Longest time for the last answer.
    const LATE: Duration = Duration::from_secs(2);

    fn start(guest: &Namespace) -> Self {
        let echo = guest.udp("10.0.0.2:7");
        thread::spawn(move || {
            let mut packet = [0; 64];
            while let Ok((len, from)) = echo.recv_from(&mut packet) {
                let _ = echo.send_to(&packet[..len], from);
            }
        });
        let socket = UdpSocket::bind("10.0.0.1:7000").unwrap();
        socket.connect("10.0.0.2:7").unwrap();
        socket.set_read_timeout(Some(Self::LATE)).unwrap();
        let (ends, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let other = socket.try_clone().unwrap();
        let (end, count) = (Arc::clone(&ends), Arc::clone(&sent));
        let sender = thread::spawn(move || {
            let mut next = Instant::now();
            while !end.load(Ordering::Relaxed) {
                let number = count.load(Ordering::Relaxed);
                other.send(&number.to_le_bytes()).unwrap();
                count.store(number + 1, Ordering::Relaxed);
                next += Duration::from_millis(1);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        let (end, count) = (Arc::clone(&ends), Arc::clone(&sent));
        let receiver = thread::spawn(move || {
            let (mut wanted, mut gap, mut last) = (0_u64, Duration::ZERO, Instant::now());
            let mut packet = [0; 64];
            while !end.load(Ordering::Relaxed) || wanted < count.load(Ordering::Relaxed) {
                // None has come for two seconds: they are lost.
                let Ok(8) = socket.recv(&mut packet) else { break };
                let now = Instant::now();
                if wanted > 0 {
                    gap = gap.max(now - last);
                }
                last = now;
                wanted += 1;
            }
            (wanted, gap)
        });
        Self { ends, sent, sender, receiver }
    }

    fn end(self) -> Answers {
        self.ends.store(true, Ordering::Relaxed);
        self.sender.join().unwrap();
        let (answered, gap) = self.receiver.join().unwrap();
        Answers { sent: self.sent.load(Ordering::Relaxed), answered, gap }
    }
}

/// A driver is replaced while the host pings the guest every millisecond: each ping is answered, once.
fn loses_no_ping(way: Way, strategy: Strategy, packed: bool) {
    let Some(mut ground) = Ground::new(way, packed) else { return };
    let pings = Pings::start(&ground.guest);
    for _ in 0..updates() {
        thread::sleep(Duration::from_millis(20));
        ground.update(strategy);
    }
    thread::sleep(Duration::from_millis(20));
    let answers = pings.end();
    let Answers { sent, answered, gap } = answers;
    println!(
        "{way}, {strategy}, packed {packed}: {} updates, {answered} of {sent} answered, longest gap {gap:?}",
        updates()
    );
    assert!(sent > 20 * updates(), "{sent} pings");
    assert_eq!(answered, sent, "pings were lost");
    ground.end();
}

macro_rules! pings {
    ($($name:ident: $way:ident, $strategy:ident, $packed:literal;)*) => {
        mod pings {
            use super::*;
            $(
                #[test]
                fn $name() {
                    loses_no_ping(Way::$way, Strategy::$strategy, $packed);
                }
            )*
        }
    };
}

pings! {
    live_by_exec: Exec, Live, false;
    live_by_fork: Fork, Live, false;
    live_by_hand_over: HandOver, Live, true;
    resume_by_exec: Exec, Resume, true;
    resume_by_fork: Fork, Resume, false;
    resume_by_hand_over: HandOver, Resume, false;
    reset_by_exec: Exec, Reset, false;
    reset_by_fork: Fork, Reset, true;
    reset_by_hand_over: HandOver, Reset, false;
}

/// A stream each way while the driver is replaced, with each strategy in turn: every byte arrives, and TCP notices nothing that it would
/// wait for.
fn streams_go_on(way: Way) {
    let Some(mut ground) = Ground::new(way, false) else { return };
    let ends = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind("10.0.0.1:5001").unwrap();
    let from_guest = (ground.guest.connect("10.0.0.1:5001"), listener.accept().unwrap().0);
    let listener = ground.guest.listen("10.0.0.2:5002");
    let to_guest = (TcpStream::connect("10.0.0.2:5002").unwrap(), listener.accept().unwrap().0);
    let sides = [(1, from_guest), (2, to_guest)].map(|(seed, (from, to))| {
        let end = Arc::clone(&ends);
        let sender = thread::spawn(move || streams::send(from, seed, |_| !end.load(Ordering::Relaxed)));
        (sender, thread::spawn(move || streams::verify(to, seed)))
    });
    let strategies = [Strategy::Live, Strategy::Resume, Strategy::Reset];
    let timeouts = |guest: &Namespace| tcp_counter("TCPTimeouts") + guest.call(|| tcp_counter("TCPTimeouts"));
    let before = timeouts(&ground.guest);
    for strategy in strategies.into_iter().cycle().take(usize::try_from(updates()).unwrap()) {
        thread::sleep(Duration::from_millis(50));
        ground.update(strategy);
    }
    let during = timeouts(&ground.guest) - before;
    ends.store(true, Ordering::Relaxed);
    let bytes = sides.map(|(sender, receiver)| {
        let sent = sender.join().unwrap();
        assert_eq!(receiver.join().unwrap(), sent, "every byte arrives");
        sent
    });
    println!("{way}: {} updates, {bytes:?} bytes, {during} timeouts of TCP", updates());
    assert!(bytes.iter().all(|bytes| *bytes > updates() * 100_000), "{bytes:?}");
    // On a machine that is busy, TCP waits for its turn on a processor as well.
    assert!(std::env::var_os(UPDATES).is_none() || during == 0, "{during} retransmission timeouts");
    ground.end();
}

#[test]
fn streams_go_on_over_execs() {
    streams_go_on(Way::Exec);
}

#[test]
fn streams_go_on_over_forks() {
    streams_go_on(Way::Fork);
}

#[test]
fn streams_go_on_over_hand_overs() {
    streams_go_on(Way::HandOver);
}
