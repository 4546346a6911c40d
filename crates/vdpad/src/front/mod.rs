//! Front ends: how clients reach devices.

use std::str::FromStr;

pub mod fuse;
mod lifeline;
pub mod vhost;
pub mod watchdog;

/// Which kind of device files to serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Character devices where they can be made, else files.
    #[default]
    Auto,
    /// Files of a FUSE mount.
    Fuse,
    /// Character devices.
    Cuse,
}

impl FromStr for Choice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "fuse" => Ok(Self::Fuse),
            "cuse" => Ok(Self::Cuse),
            _ => Err("\"auto\", \"fuse\" or \"cuse\" is right"),
        }
    }
}
