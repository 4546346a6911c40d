//! A holder and its daemons as real processes.
//!
//! A test starts this binary again as a holder, whose daemons are this binary as well: the test functions `part_*` play the
//! parts. Commands to the daemon are lines on standard input, which all processes share.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_holder::client::{Client, Event};
use vdpa_holder::holder::{self, Options, Outcome, Program};
use vdpa_holder::protocol::{Kind, Role};
use vdpa_sys::mm_reaper::MmReaper;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uring::{Ring, RingRecord};
use vdpa_sys::{clock, exec, memfd};

/// Milliseconds of hang, upgrade and start, and the crash limit.
const LIMITS: &str = "VDPA_HOLDER_TEST_LIMITS";
const TIMEOUT: Duration = Duration::from_secs(20);
const RUNNER: [&str; 3] = ["--nocapture", "--test-threads=1", "--exact"];

/// A service under test; its holder is asked to end when dropped, and ends its daemon.
struct Service {
    child: Child,
    lines: Receiver<String>,
}

impl Service {
    fn start(limits: &str) -> Self {
        // The test runner has a second thread, which must not take the signals that are for the holder.
        let mut command = Command::new("env");
        command.args(["--block-signal=TERM", "--block-signal=HUP"]).arg(std::env::current_exe().unwrap());
        command.args(RUNNER).arg("part_holder").env(LIMITS, limits);
        Self::run(command)
    }

    fn run(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = exec::terminate_with_parent(&mut command).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, said)) = line.split_once("SAYS ") {
                    let _ = send.send(said.to_owned());
                }
            }
        });
        Self { child, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(TIMEOUT).unwrap()
    }

    fn command(&mut self, command: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{command}").unwrap();
    }

    fn ask(&mut self, command: &str) -> String {
        self.command(command);
        self.line()
    }

    /// The start of a daemon: what it says without its process id, and that.
    fn started(&self) -> (String, Pid) {
        let line = self.line();
        let (rest, pid) = line.rsplit_once(' ').unwrap();
        (rest.to_owned(), Pid::from_raw(pid.parse().unwrap()).unwrap())
    }

    /// How the holder ended.
    fn ended(mut self) -> String {
        let line = self.line();
        self.child.wait().unwrap();
        line
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
            let _ = kill_process(pid, Signal::TERM);
            let _ = self.child.wait();
        }
    }
}

fn say(text: impl std::fmt::Display) {
    // One write, so that lines of different processes do not mix.
    let line = format!("\nSAYS {text}\n");
    File::from(std::io::stdout().as_fd().try_clone_to_owned().unwrap()).write_all(line.as_bytes()).unwrap();
}

fn this_program(part: &str) -> Program {
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    let args = ["test"].into_iter().chain(RUNNER).chain([part]);
    Program { file: Arc::new(file.into()), args: args.map(|arg| arg.as_bytes().to_vec()).collect() }
}

#[test]
fn part_holder() {
    let Ok(limits) = std::env::var(LIMITS) else { return };
    let limits: Vec<u64> = limits.split(' ').map(|word| word.parse().unwrap()).collect();
    let time = |at: usize| Duration::from_millis(limits[at]);
    let options = Options {
        hang: Some(time(0)),
        upgrade: time(1),
        start: time(2),
        crash_limit: usize::try_from(limits[3]).unwrap(),
        ..Options::default()
    };
    let outcome = holder::run(this_program("part_daemon"), options).unwrap();
    say(match outcome {
        Outcome::Stopped(end) => format!("stopped {} {}", end.signal, end.status),
        Outcome::GaveUp(end, _) => format!("gave up {} {}", end.signal, end.status),
    });
}

/// Reads a command a byte at a time: the rest is for whoever is the daemon then.
fn read_command() -> Option<String> {
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let (mut line, mut byte) = (String::new(), [0]);
    while input.read(&mut byte).unwrap() == 1 {
        if byte == *b"\n" {
            return Some(line);
        }
        line.push(byte[0].into());
    }
    None
}

#[test]
fn part_daemon() {
    if std::env::var_os(LIMITS).is_none() {
        return;
    }
    let mut client = Client::from_env().unwrap().unwrap();
    introduce(&client);
    serve(&mut client);
}

