//! Machines that move between two daemons. A side fails at each named step: the machine, or at least its device, works at exactly one side
//! afterwards, and its guest finds every block and page as it has written it. Needs /dev/fuse and the right to mount.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "../../vdpa-client/examples/support/machine.rs"]
mod machine;
#[path = "support/moving.rs"]
mod moving;
#[path = "support/robust.rs"]
mod robust;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vdpa_client::device::Device;
use vdpa_client::migrate::Step;
use vdpa_core::Errno;
use vdpa_core::device::state::{Record, decode_all};
use vdpa_core::features::{Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{QueueIndex, VringAddr};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use moving::{Action, DAEMON_DIR, DEVICE, FAULT, SOCKET};
use robust::{Output, RoleProcess, Vdpad, eventually, has_role};

#[test]
fn source() {
    if has_role("source") {
        moving::source();
    }
}

#[test]
fn destination() {
    if has_role("destination") {
        moving::destination();
    }
}

/// Who has the machine afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The source.
    Here,
    /// The destination.
    There,
    /// Nobody: it has ended with its process, and both devices are free.
    Ended,
}

use Outcome::{Ended, Here, There};

/// Two daemons with a device each, on one disk.
struct Hosts {
    daemons: [Vdpad; 2],
    devices: [PathBuf; 2],
    disk: PathBuf,
}

impl Hosts {
    fn start(args: &[&str]) -> Self {
        let all = [&["--front", "fuse"], args].concat();
        let daemons = [0, 1].map(|_| Vdpad::start_with(Duration::from_secs(900), &all));
        let disk = daemons[0].image("disk", machine::DISK);
        let attrs = format!("path {} shared on queues 1", disk.display());
        let devices = daemons.each_ref().map(|daemon| daemon.add("disk", "blk", &attrs));
        Self { daemons, devices, disk }
    }

    /// Starts both programs, of which one has a fault, on an empty disk.
    fn programs(&self, fault: Option<(Step, Action)>) -> [RoleProcess; 2] {
        File::create(&self.disk).unwrap().set_len(machine::DISK).unwrap();
        let socket = self.daemons[0].dir().join("move.sock");
        let _ = std::fs::remove_file(&socket);
        let start = |role: &str, side: usize| {
            let of_side = fault.filter(|(step, _)| step.is_of_destination() == (side == 1));
            let text = of_side.map_or(String::new(), |(step, action)| format!("{step:?} {action:?}"));
            let (device, dir) = (self.devices[side].to_str().unwrap(), self.daemons[side].dir());
            RoleProcess::start(
                role,
                &[
                    (DEVICE, device),
                    (SOCKET, socket.to_str().unwrap()),
                    (FAULT, &text),
                    (DAEMON_DIR, dir.to_str().unwrap()),
                ],
            )
        };
        let mut destination = start("destination", 1);
        destination.receive("listens");
        [start("source", 0), destination]
    }

    fn runs(&self, side: usize) -> bool {
        let state =
            eventually("the daemon answers", || self.daemons[side].client().device("disk").ok()).state;
        state.status.contains(Status::DRIVER_OK) && !state.suspended
    }

    /// Moves a machine with a fault, plays whoever knows which program has ended, and finds out who has the machine.
    fn run(&self, fault: Option<(Step, Action)>) -> Outcome {
        let [mut source, mut destination] = self.programs(fault);
        let killed = fault.filter(|(_, action)| *action == Action::Kill).map(|(step, _)| step);
        let [source_dies, destination_dies] =
            [false, true].map(|side| killed.is_some_and(|step| step.is_of_destination() == side));
        let (at_source, at_destination) = (source.next_line(), destination.next_line());
        let word =
            |line: &Option<String>| line.as_deref().unwrap_or("dead").split(' ').next().unwrap().to_owned();
        let outcome = match (word(&at_source).as_str(), word(&at_destination).as_str()) {
            ("moved", "landed") | ("dead", "landed") => {
                destination.receive("verified");
                There
            }
            ("dead", "waiting") => {
                destination.send("start");
                destination.receive("landed");
                destination.receive("verified");
                There
            }
            ("dead", "failed") | ("moved", "dead") => Ended,
            ("here", "failed" | "dead") => {
                source.receive("verified");
                Here
            }
            ("here", "waiting") => {
                destination.send("abandon");
                source.receive("verified");
                Here
            }
            ("undecided", "dead") => {
                assert!(!self.runs(0), "it waits");
                source.send("resume");
                source.receive("verified");
                Here
            }
            ("undecided", "landed") => {
                assert!(!self.runs(0), "it waits");
                source.send("give up");
                destination.receive("verified");
                There
            }
            other => panic!("{fault:?}: {other:?}: {at_source:?}, {at_destination:?}"),
        };
        let expected = [outcome == Here, outcome == There];
        // The kernel closes the files of a killed program a moment after the program's output.
        eventually(&format!("{fault:?}, {outcome:?}: the device runs at that side only"), || {
            ([0, 1].map(|side| self.runs(side)) == expected).then_some(())
        });
        for (process, died) in [(&mut source, source_dies), (&mut destination, destination_dies)] {
            if !died {
                process.send("end");
            }
            process.end_of_all();
        }
        self.daemons.iter().for_each(|daemon| daemon.is_released("disk"));
        outcome
    }
}

