//! Version 2 of the library's own sections: any number of devices, and every way of an update.
//!
//! As in [`v1`], these types are the format. [`Prepared`] has what is known while the devices still run, in four sections.
//! [`Switch`] has what is known only once they are stopped, in one section. In an exec, a file descriptor is given as its
//! number in the process that saved; in a hand-over, as its index in the list of descriptors that are sent along.

use serde::{Deserialize, Serialize};

use super::{Section, Sections, StateError, config, mappings, packed, v1};

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

/// Answers of the devices that are still valid after an exec, since the open files are the same; they save the new image
/// requests. The section is optional: a version that does not know it asks the devices again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// In the order of [`Devices::devices`].
    pub files: Vec<DeviceFile>,
}

/// The identity of a device's open file, and what the device has answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFile {
    /// Device number of the file system that the file is in, as stat(2) packs it.
    pub dev: u64,
    /// Inode number of the file in that file system.
    pub inode: u64,
    /// Backend features offered.
    pub backend_features: u64,
    /// First I/O virtual address that the device can translate.
    pub iova_first: u64,
    /// Last I/O virtual address that the device can translate.
    pub iova_last: u64,
}

impl Files {
    /// Adds its section to `sections`.
    ///
    /// # Errors
    /// [`StateError::Payload`], which this type does not cause.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.push(Section::json(FILES, FILES_VERSION, self)?.optional());
        Ok(())
    }

    /// Removes its section from `sections` and decodes it. Returns an empty value if there is no such section, or if it has
    /// another version.
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
    /// Process id of the process that saved; an exec does not change it.
    pub predecessor: i32,
    /// When the update began, in ns since 1970-01-01 UTC.
    pub begun_unix_ns: u64,
    /// The caller's sections that are sent with the switch.
    pub late: Vec<Late>,
}

/// A section of the caller that is announced before its contents are known, so that the successor can refuse it in time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Late {
    /// Name of the section.
    pub name: String,
    /// Version of the section.
    pub version: u32,
    /// Whether a successor that does not know the section may take the devices over.
    pub optional: bool,
}

/// All memory that the devices use, each piece once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memories {
    /// A mapping refers to its memory by the index in this list.
    pub memories: Vec<Memory>,
}

/// One piece of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Name, used only in messages.
    pub name: String,
    /// Descriptor of the memory object.
    pub fd: i32,
    /// Offset of the memory in the object, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// All devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// In the order in which they are taken over.
    pub devices: Vec<Device>,
}

/// One device with its negotiated features, its mappings and its rings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name, unique in the update.
    pub name: String,
    /// `live`, `resume`, `reset` or `reopen`.
    pub strategy: String,
    /// Descriptor of the device's open file; `None` if the predecessor closes it (reopen).
    pub fd: Option<i32>,
    /// Path at which the device can be opened again, if known.
    pub path: Option<String>,
    /// Virtio device id.
    pub device_id: u32,
    /// Negotiated device features.
    pub features: u64,
    /// Acknowledged backend features.
    pub backend_features: u64,
    /// Whether the device was running (DRIVER_OK).
    pub running: bool,
    /// One entry for each UPDATE message, in the order in which they were sent.
    pub mappings: Vec<Mapping>,
    /// Rings whose driver is the program.
    pub queues: Vec<Queue>,
    /// Rings whose driver is a guest.
    pub guest_queues: Vec<GuestQueue>,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// Name, unique in the session.
    pub name: String,
    /// Index in [`Memories::memories`] of the memory that is mapped.
    pub memory: u32,
    /// Offset of the mapping in that memory, in bytes.
    pub offset: u64,
    /// First I/O virtual address.
    pub iova: u64,
    /// Size in bytes.
    pub size: u64,
    /// What the device may do: `VHOST_ACCESS_*`.
    pub perm: u8,
    /// Identifier of the address space.
    pub asid: u32,
}

/// One vring whose driver is the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// Index of the virtqueue.
    pub index: u16,
    /// Entries of the ring.
    pub size: u16,
    /// Name of the mapping that contains the ring.
    pub region: String,
    /// Offset of the descriptor area in the mapping, in bytes.
    pub desc: u64,
    /// Offset of the driver area (available ring) in the mapping, in bytes.
    pub avail: u64,
    /// Offset of the device area (used ring) in the mapping, in bytes.
    pub used: u64,
    /// The kick eventfd.
    pub kick_fd: i32,
    /// The call eventfd.
    pub call_fd: i32,
}

/// One vring whose driver is a guest. Its areas are given as I/O virtual addresses.
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

/// The caller's own file descriptors, each with a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Descriptors {
    /// In the order in which the caller added them to its plan.
    pub descriptors: Vec<Descriptor>,
}

/// One file descriptor of the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Descriptor {
    /// Name, unique in the update.
    pub name: String,
    /// The descriptor.
    pub fd: i32,
}

/// What is known once the devices are stopped. With the strategy `live` they run, and only their drivers are stopped.
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
    pub devices: Vec<DeviceState>,
}