fn introduce(client: &Client) {
    let start = client.start();
    let crash =
        start.crash.map(|end| format!(" after {} {} {} {}", end.signal, end.status, end.hung, end.heard_ns));
    let role = start.role;
    say(format!("{role:?} {}{} {}", start.status.generation, crash.unwrap_or_default(), std::process::id()));
}

fn serve(client: &mut Client) {
    let (mut kept, mut memory) = (Vec::<OwnedFd>::new(), Vec::new());
    while let Some(command) = read_command() {
        let words: Vec<_> = command.split(' ').collect();
        let number = |at: usize| words[at].parse::<u64>().unwrap();
        let result = match words[0] {
            "hold" => {
                let fd = memfd::sealed(c"held", words[2].as_bytes()).unwrap();
                client.hold(number(1), Kind::Memory, fd, words[2].as_bytes())
            }
            "ring" => {
                let ring = Ring::new(8).unwrap();
                client.hold_ring(number(1), &ring, &ring.save())
            }
            "drop" => client.release(number(1)),
            "list" => {
                say(list(client));
                continue;
            }
            "ready" => client.ready(),
            "stopping" => client.stopping(),
            "exit" => std::process::exit(i32::try_from(number(1)).unwrap()),
            "crash" => panic_by_signal(),
            "busy" | "waits" => {
                be_busy(client, words[0] == "waits");
                Ok(())
            }
            "populate" => {
                memory.push(populated(usize::try_from(number(1)).unwrap() << 20));
                Ok(())
            }
            "reaper" => {
                let reaper = MmReaper::spawn().unwrap();
                say(reaper.pid());
                std::mem::forget(reaper);
                continue;
            }
            "prepare" => {
                let program = this_program(words[1]);
                let args: Vec<_> = program.args.iter().map(Vec::as_slice).collect();
                client.prepare_upgrade(program.file.as_fd(), &args).map(|peer| kept.push(peer))
            }
            "event" => {
                let event = client.next_event(true).unwrap();
                say(match event {
                    Event::RolledBack { why, end } => {
                        format!("rolled back {why:?} {} {}", end.signal, end.status)
                    }
                    other => format!("{other:?}"),
                });
                continue;
            }
            "commit" => {
                let result = client.commit_upgrade();
                if result.is_ok() {
                    say("handed over");
                    return;
                }
                result
            }
            "abort" => client.abort_upgrade(),
            "replace" => {
                let program = this_program("part_holder");
                let args: Vec<_> = program.args.iter().map(Vec::as_slice).collect();
                let text = memfd::sealed(c"no program", b"text").unwrap();
                let file = if words[1] == "good" { program.file.as_fd() } else { text.as_fd() };
                client.replace_holder(file, &args)
            }
            "status" => {
                let status = client.status().unwrap();
                let (crashes, upgrades, replaced) = (status.crashes, status.upgrades, status.replaced);
                say(format!("{crashes} {upgrades} {replaced} {} {}", status.held, status.generation));
                continue;
            }
            other => panic!("{other}"),
        };
        say(result.map_or_else(|errno| errno.raw().to_string(), |()| "ok".into()));
    }
}

/// Makes a thread busy for ever: it waits for something in its own process, or for something outside.
fn be_busy(client: &Client, outside: bool) {
    let progress = client.progress().clone();
    let (begun, begins) = channel();
    std::thread::spawn(move || {
        let mut counter = progress.counter().unwrap();
        counter.busy();
        begun.send(()).unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        loop {
            if outside {
                let _ = rustix::io::read(&reader, &mut [0; 1]);
            } else {
                std::thread::park();
            }
        }
    });
    begins.recv().unwrap();
}

/// Memory of `len` bytes, all of which is there.
fn populated(len: usize) -> SharedMap {
    let fd = memfd::create(c"large", len as u64, None).unwrap();
    SharedMap::map(&fd, 0, len, Prot::RW, true).unwrap()
}

fn panic_by_signal() -> ! {
    let me = rustix::process::getpid();
    kill_process(me, Signal::KILL).unwrap();
    loop {
        std::thread::park();
    }
}

fn list(client: &mut Client) -> String {
    let items = client.list().unwrap().into_iter().map(|held| {
        let content = match held.kind {
            Kind::Ring => {
                let record = RingRecord::from_bytes(&held.record).unwrap();
                let adopted = Ring::adopt(held.fd, &record, TIMEOUT).unwrap();
                format!("ring with {} in flight", adopted.ring.in_flight())
            }
            _ => String::from_utf8(memfd::read_all(&held.fd, 100).unwrap()).unwrap(),
        };
        format!("{}={content}", held.key)
    });
    items.collect::<Vec<_>>().join(",")
}

