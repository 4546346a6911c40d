//! [`NewSize`]: what a disk is to have.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::parse_size;

/// The new size of a disk. In JSON `"auto"`, a number of bytes, or a string with such a number, also with K, M, G or T.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub enum NewSize {
    /// What the file or block device behind it has.
    Auto,
    /// This number of bytes.
    Bytes(u64),
}

impl std::str::FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            text => parse_size(text).map(Self::Bytes).ok_or_else(|| {
                format!(
                    "size is \"{text}\": \"auto\" or a number of bytes is right, also with K, M, G or T (\"512M\")"
                )
            }),
        }
    }
}

impl fmt::Display for NewSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Bytes(bytes) => bytes.fmt(f),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "a size must be a string or a number")]
enum Form {
    Bytes(u64),
    Text(String),
}

impl TryFrom<Form> for NewSize {
    type Error = String;

    fn try_from(form: Form) -> Result<Self, String> {
        match form {
            Form::Bytes(bytes) => Ok(Self::Bytes(bytes)),
            Form::Text(text) => text.parse(),
        }
    }
}

impl From<NewSize> for Form {
    fn from(size: NewSize) -> Self {
        match size {
            NewSize::Auto => Self::Text("auto".into()),
            NewSize::Bytes(bytes) => Self::Bytes(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_one_is_written() {
        for (json, size, written) in [
            (r#""auto""#, NewSize::Auto, r#""auto""#),
            ("1048576", NewSize::Bytes(1 << 20), "1048576"),
            (r#""1M""#, NewSize::Bytes(1 << 20), "1048576"),
        ] {
            assert_eq!(serde_json::from_str::<NewSize>(json).unwrap(), size);
            assert_eq!(serde_json::to_string(&size).unwrap(), written);
        }
        let error = serde_json::from_str::<NewSize>(r#""large""#).unwrap_err().to_string();
        assert!(error.contains("\"auto\" or a number of bytes is right"), "{error}");
        assert!(serde_json::from_str::<NewSize>("-1").is_err());
    }
}
