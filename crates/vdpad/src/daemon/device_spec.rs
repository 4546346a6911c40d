//! The value of `--dev`: a device on the command line.

use vdpa_control::api::{AddRequest, AttrError, Attrs};

/// Why the value of `--dev` is not a device specification.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSpecError {
    /// A field without an equals sign.
    #[error("\"{field}\" is not of the form name=value")]
    NotAPair {
        /// The field.
        field: String,
    },
    /// `name` or `mgmtdev` is missing.
    #[error("\"{key}\" is missing; name=NAME mgmtdev=MGMTDEV are needed")]
    Missing {
        /// The missing one.
        key: &'static str,
    },
    /// An attribute occurs twice.
    #[error(transparent)]
    Attr(#[from] AttrError),
}

/// Parses a device specification: `name=NAME mgmtdev=MGMTDEV attribute=value ...`.
///
/// Fields are separated by white space. A value that contains white space can only be given over the control socket.
///
/// # Errors
/// [`DeviceSpecError`].
pub fn parse_device_spec(text: &str) -> Result<AddRequest, DeviceSpecError> {
    let (mut name, mut mgmtdev) = (None, None);
    let mut attrs = Attrs::new();
    for field in text.split_whitespace() {
        let (key, value) =
            field.split_once('=').ok_or_else(|| DeviceSpecError::NotAPair { field: field.into() })?;
        let slot = match key {
            "name" => &mut name,
            "mgmtdev" => &mut mgmtdev,
            _ => {
                attrs.insert(key, value)?;
                continue;
            }
        };
        if slot.replace(value.to_owned()).is_some() {
            return Err(AttrError::Twice { name: key.into() }.into());
        }
    }
    let required = |slot: Option<String>, key| {
        slot.filter(|value| !value.is_empty()).ok_or(DeviceSpecError::Missing { key })
    };
    // Of the directory in which the daemon is started.
    if let Ok(directory) = std::env::current_dir() {
        attrs.resolve_paths(&directory);
    }
    Ok(AddRequest { name: required(name, "name")?, mgmtdev: required(mgmtdev, "mgmtdev")?, attrs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_specifications_are_parsed() {
        let device = parse_device_spec("name=d0  mgmtdev=blk path=/a=b direct=on").unwrap();
        assert_eq!((device.name.as_str(), device.mgmtdev.as_str()), ("d0", "blk"));
        assert_eq!(device.attrs.iter().collect::<Vec<_>>(), [("path", "/a=b"), ("direct", "on")]);
    }

    #[test]
    fn errors_of_device_specifications_name_the_field() {
        let text = |text| parse_device_spec(text).unwrap_err().to_string();
        assert!(text("name=d0").starts_with("\"mgmtdev\" is missing"));
        assert!(text("name= mgmtdev=blk").starts_with("\"name\" is missing"));
        assert_eq!(text("name=d0 readonly"), "\"readonly\" is not of the form name=value");
        assert!(text("name=a name=b").contains("given twice"));
        assert!(text("name=a mgmtdev=b x=1 x=2").contains("given twice"));
    }
}
