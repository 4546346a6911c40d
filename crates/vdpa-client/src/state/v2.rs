//! Version 2 of the library's own sections: any number of devices, by any way.
//!
//! As in [`v1`], these types are the format. What is known before the device is touched is [`Prepared`], in four
//! sections; what is known only when it is at rest is [`Switch`], in one. Numbers of file descriptors are those of the
//! process that saved, for an exec, and places in the list that was sent along, for a hand-over.

use serde::{Deserialize, Serialize};

use super::{Section, Sections, StateError, config, packed, v1};

/// Version of each section below.
pub const VERSION: u32 = 2;
/// Name of the section that holds [`Update`].
pub const UPDATE: &str = v1::UPDATE;
/// Name of the section that holds [`Memories`].
pub const MEMORY: &str = v1::MEMORY;
/// Name of the section that holds [`Devices`].
pub const DEVICES: &str = "vdpa/devices";
/// Name of the section that holds [`Descriptors`].
pub const DESCRIPTORS: &str = "vdpa/descriptors";
/// Name of the section that holds [`Switch`].
pub const SWITCH: &str = "vdpa/switch";

/// Name of the optional section that holds [`Files`].
pub const FILES: &str = "vdpa/files";
/// Version of that section.
pub const FILES_VERSION: u32 = 1;

/// What an exec need not ask of devices again, since their open files are the same. Older readers do without.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// In the order of [`Devices::devices`].
    pub files: Vec<DeviceFile>,
}

/// The open file of a device, and what it had answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFile {
    /// Device number of its file system, as stat(2) packs it.
    pub dev: u64,
    /// Its inode there.
    pub inode: u64,
    /// Backend features offered.
    pub backend_features: u64,
    /// First I/O virtual address it can translate.
    pub iova_first: u64,
    /// Last one.
    pub iova_last: u64,
}

impl Files {
    /// Adds its section.
    ///
    /// # Errors
    /// [`StateError::Payload`], which this type does not cause.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.push(Section::json(FILES, FILES_VERSION, self)?.optional());
        Ok(())
    }

    /// Takes its section out; empty when there is none, or one of another version.
    ///
    /// # Errors
    /// [`StateError::Payload`].
    pub fn take(sections: &mut Sections) -> Result<Self, StateError> {
        match sections.take(FILES) {
            Some(section) if section.version == FILES_VERSION => section.parse(FILES_VERSION),
            _ => Ok(Self::default()),
        }
    }
}

/// What kind of update this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// `exec`, `fork` or `hand-over`.
    pub way: String,
    /// The process that saved; an exec keeps it.
    pub predecessor: i32,
    /// When the update was begun, in ns since 1970-01-01 UTC.
    pub begun_unix_ns: u64,
    /// The caller's sections that come with the switch.
    pub late: Vec<Late>,
}

/// A section of the caller that is announced before its contents are known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Late {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// Whether a program that does not know it may go on.
    pub optional: bool,
}

/// All memory, each piece once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memories {
    /// Mappings name them by their place here.
    pub memories: Vec<Memory>,
}

/// One piece of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Its name, for people.
    pub name: String,
    /// The memory object.
    pub fd: i32,
    /// Where it begins in the object, in bytes.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// All devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// In the order in which they are taken over.
    pub devices: Vec<Device>,
}

