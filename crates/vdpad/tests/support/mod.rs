//! A bus with constant answers, the real server in front of it, and the real programs as its clients; and, in modules of
//! their own, the real daemon and clients of its devices.
#![expect(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod blk;
pub(crate) mod daemon;
pub(crate) mod programs;
pub(crate) mod registered;

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vdpa_control::api::UpdateInfo;
use vdpa_control::api::{
    AddRequest, CtlError, DaemonInfo, DaemonRole, DevInfo, DevState, Dirty, MgmtDev, Owner, QueueInfo,
    QueueVstats, SetAnswer, SetRequest, Successor, UpgradeRequest, VSTATS_INDEX_MAX,
};
use vdpa_control::config::{
    BlockConfig, BlockTopology, ClassConfig, DevConfig, DiscardLimits, MacAddr, NetConfig,
};
use vdpa_core::Errno;
use vdpa_core::features::{Bit, Features, Status};
use vdpad::control::Backend;
use vdpad::control::{Limits, Server};

/// Longest time for a process; far more than any should need.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Features of the kernel's network simulator.
pub(crate) const SIM_NET: Features = Features(0x3_0883_0028);

/// A bus that answers with its fields.
#[derive(Debug, Default)]
pub(crate) struct Fixture {
    pub(crate) mgmtdevs: Vec<MgmtDev>,
    pub(crate) devices: Vec<(DevInfo, Result<DevConfig, CtlError>)>,
    pub(crate) vstats: Vec<QueueVstats>,
    /// Requests that reached it, in order.
    pub(crate) log: Mutex<Vec<String>>,
    /// While a test holds this lock, creating a device named `slow` blocks.
    pub(crate) hold: Mutex<()>,
}

impl Fixture {
    /// The three management devices of uapi-spec 7.3.
    pub(crate) fn simulators() -> Self {
        let mgmtdev = |name: &str, classes: &[u32], max_supported_vqs, dev_features| MgmtDev {
            name: name.into(),
            bus: None,
            supported_classes: classes.into(),
            max_supported_vqs,
            dev_features,
        };
        Self {
            mgmtdevs: vec![
                mgmtdev("vdpasim_net", &[1], 3, SIM_NET),
                mgmtdev("vdpasim_blk", &[2], 0, Features::NONE),
                mgmtdev("vduse", &[1, 2], 0, Features::NONE),
            ],
            ..Self::default()
        }
    }

    /// `vdpa0` of uapi-spec 7.4, negotiated or not.
    pub(crate) fn with_net(mut self, negotiated: Option<Features>) -> Self {
        let net = NetConfig {
            mac: Some(MacAddr([0, 0x11, 0x22, 0x33, 0x44, 0x55])),
            status: Some(1),
            max_vq_pairs: None,
            mtu: Some(1500),
        };
        let config = DevConfig {
            name: "vdpa0".into(),
            device_id: 1,
            device_features: SIM_NET,
            negotiated_features: negotiated,
            class: ClassConfig::Net(net),
        };
        self.devices.push((info("vdpa0", 1, "vdpasim_net", 3), Ok(config)));
        self
    }

    /// `blk0` of uapi-spec 7.4, in use.
    pub(crate) fn with_blk(mut self) -> Self {
        let features = Features::of(&[Features::BLK_FLUSH, Features::VERSION_1, Bit(40)]);
        let block = BlockConfig {
            capacity: 262_144,
            blk_size: Some(512),
            topology: Some(BlockTopology { min_io_size: 1, opt_io_size: 8, ..BlockTopology::default() }),
            discard: Some(DiscardLimits { max_sectors: 2048, max_segments: 1, sector_alignment: 1 }),
            flush: true,
            ..BlockConfig::default()
        };
        let config = DevConfig {
            name: "blk0".into(),
            device_id: 2,
            device_features: features,
            negotiated_features: Some(features),
            class: ClassConfig::Block(block),
        };
        let mut blk = info("blk0", 2, "vdpasim_blk", 1);
        blk.state = DevState {
            open: true,
            status: Status(0xf),
            suspended: false,
            owner: Some(Owner { pid: 4711, comm: "qemu".into(), since: 1_795_245_169 }),
            successor: None,
            negotiated_features: Some(features),
            pinned_pages: 1_048_576,
            memlock_limit_pages: Some(2_097_152),
            mappings: 12,
            max_iotlb_entries: 2048,
            dirty: Some(Dirty { page_size: 4096, ranges: 2, pages: 1_048_576 }),
            queues: vec![QueueInfo {
                index: 0,
                size: 256,
                enabled: true,
                running: true,
                requests: 10,
                bytes: 40_960,
                errors: 1,
                poison: 0,
            }],
        };
        self.devices.push((blk, Ok(config)));
        self
    }

