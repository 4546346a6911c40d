//! Those that are compared, each started once and pinned to the servers' CPU.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vdpa_bench::peer::PrivateDaemon;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::Client;
use vdpa_sys::exec::terminate_with_parent;

use crate::client::{Address, Result};
use crate::cpu::Runner;
use crate::plan::{Backend, Who};

/// Bytes of the disk that is none.
const NULL_BYTES: u64 = 1 << 30;
/// How long a server may take to begin.
const PATIENCE: Duration = Duration::from_secs(20);

/// Something that serves the file and nothing.
pub(crate) trait Server {
    /// Where to connect for this backend.
    fn address(&self, backend: Backend) -> Address;
    /// Whose CPU time counts; asked while connected.
    fn runner(&self, backend: Backend) -> Runner;
}

/// Our daemon.
pub(crate) struct Vdpad {
    daemon: PrivateDaemon,
    client: Client,
}

impl Vdpad {
    /// Starts it beside `directory`'s other contents. `attrs` are added to both devices.
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
            // The client is this program, whose own limit is no part of what is compared.
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

    fn runner(&self, _backend: Backend) -> Runner {
        Runner(self.daemon.pid())
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
        // The exports are made in order.
        wait_for(&directory.join("qemu-null.sock"), "qemu-storage-daemon")?;
        Ok(qemu)
    }

    /// What it calls itself.
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

    fn runner(&self, _backend: Backend) -> Runner {
        Runner(self.child.id())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process of this program for each backend.
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

    fn runner(&self, backend: Backend) -> Runner {
        Runner(self.of(backend).child.id())
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
fn wait_for(socket: &Path, who: &str) -> Result<()> {
    let begin = Instant::now();
    while !socket.exists() {
        if begin.elapsed() > PATIENCE {
            return Err(format!("{who} makes no socket").into());
        }
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Those that could be started.
pub(crate) type All = Vec<(Who, Box<dyn Server>)>;
