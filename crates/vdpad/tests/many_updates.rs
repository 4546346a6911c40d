//! Many updates in a row, each with requests in flight, and the resources of the programs and the daemon meanwhile.
//!
//! `VDPA_TEST_UPDATES` is the number of updates by each way (`just many-updates` makes a thousand), 40 by default.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;
#[expect(dead_code, reason = "the parts of another test")]
#[path = "support/updating.rs"]
mod updating;

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, waitpid};
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{self, Devices, Image, Incoming, Plan, Restored, Strategy, Via, Way};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::Disk;
use robust::{Resources, RoleProcess, Vdpad, eventually, has_role, receive_line, send_line, variable};
use updating::{FLYING, SOCKET, WAITS, WAY};

const DEVICE: &str = "TEST_DEVICE";
const STRATEGIES: &str = "TEST_STRATEGIES";
/// Numbers of updates after which the program waits for the test to inspect it.
const LOOKS: &str = "TEST_LOOKS";
const SECTION: &str = "test/chain";

/// A program that is updated again and again.
#[test]
fn chain() {
    if !has_role("chain") {
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
    let (made, mut disk) = match restored {
        None => {
            // This program waits for its orphaned descendants, as the first process of a container does.
            set_child_subreaper(Some(getpid())).unwrap();
            (0, updating::start(Path::new(&variable(DEVICE))))
        }
        Some(restored) => taken_over(restored, way),
    };
    let looks: Vec<u64> = variable(LOOKS).split(' ').map(|look| look.parse().unwrap()).collect();
    if looks.contains(&made) {
        send_line(&format!("look {}", getpid().as_raw_nonzero()));
        receive_line();
    }
    if Some(&made) == looks.last() {
        return;
    }
    updating::fly(&mut disk, 1000 + made);
    update_again(way, disk, made);
}

/// Checks that nothing was lost in the last update. Returns the number of updates.
fn taken_over(mut restored: Restored<VhostVdpaFd>, way: Way) -> (u64, Disk) {
    assert_eq!(restored.report.way, way);
    let (made, flying): (u64, Vec<_>) = restored.sections.take(SECTION).unwrap().parse(1).unwrap();
    assert_eq!(flying.len() as u64, FLYING);
    let (session, sections, _) = restored.into_one().unwrap();
    sections.ensure_consumed().unwrap();
    let mut disk = Disk { session, flying: flying.into_iter().collect() };
    updating::prove(&mut disk, 1000 + made);
    (made + 1, disk)
}

/// The strategies in turn.
fn strategy(update: u64) -> Strategy {
    let strategies: Vec<Strategy> = variable(STRATEGIES).split(' ').map(|s| s.parse().unwrap()).collect();
    strategies[usize::try_from(update).unwrap() % strategies.len()]
}

#[expect(clippy::zombie_processes, reason = "the successor outlives this process")]
fn update_again(way: Way, disk: Disk, made: u64) {
    let flying: Vec<_> = disk.flying.into_iter().collect();
    let devices = Devices::one("disk0", disk.session);
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
    let section = Section::json(SECTION, 1, &(made, flying)).unwrap();
    let plan = Plan::new().strategy(strategy(made)).late_section(SECTION, 1, false);
    let prepared = plan.prepare(&devices, via).unwrap();
    prepared.switch(devices, Sections::from_iter([section])).map_err(|failed| failed.error).unwrap();
}

/// Resources of a program in addition to [`Resources`].
#[derive(Debug, PartialEq, Eq)]
struct Held {
    resources: Resources,
    environment: usize,
    children: usize,
}

/// Children of a process, also those that have ended and were not collected.
fn children(pid: Pid) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap();
    let of = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.unwrap().path().join("children"))
    };
    tasks.filter_map(|task| of(task).ok()).map(|children| children.split_whitespace().count()).sum()
}

impl Held {
    fn of(pid: Pid) -> Self {
        let proc = format!("/proc/{}", pid.as_raw_nonzero());
        Self {
            resources: Resources::of(pid),
            environment: std::fs::read(format!("{proc}/environ")).unwrap().len(),
            children: children(pid),
        }
    }

    /// Asserts that nothing has leaked. Memory may differ by what the allocators keep.
    #[track_caller]
    fn is_no_more_than(&self, before: &Self, rss_kib: u64) {
        assert_eq!(self.lasting(), before.lasting());
        assert_eq!(self.resources.pinned_kib, before.resources.pinned_kib);
        let (now, then) = (&self.resources, &before.resources);
        assert_eq!((now.memfds, now.registered), (then.memfds, then.registered));
        assert!(now.threads <= then.threads, "{now:?}, {then:?}");
        assert!(now.maps <= then.maps + 8, "{} mappings, {} before", now.maps, then.maps);
        assert!(now.rss_kib <= then.rss_kib + rss_kib, "{} KiB, {} before", now.rss_kib, then.rss_kib);
        // Processes that take down the memory of images before may be left on a busy machine: they are named in the
        // environment, and children of this program.
        assert!(self.environment <= before.environment + 64, "{self:?}, {before:?}");
        assert!(self.children <= 8, "{self:?}, {before:?}");
    }

