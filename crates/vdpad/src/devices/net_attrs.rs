//! [`NetAttrs`]: the attributes of a new device that the kernel's netlink family defines, with the checks that the kernel makes.

use vdpa_core::Errno;
use vdpa_core::features::{Bit, Features};

use super::MgmtDevice;
use vdpa_control::api::{Attrs, CtlError, ID_NET, MgmtDev};
use vdpa_control::config::MacAddr;

/// The smallest MTU that the kernel's netlink policy accepts, in bytes.
const MTU_MIN: u16 = 68;

/// Feature bits whose meaning depends on the class of the device: `VIRTIO_DEVICE_F_MASK`.
const PER_CLASS: Features = Features(0xFFFF_F800_0FFF_FFFF);

/// An attribute of the netlink family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetAttr {
    /// `mac`: the Ethernet address.
    Mac,
    /// `max_vqp`: pairs of data queues.
    MaxVqp,
    /// `mtu`: the largest packet.
    Mtu,
    /// `device_features`: the features offered; for every class of device.
    Features,
}

impl NetAttr {
    const ALL: [Self; 4] = [Self::Mac, Self::MaxVqp, Self::Mtu, Self::Features];

    /// Its name in requests.
    const fn name(self) -> &'static str {
        match self {
            Self::Mac => "mac",
            Self::MaxVqp => "max_vqp",
            Self::Mtu => "mtu",
            Self::Features => "device_features",
        }
    }

    /// `1 << VDPA_ATTR_DEV_...` (uapi-spec 7.2).
    const fn mask(self) -> u64 {
        match self {
            Self::Mac => 1 << 10,
            Self::MaxVqp => 1 << 12,
            Self::Mtu => 1 << 13,
            Self::Features => 1 << 20,
        }
    }
}

/// The values of these attributes; `None` for one that was not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetAttrs {
    /// Ethernet address.
    pub(crate) mac: Option<MacAddr>,
    /// Pairs of data queues, at least 1.
    pub(crate) max_vqp: Option<u16>,
    /// Bytes of the largest packet, at least 68.
    pub(crate) mtu: Option<u16>,
    /// Features that the device is to offer.
    pub(crate) features: Option<Features>,
}

