//! The sections for packed rings, in addition to those of version 2. A state without packed rings does not have them.
//!
//! Neither section is optional, so a program that does not know them refuses the update. In a fork or hand-over it refuses
//! before a device is stopped, since [`ANNOUNCEMENT`] is sent before the switch.

use serde::{Deserialize, Serialize};
use vdpa_core::features::Features;
use vdpa_core::ring::driver;

use super::{Sections, StateError, v2};

/// Version of each section below.
pub const VERSION: u32 = 1;
/// Name of the section that holds an [`Announcement`].
pub const ANNOUNCEMENT: &str = "vdpa/packed";
/// Name of the section that holds [`Drivers`].
pub const DRIVERS: &str = "vdpa/packed-drivers";

/// The devices with packed rings whose driver is the program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announcement {
    /// Names of the devices, for error messages only. The features of a device decide the format of its rings.
    pub devices: Vec<String>,
}

/// The driver side of every packed ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drivers {
    /// One list for each of [`v2::Devices::devices`], with one entry for each of its queues, in the same order.
    pub devices: Vec<Vec<Driver>>,
}

/// The driver side of a packed ring. Its size is that of the queue, its features are those of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driver {
    /// Index of the next descriptor to fill, with its wrap counter in bit 15.
    pub next_avail: u16,
    /// Index of the first descriptor that is not yet available to the device, with its wrap counter in bit 15.
    pub published: u16,
    /// Index of the next descriptor to read as used, with its wrap counter in bit 15.
    pub last_used: u16,
    /// Requests in flight, in any order.
    pub in_flight: Vec<InFlight>,
}

/// One request in flight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InFlight {
    /// The token with which the request was submitted.
    pub token: u64,
    /// Buffer ID (virtio 1.2 section 2.8).
    pub id: u16,
    /// Number of descriptors of the ring that the request occupies.
    pub descriptors: u16,
    /// Number of bytes that the device may write.
    pub writable: u32,
}

impl Driver {
    pub(crate) fn save(state: driver::PackedDriverState) -> Self {
        let driver::PackedDriverState { size: _, features: _, next_avail, published, last_used, in_flight } =
            state;
        let one = |request| {
            let driver::PackedInFlight { token, id, descriptors, writable } = request;
            InFlight { token, id, descriptors, writable }
        };
        Self { next_avail, published, last_used, in_flight: in_flight.into_iter().map(one).collect() }
    }

    /// Converts without any check. [`driver::PackedDriver::adopt`] checks the result.
    pub(crate) fn restore(self, size: u16, features: Features) -> driver::PackedDriverState {
        let Self { next_avail, published, last_used, in_flight } = self;
        let one = |request| {
            let InFlight { token, id, descriptors, writable } = request;
            driver::PackedInFlight { token, id, descriptors, writable }
        };
        let in_flight = in_flight.into_iter().map(one).collect();
        driver::PackedDriverState { size, features, next_avail, published, last_used, in_flight }
    }
}

/// Announces the packed rings of `devices`, if there are any.
pub(super) fn announce(devices: &v2::Devices, sections: &mut Sections) -> Result<(), StateError> {
    let packed = |device: &&v2::Device| {
        Features(device.features).has(Features::RING_PACKED) && !device.queues.is_empty()
    };
    let devices: Vec<String> =
        devices.devices.iter().filter(packed).map(|device| device.name.clone()).collect();
    if !devices.is_empty() {
        sections.push_json(ANNOUNCEMENT, VERSION, &Announcement { devices })?;
    }
    Ok(())
}

/// Removes the announcement. Its only purpose is that a program without packed rings refuses it.
pub(super) fn take_announcement(sections: &mut Sections) -> Result<(), StateError> {
    sections.take(ANNOUNCEMENT).map_or(Ok(()), |section| section.parse::<Announcement>(VERSION).map(drop))
}

/// Adds the driver sides of packed rings, if there are any.
pub(super) fn put(devices: &[v2::DeviceState], sections: &mut Sections) -> Result<(), StateError> {
    if devices.iter().any(|device| !device.packed_drivers.is_empty()) {
        let devices = devices.iter().map(|device| device.packed_drivers.clone()).collect();
        sections.push_json(DRIVERS, VERSION, &Drivers { devices })?;
    }
    Ok(())
}

/// Removes the section with the driver sides of packed rings and stores each in its device. Entries for devices that do not
/// exist are dropped.
pub(super) fn take(devices: &mut [v2::DeviceState], sections: &mut Sections) -> Result<(), StateError> {
    if let Some(section) = sections.take(DRIVERS) {
        let drivers: Drivers = section.parse(VERSION)?;
        for (device, drivers) in devices.iter_mut().zip(drivers.devices) {
            device.packed_drivers = drivers;
        }
    }
    Ok(())
}
