//! The daemon vdpad: its devices, the bus that creates and finds them, and its control API.
//!
//! | module | what it does |
//! |---|---|
//! | [`daemon`] | start, run and stop of the daemon |
//! | [`bus`] | the devices by name: create, find, query, delete |
//! | `devices` | the kinds of devices, built on `vdpa-backend` |
//! | `block` | what the block devices share: requests, their I/O operations, and locks on ranges of the disk |
//! | [`keeper`] | the process that has a device of somebody else open, and makes the requests on it |
//! | [`rights`] | running as another user than root, with a few capabilities |
//! | [`seccomp`] | the system calls that the daemon may make |
//! | [`control`] | the server of the control API, HTTP and JSON on a Unix socket |
//! | `vdpa_bus` | the kernel's vdpa bus, on which devices of VDUSE are |
//! | `crash_points` | for tests only, with the feature of that name: a daemon that ends at a chosen point |
#![forbid(unsafe_code)]

mod block;
pub mod bus;
pub mod control;
#[cfg(feature = "crash-points")]
pub mod crash_points;
pub mod daemon;
mod devices;
mod failed;
pub mod given_mount;
pub mod keeper;
pub mod rights;
pub mod seccomp;
pub mod survival;
mod vdpa_bus;
