//! [`Attrs`]: the attributes of a new device, as names and values.

use std::fmt;
use std::path::Path;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Attributes that are paths, of any kind of device.
pub const PATH_ATTRS: [&str; 2] = ["path", "device_file"];

/// Attribute of the devices that take what they need as descriptors, which come with the request (`SCM_RIGHTS`): `on` or `off`.
pub const PASSED_ATTR: &str = "passed";

/// Names and values in the order in which they were given; every name occurs once.
///
/// An object in JSON, whose values may be strings, numbers or booleans. They become strings: numbers in decimal, booleans `on`
/// and `off`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attrs(Vec<(String, String)>);

/// Why an attribute was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttrError {
    /// The name was given before.
    #[error("attribute \"{name}\" is given twice; give it once")]
    Twice {
        /// Name of the attribute.
        name: String,
    },
    /// The value of a switch is neither on nor off.
    #[error("attribute \"{name}\" is \"{value}\"; \"on\" or \"off\" is right")]
    Switch {
        /// Name of the attribute.
        name: String,
        /// Its value.
        value: String,
    },
    /// The value is not a number, or is out of range.
    #[error("attribute \"{name}\" is \"{value}\"; a number from {min} to {max} is right")]
    Number {
        /// Name of the attribute.
        name: String,
        /// Its value.
        value: String,
        /// Smallest valid value.
        min: u64,
        /// Largest valid value.
        max: u64,
    },
    /// The value is not a size, or is out of range.
    #[error(
        "attribute \"{name}\" is \"{value}\"; bytes from {min} to {max} are right, as a number or with K, M, G or T (\"512M\")"
    )]
    Size {
        /// Name of the attribute.
        name: String,
        /// Its value.
        value: String,
        /// Smallest valid value in bytes.
        min: u64,
        /// Largest valid value in bytes.
        max: u64,
    },
}

impl Attrs {
    /// No attributes.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds an attribute.
    ///
    /// # Errors
    /// [`AttrError::Twice`] when the name was added before.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) -> Result<(), AttrError> {
        let name = name.into();
        if self.get(&name).is_some() {
            return Err(AttrError::Twice { name });
        }
        self.0.push((name, value.into()));
        Ok(())
    }

    /// The value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Removes `name` and returns its value.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    /// The value of the switch `name`, `on` or `off`; `None` when it is absent.
    ///
    /// # Errors
    /// [`AttrError::Switch`] for any other value.
    pub fn switch(&self, name: &str) -> Result<Option<bool>, AttrError> {
        match self.get(name) {
            None => Ok(None),
            Some("on") => Ok(Some(true)),
            Some("off") => Ok(Some(false)),
            Some(value) => Err(AttrError::Switch { name: name.into(), value: value.into() }),
        }
    }

    /// The value of the number `name`, decimal and from `min` to `max`; `None` when it is absent.
    ///
    /// # Errors
    /// [`AttrError::Number`] for any other value.
    pub fn number(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, AttrError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) if (min..=max).contains(&number) => Ok(Some(number)),
            _ => Err(AttrError::Number { name: name.into(), value: value.into(), min, max }),
        }
    }

    /// The value of the size `name` in bytes, from `min` to `max`: a number, or one with `K`, `M`, `G` or `T` for 2^10, 2^20, 2^30 or
    /// 2^40 bytes; `None` when it is absent.
    ///
    /// # Errors
    /// [`AttrError::Size`] for any other value.
    pub fn size(&self, name: &str, min: u64, max: u64) -> Result<Option<u64>, AttrError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match parse_size(value) {
            Some(bytes) if (min..=max).contains(&bytes) => Ok(Some(bytes)),
            _ => Err(AttrError::Size { name: name.into(), value: value.into(), min, max }),
        }
    }

    /// Makes relative paths among the attributes ([`PATH_ATTRS`]) absolute: they begin in `base`. A `base` that is not UTF-8 changes
    /// nothing.
    ///
    /// ```
    /// use vdpa_control::api::Attrs;
    ///
    /// let mut attrs = Attrs::new();
    /// attrs.insert("path", "disk.img").unwrap();
    /// attrs.resolve_paths(std::path::Path::new("/srv"));
    /// assert_eq!(attrs.get("path"), Some("/srv/disk.img"));
    /// ```
    pub fn resolve_paths(&mut self, base: &Path) {
        let paths = self.0.iter_mut().filter(|(name, value)| {
            PATH_ATTRS.contains(&name.as_str()) && !value.is_empty() && Path::new(value).is_relative()
        });
        for (_, value) in paths {
            if let Some(path) = base.join(&*value).to_str() {
                *value = path.to_owned();
            }
        }
    }

    /// Whether descriptors come with the request ([`PASSED_ATTR`]).
    #[must_use]
    pub fn is_passed(&self) -> bool {
        self.get(PASSED_ATTR) == Some("on")
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Whether there are no attributes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Bytes of a size as [`Attrs::size`] takes it; `None` for other text, and from 2^64 on.
///
/// ```
/// use vdpa_control::api::parse_size;
///
/// assert_eq!(parse_size("8M"), Some(8 << 20));
/// assert_eq!((parse_size("4096"), parse_size("1g"), parse_size("1.5G"), parse_size("K")), (Some(4096), Some(1 << 30), None, None));
/// ```
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let shift = match text.bytes().last()?.to_ascii_uppercase() {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => return text.parse().ok(),
    };
    let number: u64 = text.get(..text.len() - 1)?.parse().ok()?;
    number.checked_mul(1 << shift)
}

