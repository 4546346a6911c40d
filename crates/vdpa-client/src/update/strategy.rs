//! The four strategies to carry a device over to the next program.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vdpa_core::features::{BackendFeatures, Bit};

/// How a device is carried over, ordered from the shortest to the longest interruption.
///
/// ```
/// use vdpa_client::update::Strategy;
/// use vdpa_core::features::BackendFeatures;
///
/// let offered = BackendFeatures::of(&[BackendFeatures::SUSPEND, BackendFeatures::RESUME]);
/// assert_eq!(Strategy::pick(offered), Strategy::Reopen);
/// assert_eq!(Strategy::pick(offered.with(BackendFeatures::NEW_OWNER)), Strategy::Live);
/// assert!(Strategy::Reset.check(offered).unwrap_err().to_string().contains("NEW_OWNER (bit 9)"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// exec; NEW_OWNER. The device never stops.
    Live,
    /// SUSPEND; exec; NEW_OWNER; REMAP each; RESUME.
    Resume,
    /// SUSPEND; reset; exec; NEW_OWNER; vrings again; REMAP each; DRIVER_OK. For devices without RESUME.
    Reset,
    /// Close; exec; open and set up as new. Works on every device; every page is pinned again.
    Reopen,
}

/// The device lacks what a strategy needs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// A backend feature is missing.
    #[error("strategy {strategy} needs backend feature {name} (bit {}), which the device does not offer; it offers {}", .bit.0, vdpa_core::feature_names::backend_text(*.offered))]
    Missing {
        /// The requested strategy.
        strategy: Strategy,
        /// Name of the feature, without its prefix `VHOST_BACKEND_F_`.
        name: &'static str,
        /// Bit number of the feature.
        bit: Bit,
        /// Backend features that the device offers.
        offered: BackendFeatures,
    },
    /// The device uses owner addresses, which are stale from NEW_OWNER until REMAP.
    #[error(
        "strategy live needs a device without backend feature IOTLB_REMAP (bit 10): this one uses addresses \
         of its owner, so it has to be suspended while they change; use resume"
    )]
    NeedsRemap,
}

impl Strategy {
    /// All strategies, the best first.
    pub const ALL: [Self; 4] = [Self::Live, Self::Resume, Self::Reset, Self::Reopen];

    /// The best strategy for a device with these backend features.
    #[must_use]
    pub fn pick(offered: BackendFeatures) -> Self {
        Self::ALL.into_iter().find(|s| s.check(offered).is_ok()).unwrap_or(Self::Reopen)
    }

    /// Checks whether a device with these backend features supports the strategy.
    ///
    /// # Errors
    /// [`Unsupported::Missing`] with the first missing feature; [`Unsupported::NeedsRemap`] for `live`.
    pub fn check(self, offered: BackendFeatures) -> Result<(), Unsupported> {
        const SUSPEND: (Bit, &str) = (BackendFeatures::SUSPEND, "SUSPEND");
        const RESUME: (Bit, &str) = (BackendFeatures::RESUME, "RESUME");
        const NEW_OWNER: (Bit, &str) = (BackendFeatures::NEW_OWNER, "NEW_OWNER");
        let needed: &[(Bit, &'static str)] = match self {
            Self::Live => &[NEW_OWNER],
            Self::Resume => &[NEW_OWNER, SUSPEND, RESUME],
            Self::Reset => &[NEW_OWNER, SUSPEND],
            Self::Reopen => &[],
        };
        if let Some(&(bit, name)) = needed.iter().find(|(bit, _)| !offered.has(*bit)) {
            return Err(Unsupported::Missing { strategy: self, name, bit, offered });
        }
        if self == Self::Live && offered.has(BackendFeatures::IOTLB_REMAP) {
            return Err(Unsupported::NeedsRemap);
        }
        Ok(())
    }

    /// Its name in commands, reports and saved state.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Resume => "resume",
            Self::Reset => "reset",
            Self::Reopen => "reopen",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(name: &str) -> Result<Self, UnknownStrategy> {
        Self::ALL
            .into_iter()
            .find(|s| s.name() == name)
            .ok_or_else(|| UnknownStrategy { name: name.to_owned() })
    }
}

/// The name of a strategy could not be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("\"{name}\" is no strategy; there are live, resume, reset and reopen")]
pub struct UnknownStrategy {
    /// The text that is no strategy.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: BackendFeatures = BackendFeatures(0xe);

    fn with(bits: &[Bit]) -> BackendFeatures {
        BASE | BackendFeatures::of(bits)
    }

    #[test]
    fn the_best_that_the_device_offers() {
        use BackendFeatures as B;
        let cases = [
            (with(&[]), Strategy::Reopen),
            (with(&[B::SUSPEND, B::RESUME, B::IOTLB_PERSIST]), Strategy::Reopen),
            (with(&[B::NEW_OWNER]), Strategy::Live),
            (with(&[B::NEW_OWNER, B::SUSPEND, B::RESUME]), Strategy::Live),
            (with(&[B::NEW_OWNER, B::SUSPEND, B::RESUME, B::IOTLB_REMAP]), Strategy::Resume),
            (with(&[B::NEW_OWNER, B::SUSPEND, B::IOTLB_REMAP]), Strategy::Reset),
            (with(&[B::NEW_OWNER, B::IOTLB_REMAP]), Strategy::Reopen),
        ];
        for (offered, best) in cases {
            assert_eq!(Strategy::pick(offered), best, "{offered}");
        }
    }

    #[test]
    fn a_refusal_names_the_bit() {
        let offered = with(&[BackendFeatures::NEW_OWNER, BackendFeatures::SUSPEND]);
        let error = Strategy::Resume.check(offered).unwrap_err().to_string();
        assert!(error.contains("resume") && error.contains("RESUME (bit 5)"), "{error}");
        let remap = offered.with(BackendFeatures::IOTLB_REMAP);
        assert_eq!(Strategy::Live.check(remap), Err(Unsupported::NeedsRemap));
        assert!(Strategy::Reset.check(remap).is_ok());
    }

    #[test]
    fn names_round_trip() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        assert!("replace".parse::<Strategy>().unwrap_err().to_string().contains("\"replace\""));
    }
}
