//! [`Case`]: one check of one statement of the specification, and [`Ctx`], the context in which it runs.

use std::fmt::Debug;
use std::path::Path;

use rustix::fs::OFlags;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Bit, Features};

use crate::child::Child;
use crate::device::{Device, Target};
use crate::expect::Expectations;
use crate::forked::Forked;
use crate::probe::Probe;
use crate::request::Request;
use crate::vduse::Bus;
use crate::vstats::{self, Counters, Vstats};

/// Outcome of a check: `Ok` if the device behaved as the specification says.
pub type Outcome = Result<(), Stop>;

/// Why a check ended before its end.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Stop {
    /// The device did not behave as the specification says.
    #[error("{0}")]
    Failed(String),
    /// The machine, and not the device, lacks something that the check needs.
    #[error("cannot run: {0}")]
    CannotRun(String),
}

impl Stop {
    /// A failure to prepare the check: the device refused `action`, which is not itself the subject of the check.
    pub(crate) fn setup(action: &str, errno: Errno) -> Self {
        Self::Failed(format!("set-up: {action}: {errno}"))
    }
}

/// A precondition of a case. The suite probes the device for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The device offers this backend feature.
    Backend(Bit),
    /// The device does not offer this backend feature.
    NoBackend(Bit),
    /// The device offers this device feature.
    Feature(Bit),
    /// The device does not offer this device feature.
    NoFeature(Bit),
    /// The device has this virtio device id.
    DeviceId(u32),
    /// The device has at least this many virtqueues.
    Queues(u32),
    /// The device has at least this many groups of virtqueues.
    Groups(u32),
    /// The device has at least this many address spaces.
    AddressSpaces(u32),
    /// The device's largest ring has at least this many entries.
    RingSize(u16),
    /// A second process can be started: the suite's program was found.
    Child,
    /// The device's statistics can be read; see [`Vstats`].
    Vstats,
    /// The device can be opened a second time while it is open.
    SecondOpen,
    /// The kernel has this API version of VDUSE.
    VduseVersion(u64),
    /// The kernel has these features of VDUSE.
    VduseFeatures(u64),
    /// A memory table maps memory: the attribute `mem_table`.
    MemTable,
    /// The device is a file: the case checks system calls of the file, or request arguments in the caller's memory.
    DeviceFile,
}

impl Need {
    /// Why the device or the resources do not meet this need; `None` if they do.
    #[must_use]
    pub fn missing(self, probe: &Probe, resources: Resources<'_>) -> Option<String> {
        let (met, why) = match self {
            Self::Backend(bit) => (probe.backend.has(bit), format!("{} is not offered", backend_name(bit))),
            Self::NoBackend(bit) => (!probe.backend.has(bit), format!("{} is offered", backend_name(bit))),
            Self::Feature(bit) => (probe.features.has(bit), format!("feature bit {} is not offered", bit.0)),
            Self::NoFeature(bit) => (!probe.features.has(bit), format!("feature bit {} is offered", bit.0)),
            Self::DeviceId(id) => {
                (probe.device_id == id, format!("the device id is {} and not {id}", probe.device_id))
            }
            Self::Queues(count) => {
                (probe.queues >= count, format!("{} virtqueues, {count} are needed", probe.queues))
            }
            Self::Groups(count) => {
                (probe.groups >= count, format!("{} virtqueue groups, {count} are needed", probe.groups))
            }
            Self::AddressSpaces(count) => {
                let why = format!("{} address spaces, {count} are needed", probe.address_spaces);
                (probe.address_spaces >= count, why)
            }
            Self::RingSize(size) => {
                (probe.ring_size >= size, format!("rings of at most {}, {size} are needed", probe.ring_size))
            }
            Self::MemTable => (probe.mem_table, "a memory table has no effect".to_owned()),
            Self::DeviceFile => (probe.is_file, "there is no device file".to_owned()),
            Self::SecondOpen => (probe.second_open, "a second open is refused".to_owned()),
            Self::Vstats => (!probe.is_file || resources.vstats.is_some(), vstats::MISSING.to_owned()),
            Self::VduseVersion(version) => {
                let (newest, _) = probe.vduse.unwrap_or_default();
                (newest >= version, format!("VDUSE has API version {newest}, {version} is needed"))
            }
            Self::VduseFeatures(wanted) => {
                let (_, offered) = probe.vduse.unwrap_or_default();
                (
                    offered & wanted == wanted,
                    format!("VDUSE has the features {offered:#x}, {wanted:#x} are needed"),
                )
            }
            Self::Child => (resources.child.is_some(), "the program vdpa-conform was not found".to_owned()),
        };
        (!met).then_some(why)
    }
}

