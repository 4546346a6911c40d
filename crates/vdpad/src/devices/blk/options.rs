//! [`Options`]: the attributes of `vdpactl dev add ... mgmtdev blk`.

use std::path::PathBuf;

use vdpa_core::Errno;
use vdpa_core::blk::{ID_BYTES, SECTOR};
use vdpa_core::parent::{CompatReset, PinLimit};

use crate::block::limit::{Limits, MAX_BURST_MS};
use crate::devices::options::{
    CPUS_ATTR, IOTLB_ATTR, MEMLOCK_ATTR, PASSED_ATTR, QUEUE_SIZE_ATTR, WORKER_ATTR, compat_reset, invalid,
    iotlb_entries, pin_limit, placement, queue_size, reject_unknown,
};
use vdpa_backend::worker::Placement;
use vdpa_control::api::{Attrs, CtlError, parse_size};

/// Default size of the largest ring, in entries. QEMU 10.0.13, and every version with the same fix, offers guests 1024 entries
/// for all virtio devices, and fails to start a vhost-vdpa device that takes fewer.
const QUEUE_SIZE: u16 = 1024;

/// Default number of entries of an IOTLB table: the kernel's.
const IOTLB_ENTRIES: usize = 2048;

/// The greatest limit on requests in a second.
pub(super) const IOPS_MAX: u64 = 1_000_000_000;

/// The attributes: name, and description of the value for the error that lists them.
pub(in crate::devices) const KNOWN: [(&str, &str); 25] = [
    ("path", "FILE"),
    PASSED_ATTR,
    ("null", "SIZE"),
    ("format", "raw"),
    ("readonly", "on|off"),
    ("shared", "on|off"),
    ("direct", "on|off"),
    ("pin", "on|off"),
    MEMLOCK_ATTR,
    IOTLB_ATTR,
    ("queues", "1-64"),
    QUEUE_SIZE_ATTR,
    ("packed", "on|off"),
    ("in_order", "on|off"),
    ("serial", "TEXT of at most 20 bytes"),
    ("iops", "0-1000000000, requests in a second"),
    ("bps", "none|SIZE"),
    ("burst", "1-60000, milliseconds"),
    ("compat_reset", "keep|clean"),
    ("mem_table", "on|off"),
    ("vhost_log", "on|off"),
    ("reset_owner", "on|off"),
    ("strict_new_owner", "on|off"),
    CPUS_ATTR,
    WORKER_ATTR,
];

/// Where the data of a disk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// In this file or block device.
    File(PathBuf),
    /// Nowhere: a disk of this many sectors of 512 bytes without storage, for measuring.
    Null(u64),
}

/// The attributes of a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) source: Source,
    /// The file was opened by whoever has asked for the device, and came with the request.
    pub(super) passed: bool,
    /// The data is whatever it looks like: it is not examined for the header of another format.
    pub(super) raw: bool,
    pub(super) read_only: bool,
    /// Others may write it too.
    pub(super) shared: bool,
    /// Bypass the page cache.
    pub(super) direct: bool,
    /// Pin guest memory by registering it with io_uring.
    pub(super) pin: bool,
    /// The limit on memory pinned for one owner.
    pub(super) pin_limit: PinLimit,
    /// Most entries of an IOTLB table.
    pub(super) max_iotlb_entries: usize,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
    /// Offer packed rings. Not by default, because of clients such as Cloud Hypervisor: they pass the feature on to the guest
    /// and set the base of each ring to 0, which is wrong for a packed ring, so the guest's requests would not be served.
    pub(super) packed: bool,
    /// Offer IN_ORDER. Not by default: drivers accept it whenever it is offered, and then a slow request delays the answers to
    /// all later ones.
    pub(super) in_order: bool,
    /// The device id, padded with zeros.
    pub(super) serial: [u8; ID_BYTES],
    /// Whether a reset clears the IOTLB when the client has not acknowledged IOTLB_PERSIST.
    pub(super) compat_reset: CompatReset,
    /// SET_MEM_TABLE maps memory.
    pub(super) mem_table: bool,
    /// Offer the log of vhost.
    pub(super) vhost_log: bool,
    /// Support RESET_OWNER.
    pub(super) reset_owner: bool,
    pub(super) strict_new_owner: bool,
    pub(super) limits: Limits,
    /// Which thread serves the rings.
    pub(super) placement: Placement,
}

