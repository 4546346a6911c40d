//! [`Probe`]: what a device says about itself.

use std::path::Path;

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};

use crate::device::Device;
use crate::request::Request;

/// What a device says about itself; needs are decided by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// Virtio device id.
    pub device_id: u32,
    /// Device features offered.
    pub features: Features,
    /// Backend features offered.
    pub backend: BackendFeatures,
    /// Number of virtqueues.
    pub queues: u32,
    /// Number of virtqueue groups.
    pub groups: u32,
    /// Number of address spaces.
    pub address_spaces: u32,
    /// Entries of the largest ring.
    pub ring_size: u16,
    /// Bytes of configuration space.
    pub config_size: u32,
}

/// Why a device could not be examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProbeError {
    /// It could not be opened.
    #[error("cannot open the device: {0}")]
    Open(Errno),
    /// It refused a question that every device answers.
    #[error("{request} failed: {errno}; is this a vhost-vdpa device?")]
    Refused {
        /// The request.
        request: &'static str,
        /// Its error.
        errno: Errno,
    },
}

impl Probe {
    /// Opens the device at `path`, asks, and closes it.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn of(path: &Path) -> Result<Self, ProbeError> {
        let device = Device::open(path).map_err(ProbeError::Open)?;
        Ok(Self {
            device_id: u32::from_ne_bytes(ask(&device, Request::GET_DEVICE_ID)?),
            features: Features(u64::from_ne_bytes(ask(&device, Request::GET_FEATURES)?)),
            backend: BackendFeatures(u64::from_ne_bytes(ask(&device, Request::GET_BACKEND_FEATURES)?)),
            queues: u32::from_ne_bytes(ask(&device, Request::GET_VQS_COUNT)?),
            groups: u32::from_ne_bytes(ask(&device, Request::GET_GROUP_NUM)?),
            address_spaces: u32::from_ne_bytes(ask(&device, Request::GET_AS_NUM)?),
            ring_size: u16::from_ne_bytes(ask(&device, Request::GET_VRING_NUM)?),
            config_size: u32::from_ne_bytes(ask(&device, Request::GET_CONFIG_SIZE)?),
        })
    }
}

fn ask<const N: usize>(device: &Device, request: Request) -> Result<[u8; N], ProbeError> {
    device.get(request).map_err(|errno| ProbeError::Refused { request: request.name, errno })
}
