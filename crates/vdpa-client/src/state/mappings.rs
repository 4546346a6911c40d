//! The sections for mappings without a name and for rings that are not enabled, in addition to those of version 2. A state
//! without either has none of them.
//!
//! None is optional, so a program that does not know them refuses the update. In a fork or hand-over it refuses before a
//! device is stopped, since [`ANNOUNCEMENT`] is sent before the switch if there is one by then.

use serde::{Deserialize, Serialize};

use super::{Section, Sections, StateError, v2};

/// Version of each section below.
pub const VERSION: u32 = 1;
/// Name of the section that holds an [`Announcement`].
pub const ANNOUNCEMENT: &str = "vdpa/guest-mappings";
/// Name of the section that holds the mappings without a name. Its payload is binary, since there may be a million of them.
pub const MAPPINGS: &str = "vdpa/mappings";
/// Name of the section that holds [`Disabled`].
pub const DISABLED: &str = "vdpa/disabled";

const RECORD: usize = 32;

/// What the switch may have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announcement {
    /// There are mappings without a name.
    pub mappings: bool,
    /// There are rings that are not enabled.
    pub disabled: bool,
}

/// Rings that the device does not serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disabled {
    /// Indexes of virtqueues, one list for each of [`v2::Devices::devices`].
    pub devices: Vec<Vec<u16>>,
}

/// A mapping without a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First I/O virtual address.
    pub iova: u64,
    /// Size in bytes.
    pub size: u64,
    /// Offset of the mapping in its memory, in bytes.
    pub offset: u64,
    /// Index of the memory in [`v2::Memories::memories`].
    pub memory: u32,
    /// What the device may do: `VHOST_ACCESS_*`.
    pub perm: u8,
}

impl Mapping {
    fn encode(&self, to: &mut Vec<u8>) {
        let Self { iova, size, offset, memory, perm } = *self;
        for word in [iova, size, offset] {
            to.extend_from_slice(&word.to_le_bytes());
        }
        to.extend_from_slice(&memory.to_le_bytes());
        to.extend_from_slice(&[perm, 0, 0, 0]);
    }

    fn decode(from: &[u8; RECORD]) -> Option<Self> {
        let (words, rest) = from.as_chunks::<8>();
        let [iova, size, offset, last] = words else { return None };
        let [m0, m1, m2, m3, perm, 0, 0, 0] = *last else { return None };
        let memory = u32::from_le_bytes([m0, m1, m2, m3]);
        let [iova, size, offset] = [iova, size, offset].map(|word| u64::from_le_bytes(*word));
        rest.is_empty().then_some(Self { iova, size, offset, memory, perm })
    }
}

/// Adds the announcement, if there is something to announce.
pub(super) fn announce(announcement: &Announcement, sections: &mut Sections) -> Result<(), StateError> {
    if *announcement == Announcement::default() {
        return Ok(());
    }
    sections.push_json(ANNOUNCEMENT, VERSION, announcement)
}

pub(super) fn take_announcement(sections: &mut Sections) -> Result<Announcement, StateError> {
    sections.take(ANNOUNCEMENT).map_or_else(|| Ok(Announcement::default()), |section| section.parse(VERSION))
}

/// Adds the sections of the switch, if they have contents.
pub(super) fn put(devices: &[v2::DeviceState], sections: &mut Sections) -> Result<(), StateError> {
    if devices.iter().any(|device| !device.mappings.is_empty()) {
        let count: usize = devices.iter().map(|device| device.mappings.len()).sum();
        let mut payload = Vec::with_capacity(8 * devices.len() + RECORD * count);
        for device in devices {
            payload.extend_from_slice(&(device.mappings.len() as u64).to_le_bytes());
            device.mappings.iter().for_each(|mapping| mapping.encode(&mut payload));
        }
        sections.push(Section::new(MAPPINGS, VERSION, payload));
    }
    if devices.iter().any(|device| !device.disabled.is_empty()) {
        let devices = devices.iter().map(|device| device.disabled.clone()).collect();
        sections.push_json(DISABLED, VERSION, &Disabled { devices })?;
    }
    Ok(())
}

/// Removes the sections of the switch and stores each entry in its device.
pub(super) fn take(devices: &mut [v2::DeviceState], sections: &mut Sections) -> Result<(), StateError> {
    if let Some(section) = sections.take(MAPPINGS) {
        if section.version != VERSION {
            let (name, found) = (section.name, section.version);
            return Err(StateError::SectionVersion { name, found, supported: VERSION });
        }
        let reason =
            || "its length is not that of the mappings it counts, or a record is malformed".to_owned();
        decode(&section.payload, devices)
            .ok_or_else(|| StateError::Payload { name: MAPPINGS.to_owned(), reason: reason() })?;
    }
    if let Some(section) = sections.take(DISABLED) {
        let disabled: Disabled = section.parse(VERSION)?;
        for (device, disabled) in devices.iter_mut().zip(disabled.devices) {
            device.disabled = disabled;
        }
    }
    Ok(())
}

fn decode(mut payload: &[u8], devices: &mut [v2::DeviceState]) -> Option<()> {
    for device in devices {
        let (count, rest) = payload.split_first_chunk::<8>()?;
        let len = usize::try_from(u64::from_le_bytes(*count)).ok()?.checked_mul(RECORD)?;
        let (records, rest) = rest.split_at_checked(len)?;
        device.mappings =
            records.as_chunks::<RECORD>().0.iter().map(Mapping::decode).collect::<Option<_>>()?;
        payload = rest;
    }
    payload.is_empty().then_some(())
}
