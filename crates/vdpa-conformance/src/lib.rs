//! Conformance suite for vhost-vdpa devices: those of the kernel, of `vdpad` and of any other implementation.
//!
//! A [`Case`] checks one statement of the interface specification. Each case opens the device again: a device file, or a
//! [`LocalDevice`] in this process. The suite probes the device for what a case needs (features, backend bits, device class,
//! number of queues) and never derives it from a kernel version. [`run`](runner::run) executes cases and compares the
//! outcomes with the [`Expectations`](expect::Expectations) for the device, which give a reason for each deviation.
//!
//! A second list of cases has the kernel's VDUSE as its subject: [`cases::vduse`].
//!
//! The suite resets the device and becomes its owner, so nothing else may use the device meanwhile.
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
mod vduse;
mod vstats;

pub use case::{Case, Ctx, Need, Outcome, Resources, Stop};
pub use device::{Device, Target};
pub use inprocess::LocalDevice;
pub use probe::{Probe, ProbeError};
pub use request::Request;
pub use vduse::Bus;
pub use vstats::Vstats;
