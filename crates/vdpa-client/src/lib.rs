//! Drive a vhost-vdpa device, and be replaced without closing it.
//!
//! A program that uses a vDPA device for DMA can be upgraded while requests are in flight: it saves its state,
//! execs its new image, and the new image takes the device over with every mapping and every pinned page in
//! place.
//!
//! | module | what it is for |
//! |---|---|
//! | [`device`] | opening a device and negotiating with it |
//! | [`session`] | a negotiated device with its memory and queues |
//! | [`memory`], [`dma`] | memory, and the parts of it that a device can reach |
//! | [`queue`] | a virtqueue that this program drives |
//! | [`vring`] | a virtqueue that a guest drives |
//! | [`inprocess`] | devices of this process that can be updated like files: for examples and tests |
//! | [`update`] | being replaced: ways, strategies, roll-back, timings |
//! | [`migrate`] | moving a machine and its device to another host |
//! | [`state`] | the format of saved state |
//! | [`features`], [`types`], [`ops`], [`vq`], [`ring`], [`blk`], [`net`] | from `vdpa-core`: everything of it that a signature here names, and the requests of disks and networks |
//! | [`eventfd`], [`memfd`], [`mmap`], [`vhost_vdpa`], [`process`] | from `vdpa-sys`, likewise |
//!
//! So one line in a Cargo.toml is enough. Features: `vm-memory` for guest memory of that crate, `vmm-sys-util` for its eventfds.
//!
//! A program that survives its own replacement:
//!
//! ```no_run
//! use vdpa_client::device::Device;
//! use vdpa_client::features::Features;
//! use vdpa_client::state::{Section, Sections};
//! use vdpa_client::update::{self, Devices, Image, Plan, Via};
//! use vdpa_client::vhost_vdpa::VhostVdpaFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut devices = match update::restore::<VhostVdpaFd>()? {
//!     // A new image: requests are in flight and the device may be serving them at this moment.
//!     Some(restored) => restored.devices,
//!     // A first start.
//!     None => {
//!         let device = Device::<VhostVdpaFd>::open("/run/vdpad/dev/vhost-vdpa-0")?;
//!         Devices::one("disk", device.negotiate(Features::of(&[Features::BLK_FLUSH]))?)
//!     }
//! };
//! // ... and later, when a new binary is there. The devices are driven all through prepare:
//! let plan = Plan::new().section(Section::new("my-program", 1, b"my own state".to_vec()));
//! let prepared = plan.prepare(&devices, Via::Exec(Image::new("/usr/bin/my-program")))?;
//! // Now nobody drives them for the time of an exec.
//! devices = match prepared.switch(devices, Sections::new()) {
//!     // By fork or by hand-over: another process has them. An exec does not come back with success.
//!     Ok(_) => return Ok(()),
//!     Err(failed) => {
//!         eprintln!("not updated: {}", failed.error);
//!         failed.devices // They work as before.
//!     }
//! };
//! # drop(devices);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod device;
pub mod dma;
pub mod error;
#[cfg(feature = "vm-memory")]
mod guest;
pub mod inprocess;
pub mod memory;
pub mod migrate;
pub mod queue;
pub mod session;
pub mod state;
pub mod update;
pub mod vring;

pub use device::{Device, DeviceFile};
pub use error::Error;
pub use session::Session;
pub use vdpa_core::{Errno, blk, features, net, ops, ring, types, vq};
pub use vdpa_sys::uapi::report::UpdateReport;
pub use vdpa_sys::{eventfd, memfd, mmap, process, vhost_vdpa};
