//! Front ends: how clients reach devices.

pub mod fuse;
mod lifeline;
pub mod vhost;
pub mod watchdog;