    /// A client that waits to take the block device over.
    pub(crate) fn with_successor(mut self, successor: Successor) -> Self {
        let (blk, _) = self.devices.iter_mut().find(|(info, _)| info.name == "blk0").unwrap();
        blk.state.successor = Some(successor);
        self
    }

    /// A file-system device, whose configuration the kernel does not show.
    pub(crate) fn with_fs(mut self) -> Self {
        let refusal = CtlError::new(Errno::OPNOTSUPP, "unsupported device class");
        self.devices.push((info("fs0", 26, "vdpasim_fs", 2), Err(refusal)));
        self
    }

    /// Statistics of a queue of `vdpa0`.
    pub(crate) fn with_vstats(
        mut self,
        queue_index: u16,
        pairs: Option<u16>,
        counters: &[(&str, u64)],
    ) -> Self {
        self.vstats.push(QueueVstats {
            name: "vdpa0".into(),
            device_id: 1,
            negotiated_features: SIM_NET,
            max_vq_pairs: pairs,
            queue_index,
            counters: counters.iter().map(|(name, value)| ((*name).into(), *value)).collect(),
        });
        self
    }

    fn find(&self, name: &str) -> Result<&(DevInfo, Result<DevConfig, CtlError>), CtlError> {
        self.devices.iter().find(|(info, _)| info.name == name).ok_or_else(CtlError::no_device)
    }

    fn note(&self, line: String) {
        self.log.lock().unwrap().push(line);
    }
}

fn info(name: &str, device_id: u32, mgmtdev: &str, max_vqs: u32) -> DevInfo {
    DevInfo {
        name: name.into(),
        device_id,
        mgmtdev: mgmtdev.into(),
        vendor_id: 0,
        max_vqs,
        max_vq_size: 256,
        min_vq_size: 1,
        path: PathBuf::from("/run/vdpad/dev").join(name),
        front: "fuse".into(),
        passed: false,
        state: DevState::default(),
    }
}

impl Backend for Fixture {
    fn daemon(&self) -> Result<DaemonInfo, CtlError> {
        Ok(DaemonInfo {
            version: "1.2.3".into(),
            pid: 42,
            since: 0,
            role: DaemonRole::Daemon,
            poison: 0,
            holder: None,
        })
    }

    fn upgrade(&self, request: UpgradeRequest) -> Result<(), CtlError> {
        self.note(format!("upgrade {request:?}"));
        Ok(())
    }

    fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, CtlError> {
        Ok(self.mgmtdevs.clone())
    }

    fn devices(&self) -> Result<Vec<DevInfo>, CtlError> {
        Ok(self.devices.iter().map(|(info, _)| info.clone()).collect())
    }

    fn device(&self, name: &str) -> Result<DevInfo, CtlError> {
        self.note(format!("device {name}"));
        Ok(self.find(name)?.0.clone())
    }

    fn config(&self, name: &str) -> Result<DevConfig, CtlError> {
        self.find(name)?.1.clone()
    }

    fn vstats(&self, name: &str, queue_index: u32) -> Result<QueueVstats, CtlError> {
        if self.find(name)?.0.device_id != 1 {
            return Err(CtlError::new(Errno::OPNOTSUPP, "Operation not supported"));
        }
        if queue_index > VSTATS_INDEX_MAX {
            return Err(CtlError::new(Errno::RANGE, "queue index exceeds max value"));
        }
        self.vstats
            .iter()
            .find(|vstats| u32::from(vstats.queue_index) == queue_index)
            .cloned()
            .ok_or_else(|| CtlError::new(Errno::INVAL, "no such queue"))
    }

    fn save_state(&self, name: &str) -> Result<Vec<u8>, CtlError> {
        self.find(name)?;
        Ok(format!("state of {name}").into_bytes())
    }

    fn load_state(&self, name: &str, state: &[u8]) -> Result<(), CtlError> {
        self.find(name)?;
        self.note(format!("load {} bytes into {name}", state.len()));
        Ok(())
    }

    fn updates(&self) -> Result<Vec<UpdateInfo>, CtlError> {
        self.devices.iter().map(|(info, _)| self.update(&info.name)).collect()
    }

    fn update(&self, name: &str) -> Result<UpdateInfo, CtlError> {
        let (info, _) = self.find(name)?;
        Ok(UpdateInfo {
            name: name.to_owned(),
            owner: info.state.owner.clone(),
            owner_changes: 0,
            owner_changed: None,
            updates: 0,
            rolled_back: 0,
            last: None,
        })
    }

