//! The numbers of the live-update series and of this project's own requests, which no released kernel has: one table, to be changed in
//! one place.
//!
//! A later kernel may use the posted numbers for something else (uapi-spec 8.2). Servers and clients take them from
//! [`configured`]; everything above the wire knows only the names. A program sets them at its start, from its
//! configuration or by [`configure_from_env`]:
//!
//! ```
//! use vdpa_core::features::{BackendFeatures, Bit};
//! use vdpa_sys::uapi::live::Numbers;
//!
//! let numbers: Numbers = "new_owner=0xaf2f,new_owner_bit=19".parse()?;
//! assert_eq!(numbers, Numbers { new_owner: 0xaf2f, new_owner_bit: Bit(19), ..Numbers::POSTED });
//! let wire = numbers.features_to_wire(BackendFeatures::NONE.with(BackendFeatures::NEW_OWNER));
//! assert_eq!(wire, 1 << 19);
//! # Ok::<(), vdpa_sys::uapi::live::NumbersError>(())
//! ```

use std::str::FromStr;
use std::sync::OnceLock;

use thiserror::Error;
use vdpa_core::features::{BackendFeatures, Bit};
use vdpa_core::types::iotlb_type;

use crate::uapi::{dirty, report, state, vhost};

/// The environment variable that [`configure_from_env`] reads.
pub const ENV: &str = "VDPA_LIVE_NUMBERS";

/// First bit of a backend feature word that Linux 7.3 leaves free.
const FREE_BIT: u8 = 9;
/// First number of an ioctl that Linux 7.3 leaves free to its end.
const FREE_NUMBER: u8 = 0x90;
/// First IOTLB message type that Linux 7.3 leaves free.
const FREE_TYPE: u8 = 7;
/// Replaces bits without a meaning in this configuration; no device offers it.
const UNKNOWN: Bit = Bit(63);

/// Every number of the series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// The ioctl `VHOST_NEW_OWNER`; without an argument.
    pub new_owner: u32,
    /// The IOTLB message type `VHOST_IOTLB_REMAP`.
    pub remap: u8,
    /// The backend feature `VHOST_BACKEND_F_NEW_OWNER`.
    pub new_owner_bit: Bit,
    /// The backend feature `VHOST_BACKEND_F_IOTLB_REMAP`.
    pub remap_bit: Bit,
    /// The number of the ioctl `VDPA_LIVE_REPORT`, which is not of the series ([`report`]).
    pub report: u8,
    /// The number of the ioctl `VDPA_DIRTY_INFO`, which is not of the series; the other requests of [`dirty`] have those that follow.
    pub dirty: u8,
    /// The backend feature `VHOST_BACKEND_F_DIRTY_LOG`, which announces these requests.
    pub dirty_bit: Bit,
    /// The number of the ioctl `VDPA_STATE_SAVE`, which is not of the series; the other request of [`state`] has the next one.
    pub state: u8,
    /// The backend feature `VHOST_BACKEND_F_DEVICE_STATE`, which announces these requests.
    pub state_bit: Bit,
}

/// Why numbers cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NumbersError {
    /// Not a list of names and values.
    #[error(
        "\"{text}\": NAME=NUMBER,... is right, with new_owner, remap, new_owner_bit, remap_bit, report, dirty, dirty_bit, state and state_bit"
    )]
    Form {
        /// The part that is wrong.
        text: String,
    },
    /// A number that means something else, or cannot be one.
    #[error("{name}={value:#x} cannot be used: {why}")]
    Taken {
        /// Which.
        name: &'static str,
        /// Its value.
        value: u32,
        /// What would be right.
        why: &'static str,
    },
    /// The numbers were used or set before.
    #[error("the numbers of the live-update series are in use already; set them at the start of the program")]
    Late,
}

impl Default for Numbers {
    fn default() -> Self {
        Self::POSTED
    }
}

