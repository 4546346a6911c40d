//! [`Fixture`]: a private daemon with one disk, for a load to run on.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::host::PAGE_SIZE;
use vdpa_sys::rlimit;

use super::engine::LoadError;
use super::process::{PrivateDaemon, ProcessError};
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, AttrError, Attrs};
use vdpa_control::client::{Client, ClientError};

const DEVICE: &str = "demo0";
const GIB: u64 = 1 << 30;

/// Options of the fixture.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "fixture")]
pub struct Options {
    /// Guest memory, for example 512M or 8G [default: a quarter of free memory, at most 8G]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory: Option<u64>,
    /// Size of the disk
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size)]
    pub disk: u64,
    /// Use packed rings
    #[arg(long)]
    pub packed: bool,
    /// An existing device file of a block device, instead of a daemon with a disk: of a kernel, say. Everything on it is overwritten
    #[arg(long, value_name = "PATH", conflicts_with_all = ["vdpad", "packed"])]
    pub on_device: Option<PathBuf>,
    /// With --on-device: the file that backs it, to verify it without the device; else only what is read through it is verified
    #[arg(long, value_name = "PATH", requires = "on_device")]
    pub backing: Option<PathBuf>,
    /// The daemon to start [default: vdpad beside this program]
    #[arg(long, value_name = "PATH")]
    pub vdpad: Option<PathBuf>,
    /// Front end of the daemon: fuse for a file, cuse for a character device
    #[arg(long, value_name = "fuse|cuse", default_value = "fuse", value_parser = with_files)]
    pub front: Front,
    /// The program that is updated [default: vdpa-tenant beside this program]
    #[arg(long, value_name = "PATH")]
    pub tenant: Option<PathBuf>,
    /// Directory in which the disk file and the sockets are created; they are removed at the end [default: the system's for
    /// temporary files]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// Parses a number of bytes, with an optional suffix K, M, G or T. Must be a multiple of the page size.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G', 'T']) {
        Some(digits) => (digits, 10 * (1 + "KMGT".find(|c| text.ends_with(c)).unwrap_or(0))),
        None => (text, 0),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes
        .filter(|&n| n > 0 && n.is_multiple_of(PAGE_SIZE))
        .ok_or_else(|| "a multiple of 4096 bytes is right, for example 64M or 8G".to_owned())
}

/// A front end whose devices are device files, which the client opens.
fn with_files(text: &str) -> Result<Front, &'static str> {
    match text.parse() {
        Ok(Front::Vduse) | Err(_) => Err("\"fuse\" or \"cuse\" is right"),
        Ok(front) => Ok(front),
    }
}

/// Why a load could not run.
#[derive(Debug, Error)]
pub enum FixtureError {
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// The operation.
        action: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The process of the daemon or of the client.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A request to the daemon.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An attribute of the device.
    #[error(transparent)]
    Attr(#[from] AttrError),
    /// Journal, timeline or disk.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The client sent an unexpected event.
    #[error("the client sent {got} where {expected} was expected")]
    Unexpected {
        /// The event expected.
        expected: &'static str,
        /// The event received.
        got: String,
    },
}

pub(super) fn system<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> FixtureError {
    move |source| FixtureError::System { action, source: source.into() }
}

pub(super) fn errno(action: &'static str) -> impl Fn(Errno) -> FixtureError {
    move |source| FixtureError::System { action, source: io::Error::from_raw_os_error(source.raw()) }
}

/// A private daemon with one disk, or a device that was there. Dropping it ends the daemon and removes the disk.
#[derive(Debug)]
pub struct Fixture {
    /// Size of guest memory, in bytes.
    pub memory: u64,
    /// The device file.
    pub device: PathBuf,
    /// The backing file, if it can be read.
    pub disk: Option<PathBuf>,
    /// Its size.
    pub disk_bytes: u64,
    /// `None` for a device that was there.
    client: Option<Client>,
    directory: PathBuf,
    // Fields are dropped in this order.
    _daemon: Option<PrivateDaemon>,
    _directory: tempfile::TempDir,
}

impl Fixture {
    /// Starts the daemon and creates the disk, in a directory of their own.
    ///
    /// # Errors
    /// [`FixtureError`]; nothing is left behind.
    pub fn start(options: &Options) -> Result<Self, FixtureError> {
        let memory = match options.memory {
            Some(memory) => memory,
            None => default_memory()?,
        };
        let parent = options.directory.clone().unwrap_or_else(std::env::temp_dir);
        let directory = tempfile::Builder::new()
            .prefix("vdpa-load-")
            .tempdir_in(parent)
            .map_err(system("create a directory for the disk"))?;
        if let Some(device) = &options.on_device {
            let _ = rlimit::raise_memlock(Some(memory));
            return Ok(Self {
                memory,
                device: device.clone(),
                disk: options.backing.clone(),
                disk_bytes: options.disk,
                client: None,
                directory: directory.path().to_owned(),
                _daemon: None,
                _directory: directory,
            });
        }
        let disk = directory.path().join("disk.img");
        let file = std::fs::File::create_new(&disk).map_err(system("create the disk file"))?;
        file.set_len(options.disk).map_err(system("size the disk file"))?;

        let own = std::env::current_exe().map_err(system("find this program"))?;
        let vdpad = options.vdpad.clone().unwrap_or_else(|| own.with_file_name("vdpad"));
        let daemon = PrivateDaemon::start(&vdpad, directory.path(), options.front)?;
        let client = Client::new(daemon.socket()).map_err(system("talk to the daemon"))?;
        client.add(&device(&disk, memory, options.packed)?)?;
        let device = client.device(DEVICE)?.path;
        Ok(Self {
            memory,
            device,
            disk: Some(disk),
            disk_bytes: options.disk,
            client: Some(client),
            directory: directory.path().to_owned(),
            _daemon: Some(daemon),
            _directory: directory,
        })
    }