impl NetAttrs {
    /// Reads the attributes of a request, with the checks that do not depend on the management device (uapi-spec 7.1; 7.3,
    /// DEV_NEW 2 and 3).
    ///
    /// # Errors
    /// `EINVAL` for a malformed value, for `max_vqp` 0, and for features without one that a given attribute needs; `ERANGE` for
    /// an MTU below 68.
    pub(crate) fn parse(attrs: &Attrs) -> Result<Self, CtlError> {
        let this = Self {
            mac: attrs.get("mac").map(mac).transpose()?,
            max_vqp: number(attrs, "max_vqp")?,
            mtu: number(attrs, "mtu")?,
            features: attrs.get("device_features").map(features).transpose()?,
        };
        if let Some(mtu) = this.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(CtlError::new(Errno::RANGE, format!("an MTU of {mtu} bytes is out of range"))
                .with_hint(format!("An MTU is {MTU_MIN} to 65535 bytes.")));
        }
        if this.max_vqp == Some(0) {
            return Err(CtlError::new(Errno::INVAL, "At least one pair of VQs is required")
                .with_hint("Leave max_vqp out, or give at least 1."));
        }
        let needed = this.needed_features();
        if let Some(offered) = this.features.filter(|offered| !offered.contains(needed)) {
            let missing = Features(needed.0 & !offered.0);
            return Err(CtlError::new(
                Errno::INVAL,
                format!("Missing features {missing} for provided attributes"),
            )
            .with_hint("Add them to device_features, or leave the attributes out."));
        }
        Ok(this)
    }

    /// Checks the attributes against a management device (uapi-spec 7.3, DEV_NEW 6 to 8).
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an attribute that its devices do not take; `EINVAL` for one that needs another class of device.
    pub(crate) fn check(self, on: &dyn MgmtDevice) -> Result<(), CtlError> {
        let mask = |attrs: &[NetAttr]| attrs.iter().fold(0, |mask, attr| mask | attr.mask());
        let (given, settable) = (mask(&self.given()), mask(on.net_attrs()));
        let MgmtDev { name, supported_classes: classes, .. } = on.describe();
        if given & !settable != 0 {
            let names: Vec<_> = on.net_attrs().iter().map(|attr| attr.name()).collect();
            let right = if names.is_empty() { "none of these".into() } else { names.join(", ") };
            // The mask has all attributes that were given, as in the kernel.
            return Err(CtlError::new(
                Errno::OPNOTSUPP,
                format!("Some provided attributes are not supported: {given:#x}"),
            )
            .with_hint(format!("Of mac, max_vqp, mtu and device_features, {name} takes {right}.")));
        }
        let net = classes.contains(&ID_NET);
        if given & !NetAttr::Features.mask() != 0 && !net {
            return Err(CtlError::new(
                Errno::INVAL,
                "Network class attributes provided on unsupported management device",
            ));
        }
        let ambiguous = self.features.is_some_and(|features| features.0 & PER_CLASS.0 != 0);
        if given == NetAttr::Features.mask() && net && classes.len() > 1 && ambiguous {
            return Err(CtlError::new(
                Errno::INVAL,
                "Management device supports multi-class while device features specified are ambiguous",
            ));
        }
        Ok(())
    }

    fn given(self) -> Vec<NetAttr> {
        let present = |attr: &NetAttr| match attr {
            NetAttr::Mac => self.mac.is_some(),
            NetAttr::MaxVqp => self.max_vqp.is_some(),
            NetAttr::Mtu => self.mtu.is_some(),
            NetAttr::Features => self.features.is_some(),
        };
        NetAttr::ALL.into_iter().filter(present).collect()
    }

    /// Features without which the attributes have no meaning.
    fn needed_features(self) -> Features {
        let needs: [(bool, Bit); 3] = [
            (self.mac.is_some(), Features::NET_MAC),
            (self.mtu.is_some(), Features::NET_MTU),
            (self.max_vqp.is_some_and(|pairs| pairs > 1), Features::NET_MQ),
        ];
        needs.into_iter().filter(|(given, _)| *given).fold(Features::NONE, |word, (_, bit)| word.with(bit))
    }
}

fn mac(text: &str) -> Result<MacAddr, CtlError> {
    text.parse::<MacAddr>().map_err(|error| CtlError::new(Errno::INVAL, error.to_string()))
}

fn number(attrs: &Attrs, name: &str) -> Result<Option<u16>, CtlError> {
    let invalid = |text: &str| {
        CtlError::new(Errno::INVAL, format!("attribute \"{name}\" is \"{text}\""))
            .with_hint("A decimal number from 0 to 65535 is right.")
    };
    attrs.get(name).map(|text| text.parse().map_err(|_| invalid(text))).transpose()
}

