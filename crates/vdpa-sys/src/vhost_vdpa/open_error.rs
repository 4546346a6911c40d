//! [`OpenError`]: why a device file could not be opened.

use std::path::PathBuf;

use thiserror::Error;
use vdpa_core::Errno;

/// Why a device file could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file does not exist.
    #[error("{path}: no such device; `vdpa dev` or `vdpactl dev` list those there are")]
    NotFound {
        /// Path given.
        path: PathBuf,
    },
    /// The device is open already; a vhost-vdpa device can be open once.
    #[error("{path}: the device is open already; vhost-vdpa allows one open file per device")]
    Busy {
        /// Path given.
        path: PathBuf,
    },
    /// This user has no permission.
    #[error("{path}: no permission to read and write the device")]
    Denied {
        /// Path given.
        path: PathBuf,
    },
    /// The file exists and there is no device behind it.
    #[error("{path}: the device behind this file is gone ({errno:?}); was its driver or daemon stopped?")]
    Gone {
        /// Path given.
        path: PathBuf,
        /// What open(2) reported.
        errno: Errno,
    },
    /// Anything else.
    #[error("{path}: cannot open the device: {errno}")]
    Other {
        /// Path given.
        path: PathBuf,
        /// What open(2) reported.
        errno: Errno,
    },
}

impl OpenError {
    /// What open(2) reported.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NotFound { .. } => Errno::NOENT,
            Self::Busy { .. } => Errno::BUSY,
            Self::Denied { .. } => Errno::ACCESS,
            Self::Gone { errno, .. } | Self::Other { errno, .. } => *errno,
        }
    }
}