impl Options {
    /// Parses the attributes; `name` is the default serial.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an unknown attribute, `EINVAL` for an invalid value and for anything but one of `path` and `null`.
    pub(super) fn parse(name: &str, attrs: &Attrs) -> Result<Self, CtlError> {
        reject_unknown("blk", attrs, &KNOWN)?;
        let number = |key, min, max, default: u16| -> Result<u16, CtlError> {
            let value = attrs.number(key, min, max).map_err(invalid)?;
            Ok(value.map_or(default, |value| u16::try_from(value).unwrap_or(default)))
        };
        let switch = |key, default| attrs.switch(key).map_err(invalid).map(|on| on.unwrap_or(default));
        Ok(Self {
            source: source(attrs)?,
            passed: switch(PASSED_ATTR.0, false)?,
            raw: raw(attrs)?,
            read_only: switch("readonly", false)?,
            shared: switch("shared", false)?,
            direct: switch("direct", false)?,
            pin: switch("pin", true)?,
            pin_limit: pin_limit(attrs)?,
            max_iotlb_entries: iotlb_entries(attrs, IOTLB_ENTRIES)?,
            queues: number("queues", 1, 64, 4)?,
            queue_size: queue_size(attrs, QUEUE_SIZE)?,
            packed: switch("packed", false)?,
            in_order: switch("in_order", false)?,
            serial: serial(attrs.get("serial"), name)?,
            compat_reset: compat_reset(attrs, CompatReset::Keep)?,
            mem_table: switch("mem_table", false)?,
            vhost_log: switch("vhost_log", false)?,
            reset_owner: switch("reset_owner", false)?,
            strict_new_owner: switch("strict_new_owner", false)?,
            limits: limits(attrs)?,
            placement: placement(attrs)?,
        })
    }
}

/// Parses `path` or `null`, exactly one of which must be given.
fn source(attrs: &Attrs) -> Result<Source, CtlError> {
    let path = attrs.get("path").filter(|path| !path.is_empty());
    match (path, attrs.size("null", SECTOR, 1 << 60).map_err(invalid)?) {
        (Some(path), None) => Ok(Source::File(path.into())),
        (None, Some(bytes)) => Ok(Source::Null(bytes / SECTOR)),
        (Some(_), Some(_)) => Err(CtlError::new(Errno::INVAL, "blk takes one of path and null")
            .with_hint("null is a disk without storage, for measuring: leave it out.")),
        (None, None) => Err(CtlError::new(Errno::INVAL, "blk needs the attribute path")
            .with_hint("Give the file or block device that holds the data: path /srv/disk.img")),
    }
}

/// Parses `iops`, `bps` and `burst`.
fn limits(attrs: &Attrs) -> Result<Limits, CtlError> {
    let none = Limits::default();
    Ok(Limits {
        iops: attrs.number("iops", 0, IOPS_MAX).map_err(invalid)?.unwrap_or(none.iops),
        bps: bytes_in_a_second(attrs.get("bps"))?,
        burst_ms: attrs.number("burst", 1, MAX_BURST_MS).map_err(invalid)?.unwrap_or(none.burst_ms),
    })
}

fn bytes_in_a_second(given: Option<&str>) -> Result<u64, CtlError> {
    match given {
        None | Some("none") => Ok(0),
        Some(text) => parse_size(text).ok_or_else(|| {
            CtlError::new(Errno::INVAL, format!("bps is \"{text}\""))
                .with_hint("\"none\" or a number of bytes is right, also with K, M, G or T (\"200M\").")
        }),
    }
}

/// Parses `format`.
fn raw(attrs: &Attrs) -> Result<bool, CtlError> {
    match attrs.get("format") {
        None => Ok(false),
        Some("raw") => Ok(true),
        Some(text) => Err(CtlError::new(Errno::INVAL, format!("format is \"{text}\""))
            .with_hint("Only \"raw\" is served. \"qemu-img convert -O raw IMAGE FILE\" makes a raw image of another one.")),
    }
}

