//! [`Options`]: the attributes of `vdpactl dev add ... mgmtdev net`.

use rustix::rand::{GetRandomFlags, getrandom};
use vdpa_control::api::{Attrs, CtlError};
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::net::MAC_BYTES;
use vdpa_core::net::card::PAIRS_MAX;
use vdpa_core::parent::CompatReset;

use crate::devices::NetAttrs;
use crate::devices::options::{
    CPUS_ATTR, IOTLB_ATTR, PASSED_ATTR, QUEUE_SIZE_ATTR, WORKER_ATTR, compat_reset, invalid, iotlb_entries,
    placement, queue_size, reject_unknown,
};
use vdpa_backend::worker::Placement;
use vdpa_sys::tap::is_device;

/// Default size of the largest ring, in entries: as for `blk`, because of QEMU.
const QUEUE_SIZE: u16 = 1024;

/// Default of `max_iotlb_entries`.
const IOTLB_ENTRIES: usize = 2048;

/// Default MTU, in bytes.
const MTU: u16 = 1500;

/// The attributes: name, and description of the value for the error that lists them.
pub(in crate::devices) const KNOWN: [(&str, &str); 18] = [
    ("tap", "NAME of an interface, or /dev/tapN"),
    PASSED_ATTR,
    ("create", "on|off"),
    ("mac", "MAC"),
    ("mtu", "68-65535"),
    ("max_vqp", "1-8"),
    ("device_features", "HEX"),
    QUEUE_SIZE_ATTR,
    IOTLB_ATTR,
    ("packed", "on|off"),
    ("in_order", "on|off"),
    ("compat_reset", "keep|clean"),
    ("mem_table", "on|off"),
    ("vhost_log", "on|off"),
    ("reset_owner", "on|off"),
    ("strict_new_owner", "on|off"),
    CPUS_ATTR,
    WORKER_ATTR,
];

/// The attributes of a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// Name of the interface, or path of its character device.
    pub(super) tap: String,
    /// Make the interface, which ends with the device.
    pub(super) create: bool,
    pub(super) mac: [u8; MAC_BYTES],
    pub(super) mtu: u16,
    pub(super) pairs: u16,
    /// Features to offer; `None` for all.
    pub(super) features: Option<Features>,
    pub(super) queue_size: u16,
    /// Offer packed rings; see `blk`.
    pub(super) packed: bool,
    pub(super) in_order: bool,
    pub(super) compat_reset: CompatReset,
    /// Most entries of the IOTLB of each address space.
    pub(super) max_iotlb_entries: usize,
    /// SET_MEM_TABLE maps memory.
    pub(super) mem_table: bool,
    /// Offer the log of vhost.
    pub(super) vhost_log: bool,
    pub(super) reset_owner: bool,
    pub(super) strict_new_owner: bool,
    pub(super) placement: Placement,
}

impl Options {
    /// # Errors
    /// `EOPNOTSUPP` for an unknown attribute, `EINVAL` for an invalid value and without `tap`.
    pub(super) fn parse(attrs: &Attrs) -> Result<Self, CtlError> {
        reject_unknown("net", attrs, &KNOWN)?;
        let net = NetAttrs::parse(attrs)?;
        let switch = |key| attrs.switch(key).map_err(invalid).map(|on| on.unwrap_or(false));
        let pairs = net.max_vqp.unwrap_or(1);
        if pairs > PAIRS_MAX {
            return Err(CtlError::new(Errno::INVAL, format!("max_vqp is {pairs}"))
                .with_hint(format!("1 to {PAIRS_MAX} pairs are right.")));
        }
        let (tap, create) = (interface(attrs)?, switch("create")?);
        if create && is_device(&tap) {
            return Err(CtlError::new(Errno::INVAL, format!("create makes no {tap}")).with_hint(
                "Make the interface with \"ip link add ... type macvtap\", or give the name of a TAP.",
            ));
        }
        Ok(Self {
            tap,
            create,
            mac: net.mac.map_or_else(random_mac, |mac| Ok(mac.0))?,
            mtu: net.mtu.unwrap_or(MTU),
            pairs,
            features: net.features,
            queue_size: queue_size(attrs, QUEUE_SIZE)?,
            packed: switch("packed")?,
            in_order: switch("in_order")?,
            compat_reset: compat_reset(attrs, CompatReset::Keep)?,
            max_iotlb_entries: iotlb_entries(attrs, IOTLB_ENTRIES)?,
            mem_table: switch("mem_table")?,
            vhost_log: switch("vhost_log")?,
            reset_owner: switch("reset_owner")?,
            strict_new_owner: switch("strict_new_owner")?,
            placement: placement(attrs)?,
        })
    }
}

fn interface(attrs: &Attrs) -> Result<String, CtlError> {
    match attrs.get("tap") {
        None | Some("") => Err(CtlError::new(Errno::INVAL, "net needs the attribute tap")
            .with_hint("Give the name of the TAP interface: tap tap0")),
        Some(path) if is_device(path) => Ok(path.to_owned()),
        Some(name) if name.len() > 15 || name.contains(['/', '%', ' ', '\0']) => {
            Err(CtlError::new(Errno::INVAL, format!("\"{name}\" is no name of an interface"))
                .with_hint("At most 15 bytes without a slash, a blank and a percent sign are right."))
        }
        Some(name) => Ok(name.to_owned()),
    }
}

/// An address of the range that is for those who choose theirs themselves.
fn random_mac() -> Result<[u8; MAC_BYTES], CtlError> {
    let mut mac = [0; MAC_BYTES];
    getrandom(&mut mac, GetRandomFlags::empty())
        .map_err(|error| CtlError::new(Errno::from_raw(error.raw_os_error()), "no random address"))?;
    mac[0] = mac[0] & 0xfc | 2;
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Options, CtlError> {
        let mut attrs = Attrs::new();
        pairs.iter().for_each(|(name, value)| attrs.insert(*name, *value).unwrap());
        Options::parse(&attrs)
    }

    #[test]
    fn defaults_and_errors() {
        let options = parse(&[("tap", "tap0")]).unwrap();
        assert_eq!((options.mtu, options.pairs, options.queue_size, options.create), (1500, 1, 1024, false));
        assert!(vdpa_core::net::is_valid_address(options.mac) && options.mac[0] & 2 == 2);
        assert_ne!(options.mac, parse(&[("tap", "tap0")]).unwrap().mac);
        for (pairs, errno, word) in [
            (&[][..], Errno::INVAL, "attribute tap"),
            (&[("tap", "a/b")], Errno::INVAL, "no name of an interface"),
            (&[("tap", "1234567890123456")], Errno::INVAL, "no name"),
            (&[("tap", "/dev/tap3"), ("create", "on")], Errno::INVAL, "create makes no"),
            (&[("tap", "t"), ("max_vqp", "9")], Errno::INVAL, "max_vqp"),
            (&[("tap", "t"), ("create", "yes")], Errno::INVAL, "create"),
            (&[("tap", "t"), ("path", "/x")], Errno::OPNOTSUPP, "path"),
        ] {
            let error = parse(pairs).unwrap_err();
            assert_eq!(error.errno, errno);
            assert!(error.message.contains(word), "{error}");
        }
    }
}