impl Numbers {
    /// The numbers of both postings of the series and of the QEMU patches that use it.
    pub const POSTED: Self = Self {
        new_owner: vhost::VHOST_NEW_OWNER,
        remap: iotlb_type::REMAP,
        new_owner_bit: BackendFeatures::NEW_OWNER,
        remap_bit: BackendFeatures::IOTLB_REMAP,
        report: report::NUMBER,
        dirty: dirty::NUMBER,
        dirty_bit: BackendFeatures::DIRTY_LOG,
        state: state::NUMBER,
        state_bit: BackendFeatures::DEVICE_STATE,
    };

    /// The bits that this program knows, each with the one that crosses the interface.
    const fn bits(self) -> [(Bit, Bit); 4] {
        [
            (BackendFeatures::NEW_OWNER, self.new_owner_bit),
            (BackendFeatures::IOTLB_REMAP, self.remap_bit),
            (BackendFeatures::DIRTY_LOG, self.dirty_bit),
            (BackendFeatures::DEVICE_STATE, self.state_bit),
        ]
    }

    /// The request of dirty tracking that an ioctl is.
    #[must_use]
    pub fn dirty_request(self, ioctl: u32) -> Option<dirty::Request> {
        dirty::Request::of(ioctl, self.dirty)
    }

    /// The request of a device that moves that an ioctl is.
    #[must_use]
    pub fn state_request(self, ioctl: u32) -> Option<state::Request> {
        state::Request::of(ioctl, self.state)
    }

    /// The ioctl `VDPA_LIVE_REPORT`.
    #[must_use]
    pub const fn report_request(self) -> u32 {
        report::request(self.report)
    }

    /// A backend feature word as it crosses the interface.
    #[must_use]
    pub const fn features_to_wire(self, features: BackendFeatures) -> u64 {
        let bits = self.bits();
        let mut wire = features;
        let mut index = 0;
        while index < bits.len() {
            wire = wire.without(bits[index].0);
            index += 1;
        }
        index = 0;
        while index < bits.len() {
            if features.has(bits[index].0) {
                wire = wire.with(bits[index].1);
            }
            index += 1;
        }
        wire.0
    }

    /// A backend feature word from the interface. Bits that only other configurations of the series use become a bit that no
    /// device offers.
    #[must_use]
    pub const fn features_from_wire(self, wire: u64) -> BackendFeatures {
        const POSTED: u64 = BackendFeatures::of(&[
            BackendFeatures::NEW_OWNER,
            BackendFeatures::IOTLB_REMAP,
            BackendFeatures::DIRTY_LOG,
            BackendFeatures::DEVICE_STATE,
        ])
        .0;
        let bits = self.bits();
        let wire = BackendFeatures(wire);
        let mut rest = wire;
        let mut index = 0;
        while index < bits.len() {
            rest = rest.without(bits[index].1);
            index += 1;
        }
        let mut features = BackendFeatures(rest.0 & !POSTED);
        if rest.0 & POSTED != 0 {
            features = features.with(UNKNOWN);
        }
        index = 0;
        while index < bits.len() {
            if wire.has(bits[index].1) {
                features = features.with(bits[index].0);
            }
            index += 1;
        }
        features
    }

    /// An IOTLB message type as it crosses the interface.
    #[must_use]
    pub const fn message_to_wire(self, kind: u8) -> u8 {
        if kind == iotlb_type::REMAP { self.remap } else { kind }
    }

    /// An IOTLB message type from the interface; the posted number of REMAP is an unknown type where it is not in
    /// use.
    #[must_use]
    pub const fn message_from_wire(self, kind: u8) -> u8 {
        match kind {
            kind if kind == self.remap => iotlb_type::REMAP,
            iotlb_type::REMAP => 0,
            kind => kind,
        }
    }

