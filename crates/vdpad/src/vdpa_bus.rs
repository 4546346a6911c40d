//! The kernel's vdpa bus, and which driver has a device on it.

mod netlink;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};
use vdpa_control::api::CtlError;
use vdpa_core::Errno;

/// Management device of VDUSE's devices.
const MGMTDEV: &str = "vduse";

/// The driver that a device on the bus is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bind {
    /// `virtio_vdpa`: the kernel's own drivers use it.
    Virtio,
    /// `vhost_vdpa`: a character device for a program.
    Vhost,
    /// The device is not put on the bus.
    None,
}

impl Bind {
    /// Parses the attribute `bind`.
    ///
    /// # Errors
    /// `EINVAL`.
    pub(crate) fn parse(text: Option<&str>) -> Result<Self, CtlError> {
        match text {
            None | Some("none") => Ok(Self::None),
            Some("virtio") => Ok(Self::Virtio),
            Some("vhost") => Ok(Self::Vhost),
            Some(text) => Err(CtlError::new(Errno::INVAL, format!("bind is \"{text}\""))
                .with_hint("\"virtio\", \"vhost\" or \"none\" is right.")),
        }
    }

    /// As the attribute has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Vhost => "vhost",
            Self::None => "none",
        }
    }

    const fn driver(self) -> Option<&'static str> {
        match self {
            Self::Virtio => Some("virtio_vdpa"),
            Self::Vhost => Some("vhost_vdpa"),
            Self::None => None,
        }
    }
}

fn device_dir(name: &str) -> PathBuf {
    PathBuf::from("/sys/bus/vdpa/devices").join(name)
}