    /// All descriptors but that of the process that takes down the memory of the image before.
    fn lasting(&self) -> Vec<(&String, &usize)> {
        self.resources.fds.iter().filter(|(kind, _)| *kind != "anon_inode:[pidfd]").collect()
    }
}

/// Permitted difference of resident memory: of the daemon, and between two images.
const RSS_KIB: u64 = 1024;

/// Without the processes that take down the memory of earlier images. Each lives for 50 ms after its exec, and is known by
/// a descriptor until it is collected with a later update, so how many there are depends on how fast updates follow.
fn settled(mut held: Held) -> Held {
    const AT_ONCE: usize = 30;
    let known = held.resources.fds.remove("anon_inode:[pidfd]").unwrap_or(0);
    assert!(known <= AT_ONCE && held.children <= AT_ONCE, "{known} and {}", held.children);
    held.children = 0;
    held
}

fn holds_no_more(mgmtdev: &str, way: Way, strategies: &str) {
    let updates: u64 = std::env::var("VDPA_TEST_UPDATES").map_or(40, |number| number.parse().unwrap());
    set_child_subreaper(Some(getpid())).unwrap();
    let vdpad = Vdpad::start(Duration::from_secs(if updates > 100 { 3600 } else { 110 }));
    let device = vdpad.add_any("disk0", mgmtdev);
    let (first, last) = (updates.div_ceil(10), updates);
    let socket = vdpad.dir().join("next");
    let looks = format!("{first} {last}");
    let mut variables = vec![
        (DEVICE, device.to_str().unwrap()),
        (WAY, way.name()),
        (STRATEGIES, strategies),
        (LOOKS, looks.as_str()),
        (SOCKET, socket.to_str().unwrap()),
    ];
    if mgmtdev == "blk" && way == Way::Fork {
        variables.push((robust::disk::PACKED, "1"));
    }
    let mut client = RoleProcess::start("chain", &variables);
    let begin = Instant::now();
    let started = client.pid();
    let mut look = || {
        let pid = Pid::from_raw(client.receive("look").parse().unwrap()).unwrap();
        assert_eq!(pid == started, way == Way::Exec);
        // Those before it have ended; a child of them is this process's then.
        eventually("there is one program", || {
            while let Ok(Some((ended, _))) = waitpid(None, WaitOptions::NOHANG) {
                assert_ne!(ended, vdpad.pid());
            }
            (children(getpid()) == 2).then_some(())
        });
        let (program, state) = (settled(Held::of(pid)), vdpad.info("disk0").state);
        std::thread::sleep(Duration::from_millis(50));
        let daemon = vdpad.resources();
        client.send("go on");
        (program, daemon, state)
    };
    let ((then, daemon_then, state_then), (now, daemon_now, state_now)) = (look(), look());
    let took = begin.elapsed();
    client.end_of_all();
    println!(
        "{mgmtdev}, {way}, {updates} updates ({strategies}) in {took:?}: after {first} and after {last}"
    );
    println!("program {then:?}\n        {now:?}\ndaemon  {daemon_then:?}\n        {daemon_now:?}");
    now.is_no_more_than(&then, RSS_KIB);
    let plain = |resources: Resources| Held { resources, environment: 0, children: 0 };
    plain(daemon_now).is_no_more_than(&plain(daemon_then), RSS_KIB);
    assert_eq!(
        (state_now.pinned_pages, state_now.mappings, state_now.queues[0].errors),
        (state_then.pinned_pages, state_then.mappings, 0)
    );
    assert_eq!((state_now.pinned_pages > 0, state_now.mappings), (mgmtdev == "blk", 1));
    // Every request of every program was answered once.
    let each = FLYING + updating::CHECKS;
    assert_eq!(state_now.queues[0].requests - state_then.queues[0].requests, (last - first) * each);
    vdpad.is_released("disk0");
}

const ALL: &str = "live resume reset reopen";
const WITH_REMAP: &str = "resume reset reopen";

mod heavy {
    use super::*;

    #[test]
    fn blk_by_exec() {
        holds_no_more("blk", Way::Exec, ALL);
    }

    #[test]
    fn blk_by_fork() {
        holds_no_more("blk", Way::Fork, ALL);
    }

    #[test]
    fn blk_by_hand_over() {
        holds_no_more("blk", Way::HandOver, ALL);
    }

    #[test]
    fn sim_blk_by_exec() {
        holds_no_more("sim-blk", Way::Exec, WITH_REMAP);
    }

    #[test]
    fn sim_blk_by_fork() {
        holds_no_more("sim-blk", Way::Fork, WITH_REMAP);
    }

    #[test]
    fn sim_blk_by_hand_over() {
        holds_no_more("sim-blk", Way::HandOver, WITH_REMAP);
    }
}