impl Serialize for Attrs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Attrs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(AttrsVisitor)
    }
}

struct AttrsVisitor;

impl<'de> Visitor<'de> for AttrsVisitor {
    type Value = Attrs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of attributes")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Attrs, A::Error> {
        let mut attrs = Attrs::new();
        while let Some((name, Scalar(value))) = map.next_entry::<String, Scalar>()? {
            attrs.insert(name, value).map_err(A::Error::custom)?;
        }
        Ok(attrs)
    }
}

/// One value of the object, converted to a string.
struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "an attribute must be a string, a number or a boolean")]
        enum Form {
            Text(String),
            Number(serde_json::Number),
            Switch(bool),
        }
        Ok(Self(match Form::deserialize(deserializer)? {
            Form::Text(text) => text,
            Form::Number(number) => number.to_string(),
            Form::Switch(true) => "on".into(),
            Form::Switch(false) => "off".into(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_every_form_become_strings_in_order() {
        let attrs: Attrs = serde_json::from_str(r#"{"path":"/b","queues":4,"direct":true,"a":"x"}"#).unwrap();
        let all: Vec<_> = attrs.iter().collect();
        assert_eq!(all, [("path", "/b"), ("queues", "4"), ("direct", "on"), ("a", "x")]);
        assert_eq!(
            serde_json::to_string(&attrs).unwrap(),
            r#"{"path":"/b","queues":"4","direct":"on","a":"x"}"#
        );
    }

    #[test]
    fn a_name_occurs_once() {
        let error = serde_json::from_str::<Attrs>(r#"{"a":"1","a":"2"}"#).unwrap_err();
        assert!(error.to_string().starts_with("attribute \"a\" is given twice"), "{error}");
        assert!(serde_json::from_str::<Attrs>(r#"{"a":[1]}"#).is_err());
        assert!(serde_json::from_str::<Attrs>(r#"["a"]"#).is_err());
    }

    #[test]
    fn typed_values_name_what_would_be_right() {
        let mut attrs = Attrs::new();
        attrs.insert("direct", "yes").unwrap();
        attrs.insert("queues", "65").unwrap();
        assert_eq!(
            attrs.switch("direct").unwrap_err().to_string(),
            "attribute \"direct\" is \"yes\"; \"on\" or \"off\" is right"
        );
        assert_eq!(attrs.switch("pin"), Ok(None));
        assert_eq!(attrs.number("queues", 1, 65), Ok(Some(65)));
        assert!(attrs.number("queues", 1, 64).is_err());
    }

    #[test]
    fn sizes_take_units() {
        let mut attrs = Attrs::new();
        for (name, value) in [("a", "512M"), ("b", "1GB"), ("c", "17T"), ("d", "99999999T"), ("e", "")] {
            attrs.insert(name, value).unwrap();
        }
        assert_eq!(attrs.size("a", 0, u64::MAX), Ok(Some(512 << 20)));
        assert_eq!(attrs.size("c", 0, u64::MAX), Ok(Some(17 << 40)));
        assert_eq!(attrs.size("none", 0, 1), Ok(None));
        assert!(attrs.size("d", 0, u64::MAX).is_err() && attrs.size("e", 0, u64::MAX).is_err());
        assert!(attrs.size("a", 0, 1 << 20).is_err());
        assert_eq!(
            attrs.size("b", 512, 1 << 30).unwrap_err().to_string(),
            "attribute \"b\" is \"1GB\"; bytes from 512 to 1073741824 are right, as a number or with K, M, G or T (\"512M\")"
        );
    }
}
