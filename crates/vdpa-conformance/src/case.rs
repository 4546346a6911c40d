//! [`Case`]: one statement of the specification, and what its check is given.

use std::fmt::Debug;
use std::path::Path;

use rustix::fs::OFlags;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Bit, Features};

use crate::child::Child;
use crate::device::{Device, Target};
use crate::forked::Forked;
use crate::probe::Probe;
use crate::request::Request;
use crate::vstats::{self, Counters, Vstats};

/// What a check came to: `Ok` when the device did what the specification says.
pub type Outcome = Result<(), Stop>;

/// Why a check ended early.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Stop {
    /// The device did something else.
    #[error("{0}")]
    Failed(String),
    /// This machine lacks something the check needs, apart from the device.
    #[error("cannot run: {0}")]
    CannotRun(String),
}

impl Stop {
    /// A failure to prepare the check: the device refused `action`, which is not what is being checked.
    pub(crate) fn setup(action: &str, errno: Errno) -> Self {
        Self::Failed(format!("set-up: {action}: {errno}"))
    }
}

/// Something a device must have for a case to mean anything. Probed from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It offers this backend feature.
    Backend(Bit),
    /// It does not offer this backend feature.
    NoBackend(Bit),
    /// It offers this device feature.
    Feature(Bit),
    /// It has this virtio device id.
    DeviceId(u32),
    /// It has at least this many virtqueues.
    Queues(u32),
    /// It has at least this many groups of virtqueues.
    Groups(u32),
    /// It has at least this many address spaces.
    AddressSpaces(u32),
    /// Its largest ring has at least this many entries.
    RingSize(u16),
    /// A second process can be started: the program of the suite is there.
    Child,
    /// There is a way to learn what the device counts; see [`Vstats`].
    Vstats,
    /// It can be opened a second time while somebody has it open.
    SecondOpen,
    /// The device is a file: the case is about its system calls, or about arguments as they lie in memory.
    DeviceFile,
}

impl Need {
    /// Why this need is not met; `None` when it is.
    #[must_use]
    pub fn missing(self, probe: &Probe, resources: Resources<'_>) -> Option<String> {
        let (met, why) = match self {
            Self::Backend(bit) => (probe.backend.has(bit), format!("{} is not offered", backend_name(bit))),
            Self::NoBackend(bit) => (!probe.backend.has(bit), format!("{} is offered", backend_name(bit))),
            Self::Feature(bit) => (probe.features.has(bit), format!("feature bit {} is not offered", bit.0)),
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
            Self::DeviceFile => (probe.is_file, "there is no device file".to_owned()),
            Self::SecondOpen => (probe.second_open, "a second open is refused".to_owned()),
            Self::Vstats => (!probe.is_file || resources.vstats.is_some(), vstats::MISSING.to_owned()),
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
        Bit(number) => return format!("backend bit {number}"),
    };
    format!("backend feature {name}")
}

/// One check.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Stable name, `group.what`; expectation files refer to it.
    pub id: &'static str,
    /// Section of the interface specification (uapi-spec), and the vector of its section 9.4 if there is one.
    pub spec: &'static str,
    /// The requests whose behaviour it checks; the source of `docs/uapi.md`.
    pub covers: &'static [Request],
    /// What the device must have.
    pub needs: &'static [Need],
    /// The check. It opens the device itself and leaves it closed.
    pub run: fn(&mut Ctx<'_>) -> Outcome,
}

/// What there is for a run besides the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resources<'a> {
    /// The program to start for a second process (`vdpa-conform` itself); without it such cases are skipped.
    pub child: Option<&'a Path>,
    /// How to learn what the device counts; without it such cases are skipped.
    pub vstats: Option<&'a Vstats>,
}

/// What a check is given.
#[derive(Debug)]
pub struct Ctx<'a> {
    target: Target<'a>,
    probe: &'a Probe,
    resources: Resources<'a>,
}

impl<'a> Ctx<'a> {
    pub(crate) fn new(target: Target<'a>, probe: &'a Probe, resources: Resources<'a>) -> Self {
        Self { target, probe, resources }
    }

    /// What the device is.
    pub(crate) fn probe(&self) -> &'a Probe {
        self.probe
    }

    /// Opens the device for reading and writing.
    pub(crate) fn try_open(&self) -> Result<Device, Errno> {
        Device::open(self.target)
    }

    /// Opens the device file in some mode.
    pub(crate) fn open_as(&self, mode: OFlags) -> Result<Device, Stop> {
        let Target::File(path) = self.target else {
            return Err(Stop::CannotRun("there is no device file".to_owned()));
        };
        Device::open_as(path, mode).map_err(|errno| Stop::setup("open", errno))
    }

    /// Opens the device; no owner, status 0.
    pub(crate) fn open(&self) -> Result<Device, Stop> {
        self.try_open().map_err(|errno| Stop::setup("open", errno))
    }

    /// Opens the device and becomes its owner.
    pub(crate) fn open_owned(&self) -> Result<Device, Stop> {
        let device = self.open()?;
        device.call(Request::SET_OWNER).map_err(|errno| Stop::setup("VHOST_SET_OWNER", errno))?;
        Ok(device)
    }

    /// The features every transport client acknowledges, as far as the device offers them.
    pub(crate) fn plain_features(&self) -> Features {
        self.probe.features & Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM])
    }

    /// What `device` counts for a queue.
    pub(crate) fn counters(&self, device: &Device, queue: u16) -> Result<Counters, Stop> {
        vstats::counters(self.resources.vstats, device, queue)
    }

    /// Forks a child that holds `device` too.
    #[expect(clippy::unused_self, reason = "beside `child`, as the other kind of second process")]
    pub(crate) fn fork(&self, device: &Device) -> Result<Forked, Stop> {
        Forked::start(device)
    }

    /// Starts a second process that holds `device` too.
    pub(crate) fn child(&self, device: &Device) -> Result<Child, Stop> {
        let program = self
            .resources
            .child
            .ok_or_else(|| Stop::CannotRun("no program for a second process".to_owned()))?;
        Child::start(program, device).map_err(|error| Stop::CannotRun(format!("second process: {error}")))
    }
}

/// Compares what came with what the specification says.
pub(crate) fn check<T: PartialEq + Debug>(what: &str, got: T, want: T) -> Outcome {
    if got == want { Ok(()) } else { Err(Stop::Failed(format!("{what}: got {got:?}, should be {want:?}"))) }
}

/// Prepares a check; an error means that the check could not be made.
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
        assert!(Need::Vstats.missing(&probe, none).is_none(), "it is asked itself");
    }

    #[test]
    fn check_shows_both_sides() {
        assert_eq!(check("x", 1, 1), Ok(()));
        let failed = check("GET_STATUS", Err::<u8, _>(Errno::PERM), Ok(0)).unwrap_err();
        assert_eq!(failed.to_string(), "GET_STATUS: got Err(EPERM), should be Ok(0)");
    }
}
