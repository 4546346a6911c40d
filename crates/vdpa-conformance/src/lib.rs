//! Conformance suite for vhost-vdpa devices: the kernel's, those of `vdpad`, anyone's.
//!
//! A [`Case`] checks one statement of the interface specification on a device that it opens afresh: a device file, or
//! a [`LocalDevice`] without one. What it
//! needs from the device (features, backend bits, device class, number of queues) is probed, never derived from
//! a kernel version. [`run`](runner::run) executes cases and compares the outcomes with the
//! [`Expectations`](expect::Expectations) for the device, where each deviation has its reason.
//!
//! The suite resets the device and takes its ownership: it must have the device for itself.
#![forbid(unsafe_code)]

mod blk_driver;
mod case;
pub mod cases;
pub mod child;
mod device;
pub mod expect;
mod forked;
mod inprocess;
pub mod matrix;
mod memory;
mod net_driver;
mod probe;
pub mod report;
mod request;
mod ring;
pub mod runner;
mod vstats;

pub use case::{Case, Ctx, Need, Outcome, Resources, Stop};
pub use device::{Device, Target};
pub use inprocess::LocalDevice;
pub use probe::{Probe, ProbeError};
pub use request::Request;
pub use vstats::Vstats;
