//! [`Probe`]: what a device says about itself.

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};

use crate::device::{Device, Target};
use crate::request::Request;

/// What a device says about itself; needs are decided by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// It is a file.
    pub is_file: bool,
    /// It can be opened a second time while somebody has it open.
    pub second_open: bool,
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
    /// Opens the device, asks, and closes it.
    ///
    /// # Errors
    /// [`ProbeError`].
    pub fn of<'a>(target: impl Into<Target<'a>>) -> Result<Self, ProbeError> {
        let target = target.into();
        let device = Device::open(target).map_err(ProbeError::Open)?;
        Ok(Self {
            is_file: matches!(target, Target::File(_)),
            second_open: Device::open(target).is_ok(),
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
