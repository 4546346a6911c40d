//! Front ends: how clients reach devices.

pub mod fuse;
pub mod vhost;
pub mod watchdog;