/// The state of one stopped device and of the driver side of its rings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// How long stopping the device took, in ns.
    pub suspend_ns: u64,
    /// The vring base of each ring (`VHOST_GET_VRING_BASE`), at which the device continues: first of [`Device::queues`], then
    /// of [`Device::guest_queues`]. Empty if the device was not stopped.
    pub bases: Vec<u32>,
    /// The driver side of each split ring whose driver is the program.
    pub drivers: Vec<v1::Driver>,
    /// The driver side of each packed ring whose driver is the program, from the section [`packed::DRIVERS`].
    #[serde(skip)]
    pub packed_drivers: Vec<packed::Driver>,
    /// What the driver has written into the field `writeback`, from the section [`config::WRITTEN`].
    #[serde(skip)]
    pub writeback: Option<u8>,
    /// Mappings without a name, from the section [`mappings::MAPPINGS`].
    #[serde(skip)]
    pub mappings: Vec<mappings::Mapping>,
    /// Indexes of rings that are not enabled, from the section [`mappings::DISABLED`].
    #[serde(skip)]
    pub disabled: Vec<u16>,
}

/// What is known before any device is stopped.
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
    /// What the switch may have; from the section [`mappings::ANNOUNCEMENT`].
    pub announced: mappings::Announcement,
}

impl Prepared {
    /// Adds its sections to `sections`, which has those of the caller.
    ///
    /// # Errors
    /// [`StateError::Name`] if a section of the caller has a name that is reserved for the library.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.check_names()?;
        sections.push_json(UPDATE, VERSION, &self.update)?;
        sections.push_json(MEMORY, VERSION, &self.memory)?;
        sections.push_json(DEVICES, VERSION, &self.devices)?;
        sections.push_json(DESCRIPTORS, VERSION, &self.descriptors)?;
        packed::announce(&self.devices, sections)?;
        mappings::announce(&self.announced, sections)
    }

    /// Removes its sections from `sections` and decodes them.
    ///
    /// # Errors
    /// [`StateError`] if a section is missing, has another version or cannot be decoded.
    pub fn take(sections: &mut Sections) -> Result<Self, StateError> {
        packed::take_announcement(sections)?;
        Ok(Self {
            update: sections.require_json(UPDATE, VERSION)?,
            memory: sections.require_json(MEMORY, VERSION)?,
            devices: sections.require_json(DEVICES, VERSION)?,
            descriptors: sections.require_json(DESCRIPTORS, VERSION)?,
            announced: mappings::take_announcement(sections)?,
        })
    }
}

impl Switch {
    /// Adds its section to `sections`.
    ///
    /// # Errors
    /// [`StateError::Payload`], which this type does not cause.
    pub fn put(&self, sections: &mut Sections) -> Result<(), StateError> {
        sections.push_json(SWITCH, VERSION, self)?;
        packed::put(&self.devices, sections)?;
        mappings::put(&self.devices, sections)?;
        config::put(&self.devices, sections)
    }

    /// Removes its section from `sections` and decodes it.
    ///
    /// # Errors
    /// [`StateError`] if the section is missing, has another version or cannot be decoded.
    pub fn take(sections: &mut Sections) -> Result<Self, StateError> {
        let mut switch: Self = sections.require_json(SWITCH, VERSION)?;
        packed::take(&mut switch.devices, sections)?;
        mappings::take(&mut switch.devices, sections)?;
        config::take(&mut switch.devices, sections)?;
        Ok(switch)
    }
}

/// Removes the library's sections of a complete state, of this version or of version 1, and decodes them. The caller's
/// sections remain.
///
/// # Errors
/// [`StateError`] if a section is missing, has a newer version or cannot be decoded, or if there is an unknown section of
/// the library that is not optional.
pub fn take(sections: &mut Sections) -> Result<(Prepared, Switch), StateError> {
    let old = sections.iter().any(|s| s.name == UPDATE && s.version == v1::VERSION);
    if old {
        return Ok(from_v1(v1::State::take(sections)?));
    }
    let taken = (Prepared::take(sections)?, Switch::take(sections)?);
    sections.end_of_own()?;
    Ok(taken)
}

/// Name that the device of a version-1 state gets, since version 1 has no names of devices.
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
    let mut device_state = DeviceState { suspend_ns: update.suspend_ns, ..DeviceState::default() };
    let mut rings = Vec::new();
    for queue in queues.queues {
        let v1::Queue { index, size, region, desc, avail, used, kick_fd, call_fd, base, driver } = queue;
        rings.push(Queue { index, size, region, desc, avail, used, kick_fd, call_fd });
        device_state.bases.extend(base);
        device_state.drivers.push(driver);
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
        announced: mappings::Announcement::default(),
    };
    let switch = Switch {
        begun_ns,
        saved_ns: update.exec_begin_ns,
        prepare_ns: 0,
        save_ns: update.save_ns,
        devices: vec![device_state],
    };
    (prepared, switch)
}