/// The device id: as given, or the device's name cut to 20 bytes.
fn serial(given: Option<&str>, name: &str) -> Result<[u8; ID_BYTES], CtlError> {
    let text = match given {
        Some(text) if text.len() > ID_BYTES => {
            return Err(CtlError::new(Errno::INVAL, format!("serial \"{text}\" has {} bytes", text.len()))
                .with_hint("At most 20 bytes are right."));
        }
        Some(text) => text,
        None => name,
    };
    let mut serial = [0; ID_BYTES];
    serial.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
    Ok(serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attrs(pairs: &[(&str, &str)]) -> Attrs {
        let mut attrs = Attrs::new();
        pairs.iter().for_each(|(name, value)| attrs.insert(*name, *value).unwrap());
        attrs
    }

    #[test]
    fn defaults_and_every_attribute() {
        let options = Options::parse("disk0", &attrs(&[("path", "/d")])).unwrap();
        assert!(options.pin && !options.direct && !options.read_only && !options.strict_new_owner);
        assert!(!options.packed && !options.in_order && !options.raw && !options.shared);
        assert!(options.compat_reset == CompatReset::Keep && !options.reset_owner);
        assert!(!options.mem_table && !options.vhost_log);
        assert_eq!((options.queues, options.queue_size, options.max_iotlb_entries), (4, 1024, 2048));
        assert_eq!(&options.serial[..6], b"disk0\0");
        let all = [
            ("path", "/d"),
            ("format", "raw"),
            ("readonly", "on"),
            ("shared", "on"),
            ("direct", "on"),
            ("pin", "off"),
            ("memlock", "8192"),
            ("max_iotlb_entries", "1000000"),
            ("queues", "64"),
            ("queue_size", "1024"),
            ("packed", "on"),
            ("in_order", "on"),
            ("serial", "12345678901234567890"),
            ("iops", "500"),
            ("bps", "10M"),
            ("burst", "50"),
            ("compat_reset", "clean"),
            ("mem_table", "on"),
            ("vhost_log", "on"),
            ("reset_owner", "on"),
        ];
        let options = Options::parse("x", &attrs(&all)).unwrap();
        assert!(!options.pin && options.direct && options.read_only && options.raw && options.shared);
        assert!(options.packed && options.in_order);
        assert_eq!((options.pin_limit, options.max_iotlb_entries), (PinLimit::Pages(2), 1_000_000));
        assert_eq!(options.limits, Limits { iops: 500, bps: 10 << 20, burst_ms: 50 });
        assert!(options.compat_reset == CompatReset::Clean && options.reset_owner);
        assert!(options.mem_table && options.vhost_log);
        assert_eq!((options.queues, options.queue_size, options.serial[19]), (64, 1024, b'0'));
    }

    #[test]
    fn errors_name_the_attribute() {
        for (pairs, errno, word) in [
            (&[][..], Errno::INVAL, "path"),
            (&[("path", "/d"), ("queues", "0")], Errno::INVAL, "queues"),
            (&[("path", "/d"), ("queue_size", "100")], Errno::INVAL, "queue_size"),
            (&[("path", "/d"), ("pin", "yes")], Errno::INVAL, "pin"),
            (&[("path", "/d"), ("max_iotlb_entries", "1048577")], Errno::INVAL, "a number from 2 to 1048576"),
            (&[("path", "/d"), ("memlock", "lots")], Errno::INVAL, "memlock"),
            (&[("path", "/d"), ("serial", "123456789012345678901")], Errno::INVAL, "serial"),
            (&[("path", "/d"), ("iops", "many")], Errno::INVAL, "iops"),
            (&[("path", "/d"), ("burst", "0")], Errno::INVAL, "burst"),
            (&[("path", "/d"), ("format", "qcow2")], Errno::INVAL, "format is \"qcow2\""),
            (&[("path", "/d"), ("mac", "0")], Errno::OPNOTSUPP, "mac"),
            (&[("path", "/d"), ("null", "512")], Errno::INVAL, "one of path and null"),
            (&[("null", "511")], Errno::INVAL, "null"),
        ] {
            let error = Options::parse("x", &attrs(pairs)).unwrap_err();
            assert_eq!(error.errno, errno);
            assert!(error.message.contains(word), "{error}");
        }
    }
}
