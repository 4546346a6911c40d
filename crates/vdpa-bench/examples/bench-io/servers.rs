//! The servers that are compared. Each is started once and pinned to the servers' CPU.

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
use crate::cpu::ServerProcess;
use crate::plan::{Backend, Target};

/// Size of the disk without storage, in bytes.
const NULL_BYTES: u64 = 1 << 30;
/// Time for a server to start.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A server with two disks: one on the file, one without storage.
pub(crate) trait Server {
    /// Where to connect for a backend.
    fn address(&self, backend: Backend) -> Address;
    /// The process whose CPU time is measured. Called while a client is connected.
    fn process(&self, backend: Backend) -> ServerProcess;
}

/// vdpad.
pub(crate) struct Vdpad {
    daemon: PrivateDaemon,
    client: Client,
}

impl Vdpad {
    /// Starts it, with its socket in `directory`. `attrs` are added to both devices.
    pub(crate) fn start(
        program: &Path,
        directory: &Path,
        file: &Path,
        attrs: &[(String, String)],
    ) -> Result<Self> {
        let daemon = PrivateDaemon::start(program, directory, Front::Fuse)?;
        let client = Client::new(daemon.socket())?;
        let size = NULL_BYTES.to_string();
        let path = file.to_str().ok_or("a path that is not UTF-8")?;
        for (name, key, value) in [("file", "path", path), ("null", "null", &size)] {
            let mut all = Attrs::new();
            all.insert(key, value)?;
            // The client is this program, whose RLIMIT_MEMLOCK must not affect the comparison.
            all.insert("memlock", "unlimited")?;
            for (key, value) in attrs {
                all.insert(key.clone(), value.clone())?;
            }
            client.add(&AddRequest { name: name.into(), mgmtdev: "blk".into(), attrs: all })?;
        }
        Ok(Self { daemon, client })
    }
}

impl Server for Vdpad {
    fn address(&self, backend: Backend) -> Address {
        let name = match backend {
            Backend::File => "file",
            Backend::Null => "null",
        };
        let path = self.client.device(name).map(|info| info.path);
        Address::Vdpa(path.unwrap_or_default())
    }

    fn process(&self, _backend: Backend) -> ServerProcess {
        ServerProcess(self.daemon.pid())
    }
}

/// qemu-storage-daemon, which serves vhost-user.
pub(crate) struct Qemu {
    child: Child,
    directory: PathBuf,
}

impl Qemu {
    pub(crate) fn start(program: &Path, directory: &Path, file: &Path) -> Result<Self> {
        let export = |node: &str| {
            let socket = directory.join(format!("qemu-{node}.sock"));
            format!(
                "type=vhost-user-blk,id=e-{node},node-name={node},addr.type=unix,addr.path={},writable=on,num-queues=2",
                socket.display()
            )
        };
        let child = terminate_with_parent(&mut Command::new(program))
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={},aio=io_uring,locking=off", file.display()))
            .args(["--export", &export("disk")])
            .arg("--blockdev")
            .arg(format!("driver=null-co,node-name=null,size={NULL_BYTES}"))
            .args(["--export", &export("null")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let qemu = Self { child, directory: directory.into() };
        // Exports are created in order, so the last one is waited for.
        wait_for(&directory.join("qemu-null.sock"), "qemu-storage-daemon")?;
        Ok(qemu)
    }

    /// Its name and version.
    pub(crate) fn version(program: &Path) -> Result<String> {
        let output = Command::new(program).arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or("unknown").to_owned())
    }
}

impl Server for Qemu {
    fn address(&self, backend: Backend) -> Address {
        let node = match backend {
            Backend::File => "disk",
            Backend::Null => "null",
        };
        Address::User(self.directory.join(format!("qemu-{node}.sock")))
    }

    fn process(&self, _backend: Backend) -> ServerProcess {
        ServerProcess(self.child.id())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The floor, with a process of this program for each backend.
pub(crate) struct Floors {
    file: Floor,
    null: Floor,
}

impl Floors {
    pub(crate) fn start(directory: &Path, file: &Path) -> Result<Self> {
        Ok(Self {
            file: Floor::start(directory.join("floor-file.sock"), Some(file))?,
            null: Floor::start(directory.join("floor-null.sock"), None)?,
        })
    }

    const fn of(&self, backend: Backend) -> &Floor {
        match backend {
            Backend::File => &self.file,
            Backend::Null => &self.null,
        }
    }
}

impl Server for Floors {
    fn address(&self, backend: Backend) -> Address {
        Address::User(self.of(backend).socket.clone())
    }

    fn process(&self, backend: Backend) -> ServerProcess {
        ServerProcess(self.of(backend).child.id())
    }
}

struct Floor {
    child: Child,
    socket: PathBuf,
}

impl Floor {
    fn start(socket: PathBuf, file: Option<&Path>) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--serve-floor").arg(&socket);
        if let Some(file) = file {
            command.arg("--file").arg(file);
        }
        let child = terminate_with_parent(&mut command).spawn()?;
        wait_for(&socket, "the floor")?;
        Ok(Self { child, socket })
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a server listens.
fn wait_for(socket: &Path, name: &str) -> Result<()> {
    let begin = Instant::now();
    while !socket.exists() {
        if begin.elapsed() > START_TIMEOUT {
            return Err(format!("{name} has not created its socket").into());
        }
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The servers that were started.
pub(crate) type All = Vec<(Target, Box<dyn Server>)>;