/// One device, what was negotiated with it, its mappings and its rings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name, unique in the update.
    pub name: String,
    /// `live`, `resume`, `reset` or `reopen`.
    pub strategy: String,
    /// The device's open file; `None` if it is closed (reopen).
    pub fd: Option<i32>,
    /// Where the device can be opened again, if known.
    pub path: Option<String>,
    /// Virtio device id.
    pub device_id: u32,
    /// Negotiated device features.
    pub features: u64,
    /// Acknowledged backend features.
    pub backend_features: u64,
    /// Whether the device was running (DRIVER_OK).
    pub running: bool,
    /// One entry per UPDATE, in their order.
    pub mappings: Vec<Mapping>,
    /// Rings that the program drives.
    pub queues: Vec<Queue>,
    /// Rings that a guest drives.
    pub guest_queues: Vec<GuestQueue>,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// Name, unique in the session.
    pub name: String,
    /// Which of [`Memories::memories`] it is a part of.
    pub memory: u32,
    /// Where it begins there, in bytes.
    pub offset: u64,
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Access for the device: `VHOST_ACCESS_*`.
    pub perm: u8,
    /// Address space.
    pub asid: u32,
}

/// One vring that the program drives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Index of the virtqueue.
    pub index: u16,
    /// Entries of the ring.
    pub size: u16,
    /// Name of the mapping it lies in.
    pub region: String,
    /// Offset of the descriptor area in the mapping, in bytes.
    pub desc: u64,
    /// Offset of the driver area.
    pub avail: u64,
    /// Offset of the device area.
    pub used: u64,
    /// The kick eventfd.
    pub kick_fd: i32,
    /// The call eventfd.
    pub call_fd: i32,
}

/// One vring that a guest drives; its areas are I/O virtual addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestQueue {
    /// Index of the virtqueue.
    pub index: u16,
    /// Entries of the ring.
    pub size: u16,
    /// Descriptor area.
    pub desc: u64,
    /// Driver area.
    pub driver: u64,
    /// Device area.
    pub device: u64,
    /// The kick eventfd.
    pub kick_fd: i32,
    /// The call eventfd.
    pub call_fd: i32,
}

/// Descriptors of the caller, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Descriptors {
    /// In the order in which they were given.
    pub descriptors: Vec<Descriptor>,
}

/// One descriptor of the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Descriptor {
    /// Name, unique in the update.
    pub name: String,
    /// Its number.
    pub fd: i32,
}

/// What is known when the devices are at rest, or, with `live`, when nobody drives them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// `CLOCK_MONOTONIC` when the switch began, in ns.
    pub begun_ns: u64,
    /// `CLOCK_MONOTONIC` when the state was complete, in ns.
    pub saved_ns: u64,
    /// How long preparing took, in ns.
    pub prepare_ns: u64,
    /// How long collecting the state took, in ns.
    pub save_ns: u64,
    /// In the order of [`Devices::devices`].
    pub devices: Vec<AtRest>,
}

/// One device at rest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AtRest {
    /// How long bringing it to rest took, in ns.
    pub suspend_ns: u64,
    /// Where it goes on in each ring (`VHOST_GET_VRING_BASE`), first the queues, then those of a guest; empty if it was
    /// not stopped.
    pub bases: Vec<u32>,
    /// The driver side of each split ring that the program drives.
    pub drivers: Vec<v1::Driver>,
    /// That of each packed ring, from the section [`packed::DRIVERS`].
    #[serde(skip)]
    pub packed_drivers: Vec<packed::Driver>,
    /// What the driver has written into the field `writeback`, from the section [`config::WRITTEN`].
    #[serde(skip)]
    pub writeback: Option<u8>,
}

/// What is known before any device is touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// See [`Update`].
    pub update: Update,
    /// See [`Memories`].
    pub memory: Memories,
    /// See [`Devices`].
    pub devices: Devices,
    /// See [`Descriptors`].
    pub descriptors: Descriptors,
}

