//! The optional section for configuration space, in addition to those of version 2. A state has it only if a block device
//! with `CONFIG_WCE` is reset or opened again.
//!
//! If the new program does not know the section, the write cache of such a device has the default of the negotiated features.

use serde::{Deserialize, Serialize};

use super::{Section, Sections, StateError, v2};

/// Version of the section below.
pub const VERSION: u32 = 1;
/// Name of the section that holds [`Written`].
pub const WRITTEN: &str = "vdpa/config";

/// What drivers have written into the configuration space of devices that lose it in the update.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// In the order of [`v2::Devices::devices`]: the field `writeback` of a block device (virtio 1.2 section 5.2.4).
    pub writeback: Vec<Option<u8>>,
}

/// Adds the section, if a device needs it.
pub(super) fn put(devices: &[v2::DeviceState], sections: &mut Sections) -> Result<(), StateError> {
    if devices.iter().any(|device| device.writeback.is_some()) {
        let writeback = devices.iter().map(|device| device.writeback).collect();
        sections.push(Section::json(WRITTEN, VERSION, &Written { writeback })?.optional());
    }
    Ok(())
}

/// Removes the section and stores each entry in its device. Entries for devices that do not exist are dropped.
pub(super) fn take(devices: &mut [v2::DeviceState], sections: &mut Sections) -> Result<(), StateError> {
    if let Some(section) = sections.take(WRITTEN) {
        let written: Written = section.parse(VERSION)?;
        for (device, writeback) in devices.iter_mut().zip(written.writeback) {
            device.writeback = writeback;
        }
    }
    Ok(())
}