fn candidate() -> Option<Client> {
    std::env::var_os(LIMITS)?;
    let mut client = Client::from_env().unwrap().unwrap();
    assert_eq!(client.start().role, Role::Candidate);
    assert!(client.take_peer().is_some());
    Some(client)
}

#[test]
fn part_candidate_that_takes_over() {
    if std::env::var_os(LIMITS).is_none() {
        return;
    }
    let mut client = Client::from_env().unwrap().unwrap();
    if client.start().role == Role::Candidate {
        assert!(client.take_peer().is_some());
        client.ready().unwrap();
        assert_eq!(client.next_event(true), Ok(Event::Committed));
        say("taken over");
    } else {
        introduce(&client);
    }
    serve(&mut client);
}

#[test]
fn part_candidate_that_dies_at_once() {
    let Some(_client) = candidate() else { return };
    std::process::exit(3);
}

#[test]
fn part_candidate_that_dies_when_ready() {
    let Some(mut client) = candidate() else { return };
    client.ready().unwrap();
    std::process::exit(4);
}

#[test]
fn part_candidate_that_waits() {
    let Some(_client) = candidate() else { return };
    std::thread::sleep(Duration::from_secs(60));
}

const CALM: &str = "60000 60000 60000 5";

#[test]
fn a_crashed_daemon_is_started_again_with_everything_it_held() {
    let mut service = Service::start(CALM);
    let (said, pid) = service.started();
    assert_eq!(said, "Daemon 1");
    assert_eq!(service.ask("ready"), "ok");
    for key in 1..=150 {
        assert_eq!(service.ask(&format!("hold {key} content{key}")), "ok");
    }
    assert_eq!(service.ask("ring 1000"), "ok");
    assert_eq!(service.ask("hold 7 again"), "17", "EEXIST");
    assert_eq!((service.ask("drop 7"), service.ask("drop 7")), ("ok".into(), "2".into()));
    let begin = clock::monotonic_ns();
    kill_process(pid, Signal::KILL).unwrap();
    let (said, _) = service.started();
    let restarted = clock::monotonic_ns() - begin;
    let heard = said.rsplit(' ').next().unwrap().parse::<u64>().unwrap();
    println!("heard after {} us, served again after {} us", (heard - begin) / 1000, restarted / 1000);
    assert!(said.starts_with("Daemon 2 after 9 0 false "), "{said}");
    let expected: Vec<_> =
        (1..=150).filter(|key| *key != 7).map(|key| format!("{key}=content{key}")).collect();
    assert_eq!(service.ask("list"), expected.join(",") + ",1000=ring with 0 in flight");
    assert_eq!(service.ask("status"), "1 0 0 150 2");
    assert_eq!(service.ask("stopping"), "ok");
    service.command("exit 5");
    assert_eq!(service.ended(), "stopped 0 5");
}

#[test]
fn a_crash_loop_ends_in_the_failed_role_and_then_the_service() {
    let mut service = Service::start("60000 60000 60000 2");
    for generation in 1..=3 {
        assert!(service.started().0.starts_with(&format!("Daemon {generation}")));
        assert_eq!(service.ask("ready"), "ok");
        service.command("crash");
    }
    assert!(service.started().0.starts_with("Failed 4 after 9"));
    service.command("exit 6");
    assert_eq!(service.ended(), "gave up 0 6");
}

#[test]
fn a_daemon_that_cannot_start_ends_the_service_with_its_status() {
    let mut service = Service::start(CALM);
    service.started();
    service.command("exit 3");
    assert_eq!(service.ended(), "stopped 0 3");
}

#[test]
fn a_signal_to_the_holder_ends_the_daemon_and_the_service() {
    let mut service = Service::start(CALM);
    service.started();
    assert_eq!(service.ask("ready"), "ok");
    let holder = Pid::from_raw(i32::try_from(service.child.id()).unwrap()).unwrap();
    kill_process(holder, Signal::TERM).unwrap();
    assert_eq!(service.ended(), "stopped 15 0");
}