    /// The directory of this fixture.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Pages of 4096 bytes that the device has pinned: as the daemon says, or else what the kernel has charged to all processes
    /// (VmPin).
    ///
    /// # Errors
    /// [`FixtureError::Client`], [`FixtureError::System`].
    pub fn pinned_pages(&self) -> Result<u64, FixtureError> {
        match &self.client {
            Some(client) => Ok(client.device(DEVICE)?.state.pinned_pages),
            None => charged_pages(),
        }
    }
}

/// The sum of VmPin of all processes, in pages of 4096 bytes.
fn charged_pages() -> Result<u64, FixtureError> {
    let processes = std::fs::read_dir("/proc").map_err(system("read /proc"))?;
    // A process may end meanwhile, and threads of the kernel have no memory.
    let status = |entry: io::Result<std::fs::DirEntry>| {
        let path = entry.ok()?.path();
        path.file_name()?.to_str()?.parse::<u32>().ok()?;
        std::fs::read_to_string(path.join("status")).ok()
    };
    let kib = processes.filter_map(status).filter_map(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("VmPin:"))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    Ok(kib.sum::<u64>() / 4)
}

/// The request that creates the device. Where RLIMIT_MEMLOCK of the client cannot be raised, the device sets a limit of its own;
/// where that is not permitted either, the device does not pin.
fn device(disk: &Path, memory: u64, packed: bool) -> Result<AddRequest, FixtureError> {
    let mut attrs = Attrs::default();
    // The client accepts packed rings if the device offers them.
    attrs.insert("packed", if packed { "on" } else { "off" })?;
    let path = disk
        .to_str()
        .ok_or_else(|| system("use a directory whose name is not UTF-8")(io::ErrorKind::InvalidInput))?;
    attrs.insert("path", path)?;
    // The client inherits the limit. It is charged for its guest memory only.
    if rlimit::raise_memlock(Some(memory)).is_err() {
        if rlimit::memlock_exempt() {
            attrs.insert("memlock", "unlimited")?;
        } else {
            eprintln!("vdpactl: RLIMIT_MEMLOCK cannot be raised: memory is not pinned (pin=off)");
            attrs.insert("pin", "off")?;
        }
    }
    Ok(AddRequest { name: DEVICE.to_owned(), mgmtdev: "blk".to_owned(), attrs })
}

/// Default size of guest memory: a quarter of free memory, at most 8 GiB.
fn default_memory() -> Result<u64, FixtureError> {
    Ok(free_memory()?.map_or(GIB / 2, quarter))
}

const fn quarter(free: u64) -> u64 {
    let quarter = if free / 4 < 8 * GIB { free / 4 } else { 8 * GIB };
    quarter & !(PAGE_SIZE - 1)
}

/// Bytes that can be allocated without swapping; `None` if the kernel does not report it.
pub(super) fn free_memory() -> Result<Option<u64>, FixtureError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(system("read /proc/meminfo"))?;
    Ok(available(&text))
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("8192"), Ok(8192));
        assert_eq!(size("1T"), Ok(1 << 40));
        for wrong in ["", "0", "G", "1.5G", "100", "99999999999T", "-1M"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_quarter_of_what_is_free() {
        assert_eq!(available("MemTotal: 1 kB\nMemAvailable:    4001 kB\n").map(quarter), Some(1_024_000));
        assert_eq!(available("MemAvailable: 999999999999 kB").map(quarter), Some(8 * GIB));
        assert_eq!(available("MemFree: 5 kB"), None);
    }
}
