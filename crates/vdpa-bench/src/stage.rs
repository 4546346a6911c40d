//! What a load runs on: a private daemon with one disk.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::host::PAGE_SIZE;
use vdpa_sys::rlimit;

use super::engine::LoadError;
use super::peer::{PeerError, PrivateDaemon};
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, AttrError, Attrs};
use vdpa_control::client::{Client, ClientError};

const DEVICE: &str = "demo0";
const GIB: u64 = 1 << 30;

/// What the stage is made of.
#[derive(Clone, Debug, clap::Args)]
#[group(id = "stage")]
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
    /// The daemon to start [default: vdpad beside this program]
    #[arg(long, value_name = "PATH")]
    pub vdpad: Option<PathBuf>,
    /// Front end of the daemon: fuse for a file, cuse for a character device
    #[arg(long, value_name = "fuse|cuse", default_value = "fuse")]
    pub front: Front,
    /// The program that is updated [default: vdpa-tenant beside this program]
    #[arg(long, value_name = "PATH")]
    pub tenant: Option<PathBuf>,
    /// Directory for the disk file and the sockets, removed at the end [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// A number of bytes, in whole pages.
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

/// Why a load could not be run.
#[derive(Debug, Error)]
pub enum StageError {
    /// Something about files or processes of this machine.
    #[error("cannot {action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The daemon or the tenant.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The daemon's answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A path that cannot be an attribute.
    #[error(transparent)]
    Attr(#[from] AttrError),
    /// Ledger, timeline or disk.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The tenant answered something else than was asked.
    #[error("the tenant answered {got} when {expected} was due")]
    Unexpected {
        /// What was due.
        expected: &'static str,
        /// What came.
        got: String,
    },
}

pub(super) fn system<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> StageError {
    move |source| StageError::System { action, source: source.into() }
}

pub(super) fn errno(action: &'static str) -> impl Fn(Errno) -> StageError {
    move |source| StageError::System { action, source: io::Error::from_raw_os_error(source.raw()) }
}

/// A private daemon with one disk. Dropping it ends the daemon and removes the disk.
#[derive(Debug)]
pub struct Stage {
    /// Guest memory to use, in bytes.
    pub memory: u64,
    /// The device file.
    pub device: PathBuf,
    /// The backing file.
    pub disk: PathBuf,
    /// Its size.
    pub disk_bytes: u64,
    client: Client,
    directory: PathBuf,
    // The order of the fields is the order in which things end.
    _daemon: PrivateDaemon,
    _directory: tempfile::TempDir,
}

impl Stage {
    /// Starts the daemon and makes the disk, in a directory of their own.
    ///
    /// # Errors
    /// [`StageError`]; nothing is left behind.
    pub fn set(options: &Options) -> Result<Self, StageError> {
        let memory = match options.memory {
            Some(memory) => memory,
            None => default_memory()?,
        };
        let parent = options.directory.clone().unwrap_or_else(std::env::temp_dir);
        let directory = tempfile::Builder::new()
            .prefix("vdpa-load-")
            .tempdir_in(parent)
            .map_err(system("create a directory for the disk"))?;
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
            disk,
            disk_bytes: options.disk,
            client,
            directory: directory.path().to_owned(),
            _daemon: daemon,
            _directory: directory,
        })
    }

    /// A directory for what belongs to this stage.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Pages of 4096 bytes that the device has pinned.
    ///
    /// # Errors
    /// [`StageError::Client`].
    pub fn pinned_pages(&self) -> Result<u64, StageError> {
        Ok(self.client.device(DEVICE)?.state.pinned_pages)
    }
}

/// What to create. Where the client's limit on locked memory cannot be raised, the device sets one; where the daemon
/// may not pin at all, pages are not pinned.
fn device(disk: &Path, memory: u64, packed: bool) -> Result<AddRequest, StageError> {
    let mut attrs = Attrs::default();
    // A tenant uses what the device offers.
    attrs.insert("packed", if packed { "on" } else { "off" })?;
    let path = disk
        .to_str()
        .ok_or_else(|| system("use a directory whose name is not UTF-8")(io::ErrorKind::InvalidInput))?;
    attrs.insert("path", path)?;
    // Inherited by the client, which is charged for its guest memory and nothing else.
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

/// A quarter of the memory that is free, at most 8 GiB.
fn default_memory() -> Result<u64, StageError> {
    Ok(free_memory()?.map_or(GIB / 2, quarter))
}

const fn quarter(free: u64) -> u64 {
    let quarter = if free / 4 < 8 * GIB { free / 4 } else { 8 * GIB };
    quarter & !(PAGE_SIZE - 1)
}

/// Bytes that can be allocated without swapping, if the kernel says.
pub(super) fn free_memory() -> Result<Option<u64>, StageError> {
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
