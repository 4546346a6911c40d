//! The servers that are compared. Each measurement has a server of its own, which is pinned to the servers' CPU.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vdpa_bench::process::PrivateDaemon;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::Client;
use vdpa_sys::exec::terminate_with_parent;

use crate::client::{Address, Result};
use crate::host::{self, INTERFACE};
use crate::packets::{GUEST, HOST, HOST_MAC};
use crate::plan::Target;

/// Time for a server to start.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// The programs.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) vdpad: PathBuf,
    /// Additional attributes of vdpad's device.
    pub(crate) attrs: Vec<(String, String)>,
    pub(crate) testpmd: PathBuf,
    pub(crate) passt: PathBuf,
}

/// A server that runs. It ends when this is dropped.
pub(crate) struct Server {
    pub(crate) address: Address,
    /// The process whose CPU time is measured.
    pub(crate) process: u32,
    _running: Running,
}

enum Running {
    Daemon { _daemon: PrivateDaemon },
    Child { _child: Ended },
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Server {
    /// Starts it, with its files in `directory`, which is empty, and an interface with `pairs` queues.
    pub(crate) fn start(target: Target, programs: &Programs, directory: &Path, pairs: u16) -> Result<Self> {
        let server = match target {
            Target::Vdpad => vdpad(programs, directory, pairs)?,
            Target::Testpmd => testpmd(&programs.testpmd, directory, pairs)?,
            Target::Passt => passt(&programs.passt, directory)?,
            Target::Floor => floor(directory, pairs)?,
        };
        if target != Target::Passt {
            host::set_up(target != Target::Floor, START_TIMEOUT)?;
        }
        Ok(server)
    }
}

fn vdpad(programs: &Programs, directory: &Path, pairs: u16) -> Result<Server> {
    let daemon = PrivateDaemon::start(&programs.vdpad, directory, Front::Fuse)?;
    let client = Client::new(daemon.socket())?;
    let mut attrs = Attrs::new();
    let pairs = pairs.to_string();
    for (key, value) in
        [("tap", INTERFACE), ("create", "on"), ("max_vqp", &pairs), ("mac", "52:54:00:00:09:02")]
    {
        attrs.insert(key, value)?;
    }
    for (key, value) in &programs.attrs {
        attrs.insert(key.clone(), value.clone())?;
    }
    client.add(&AddRequest { name: "net0".into(), mgmtdev: "net".into(), attrs })?;
    let path = client.device("net0")?.path;
    let process = daemon.pid();
    Ok(Server { address: Address::Vdpa(path), process, _running: Running::Daemon { _daemon: daemon } })
}

fn testpmd(program: &Path, directory: &Path, pairs: u16) -> Result<Server> {
    let socket = directory.join("testpmd.sock");
    let cpu = *crate::cpu::allowed()?.first().ok_or("no CPU is allowed")?;
    let child = terminate_with_parent(&mut Command::new(program))
        .env("RUNTIME_DIRECTORY", directory)
        .args(["--no-pci", "--no-huge", "-m", "256", "--no-telemetry", "--file-prefix", "bench"])
        // The thread of commands, which sleeps, and the one that forwards packets.
        .arg("--lcores")
        .arg(format!("0@{cpu},1@{cpu}"))
        .arg(format!("--vdev=net_vhost0,iface={},queues={pairs}", socket.display()))
        .arg(format!("--vdev=net_tap0,iface={INTERFACE}"))
        .arg("--")
        .args([
            "--auto-start",
            "--nb-cores=1",
            "--total-num-mbufs=16384",
            "--no-mlockall",
            "--stats-period=3600",
        ])
        .arg(format!("--rxq={pairs}"))
        .arg(format!("--txq={pairs}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    child_server(child, socket, "testpmd")
}

fn passt(program: &Path, directory: &Path) -> Result<Server> {
    let socket = directory.join("passt.sock");
    let text = |address: [u8; 4]| std::net::Ipv4Addr::from(address).to_string();
    let child = terminate_with_parent(&mut Command::new(program))
        .args(["--foreground", "--quiet", "--vhost-user", "--ipv4-only", "--runas", "0", "--socket"])
        .arg(&socket)
        .args(["--address", &text(GUEST), "--netmask", "24", "--gateway", &text(HOST)])
        .args(["--mac-addr", &HOST_MAC.map(|byte| format!("{byte:02x}")).join(":")])
        .args(["--interface", "lo", "--outbound", "127.0.0.1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    child_server(child, socket, "passt")
}

fn floor(directory: &Path, pairs: u16) -> Result<Server> {
    let socket = directory.join("floor.sock");
    let child = terminate_with_parent(&mut Command::new(std::env::current_exe()?))
        .arg("--serve-floor")
        .arg(&socket)
        .arg("--pairs")
        .arg(pairs.to_string())
        .spawn()?;
    child_server(child, socket, "the floor")
}

fn child_server(child: Child, socket: PathBuf, name: &str) -> Result<Server> {
    let mut child = Ended(child);
    let begin = Instant::now();
    while !socket.exists() {
        if let Some(status) = child.0.try_wait()? {
            return Err(format!("{name} has ended: {status}").into());
        }
        if begin.elapsed() > START_TIMEOUT {
            return Err(format!("{name} has not made its socket").into());
        }
        sleep(Duration::from_millis(5));
    }
    let process = child.0.id();
    Ok(Server { address: Address::User(socket), process, _running: Running::Child { _child: child } })
}