fn backend_name(bit: Bit) -> String {
    let name = match bit {
        BackendFeatures::SUSPEND => "SUSPEND",
        BackendFeatures::RESUME => "RESUME",
        BackendFeatures::DESC_ASID => "DESC_ASID",
        BackendFeatures::IOTLB_PERSIST => "IOTLB_PERSIST",
        BackendFeatures::NEW_OWNER => "NEW_OWNER",
        BackendFeatures::IOTLB_REMAP => "IOTLB_REMAP",
        BackendFeatures::DIRTY_LOG => "DIRTY_LOG",
        BackendFeatures::DEVICE_STATE => "DEVICE_STATE",
        Bit(number) => return format!("backend bit {number}"),
    };
    format!("backend feature {name}")
}

/// One check.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Stable name, `group.what`, which expectation files use.
    pub id: &'static str,
    /// Section of the interface specification (uapi-spec), and the vector of its section 9.4 if there is one.
    pub spec: &'static str,
    /// The requests whose behaviour the case checks. `docs/uapi.md` is generated from these.
    pub covers: &'static [Request],
    /// Preconditions.
    pub needs: &'static [Need],
    /// The check. It opens the device itself, and the device is closed when it returns.
    pub run: fn(&mut Ctx<'_>) -> Outcome,
}

/// What a run has besides the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources<'a> {
    /// The program to start as a second process (`vdpa-conform` itself); without it, cases that need one are skipped.
    pub child: Option<&'a Path>,
    /// How to read the device's statistics; without it, cases that need them are skipped.
    pub vstats: Option<&'a Vstats>,
}

/// The context of a check: the device and the resources of the run.
#[derive(Debug)]
pub struct Ctx<'a> {
    target: Target<'a>,
    probe: &'a Probe,
    resources: Resources<'a>,
    iotlb_entries: u32,
}

/// Default of `max_iotlb_entries`, the parameter of the kernel's module vhost.
const IOTLB_ENTRIES: u32 = 2048;

impl<'a> Ctx<'a> {
    pub(crate) fn new(
        target: Target<'a>,
        probe: &'a Probe,
        resources: Resources<'a>,
        expected: &Expectations,
    ) -> Self {
        let iotlb_entries = expected.max_iotlb_entries().unwrap_or(IOTLB_ENTRIES);
        Self { target, probe, resources, iotlb_entries }
    }

    /// Most entries that an IOTLB table of the device is to hold.
    pub(crate) fn iotlb_entries(&self) -> u32 {
        self.iotlb_entries
    }

