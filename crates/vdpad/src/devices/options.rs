//! Attributes that several kinds of devices take.

use vdpa_core::Errno;
use vdpa_core::host::PAGE_SIZE;
use vdpa_core::parent::{CompatReset, PinLimit};

use vdpa_backend::worker::{InvalidCpuList, Placement};
use vdpa_control::api::{Attrs, CtlError};

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

/// Name of the attribute [`queue_size`] and what it takes.
pub(super) const QUEUE_SIZE_ATTR: (&str, &str) = ("queue_size", "2-32768, a power of two");

/// Entries of the largest ring.
pub(super) fn queue_size(attrs: &Attrs, default: u16) -> Result<u16, CtlError> {
    let given = attrs.number("queue_size", 2, 32768).map_err(invalid)?;
    let size = given.map_or(default, |size| u16::try_from(size).unwrap_or(default));
    if size.is_power_of_two() {
        return Ok(size);
    }
    Err(CtlError::new(Errno::INVAL, format!("queue_size is {size}"))
        .with_hint("A power of two from 2 to 32768 is right."))
}

/// Name of the attribute [`pin_limit`] and what it takes.
pub(super) const MEMLOCK_ATTR: (&str, &str) = ("memlock", "rlimit|unlimited|BYTES");

/// The limit on pinned memory: the owner's own unless the operator sets one for the device.
pub(super) fn pin_limit(attrs: &Attrs) -> Result<PinLimit, CtlError> {
    match attrs.get("memlock") {
        None | Some("rlimit") => Ok(PinLimit::Rlimit),
        Some("unlimited") => Ok(PinLimit::Pages(u64::MAX)),
        Some(text) => text.parse::<u64>().map(|bytes| PinLimit::Pages(bytes / PAGE_SIZE)).map_err(|_| {
            CtlError::new(Errno::INVAL, format!("memlock is \"{text}\""))
                .with_hint("\"rlimit\", \"unlimited\" or a number of bytes is right.")
        }),
    }
}

/// Name of the attribute [`placement`] and what it takes.
pub(super) const CPUS_ATTR: (&str, &str) = ("cpus", "LIST of processors, for example 2,4-7");

/// The other attribute that [`placement`] reads, and what it takes.
pub(super) const WORKER_ATTR: (&str, &str) = ("worker", "shared|own");

/// Where the rings of the device are served.
pub(super) fn placement(attrs: &Attrs) -> Result<Placement, CtlError> {
    let refuse = |name, text: &str, hint: String| {
        Err(CtlError::new(Errno::INVAL, format!("{name} is \"{text}\"")).with_hint(hint))
    };
    let own = match attrs.get("worker") {
        None | Some("shared") => false,
        Some("own") => true,
        Some(text) => return refuse("worker", text, "\"shared\" or \"own\" is right.".into()),
    };
    match attrs.get("cpus").map(|text| (text, text.parse())) {
        None => Ok(Placement { cpus: None, dedicated: own }),
        Some((_, Ok(cpus))) => Ok(Placement { cpus: Some(cpus), dedicated: own }),
        Some((text, Err(error))) => {
            let error: InvalidCpuList = error;
            refuse("cpus", text, format!("{error}."))
        }
    }
}

/// Why a device has no thread that serves it.
pub(super) fn no_worker(name: &str, placement: &Placement, errno: Errno) -> CtlError {
    let error = CtlError::new(errno, format!("cannot start the worker of {name}: {errno}"));
    match &placement.cpus {
        Some(cpus) if errno == Errno::INVAL => error
            .with_hint(format!("None of the processors {cpus} is there and may be used by the daemon.")),
        _ => error.with_hint(
            "Devices need io_uring: check the sysctl kernel.io_uring_disabled and the seccomp policy of the daemon.",
        ),
    }
}

/// A value that is not what its attribute takes.
pub(super) fn invalid(error: impl std::fmt::Display) -> CtlError {
    CtlError::new(Errno::INVAL, error.to_string())
}