    /// Checks that the numbers are free and different.
    pub(crate) fn check(self) -> Result<Self, NumbersError> {
        let taken = |name, value, why| Err(NumbersError::Taken { name, value, why });
        let other = vhost::REQUESTS
            .iter()
            .any(|(name, number)| *number == self.new_owner && *name != "VHOST_NEW_OWNER");
        if other || self.new_owner >> 8 != u32::from(vhost::VHOST_VIRTIO) {
            return taken("new_owner", self.new_owner, "a free number of the form 0xafNN is right");
        }
        if self.report < FREE_NUMBER {
            return taken("report", self.report.into(), "a number from 0x90 to 0xff is right");
        }
        let last = self.dirty.saturating_add(dirty::Request::Unmap as u8);
        if self.dirty < FREE_NUMBER || last == u8::MAX || (self.dirty..=last).contains(&self.report) {
            return taken(
                "dirty",
                self.dirty.into(),
                "five free numbers from one of 0x90 to 0xfa on are right",
            );
        }
        let load = self.state.saturating_add(state::Request::Load as u8);
        let mut both = self.state..=load;
        if self.state < FREE_NUMBER
            || load == u8::MAX
            || both.any(|number| number == self.report || (self.dirty..=last).contains(&number))
        {
            return taken(
                "state",
                self.state.into(),
                "two free numbers from one of 0x90 to 0xfd on are right",
            );
        }
        if self.remap < FREE_TYPE {
            return taken("remap", self.remap.into(), "a message type from 7 on is right");
        }
        let bits = [
            ("new_owner_bit", self.new_owner_bit),
            ("remap_bit", self.remap_bit),
            ("dirty_bit", self.dirty_bit),
            ("state_bit", self.state_bit),
        ];
        for (name, bit) in bits {
            if !(FREE_BIT..UNKNOWN.0).contains(&bit.0) {
                return taken(name, bit.0.into(), "a bit from 9 to 62 is right");
            }
        }
        if self.new_owner_bit == self.remap_bit {
            return taken("remap_bit", self.remap_bit.0.into(), "new_owner_bit has it");
        }
        if [self.new_owner_bit, self.remap_bit].contains(&self.dirty_bit) {
            return taken("dirty_bit", self.dirty_bit.0.into(), "another bit of the table is that");
        }
        if [self.new_owner_bit, self.remap_bit, self.dirty_bit].contains(&self.state_bit) {
            return taken("state_bit", self.state_bit.0.into(), "another bit of the table is that");
        }
        Ok(self)
    }
}

impl FromStr for Numbers {
    type Err = NumbersError;

    /// Reads `NAME=NUMBER,...`, numbers decimal or with `0x`; what is not named is as posted.
    fn from_str(text: &str) -> Result<Self, NumbersError> {
        let mut numbers = Self::POSTED;
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let form = || NumbersError::Form { text: part.to_owned() };
            let (name, value) = part.split_once('=').ok_or_else(form)?;
            let value = match value.strip_prefix("0x") {
                Some(digits) => u32::from_str_radix(digits, 16),
                None => value.parse(),
            }
            .map_err(|_| form())?;
            let byte = || u8::try_from(value).map_err(|_| form());
            match name {
                "new_owner" => numbers.new_owner = value,
                "report" => numbers.report = byte()?,
                "remap" => numbers.remap = byte()?,
                "new_owner_bit" => numbers.new_owner_bit = Bit(byte()?),
                "remap_bit" => numbers.remap_bit = Bit(byte()?),
                "dirty" => numbers.dirty = byte()?,
                "dirty_bit" => numbers.dirty_bit = Bit(byte()?),
                "state" => numbers.state = byte()?,
                "state_bit" => numbers.state_bit = Bit(byte()?),
                _ => return Err(form()),
            }
        }
        numbers.check()
    }
}

static CONFIGURED: OnceLock<Numbers> = OnceLock::new();

/// The numbers that this program uses: the configured or the posted ones. They do not change after the first call.
#[must_use]
pub fn configured() -> Numbers {
    *CONFIGURED.get_or_init(|| Numbers::POSTED)
}

/// Sets the numbers this program uses.
///
/// # Errors
/// [`NumbersError::Late`] unless this comes before everything that uses them; setting them to what they are is no
/// error. [`NumbersError::Taken`].
pub fn configure(numbers: Numbers) -> Result<(), NumbersError> {
    let numbers = numbers.check()?;
    if *CONFIGURED.get_or_init(|| numbers) == numbers { Ok(()) } else { Err(NumbersError::Late) }
}