impl Prepared {
    /// Adds its sections to those of the caller.
    ///
    /// # Errors
    /// [`StateError::Name`] when a caller's section has a name of the library.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.check_names()?;
        sections.push_json(UPDATE, VERSION, &self.update)?;
        sections.push_json(MEMORY, VERSION, &self.memory)?;
        sections.push_json(DEVICES, VERSION, &self.devices)?;
        sections.push_json(DESCRIPTORS, VERSION, &self.descriptors)?;
        packed::announce(&self.devices, sections)
    }

    /// Takes its sections out.
    ///
    /// # Errors
    /// [`StateError`]: missing, of another version, unreadable.
    pub fn take(sections: &mut Sections) -> Result<Self, StateError> {
        packed::take_announcement(sections)?;
        Ok(Self {
            update: sections.require_json(UPDATE, VERSION)?,
            memory: sections.require_json(MEMORY, VERSION)?,
            devices: sections.require_json(DEVICES, VERSION)?,
            descriptors: sections.require_json(DESCRIPTORS, VERSION)?,
        })
    }
}

impl Switch {
    /// Adds its section.
    ///
    /// # Errors
    /// [`StateError::Payload`], which this type does not cause.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.push_json(SWITCH, VERSION, self)?;
        packed::put(&self.devices, sections)?;
        config::put(&self.devices, sections)
    }

    /// Takes its section out.
    ///
    /// # Errors
    /// [`StateError`]: missing, of another version, unreadable.
    pub fn take(sections: &mut Sections) -> Result<Self, StateError> {
        let mut switch: Self = sections.require_json(SWITCH, VERSION)?;
        packed::take(&mut switch.devices, sections)?;
        config::take(&mut switch.devices, sections)?;
        Ok(switch)
    }
}

/// The library's sections of a complete state, of this version or an older one. The caller's stay.
///
/// # Errors
/// [`StateError`]: missing, of a newer version, unreadable, or a section of the library that is not known and not
/// optional.
pub fn take(sections: &mut Sections) -> Result<(Prepared, Switch), StateError> {
    let old = sections.iter().any(|s| s.name == UPDATE && s.version == v1::VERSION);
    if old {
        return Ok(from_v1(v1::State::take(sections)?));
    }
    let taken = (Prepared::take(sections)?, Switch::take(sections)?);
    sections.end_of_own()?;
    Ok(taken)
}

/// Name of the device of a state that had no names.
pub const V1_DEVICE: &str = "device";

fn from_v1(state: v1::State) -> (Prepared, Switch) {
    let v1::State { update, session, memory, queues } = state;
    let mut memories = Vec::new();
    let mut mappings = Vec::new();
    for (at, region) in (0..).zip(memory.regions) {
        let v1::Region { name, fd, iova, size, perm, asid } = region;
        memories.push(Memory { name: name.clone(), fd, offset: 0, size });
        mappings.push(Mapping { name, memory: at, offset: 0, iova, size, perm, asid });
    }
    let mut rest = AtRest { suspend_ns: update.suspend_ns, ..AtRest::default() };
    let mut rings = Vec::new();
    for queue in queues.queues {
        let v1::Queue { index, size, region, desc, avail, used, kick_fd, call_fd, base, driver } = queue;
        rings.push(Queue { index, size, region, desc, avail, used, kick_fd, call_fd });
        rest.bases.extend(base);
        rest.drivers.push(driver);
    }
    let device = Device {
        name: V1_DEVICE.to_owned(),
        strategy: update.strategy,
        fd: session.device_fd,
        path: session.path,
        device_id: session.device_id,
        features: session.features,
        backend_features: session.backend_features,
        running: session.running,
        mappings,
        queues: rings,
        guest_queues: Vec::new(),
    };
    let begun_ns = update.exec_begin_ns.saturating_sub(update.save_ns).saturating_sub(update.suspend_ns);
    let prepared = Prepared {
        update: Update {
            way: "exec".to_owned(),
            predecessor: update.pid,
            begun_unix_ns: 0,
            late: Vec::new(),
        },
        memory: Memories { memories },
        devices: Devices { devices: vec![device] },
        descriptors: Descriptors::default(),
    };
    let switch = Switch {
        begun_ns,
        saved_ns: update.exec_begin_ns,
        prepare_ns: 0,
        save_ns: update.save_ns,
        devices: vec![rest],
    };
    (prepared, switch)
}
