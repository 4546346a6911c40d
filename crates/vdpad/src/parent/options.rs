//! Attributes that several kinds of devices take.

use vdpa_core::Errno;
use vdpa_core::parent::CompatReset;

use crate::ctl::api::{Attrs, CtlError};

/// Refuses attributes that are not among `known`, which has their names and what they take.
pub(super) fn reject_unknown(kind: &str, attrs: &Attrs, known: &[(&str, &str)]) -> Result<(), CtlError> {
    match attrs.iter().find(|(name, _)| known.iter().all(|(known, _)| known != name)) {
        None => Ok(()),
        Some((name, _)) => {
            let list: Vec<String> = known.iter().map(|(name, takes)| format!("{name} {takes}")).collect();
            Err(CtlError::new(Errno::OPNOTSUPP, format!("{kind} has no attribute \"{name}\""))
                .with_hint(format!("It has: {}.", list.join(", "))))
        }
    }
}

/// What a reset does to the device's translation unless the client has acknowledged IOTLB_PERSIST.
pub(super) fn compat_reset(attrs: &Attrs, default: CompatReset) -> Result<CompatReset, CtlError> {
    match attrs.get("compat_reset") {
        None => Ok(default),
        Some("keep") => Ok(CompatReset::Keep),
        Some("clean") => Ok(CompatReset::Clean),
        Some(text) => Err(CtlError::new(Errno::INVAL, format!("compat_reset is \"{text}\""))
            .with_hint("\"keep\" or \"clean\" is right.")),
    }
}

/// A value that is not what its attribute takes.
pub(super) fn invalid(error: impl std::fmt::Display) -> CtlError {
    CtlError::new(Errno::INVAL, error.to_string())
}
