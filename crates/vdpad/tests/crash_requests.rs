//! A daemon that dies between reading a request and answering it: the next one gives the answer that this one would have given,
//! and the request has its effect once. For every request of docs/uapi.md that reaches the daemon.
//!
//! Each request is made once without a crash, which says what is right, and once with a crash at each point.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/crash.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod crash;
#[path = "support/requests.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod requests;
#[path = "support/robust.rs"]
mod robust;

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use vdpa_core::crash_points::CrashPoint;
use vdpa_core::features::Status;
use vdpa_core::ops::{VdpaOps as _, read_all_config};
use vdpa_core::types::{Asid, Perm, QueueIndex, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::fork::Forked;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uapi::vhost as uapi;
use vdpa_sys::vhost_vdpa::{RawArg, VhostVdpaFd};
use vdpad::crash_points::Action;
use zerocopy::IntoBytes as _;

use crash::Crashes;
use robust::{Vdpad, eventually};

const LIMIT: Duration = Duration::from_secs(280);
const Q0: QueueIndex = QueueIndex(0);
const IOVA: u64 = 0x10_0000;
const SIZE: u64 = 1 << 20;
/// Where requests map something more.
const FREE: u64 = 0x1000_0000;
/// With the request read, executed, its record committed, and everything but the answer done.
const POINTS: [CrashPoint; 4] = [
    CrashPoint::RequestRead,
    CrashPoint::RequestExecuted,
    CrashPoint::RecordCommitted,
    CrashPoint::ReplyReady,
];

/// How far a client has come before the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Closed,
    Open,
    /// An owner, backend features, DRIVER.
    Owned,
    /// FEATURES_OK, memory, one queue.
    Ready,
    /// DRIVER_OK.
    Running,
    Suspended,
    /// In a batch that has a mapping.
    Batch,
}

use Level::{Batch, Closed, Open, Owned, Ready, Running, Suspended};

/// A client of one device.
struct Client {
    path: PathBuf,
    device: Option<VhostVdpaFd>,
    map: SharedMap,
    events: [EventFd; 2],
}

impl Client {
    fn new(path: PathBuf, level: Level) -> Self {
        let memory = memfd::create(c"crash-requests", SIZE, None).unwrap();
        let map = SharedMap::map(memory, 0, usize::try_from(SIZE).unwrap(), Prot::RW, false).unwrap();
        let events = [EventFd::new().unwrap(), EventFd::new().unwrap()];
        let mut client = Self { path, device: None, map, events };
        if level >= Open {
            client.open();
        }
        if level >= Owned {
            let device = client.device();
            device.set_owner().unwrap();
            device.set_backend_features(device.backend_features().unwrap()).unwrap();
            device.set_status(Status::ACKNOWLEDGE | Status::DRIVER).unwrap();
        }
        if level >= Ready {
            let device = client.device();
            device.set_features(device.features().unwrap()).unwrap();
            device.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).unwrap();
            device.dma_map(Asid(0), IOVA, SIZE, client.map.addr() as u64, Perm::RW).unwrap();
            device.set_vring_num(Q0, 64).unwrap();
            let addr =
                VringAddr { desc: IOVA, avail: IOVA + 0x4000, used: IOVA + 0x8000, ..VringAddr::default() };
            device.set_vring_addr(Q0, &addr).unwrap();
            device.set_vring_kick(Q0, Some(&client.events[0])).unwrap();
            device.set_vring_call(Q0, Some(&client.events[1])).unwrap();
            device.set_vring_enable(Q0, true).unwrap();
        }
        if level >= Running {
            client.device().set_status(Status(0xf)).unwrap();
        }
        if level >= Suspended {
            client.device().suspend().unwrap();
        }
        if level >= Batch {
            client.device().batch_begin(Asid(0)).unwrap();
            client.device().dma_map(Asid(0), FREE, SIZE / 2, client.uaddr(), Perm::RW).unwrap();
        }
        client
    }

    fn open(&mut self) {
        self.device = Some(requests::open(&self.path).unwrap());
    }

    fn device(&self) -> &VhostVdpaFd {
        self.device.as_ref().unwrap()
    }

    fn uaddr(&self) -> u64 {
        self.map.addr() as u64
    }

    /// What the interface shows of the device. The order of the requests is part of it.
    fn observe(&self, vdpad: &Vdpad, name: &str) -> String {
        let Some(device) = &self.device else { return "closed".into() };
        let state = eventually("the daemon answers", || vdpad.client().device(name).ok()).state;
        let queues: Vec<_> =
            state.queues.iter().map(|queue| (queue.size, queue.enabled, queue.running)).collect();
        let seen = (state.open, state.mappings, state.pinned_pages, state.suspended, queues);
        let owner = state.owner.map(|owner| owner.pid == std::process::id());
        let features = (device.features(), state.negotiated_features, device.backend_features());
        let status = device.status();
        let bases = [0, 1].map(|queue| device.vring_base(QueueIndex(queue)));
        let config = read_all_config(device);
        let again = (device.batch_end(Asid(0)), device.set_owner());
        format!("{status:?} {features:?} {bases:?} {config:?} {again:?} {seen:?} owner {owner:?}")
    }
}