    fn add(&self, request: AddRequest, _: Vec<OwnedFd>) -> Result<(), CtlError> {
        let attrs: String = request.attrs.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        self.note(format!("add {} on {}{attrs}", request.name, request.mgmtdev));
        if self.find(&request.name).is_ok() {
            return Err(CtlError::new(Errno::EXIST, "device exists already"));
        }
        match request.name.as_str() {
            "panic" => panic!("a bug in the backend"),
            "slow" => drop(self.hold.lock().unwrap()),
            _ => {}
        }
        if !self.mgmtdevs.iter().any(|mgmtdev| mgmtdev.handle() == request.mgmtdev) {
            return Err(CtlError::no_mgmtdev());
        }
        if request.attrs.get("colour").is_some() {
            return Err(CtlError::new(
                Errno::OPNOTSUPP,
                "Some provided attributes are not supported: colour",
            ));
        }
        Ok(())
    }

    fn set(&self, name: &str, request: SetRequest) -> Result<SetAnswer, CtlError> {
        let mac = request.mac.map(|mac| mac.to_string()).unwrap_or_default();
        self.note(format!("set {name} mac {mac}"));
        let net = self.find(name)?.0.device_id == 1;
        Ok(SetAnswer { warning: (!net).then(|| format!("{name} device not supported")) })
    }

    fn delete(&self, name: &str, force: bool) -> Result<(), CtlError> {
        self.note(format!("delete {name} force {force}"));
        let (info, _) = self.find(name)?;
        if info.state.open && !force {
            return Err(CtlError::new(Errno::BUSY, "device is in use")
                .with_hint("Stop the client, or delete it with --force."));
        }
        Ok(())
    }
}

/// A server with a fixture behind it.
pub(crate) struct Setup {
    pub(crate) fixture: Arc<Fixture>,
    pub(crate) socket: PathBuf,
    server: Server,
    _dir: tempfile::TempDir,
}

impl Setup {
    pub(crate) fn new(fixture: Fixture) -> Self {
        Self::limited(fixture, Limits::default())
    }

    pub(crate) fn limited(fixture: Fixture, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control.sock");
        let fixture = Arc::new(fixture);
        let backend: Arc<dyn Backend> = fixture.clone();
        let server = Server::start_limited(&socket, backend, limits).unwrap();
        Self { fixture, socket, server, _dir: dir }
    }

    /// Runs vdpactl with the arguments in `line`.
    pub(crate) fn vdpactl(&self, line: &str) -> Outcome {
        vdpactl(&self.socket, line)
    }

    /// Sends `bytes` and returns everything that comes back.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// One request as curl sends it; returns the status and the body.
    pub(crate) fn http(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let answer = self.raw(
            format!(
                "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        );
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.unwrap_or_else(|| panic!("no HTTP answer: {answer:?}")), body.into())
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.fixture.log.lock().unwrap().clone()
    }

    pub(crate) fn shutdown(self) {
        self.server.shutdown();
    }
}

/// Exit status and output of a process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) code: Option<i32>,
}

impl Outcome {
    /// Asserts a success with exactly this output; the difference is printed line by line.
    #[track_caller]
    pub(crate) fn prints(&self, expected: &str) {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        assert_eq!(self.stdout.split_inclusive('\n').collect::<Vec<_>>(), lines(expected));
    }

    /// Asserts exit status 1 with exactly this output and this text on standard error.
    #[track_caller]
    pub(crate) fn fails(&self, stdout: &str, stderr: &str) {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!(self.stdout, stdout);
        assert_eq!(self.stderr.split_inclusive('\n').collect::<Vec<_>>(), lines(stderr));
    }
}

fn lines(text: &str) -> Vec<&str> {
    text.split_inclusive('\n').collect()
}

pub(crate) fn vdpactl(socket: &Path, line: &str) -> Outcome {
    let mut command = Command::new(programs::program("vdpactl"));
    command.env("VDPAD_SOCKET", socket).args(line.split_whitespace());
    run(&mut command)
}

/// Runs a command to its end, which must come within [`TIMEOUT`].
pub(crate) fn run(command: &mut Command) -> Outcome {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    finish(child)
}

/// Waits until a child ends; kills it and panics if that takes longer than [`TIMEOUT`].
pub(crate) fn finish(mut child: Child) -> Outcome {
    let drain = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut text = String::new();
            pipe.map(|mut pipe| pipe.read_to_string(&mut text));
            text
        })
    };
    let stdout = drain(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = drain(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let deadline = Instant::now() + TIMEOUT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{child:?} has not ended within {TIMEOUT:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Outcome { stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap(), code: status.code() }
}
