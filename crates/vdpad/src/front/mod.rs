//! Front ends: how clients reach devices.

pub mod fuse;
pub mod watchdog;