/// Parses a feature word: hexadecimal, as in iproute2 and everywhere in the control API.
fn features(text: &str) -> Result<Features, CtlError> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let word = u64::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'));
    word.map(Features).ok_or_else(|| {
        CtlError::new(Errno::INVAL, format!("attribute \"device_features\" is \"{text}\""))
            .with_hint("A hexadecimal number such as 0x300000020 is right.")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdpa_backend::front::vhost::AnyParent;

    /// A management device that creates nothing.
    #[derive(Debug)]
    struct FakeMgmt(&'static [u32], &'static [NetAttr]);

    impl MgmtDevice for FakeMgmt {
        fn describe(&self) -> MgmtDev {
            MgmtDev {
                name: "fake".into(),
                bus: None,
                supported_classes: self.0.into(),
                max_supported_vqs: 0,
                dev_features: Features::NONE,
            }
        }

        fn net_attrs(&self) -> &'static [NetAttr] {
            self.1
        }

        fn create(
            &self,
            _: &str,
            _: &Attrs,
            _: &vdpa_backend::worker::WorkerPool,
            _: &crate::devices::Kept,
        ) -> Result<AnyParent, CtlError> {
            Err(CtlError::new(Errno::IO, "this management device creates nothing"))
        }
    }

    fn attrs(pairs: &[(&str, &str)]) -> Attrs {
        let mut attrs = Attrs::new();
        for (name, value) in pairs {
            attrs.insert(*name, *value).unwrap();
        }
        attrs
    }

    fn refused(pairs: &[(&str, &str)]) -> (Errno, String) {
        let error = NetAttrs::parse(&attrs(pairs)).unwrap_err();
        (error.errno, error.message)
    }

    #[test]
    fn values_are_parsed() {
        let all = [("mac", "2:0:0:0:0:1"), ("mtu", "68"), ("max_vqp", "1"), ("device_features", "300000028")];
        assert_eq!(
            NetAttrs::parse(&attrs(&all)).unwrap(),
            NetAttrs {
                mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
                max_vqp: Some(1),
                mtu: Some(68),
                features: Some(Features(0x3_0000_0028)),
            }
        );
        assert_eq!(NetAttrs::parse(&attrs(&[("path", "/x")])).unwrap(), NetAttrs::default());
    }

    #[test]
    fn values_are_refused_with_the_kernels_messages() {
        assert_eq!(refused(&[("mtu", "67")]).0, Errno::RANGE);
        assert_eq!(refused(&[("mtu", "65536")]).0, Errno::INVAL);
        assert_eq!(refused(&[("mac", "1:2")]).0, Errno::INVAL);
        assert_eq!(refused(&[("device_features", "+1")]).0, Errno::INVAL);
        assert_eq!(
            refused(&[("max_vqp", "0"), ("device_features", "0")]),
            (Errno::INVAL, "At least one pair of VQs is required".into())
        );
        assert_eq!(
            refused(&[("mac", "2::1"), ("device_features", "0")]).0,
            Errno::INVAL,
            "a malformed value comes before everything"
        );
        assert_eq!(
            refused(&[
                ("mac", "2:0:0:0:0:1"),
                ("mtu", "1500"),
                ("max_vqp", "2"),
                ("device_features", "0x20")
            ]),
            (Errno::INVAL, "Missing features 0x400008 for provided attributes".into())
        );
    }

    #[test]
    fn attributes_are_checked_against_the_management_device() {
        let check = |on: &FakeMgmt, pairs: &[(&str, &str)]| {
            let result = NetAttrs::parse(&attrs(pairs)).unwrap().check(on);
            result.map_err(|error| (error.errno, error.message))
        };
        let mac = [("mac", "2:0:0:0:0:1")];
        let net = FakeMgmt(&[1], &[NetAttr::Mac, NetAttr::Mtu, NetAttr::Features]);
        assert_eq!(check(&net, &mac), Ok(()));
        assert_eq!(
            check(&net, &[mac[0], ("max_vqp", "1")]),
            Err((Errno::OPNOTSUPP, "Some provided attributes are not supported: 0x1400".into()))
        );
        let none = FakeMgmt(&[2], &[]);
        assert_eq!(
            check(&none, &mac),
            Err((Errno::OPNOTSUPP, "Some provided attributes are not supported: 0x400".into()))
        );
        assert_eq!(check(&none, &[("path", "/x")]), Ok(()), "not an attribute of the netlink family");
        let block = FakeMgmt(&[2], &[NetAttr::Mac, NetAttr::Features]);
        assert!(check(&block, &mac).unwrap_err().1.starts_with("Network class attributes provided"));
        assert_eq!(check(&block, &[("device_features", "1")]), Ok(()));
        let both = FakeMgmt(&[1, 2], &[NetAttr::Mac, NetAttr::Features]);
        assert!(
            check(&both, &[("device_features", "20")]).unwrap_err().1.ends_with("specified are ambiguous")
        );
        assert_eq!(check(&both, &[("device_features", "300000000")]), Ok(()));
        assert_eq!(check(&both, &[mac[0], ("device_features", "20")]), Ok(()));
    }
}