/// All steps at which the programs fail, with who has the machine then.
fn check(action: Action, expected: impl Fn(Step) -> &'static [Outcome]) {
    let hosts = Hosts::start(&["--holder", "--crash-limit", "1000"]);
    assert_eq!(hosts.run(None), There);
    let mut seen = Vec::new();
    for step in Step::ALL {
        let outcome = hosts.run(Some((step, action)));
        println!("{action:?} after {step:?}: {outcome:?}");
        assert!(expected(step).contains(&outcome), "{action:?} after {step:?}: {outcome:?}");
        seen.push(outcome);
    }
    assert!(seen.len() >= 12);
}

#[test]
fn a_program_is_killed_at_each_step() {
    check(Action::Kill, |step| match step {
        Step::Offered | Step::Accepted | Step::Tracking | Step::Round => &[Ended],
        Step::Paused | Step::Suspended | Step::LastPages | Step::Saved => &[Ended],
        Step::StateSent | Step::LoadedHeard | Step::Committed | Step::RunningHeard => &[There],
        // The source has heard that it runs there.
        Step::RunningSent => &[Ended],
        _ => &[Here],
    });
}

#[test]
fn the_connection_is_cut_at_each_step() {
    check(Action::Cut, |step| match step {
        // The commit may be on its way by then.
        Step::LoadedSent => &[Here, There],
        Step::Committed | Step::CommitRead | Step::Started | Step::RunningSent | Step::RunningHeard => {
            &[There]
        }
        _ => &[Here],
    });
}

#[test]
fn a_daemon_is_killed_at_each_step() {
    check(Action::KillDaemon, |_| &[There]);
}

/// Without a holder a daemon's end is that of its devices.
#[test]
fn a_daemon_without_a_holder_costs_its_side() {
    let hosts = Hosts::start(&[]);
    let [mut source, mut destination] = hosts.programs(Some((Step::Mapped, Action::KillDaemon)));
    assert!(!source.next_line().unwrap().is_empty());
    source.receive("verified");
    assert!(destination.next_line().unwrap().starts_with("failed "));
    [source, destination].iter_mut().for_each(|process| {
        process.send("end");
        process.end_of_all();
    });
    let hosts = Hosts::start(&[]);
    let [mut source, mut destination] = hosts.programs(Some((Step::Suspended, Action::KillDaemon)));
    let lost = source.next_line().unwrap();
    assert!(lost.starts_with("lost ") && lost.contains("cannot be resumed here"), "{lost}");
    assert!(destination.next_line().unwrap().starts_with("failed "));
    assert!(!hosts.runs(1));
    [source, destination].iter_mut().for_each(|process| {
        process.send("end");
        process.end_of_all();
    });
}

/// A device with a ring that was in use, as a driver leaves it that is stopped.
fn suspended(device: &Path, features: Features) -> VhostVdpaFd {
    let file = VhostVdpaFd::open(device).unwrap();
    file.set_owner().unwrap();
    let ready = Status::ACKNOWLEDGE | Status::DRIVER;
    for status in [Status::ACKNOWLEDGE, ready] {
        file.set_status(status).unwrap();
    }
    file.set_features(features | Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM])).unwrap();
    file.set_status(ready | Status::FEATURES_OK).unwrap();
    if features.has(Features::BLK_CONFIG_WCE) {
        file.set_config(32, &[0]).unwrap();
    }
    file.set_vring_num(QueueIndex(0), 64).unwrap();
    let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
    file.set_vring_addr(QueueIndex(0), &addr).unwrap();
    file.set_vring_base(QueueIndex(0), 17).unwrap();
    file.set_status(ready | Status::FEATURES_OK | Status::DRIVER_OK).unwrap();
    file.suspend().unwrap();
    file
}

const CACHE: Features = Features::of(&[Features::BLK_FLUSH, Features::BLK_CONFIG_WCE]);

