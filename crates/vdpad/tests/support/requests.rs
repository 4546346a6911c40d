//! [`requests`]: a client of a device file that checks every answer.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use vdpa_core::Errno;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

/// How long the device may be busy with its last client.
const SOON: Duration = Duration::from_secs(10);

/// Every kind of request that changes a device, on a device that nobody has open. More events than a journal keeps without a
/// checkpoint.
pub(crate) fn requests(path: &Path) -> Result<(), Errno> {
    const SIZE: u64 = 1 << 20;
    let device = open(path)?;
    assert_eq!(device.status()?, Status(0));
    device.set_owner()?;
    assert_eq!(device.set_owner(), Err(Errno::BUSY));
    device.set_backend_features(device.backend_features()?)?;
    device.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
    device.set_features(device.features()?)?;
    device.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK)?;
    let memory = memfd::create(c"crash-points", SIZE, None)?;
    let map = SharedMap::map(memory, 0, usize::try_from(SIZE).unwrap(), Prot::RW, false)?;
    device.dma_map(Asid(0), 0x10_0000, SIZE, map.addr() as u64, Perm::RW)?;
    for _ in 0..72 {
        device.set_vring_call(QueueIndex(0), Some(&EventFd::new()?))?;
    }
    device.set_vring_base(QueueIndex(0), 7)?;
    assert_eq!(device.vring_base(QueueIndex(0))?, 7);
    device.dma_unmap(Asid(0), 0x10_0000, SIZE)?;
    device.set_status(Status(0))?;
    assert_eq!(device.status()?, Status(0));
    Ok(())
}

/// Opens a device that the last client may not have closed yet.
pub(crate) fn open(path: &Path) -> Result<VhostVdpaFd, Errno> {
    let deadline = Instant::now() + SOON;
    loop {
        match File::options().read(true).write(true).open(path) {
            Ok(file) => return Ok(VhostVdpaFd::from_fd(file.into())),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap())),
        }
    }
}