/// One kind of request.
struct Row {
    name: String,
    level: Level,
    request: Box<dyn Fn(&mut Client) -> String>,
}

fn row(name: &str, level: Level, request: impl Fn(&mut Client) -> String + 'static) -> Row {
    Row { name: name.into(), level, request: Box::new(request) }
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index, num].as_bytes().to_vec()
}

/// Level and argument of each ioctl for which zeros would not do.
fn argument(name: &str) -> (Level, fn(&Client) -> Vec<u8>) {
    match name {
        "VHOST_SET_FEATURES" => {
            (Owned, |client| client.device().features().unwrap().0.to_le_bytes().to_vec())
        }
        "VHOST_SET_BACKEND_FEATURES" => {
            (Open, |client| client.device().backend_features().unwrap().0.to_le_bytes().to_vec())
        }
        // With the memory of the ring, half of which stays, and more.
        "VHOST_SET_MEM_TABLE" => (Running, |client| {
            let region = |iova: u64, offset: u64, size: u64| [iova, size, client.uaddr() + offset, 0];
            let regions =
                [region(IOVA, 0, SIZE), region(FREE, 0, SIZE / 2), region(2 * FREE, SIZE / 2, SIZE / 4)];
            [&[3_u64][..], regions.as_flattened()].concat().as_bytes().to_vec()
        }),
        "VHOST_SET_LOG_BASE" => (Running, |client| (client.uaddr() + SIZE / 2).to_le_bytes().to_vec()),
        "VHOST_SET_LOG_FD" => (Running, |client| client.events[1].as_fd().as_raw_fd().to_le_bytes().to_vec()),
        "VHOST_SET_OWNER" | "VHOST_GET_FORK_FROM_OWNER" | "VHOST_SET_FORK_FROM_OWNER" => (Open, |_| vec![0]),
        "VHOST_SET_VRING_NUM" => (Owned, |_| state(0, 128)),
        "VHOST_SET_VRING_BASE" => (Ready, |_| state(0, 7)),
        "VHOST_SET_VRING_ADDR" => {
            (Owned, |_| [0, IOVA + 0x1000, IOVA + 0x9000, IOVA + 0x5000, 0].as_bytes().to_vec())
        }
        "VHOST_SET_VRING_BUSYLOOP_TIMEOUT" => (Owned, |_| state(0, 50)),
        "VHOST_SET_VRING_KICK" | "VHOST_SET_VRING_CALL" | "VHOST_SET_VRING_ERR" => {
            (Running, |client| [0, client.events[1].as_fd().as_raw_fd()].as_bytes().to_vec())
        }
        "VHOST_VDPA_SET_CONFIG_CALL" => {
            (Open, |client| client.events[1].as_fd().as_raw_fd().to_le_bytes().to_vec())
        }
        "VHOST_VDPA_SET_STATUS" => (Ready, |_| vec![0xf]),
        "VHOST_VDPA_GET_CONFIG" => (Owned, |_| [state(0, 8), vec![0xee; 8]].concat()),
        "VHOST_VDPA_SET_CONFIG" => (Owned, |_| [state(0, 6), vec![2, 0, 0, 0, 0, 9]].concat()),
        "VHOST_VDPA_SET_VRING_ENABLE" => (Running, |_| state(0, 0)),
        "VHOST_VDPA_SET_GROUP_ASID" => (Ready, |_| state(1, 1)),
        "VHOST_VDPA_SUSPEND" | "VHOST_GET_VRING_BASE" => (Running, |_| state(0, 0)),
        "VHOST_VDPA_RESUME" => (Suspended, |_| Vec::new()),
        "VHOST_VDPA_GET_IOVA_RANGE" => (Open, |_| vec![0; 16]),
        _ => (Owned, |_| vec![0; 64]),
    }
}

