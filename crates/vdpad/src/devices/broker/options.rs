//! The attributes of the device, and opening what is behind it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vdpa_control::api::{Attrs, CtlError};
use vdpa_core::Errno;
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::{PinLimit, PrivateMemory};
use vdpa_sys::vhost_vdpa::{OpenError, VhostVdpaFd};

use crate::devices::options::{IOTLB_ATTR, MEMLOCK_ATTR, iotlb_entries, pin_limit, reject_unknown};

/// The attributes: name, and description of the value.
pub(in crate::devices) const KNOWN: [(&str, &str); 4] =
    [("path", "FILE of a vhost-vdpa device"), ("private_memory", "refuse|skip"), IOTLB_ATTR, MEMLOCK_ATTR];

/// How long a device may be busy because the process that had it is ending.
const BUSY_TIME: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Options {
    pub(super) path: PathBuf,
    pub(super) private_memory: PrivateMemory,
    pub(super) max_iotlb_entries: usize,
    pub(super) pin_limit: PinLimit,
}

impl Options {
    pub(super) fn parse(attrs: &Attrs) -> Result<Self, CtlError> {
        reject_unknown("vhost-vdpa", attrs, &KNOWN)?;
        let path =
            attrs.get("path").map(PathBuf::from).filter(|path| path.is_absolute()).ok_or_else(|| {
                CtlError::new(Errno::INVAL, "path is not the absolute path of a file").with_hint(
                    "The file of the device to serve is right, for example path /dev/vhost-vdpa-0.",
                )
            })?;
        let private_memory = match attrs.get("private_memory") {
            None | Some("refuse") => PrivateMemory::Refuse,
            Some("skip") => PrivateMemory::Skip,
            Some(text) => {
                return Err(CtlError::new(Errno::INVAL, format!("private_memory is \"{text}\""))
                    .with_hint("\"refuse\" or \"skip\" is right."));
            }
        };
        let (max_iotlb_entries, pin_limit) = (iotlb_entries(attrs, 2048)?, pin_limit(attrs)?);
        Ok(Self { path, private_memory, max_iotlb_entries, pin_limit })
    }
}

/// Opens the device at `path`, and checks that it is one.
pub(super) fn open(path: &Path) -> Result<OwnedFd, CtlError> {
    let deadline = Instant::now() + BUSY_TIME;
    let device = loop {
        match VhostVdpaFd::open(path) {
            Err(OpenError::Busy { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => break result.map_err(|error| refused(&error))?,
        }
    };
    device.device_id().map_err(|errno| {
        CtlError::new(errno, format!("{} is no vhost-vdpa device", path.display())).with_hint(
            "One that the kernel's module vhost_vdpa makes is right, for example /dev/vhost-vdpa-0.",
        )
    })?;
    Ok(device.into())
}

fn refused(error: &OpenError) -> CtlError {
    let hint = match error {
        OpenError::NotFound { .. } => {
            "The kernel makes /dev/vhost-vdpa-N for each device that is bound to its module vhost_vdpa: see \"vdpa dev show\"."
        }
        OpenError::Busy { .. } => {
            "Another process has it open: end that one, or have it use the device that is added here."
        }
        OpenError::Denied { .. } => "The daemon needs read and write access to it.",
        OpenError::Gone { .. } => "Its device does not exist any more: see \"vdpa dev show\".",
        _ => "See the log of the kernel.",
    };
    CtlError::new(error.errno(), error.to_string()).with_hint(hint)
}
