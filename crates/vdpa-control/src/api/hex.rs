//! Serialises feature words as `"0x308830028"`.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};
use vdpa_core::features::Features;

pub(crate) fn serialize<S: Serializer>(word: &Features, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(word)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Features, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.strip_prefix("0x")
        .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .map(Features)
        .ok_or_else(|| D::Error::custom(format!("features {text:?} are not of the form \"0x1f\"")))
}

/// The same for a word that may be absent.
pub(crate) mod option {
    use super::{Deserializer, Features, Serializer};

    pub(crate) fn serialize<S: Serializer>(
        word: &Option<Features>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match word {
            Some(word) => super::serialize(word, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Features>, D::Error> {
        super::deserialize(deserializer).map(Some)
    }
}
