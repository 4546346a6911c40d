//! [`Front`]: the kind of device files that the daemon serves.

use std::str::FromStr;

/// Which kind of device files the daemon serves (`vdpad --front`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Front {
    /// Character devices where they can be made, else files.
    #[default]
    Auto,
    /// Files of a FUSE mount.
    Fuse,
    /// Character devices, by CUSE.
    Cuse,
    /// None for devices that the kernel can have, by VDUSE, which it gets; files for others.
    Vduse,
}

impl FromStr for Front {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "fuse" => Ok(Self::Fuse),
            "cuse" => Ok(Self::Cuse),
            "vduse" => Ok(Self::Vduse),
            _ => Err("\"auto\", \"fuse\", \"cuse\" or \"vduse\" is right"),
        }
    }
}