    /// What the device reports about itself.
    pub(crate) fn probe(&self) -> &'a Probe {
        self.probe
    }

    /// Opens the device for reading and writing.
    pub(crate) fn try_open(&self) -> Result<Device, Errno> {
        Device::open(self.target)
    }

    /// Opens the device file with this access mode.
    pub(crate) fn open_as(&self, mode: OFlags) -> Result<Device, Stop> {
        let Target::File(path) = self.target else {
            return Err(Stop::CannotRun("there is no device file".to_owned()));
        };
        Device::open_as(path, mode).map_err(|errno| Stop::setup("open", errno))
    }

    /// How to put devices on the bus.
    pub(crate) fn bus(&self) -> Result<&'a Bus, Stop> {
        match self.target {
            Target::Vduse(bus) => Ok(bus),
            _ => Err(Stop::CannotRun("the subject is not VDUSE".to_owned())),
        }
    }

    /// Opens the device. It has no owner, and its status is 0.
    pub(crate) fn open(&self) -> Result<Device, Stop> {
        self.try_open().map_err(|errno| Stop::setup("open", errno))
    }

    /// Opens the device and becomes its owner.
    pub(crate) fn open_owned(&self) -> Result<Device, Stop> {
        let device = self.open()?;
        device.call(Request::SET_OWNER).map_err(|errno| Stop::setup("VHOST_SET_OWNER", errno))?;
        Ok(device)
    }

    /// The features that every client of the transport acknowledges, if the device offers them.
    pub(crate) fn base_features(&self) -> Features {
        self.probe.features & Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM])
    }

    /// Reads the statistics of a queue of `device`.
    pub(crate) fn counters(&self, device: &Device, queue: u16) -> Result<Counters, Stop> {
        vstats::counters(self.resources.vstats, device, queue)
    }

    /// Forks a child, which inherits `device`.
    #[expect(clippy::unused_self, reason = "a method, since `child` starts the other kind of second process")]
    pub(crate) fn fork(&self, device: &Device) -> Result<Forked, Stop> {
        Forked::start(device)
    }

    /// Starts a second process and passes `device` to it.
    pub(crate) fn child(&self, device: &Device) -> Result<Child, Stop> {
        let program = self
            .resources
            .child
            .ok_or_else(|| Stop::CannotRun("no program for a second process".to_owned()))?;
        Child::start(program, device).map_err(|error| Stop::CannotRun(format!("second process: {error}")))
    }
}

/// Compares the result `got` with `want`, the result that the specification requires.
pub(crate) fn check<T: PartialEq + Debug>(what: &str, got: T, want: T) -> Outcome {
    if got == want { Ok(()) } else { Err(Stop::Failed(format!("{what}: got {got:?}, should be {want:?}"))) }
}

/// Converts the error of a step that prepares a check: the check could not be made.
pub(crate) fn prepare<T>(action: &str, result: Result<T, Errno>) -> Result<T, Stop> {
    result.map_err(|errno| Stop::setup(action, errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_need_says_what_is_missing() {
        let probe = Probe { device_id: 2, queues: 1, ..Probe::default() };
        let none = Resources::default();
        assert_eq!(Need::DeviceId(2).missing(&probe, none), None);
        assert_eq!(Need::Queues(2).missing(&probe, none).unwrap(), "1 virtqueues, 2 are needed");
        let need = Need::Backend(BackendFeatures::NEW_OWNER);
        assert_eq!(need.missing(&probe, none).unwrap(), "backend feature NEW_OWNER is not offered");
        assert!(Need::NoBackend(BackendFeatures::NEW_OWNER).missing(&probe, none).is_none());
        assert!(Need::Child.missing(&probe, none).is_some());
        assert_eq!(Need::SecondOpen.missing(&probe, none).unwrap(), "a second open is refused");
        let child = Resources { child: Some(Path::new("/bin/true")), ..none };
        assert!(Need::Child.missing(&probe, child).is_none());
        let file = Probe { is_file: true, ..probe };
        assert!(Need::Vstats.missing(&file, child).unwrap().contains("--vstats"));
        assert!(Need::Vstats.missing(&file, Resources { vstats: Some(&"vdpa".into()), ..none }).is_none());
        assert!(Need::Vstats.missing(&probe, none).is_none(), "a device in this process is asked directly");
    }

    #[test]
    fn check_shows_both_sides() {
        assert_eq!(check("x", 1, 1), Ok(()));
        let failed = check("GET_STATUS", Err::<u8, _>(Errno::PERM), Ok(0)).unwrap_err();
        assert_eq!(failed.to_string(), "GET_STATUS: got Err(EPERM), should be Ok(0)");
    }
}