/// Sets the numbers this program uses to those of the environment variable [`ENV`], if it is there; so a new image of
/// a program has those of the old one.
///
/// # Errors
/// As [`configure`]; [`NumbersError::Form`].
pub fn configure_from_env() -> Result<(), NumbersError> {
    std::env::var(ENV).map_or(Ok(()), |text| configure(text.parse()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOVED: Numbers = Numbers {
        new_owner: 0xaf2f,
        remap: 9,
        new_owner_bit: Bit(20),
        remap_bit: Bit(21),
        report: 0xf0,
        dirty: 0xa0,
        dirty_bit: Bit(22),
        state: 0xa8,
        state_bit: Bit(23),
    };

    #[test]
    fn posted_numbers_change_nothing() {
        for word in [0, 0x77e, 0x200, u64::MAX] {
            assert_eq!(Numbers::POSTED.features_from_wire(word).0, word);
            assert_eq!(Numbers::POSTED.features_to_wire(BackendFeatures(word)), word);
        }
        for kind in 0..=u8::MAX {
            assert_eq!(Numbers::POSTED.message_from_wire(kind), kind);
        }
    }

    #[test]
    fn moved_numbers_leave_the_posted_ones_without_a_meaning() {
        assert_eq!(MOVED.features_to_wire(BackendFeatures(0x77e)), 0x30_017e);
        assert_eq!(MOVED.features_from_wire(0x30_017e), BackendFeatures(0x77e));
        assert_eq!(MOVED.features_from_wire(0x200), BackendFeatures(1 << 63));
        assert_eq!((MOVED.message_from_wire(9), MOVED.message_from_wire(7)), (7, 0));
        assert_eq!((MOVED.message_to_wire(7), MOVED.message_to_wire(2)), (9, 2));
        let swapped = Numbers { new_owner_bit: Bit(10), remap_bit: Bit(9), ..Numbers::POSTED };
        assert_eq!(swapped.features_to_wire(BackendFeatures(0x200)), 0x400);
        assert_eq!(swapped.features_from_wire(0x400), BackendFeatures(0x200));
        assert_eq!(MOVED.features_to_wire(BackendFeatures(1 << 48)), 1 << 22);
        assert_eq!(MOVED.features_from_wire(1 << 22), BackendFeatures(1 << 48));
        assert_eq!(MOVED.features_from_wire(1 << 48), BackendFeatures(1 << 63));
    }

    #[test]
    fn the_text_lists_the_numbers_that_differ() {
        let text = "new_owner=0xaf2f, remap=9,new_owner_bit=20,remap_bit=0x15,report=240,dirty=160,dirty_bit=22,\
             state=168,state_bit=23";
        assert_eq!(text.parse(), Ok(MOVED));
        assert_eq!("".parse(), Ok(Numbers::POSTED));
        for (text, what) in [
            ("new_owner", "\"new_owner\""),
            ("owner=1", "\"owner=1\""),
            ("remap=300", "remap=300"),
            ("new_owner=0xaf01", "new_owner=0xaf01"),
            ("new_owner=0x4008af10", "new_owner=0x4008af10"),
            ("new_owner=0x1227", "0xafNN"),
            ("report=0x20", "from 0x90"),
            ("remap=6", "from 7 on"),
            ("new_owner_bit=8", "9 to 62"),
            ("new_owner_bit=63", "9 to 62"),
            ("new_owner_bit=10", "new_owner_bit has it"),
            ("dirty_bit=9", "another bit"),
            ("dirty=0xf4", "five free numbers"),
            ("dirty=0xfb", "five free numbers"),
            ("state=0xe4", "two free numbers"),
            ("state=0xfe", "two free numbers"),
            ("state=0xdf", "two free numbers"),
            ("state_bit=48", "another bit"),
        ] {
            let error = text.parse::<Numbers>().unwrap_err().to_string();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
