//! Device attributes that several kinds of devices share.

use vdpa_core::Errno;
use vdpa_core::host::PAGE_SIZE;
use vdpa_core::parent::{CompatReset, PinLimit};

use vdpa_backend::worker::{InvalidCpuList, Placement};
use vdpa_control::api::{Attrs, CtlError, parse_size};

/// Refuses attributes that are not among `known`: names, and descriptions of the value for the error message.
pub(super) fn reject_unknown(kind: &str, attrs: &Attrs, known: &[(&str, &str)]) -> Result<(), CtlError> {
    match attrs.iter().find(|(name, _)| known.iter().all(|(known, _)| known != name)) {
        None => Ok(()),
        Some((name, _)) => {
            let list: Vec<String> = known.iter().map(|(name, takes)| format!("{name} {takes}")).collect();
            Err(CtlError::new(Errno::OPNOTSUPP, format!("{kind} has no attribute \"{name}\""))
                .with_hint(format!("It has: {}.", list.join("; "))))
        }
    }
}

/// Parses `compat_reset`: whether a reset clears the IOTLB of a client that has not acknowledged IOTLB_PERSIST.
pub(super) fn compat_reset(attrs: &Attrs, default: CompatReset) -> Result<CompatReset, CtlError> {
    match attrs.get("compat_reset") {
        None => Ok(default),
        Some("keep") => Ok(CompatReset::Keep),
        Some("clean") => Ok(CompatReset::Clean),
        Some(text) => Err(CtlError::new(Errno::INVAL, format!("compat_reset is \"{text}\""))
            .with_hint("\"keep\" or \"clean\" is right.")),
    }
}

/// Name and value of the attribute that says that what a device needs was opened by whoever has asked for it, and came with the request.
pub(super) const PASSED_ATTR: (&str, &str) = (vdpa_control::api::PASSED_ATTR, "on|off");

/// Name and value of the attribute that [`queue_size`] parses.
pub(super) const QUEUE_SIZE_ATTR: (&str, &str) = ("queue_size", "2-32768, a power of two");

/// Parses `queue_size`: entries of the largest ring.
pub(super) fn queue_size(attrs: &Attrs, default: u16) -> Result<u16, CtlError> {
    let Some(text) = attrs.get("queue_size") else { return Ok(default) };
    text.parse().ok().filter(|size: &u16| *size >= 2 && size.is_power_of_two()).ok_or_else(|| {
        CtlError::new(Errno::INVAL, format!("queue_size is \"{text}\""))
            .with_hint("A power of two from 2 to 32768 is right.")
    })
}

/// Name and value of the attribute that [`iotlb_entries`] parses.
pub(super) const IOTLB_ATTR: (&str, &str) = ("max_iotlb_entries", "2-1048576");

/// Parses `max_iotlb_entries`: most entries of an IOTLB table.
pub(super) fn iotlb_entries(attrs: &Attrs, default: usize) -> Result<usize, CtlError> {
    let given = attrs.number("max_iotlb_entries", 2, 1 << 20).map_err(invalid)?;
    Ok(given.and_then(|entries| usize::try_from(entries).ok()).unwrap_or(default))
}

/// Name and value of the attribute that [`pin_limit`] parses.
pub(super) const MEMLOCK_ATTR: (&str, &str) = ("memlock", "rlimit|unlimited|SIZE");

/// Parses `memlock`: the limit on pinned memory. The owner's RLIMIT_MEMLOCK unless the operator sets one for the device.
pub(super) fn pin_limit(attrs: &Attrs) -> Result<PinLimit, CtlError> {
    match attrs.get("memlock") {
        None | Some("rlimit") => Ok(PinLimit::Rlimit),
        Some("unlimited") => Ok(PinLimit::Pages(u64::MAX)),
        Some(text) => parse_size(text).map(|bytes| PinLimit::Pages(bytes / PAGE_SIZE)).ok_or_else(|| {
            CtlError::new(Errno::INVAL, format!("memlock is \"{text}\"")).with_hint(
                "\"rlimit\", \"unlimited\" or a number of bytes is right, also with K, M, G or T (\"512M\").",
            )
        }),
    }
}

/// Name and value of one attribute that [`placement`] parses.
pub(super) const CPUS_ATTR: (&str, &str) = ("cpus", "LIST of processors, for example 2,4-7");

/// Name and value of the other attribute that [`placement`] parses.
pub(super) const WORKER_ATTR: (&str, &str) = ("worker", "shared|own");

/// Parses `cpus` and `worker`: which thread serves the rings of the device.
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

/// The error for a device whose worker thread could not be started.
pub(super) fn no_worker(name: &str, placement: &Placement, errno: Errno) -> CtlError {
    let error = CtlError::new(errno, format!("cannot start the worker of {name}: {errno}"));
    match &placement.cpus {
        Some(cpus) if errno == Errno::INVAL => {
            error.with_hint(format!("None of the processors {cpus} is there and may be used by the daemon."))
        }
        _ => error.with_hint("\"vdpactl doctor\" says what this machine lacks."),
    }
}

/// The error for an invalid value of an attribute.
pub(super) fn invalid(error: impl std::fmt::Display) -> CtlError {
    CtlError::new(Errno::INVAL, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memlock_takes_sizes() {
        let memlock = |value| {
            let mut attrs = Attrs::new();
            attrs.insert("memlock", value).unwrap();
            pin_limit(&attrs)
        };
        assert_eq!(memlock("1G").unwrap(), PinLimit::Pages((1 << 30) / PAGE_SIZE));
        assert_eq!(memlock("8388608").unwrap(), PinLimit::Pages(2048));
        let refused = memlock("1GB").unwrap_err();
        assert_eq!(refused.message, "memlock is \"1GB\"");
        assert!(refused.hint.unwrap().contains("also with K, M, G or T"));
    }
}
