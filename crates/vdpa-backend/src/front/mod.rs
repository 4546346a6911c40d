//! Front ends: how clients reach devices.
//!
//! [`fuse`] makes device files and passes the system calls on them to a [`DeviceFile`](fuse::DeviceFile); [`vhost`] has the
//! `DeviceFile` that implements vhost-vdpa; [`vduse`] serves devices to the kernel itself; [`watchdog`] is a second process
//! that frees the clients of a program that has stopped.

pub mod fuse;
pub mod vduse;
pub mod vhost;
pub mod watchdog;