#[test]
fn a_daemon_that_hangs_or_is_never_ready_is_killed_and_started_again() {
    let mut service = Service::start("200 60000 1500 5");
    service.started();
    assert!(service.started().0.starts_with("Daemon 2 after 9 0 true"), "it was not ready in time");
    assert_eq!(service.ask("ready"), "ok");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(service.ask("status"), "1 0 0 0 2", "an idle daemon does not hang");
    assert_eq!(service.ask("waits"), "ok");
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(service.ask("status"), "1 0 0 0 2", "a thread that waits for others does not hang");
    assert_eq!(service.ask("busy"), "ok");
    assert!(service.started().0.starts_with("Daemon 3 after 9 0 true"));
}

#[test]
fn an_upgrade_is_committed_and_the_new_daemon_is_guarded() {
    let mut service = Service::start(CALM);
    service.started();
    assert_eq!((service.ask("ready"), service.ask("hold 1 content")), ("ok".into(), "ok".into()));
    assert_eq!(service.ask("commit"), "125", "there is no candidate");
    assert_eq!(service.ask("prepare part_candidate_that_takes_over"), "ok");
    assert_eq!(service.ask("prepare part_candidate_that_takes_over"), "16");
    assert_eq!(service.ask("event"), "CandidateReady");
    service.command("commit");
    let mut said = [service.line(), service.line()];
    said.sort();
    assert_eq!(said, ["handed over", "taken over"]);
    assert_eq!(service.ask("status"), "0 1 0 1 2");
    assert_eq!(service.ask("list"), "1=content");
    service.command("crash");
    assert!(service.started().0.starts_with("Daemon 3 after 9"), "the new program is started again");
    assert_eq!((service.ask("list"), service.ask("stopping")), ("1=content".into(), "ok".into()));
    service.command("exit 0");
    assert_eq!(service.ended(), "stopped 0 0");
}

#[test]
fn an_upgrade_is_rolled_back_at_each_point() {
    let mut service = Service::start("60000 500 60000 5");
    service.started();
    assert_eq!(service.ask("ready"), "ok");
    assert_eq!(service.ask("prepare part_candidate_that_dies_at_once"), "ok");
    assert_eq!(service.ask("event"), "rolled back Died 0 3");
    assert_eq!(service.ask("prepare part_candidate_that_dies_when_ready"), "ok");
    assert_eq!(service.ask("event"), "CandidateReady");
    assert_eq!(service.ask("event"), "rolled back Died 0 4");
    assert_eq!(service.ask("commit"), "125");
    assert_eq!(service.ask("prepare part_candidate_that_waits"), "ok");
    assert_eq!(service.ask("commit"), "125", "the candidate is not ready");
    assert_eq!(service.ask("event"), "rolled back Deadline 9 0");
    assert_eq!(service.ask("prepare part_candidate_that_waits"), "ok");
    assert_eq!(service.ask("abort"), "ok");
    assert_eq!(service.ask("event"), "rolled back Asked 9 0");
    assert_eq!((service.ask("abort"), service.ask("status")), ("2".into(), "0 0 0 0 1".into()));
    assert_eq!(service.ask("prepare part_candidate_that_waits"), "ok");
    service.command("crash");
    assert!(service.started().0.starts_with("Daemon 2 after 9"), "a crash during an upgrade");
}

