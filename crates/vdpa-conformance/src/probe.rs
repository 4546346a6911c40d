//! [`Probe`]: what a device reports about itself.

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_sys::vduse::Control;

use crate::device::{Device, Target};
use crate::request::Request;

/// What a device reports about itself. The [`Need`](crate::Need)s of cases are checked against it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// Whether the device is a file.
    pub is_file: bool,
    /// Whether the device can be opened a second time while it is open.
    pub second_open: bool,
    /// Whether a memory table maps memory.
    pub mem_table: bool,
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
    /// The newest API version and the features of VDUSE, if that is the subject.
    pub vduse: Option<(u64, u64)>,
}

/// Why a device could not be probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The device could not be opened.
    #[error("cannot open the device: {0}")]
    Open(Errno),
    /// A request failed that every device supports.
    #[error("{request} failed: {errno}; is this a vhost-vdpa device?")]
    Refused {
        /// Name of the request.
        request: &'static str,
        /// Error of the request.
        errno: Errno,
    },
}

impl Probe {
    /// Opens the device, reads what it reports, and closes it.
    ///
    /// # Errors
    /// [`ProbeError`] if the device cannot be opened or refuses a request.
    pub fn of<'a>(target: impl Into<Target<'a>>) -> Result<Self, ProbeError> {
        let target = target.into();
        if let Target::Vduse(_) = target {
            let control = Control::open().map_err(ProbeError::Open)?;
            let refused = |errno| ProbeError::Refused { request: "VDUSE_GET_API_VERSION", errno };
            let version = control.api_version().map_err(refused)?;
            // Before Linux 7.3 there are none.
            let features = control.features().unwrap_or(0);
            return Ok(Self { vduse: Some((version, features)), ..Self::default() });
        }
        let device = Device::open(target).map_err(ProbeError::Open)?;
        let second_open = Device::open(target).is_ok();
        Ok(Self {
            mem_table: maps_tables(&device),
            is_file: matches!(target, Target::File(_)),
            second_open,
            device_id: u32::from_ne_bytes(read(&device, Request::GET_DEVICE_ID)?),
            features: Features(u64::from_ne_bytes(read(&device, Request::GET_FEATURES)?)),
            backend: BackendFeatures(u64::from_ne_bytes(read(&device, Request::GET_BACKEND_FEATURES)?)),
            queues: u32::from_ne_bytes(read(&device, Request::GET_VQS_COUNT)?),
            groups: u32::from_ne_bytes(read(&device, Request::GET_GROUP_NUM)?),
            address_spaces: u32::from_ne_bytes(read(&device, Request::GET_AS_NUM)?),
            ring_size: u16::from_ne_bytes(read(&device, Request::GET_VRING_NUM)?),
            config_size: u32::from_ne_bytes(read(&device, Request::GET_CONFIG_SIZE)?),
            vduse: None,
        })
    }
}

/// Whether a table with a region where no memory can be is refused. The device gets an owner.
fn maps_tables(device: &Device) -> bool {
    const PAGE: u64 = 4096;
    let mut table = 1_u64.to_le_bytes().to_vec();
    table.extend([PAGE, PAGE, 0, 0].into_iter().flat_map(u64::to_ne_bytes));
    device.call(Request::SET_OWNER).is_ok() && device.set(Request::SET_MEM_TABLE, &table) == Err(Errno::FAULT)
}

fn read<const N: usize>(device: &Device, request: Request) -> Result<[u8; N], ProbeError> {
    device.get(request).map_err(|errno| ProbeError::Refused { request: request.name, errno })
}