/// Loads a module, unless it is there or cannot be found: then the request that needs it says so.
pub(crate) fn load(module: &str) {
    let loaded =
        Command::new("modprobe").args(["-q", module]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    tracing::debug!(module, ?loaded, "modprobe");
}

/// Whether the device is on the bus.
pub(crate) fn has(name: &str) -> bool {
    device_dir(name).exists()
}

/// Puts a VDUSE device on the bus, and gives it the driver. Blocks while the drivers probe it, which ask the program behind it.
///
/// # Errors
/// The device is not on the bus then. `EPERM` without CAP_NET_ADMIN; `ENODEV` without the driver; `EIO` when another driver has it.
pub(crate) fn attach(name: &str, bind: Bind) -> Result<(), CtlError> {
    let Some(driver) = bind.driver() else { return Ok(()) };
    load(driver);
    if !PathBuf::from("/sys/bus/vdpa/drivers").join(driver).exists() {
        return Err(CtlError::new(Errno::NODEV, format!("the kernel has no driver {driver}"))
            .with_hint(format!("\"modprobe {driver}\" loads it, if the kernel was built with it.")));
    }
    netlink::add(MGMTDEV, name).map_err(|errno| {
        let error = CtlError::new(errno, format!("the kernel does not put {name} on its vdpa bus: {errno}"));
        match errno {
            Errno::PERM => error.with_hint("The daemon needs CAP_NET_ADMIN for that."),
            Errno::EXIST => error.with_hint("There is a device of that name on the bus (\"vdpa dev show\")."),
            _ => error,
        }
    })?;
    choose_driver(name, driver).inspect_err(|_| {
        // If it stays, whoever destroys the device says so.
        let _ = netlink::delete(name);
    })
}

/// The bus gives a device to the driver that was there first.
fn choose_driver(name: &str, driver: &str) -> Result<(), CtlError> {
    let dir = device_dir(name);
    let failed = |error: io::Error| {
        let errno = errno(error);
        CtlError::new(errno, format!("{name} does not get the driver {driver}: {errno}"))
            .with_hint(format!("{} says which driver it has.", dir.join("driver").display()))
    };
    let present = || std::fs::read_link(dir.join("driver")).ok();
    if present().is_some_and(|link| link.ends_with(driver)) {
        return Ok(());
    }
    std::fs::write(dir.join("driver_override"), driver).map_err(failed)?;
    if present().is_some() {
        std::fs::write(dir.join("driver/unbind"), name).map_err(failed)?;
    }
    std::fs::write(format!("/sys/bus/vdpa/drivers/{driver}/bind"), name).map_err(failed)?;
    if present().is_some_and(|link| link.ends_with(driver)) {
        return Ok(());
    }
    Err(failed(io::Error::from_raw_os_error(Errno::IO.raw())))
}

/// Takes a device from the bus, if it is there. Blocks while its driver lets it go, and asks the program behind it.
///
/// # Errors
/// `EBUSY` when a program has it open by `vhost_vdpa`, for which the kernel would wait; those of the kernel.
pub(crate) fn detach(name: &str) -> Result<(), CtlError> {
    if !has(name) {
        return Ok(());
    }
    // The kernel would wait for its end, and no other device could be added or deleted meanwhile.
    if let Some(node) = node(name) {
        let shown = node.display();
        match open_error(&node, 0) {
            Some(Errno::BUSY) => {
                return Err(CtlError::new(Errno::BUSY, format!("a program has {shown} open"))
                    .with_hint("Close it first: the kernel waits for it, also with --force."));
            }
            Some(errno @ (Errno::PERM | Errno::ACCESS)) => {
                let text = format!("whether a program has {shown} open cannot be found out: {errno}");
                return Err(CtlError::new(errno, text)
                    .with_hint("The daemon must be able to open it (DeviceAllow= of its unit)."));
            }
            // EIO of a device that the kernel has given up, for example: who has it open is asked first.
            _ => {}
        }
    }
    netlink::delete(name).map_err(|errno| {
        CtlError::new(errno, format!("the kernel does not take {name} from its vdpa bus: {errno}"))
    })
}

/// Whether somebody uses it: a program by `vhost_vdpa`; a file system, swap or another device on its disk; or its interface is up.
pub(crate) fn in_use(name: &str) -> bool {
    node(name).is_some_and(|node| open_fails_busy(&node, 0))
        || disks(name).iter().any(|disk| open_fails_busy(disk, exclusive()))
        || interfaces(name).iter().any(|interface| is_up(interface))
}

/// `IFF_UP` in the flags of an interface. One in another network namespace has no directory here.
fn is_up(interface: &Path) -> bool {
    let flags = std::fs::read_to_string(interface.join("flags")).unwrap_or_default();
    flags
        .trim()
        .strip_prefix("0x")
        .and_then(|flags| u32::from_str_radix(flags, 16).ok())
        .is_some_and(|flags| flags & 1 != 0)
}

/// `O_EXCL`: of a block device, whoever mounts it has it.
fn exclusive() -> i32 {
    rustix::fs::OFlags::EXCL.bits().cast_signed()
}

fn open_fails_busy(path: &Path, flags: i32) -> bool {
    open_error(path, flags) == Some(Errno::BUSY)
}

/// Why a file cannot be opened.
fn open_error(path: &Path, flags: i32) -> Option<Errno> {
    let opened = OpenOptions::new().read(true).write(flags == 0).custom_flags(flags).open(path);
    opened.err().map(errno)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(Errno::IO.raw()))
}

/// The character device of `vhost_vdpa`.
fn node(name: &str) -> Option<PathBuf> {
    entries(&device_dir(name), "vhost-vdpa-").into_iter().next().map(|node| PathBuf::from("/dev").join(node))
}

/// The block devices of `virtio_vdpa`.
fn disks(name: &str) -> Vec<PathBuf> {
    of_virtio(name, "block", "/dev")
}

/// The network interfaces of `virtio_vdpa`, as directories of sysfs.
fn interfaces(name: &str) -> Vec<PathBuf> {
    of_virtio(name, "net", "/sys/class/net")
}

/// What the driver of a virtio device of `virtio_vdpa` has made in a class, by its names in `place`.
fn of_virtio(name: &str, class: &str, place: &str) -> Vec<PathBuf> {
    let dir = device_dir(name);
    let buses = entries(&dir, "virtio");
    let made = buses.iter().flat_map(|bus| entries(&dir.join(bus).join(class), ""));
    made.map(|made| Path::new(place).join(made)).collect()
}

fn entries(dir: &Path, prefix: &str) -> Vec<String> {
    let found = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = found.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// The file by which the device is used, if it has one: that of `vhost_vdpa`, or the disk or the interface of the kernel's driver.
pub(crate) fn file(name: &str) -> Option<PathBuf> {
    node(name).or_else(|| disks(name).into_iter().next()).or_else(|| interfaces(name).into_iter().next())
}