/// The requests that reach the daemon.
fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = uapi::REQUESTS
        .iter()
        .filter(|(name, _)| *name != "VHOST_NEW_OWNER")
        .map(|&(name, number)| {
            let (level, argument) = argument(name);
            row(name, level, move |client| {
                let mut bytes = argument(client);
                // Descriptors have other numbers each time.
                let shows = !["KICK", "CALL", "ERR", "LOG_BASE", "LOG_FD", "MEM_TABLE"]
                    .iter()
                    .any(|end| name.ends_with(end));
                let result = client.device().raw_ioctl(number, RawArg::Bytes(&mut bytes));
                format!("{result:?} {:?}", shows.then_some(bytes))
            })
        })
        .collect();
    rows.extend([
        row("VHOST_NEW_OWNER", Running, |client| {
            let other = Forked::start(Some(client.device())).unwrap();
            format!("{:?}", other.call(uapi::VHOST_NEW_OWNER))
        }),
        row("reset", Running, |client| format!("{:?}", client.device().set_status(Status(0)))),
        row("unknown ioctl", Owned, |client| {
            format!("{:?}", client.device().raw_ioctl(0xaf99, RawArg::Null))
        }),
        row("UPDATE", Running, |client| {
            format!("{:?}", client.device().dma_map(Asid(0), FREE, SIZE / 2, client.uaddr(), Perm::RW))
        }),
        row("INVALIDATE", Running, |client| format!("{:?}", client.device().dma_unmap(Asid(0), IOVA, SIZE))),
        row("BATCH_BEGIN", Ready, |client| format!("{:?}", client.device().batch_begin(Asid(0)))),
        row("BATCH_END", Batch, |client| format!("{:?}", client.device().batch_end(Asid(0)))),
        row("REMAP", Running, |client| {
            format!("{:?}", client.device().dma_remap(Asid(0), IOVA, SIZE, client.uaddr()))
        }),
        row("other messages", Owned, |client| format!("{:?}", client.device().raw_write(&[0xff; 72]))),
        row("open", Closed, |client| {
            client.open();
            "opened".into()
        }),
        row("close", Running, |client| {
            client.device = None;
            client.open();
            format!("{:?}", client.device().status())
        }),
        row("read", Owned, |client| format!("{:?}", rustix::io::read(client.device().as_fd(), &mut [0; 8]))),
        row("poll", Owned, |client| {
            let mut fds = [PollFd::from_borrowed_fd(client.device().as_fd(), PollFlags::IN | PollFlags::OUT)];
            format!("{:?} {:?}", poll(&mut fds, None), fds[0].revents())
        }),
    ]);
    rows
}

/// All requests on devices of one kind.
fn requests_in_progress(mgmtdev: &str, attrs: &str) {
    let crashes = Crashes::new();
    let dir = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(dir.path()).unwrap();
    let mut command = robust::command_at(&dir);
    command.args(["--holder", "--front", "fuse", "--crash-limit", "60000", "--log", "error"]);
    crashes.watch(&mut command);
    let vdpad = Vdpad::start_command(&dir, LIMIT, command);
    let path = match mgmtdev {
        "blk" => vdpad.add_blk("used", 1 << 20, attrs),
        other => vdpad.add("used", other, attrs),
    };
    let mut counts = BTreeMap::<_, usize>::new();
    let begin = Instant::now();
    for row in rows() {
        let run = |point: Option<CrashPoint>| {
            let mut client = Client::new(path.clone(), row.level);
            let before = crashes.fired();
            if let Some(point) = point {
                crashes.arm(point, 1, Action::Kill);
            }
            let result = (row.request)(&mut client);
            let reached = crashes.fired() > before;
            crashes.disarm();
            (format!("{result}\n{}", client.observe(&vdpad, "used")), reached)
        };
        let (wanted, _) = run(None);
        let mut reached = Vec::new();
        for point in POINTS {
            let (found, at_point) = run(Some(point));
            assert_eq!(found, wanted, "{} with a crash at {point:?}: {}", row.name, vdpad.log());
            if at_point {
                reached.push(point);
                *counts.entry(point.name()).or_default() += 1;
            }
        }
        println!("{}: {} {reached:?}", row.name, wanted.lines().next().unwrap_or_default());
        // The reader answers a read itself; anything else is a request of the device.
        let least = if row.name == "read" { 1 } else { 2 };
        assert!(reached.len() >= least, "{}: {reached:?}", row.name);
    }
    println!("{mgmtdev}: {counts:?} in {:?}", begin.elapsed());
    // More than half of them change something.
    assert!(counts["record-committed"] >= 20, "{counts:?}");
}

#[test]
fn requests_of_a_network_device() {
    requests_in_progress("sim-net", "reset_owner on mac 02:00:00:00:00:01");
}

#[test]
fn requests_of_a_block_device() {
    requests_in_progress("blk", "packed on mem_table on vhost_log on");
}
