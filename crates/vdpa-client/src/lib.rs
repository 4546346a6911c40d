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
//! | [`dma`] | memory the device can reach |
//! | [`queue`] | the driver side of one virtqueue |
//! | [`update`] | being replaced: strategies, exec, restore, timings |
//! | [`state`] | the format of saved state |
//!
//! A program that survives its own replacement:
//!
//! ```no_run
//! use vdpa_client::device::Device;
//! use vdpa_client::state::Section;
//! use vdpa_client::update::{self, Plan};
//! use vdpa_core::features::Features;
//! use vdpa_sys::vhost_vdpa::VhostVdpaFd;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let session = match update::restore::<VhostVdpaFd>()? {
//!     // A new image: requests are in flight and the device may be serving them at this moment.
//!     Some(restored) => restored.session,
//!     // A first start.
//!     None => {
//!         let device = Device::<VhostVdpaFd>::open("/run/vdpa/dev/vdpa0")?;
//!         device.negotiate(Features::of(&[Features::BLK_FLUSH]))?
//!     }
//! };
//! // ... and later, when a new binary is there:
//! let plan = Plan::new("/proc/self/exe").section(Section::new("my-program", 1, b"my own state".to_vec()));
//! let failed = update::exec(session, plan);
//! // Only a failure comes back; the session in it works as before.
//! eprintln!("not updated: {}", failed.error);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod device;
pub mod dma;
pub mod error;
pub mod queue;
pub mod session;
pub mod state;
pub mod update;

pub use device::{Device, DeviceFile};
pub use error::Error;
pub use session::Session;