#[test]
fn a_holder_replaces_its_own_program() {
    let mut service = Service::start(CALM);
    let holder = service.child.id();
    let (_, pid) = service.started();
    assert_eq!((service.ask("ready"), service.ask("hold 1 content")), ("ok".into(), "ok".into()));
    assert_eq!(service.ask("ring 2"), "ok");
    assert_eq!(service.ask("replace bad"), "8", "ENOEXEC");
    assert_eq!(service.ask("replace good"), "ok");
    assert_eq!(service.ask("status"), "0 0 1 2 1");
    assert_eq!(service.ask("hold 3 more"), "ok");
    kill_process(pid, Signal::KILL).unwrap();
    let (said, new) = service.started();
    assert!(said.starts_with("Daemon 2 after 9"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", new.as_raw_nonzero())).unwrap();
    assert!(status.contains(&format!("PPid:\t{holder}\n")));
    assert_eq!(service.ask("list"), "1=content,2=ring with 0 in flight,3=more");
}

#[test]
fn what_the_service_manager_kept_is_held_again() {
    let dir = tempfile::tempdir().unwrap();
    let (file, notify) = (dir.path().join("file"), dir.path().join("notify"));
    std::fs::write(&file, "kept").unwrap();
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(r#"export LISTEN_PID=$$; exec "$PROGRAM" "$@" 3<"$FILE""#).arg("sh");
    command.args(RUNNER).arg("part_holder").env(LIMITS, CALM);
    command.env("PROGRAM", std::env::current_exe().unwrap()).env("FILE", &file).env("NOTIFY_SOCKET", &notify);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "vdpa.5.1.0aff");
    let mut service = Service::run(command);
    service.started();
    assert_eq!(service.ask("list"), "5=kept");
    assert_eq!(
        (service.ask("ready"), service.ask("hold 6 new"), service.ask("drop 5")),
        ("ok".into(), "ok".into(), "ok".into())
    );
    let told: Vec<_> = (0..4)
        .map(|_| {
            let mut bytes = [0; 300];
            let len = manager.recv(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes[..len]).into_owned()
        })
        .collect();
    assert_eq!(told[0], "FDSTORE=1\nFDNAME=vdpa.ffffffffffffffff.1.\nFDPOLL=0");
    assert!(told[1].starts_with("READY=1\nSTATUS=daemon "), "{told:?}");
    assert_eq!(told[2], "FDSTORE=1\nFDNAME=vdpa.6.1.6e6577\nFDPOLL=0");
    assert_eq!(told[3], "FDSTOREREMOVE=1\nFDNAME=vdpa.5.1.0aff");
}

/// A process that shares the memory keeps it until the death was heard, so that nobody waits for gigabytes to be freed. It is
/// stopped here: what is heard meanwhile is heard before the memory is gone.
#[test]
fn death_is_heard_before_the_memory_is_taken_down() {
    let mut service = Service::start(CALM);
    let (_, pid) = service.started();
    assert_eq!((service.ask("ready"), service.ask("populate 64")), ("ok".into(), "ok".into()));
    let reaper = Pid::from_raw(service.ask("reaper").parse().unwrap()).unwrap();
    kill_process(reaper, Signal::STOP).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    assert!(service.started().0.starts_with("Daemon 2 after 9 0 false "));
    let maps = format!("/proc/{}/maps", reaper.as_raw_nonzero());
    assert!(std::fs::read_to_string(&maps).unwrap().contains("/memfd:large"), "the memory is there");
    kill_process(reaper, Signal::CONT).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while std::fs::read_to_string(&maps).is_ok_and(|text| !text.is_empty()) {
        assert!(Instant::now() < deadline, "the memory is still there");
        std::thread::yield_now();
    }
}

/// All its threads sleep, and what it should do cannot be seen from outside. The process is looked at itself.
#[test]
fn a_daemon_that_is_stopped_is_killed_and_started_again() {
    let mut service = Service::start("500 60000 60000 5");
    let (_, pid) = service.started();
    assert_eq!(service.ask("ready"), "ok");
    kill_process(pid, Signal::STOP).unwrap();
    assert!(service.started().0.starts_with("Daemon 2 after 9 0 true"));
}

#[test]
fn a_service_manager_hears_of_the_reload_and_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(TIMEOUT)).unwrap();
    let told = || {
        let mut bytes = [0; 300];
        let len = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let mut command = Command::new("env");
    command.args(["--block-signal=TERM", "--block-signal=HUP"]).arg(std::env::current_exe().unwrap());
    command.args(RUNNER).arg("part_holder").env(LIMITS, CALM).env("NOTIFY_SOCKET", &notify);
    let mut service = Service::run(command);
    service.started();
    assert!(told().starts_with("FDSTORE=1\nFDNAME=vdpa.ffffffffffffffff.1."), "its own counts");
    let holder = Pid::from_raw(i32::try_from(service.child.id()).unwrap()).unwrap();
    kill_process(holder, Signal::HUP).unwrap();
    assert_eq!(service.ask("status"), "0 0 0 0 1", "a daemon that does not expect it yet would die of it");
    service.command("ready");
    assert!(told().starts_with("READY=1\nSTATUS=daemon "));
    let reloading = told();
    let usec = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().parse::<u64>().unwrap();
    assert!(usec > 0 && usec <= clock::monotonic_ns() / 1000);
    // This daemon does not know what to do with it. It may have heard before that it is ready.
    let line = service.line();
    let line = if line == "ok" { service.line() } else { line };
    assert!(line.starts_with("Daemon 2 after 1 0 false"), "{line}");
    assert!(told().starts_with("READY=1\n"), "the reload has ended");
}