/// The devices of the golden files: name, kind, attributes, features.
fn kinds(vdpad: &Vdpad) -> [(&'static str, PathBuf, Features); 3] {
    [
        ("blk", vdpad.add_blk("blk", 1 << 20, "queues 2 serial golden"), CACHE),
        ("sim-blk", vdpad.add("sim-blk", "sim-blk", ""), Features::NONE),
        (
            "sim-net",
            vdpad.add("sim-net", "sim-net", "mac 52:54:00:00:00:07"),
            Features::of(&[Features::NET_MAC]),
        ),
    ]
}

/// What version 1 of the format has of each device is read for ever, and written the same. `VDPA_WRITE_GOLDEN` writes the files.
#[test]
fn states_of_the_first_version_are_loaded() {
    let vdpad = Vdpad::start_with(Duration::from_secs(300), &["--front", "fuse"]);
    for (name, device, features) in kinds(&vdpad) {
        let path =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/state-{name}-v1.bin"));
        let file = suspended(&device, features);
        let config = vdpa_core::ops::read_all_config(&file).unwrap();
        let state = file.state_save().unwrap();
        drop(file);
        if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, &state).unwrap();
        }
        let golden = std::fs::read(&path).unwrap();
        // What a device offers may grow.
        let without_shape = |bytes: &[u8]| {
            let records = decode_all(bytes).unwrap();
            records.into_iter().filter(|record| !matches!(record, Record::Device(_))).collect::<Vec<_>>()
        };
        assert_eq!(without_shape(&golden), without_shape(&state), "{name}");
        vdpad.is_released(name);
        let file = VhostVdpaFd::open(&device).unwrap();
        file.set_owner().unwrap();
        file.state_load(&golden).unwrap();
        assert_eq!(vdpa_core::ops::read_all_config(&file).unwrap(), config, "{name}");
        assert_eq!(file.vring_base(QueueIndex(0)).unwrap(), 17, "{name}");
        assert_eq!(file.state_load(&golden), Err(Errno::BUSY), "{name}: it is not reset");
    }
}

/// vdpactl has failed, and said so.
#[track_caller]
fn refused(output: &Output, text: &str) {
    assert!(output.code == Some(1) && output.stderr.contains(text), "{text}: {output:?}");
}

/// The state of a device by the control socket, as a file.
#[test]
fn vdpactl_saves_and_loads() {
    let daemons = [0, 1].map(|_| Vdpad::start_with(Duration::from_secs(300), &["--front", "fuse"]));
    let [from, to] = &daemons;
    let state = from.dir().join("blk.state");
    let device = from.add_blk("blk", 1 << 20, "queues 2");
    let target = to.add_blk("other", 1 << 20, "queues 2");
    let client = suspended(&device, CACHE);
    from.ctl(&format!("dev state save blk {}", state.display())).succeeds();
    assert_eq!(std::fs::read(&state).unwrap(), client.state_save().unwrap());
    client.set_vring_enable(QueueIndex(0), true).unwrap();
    client.resume().unwrap();
    let runs = from.ctl(&format!("dev state save blk {}", state.display()));
    refused(&runs, "queue 0 runs: suspend the device first");
    let load = format!("dev state load other {}", state.display());
    refused(&to.ctl(&load), "not open");
    let file = VhostVdpaFd::open(&target).unwrap();
    file.set_owner().unwrap();
    to.ctl(&load).succeeds();
    let ready = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    assert_eq!((file.status(), file.vring_base(QueueIndex(0))), (Ok(ready), Ok(17)));
    let mut cache = [9];
    file.config(32, &mut cache).unwrap();
    assert_eq!(cache, [0], "the driver has turned the cache off");
    refused(&to.ctl(&load), "acknowledge|driver|features_ok");
    file.set_status(Status::RESET).unwrap();
    std::fs::write(&state, b"nothing of that kind").unwrap();
    refused(&to.ctl(&load), "at most 1048576 are accepted");
    assert_eq!(file.status(), Ok(Status::RESET));
    drop(file);
    to.add_blk("larger", 2 << 20, "queues 2");
    std::fs::write(&state, client.suspend().and_then(|()| client.state_save()).unwrap()).unwrap();
    let larger = VhostVdpaFd::open(to.info("larger").path).unwrap();
    larger.set_owner().unwrap();
    let other = to.ctl(&format!("dev state load larger {}", state.display()));
    refused(&other, "on a disk of the same size");
    assert!(from.ctl("dev state").stderr.contains("dev state save DEV"));
    drop(Device::<VhostVdpaFd>::from_ops(larger));
}
