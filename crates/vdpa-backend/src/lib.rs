//! To write a vDPA device in user space.
//!
//! A device made with this crate is a vhost-vdpa device file, which QEMU, libblkio, DPDK, cloud-hypervisor and the kernel's
//! own tests drive as they drive `/dev/vhost-vdpa-0` of Linux. The crate brings everything but the device: the file (by
//! FUSE, or CUSE as a character device), status and feature negotiation, owners and their replacement, the IOTLB, client
//! memory, split and packed rings, worker threads with io_uring. It knows no device type.
//!
//! # A device
//!
//! A device that answers each request at once implements [`RequestHandler`]. This one is complete: an entropy source
//! (virtio 1.2 section 5.4), whose one queue takes buffers and fills them.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use vdpa_backend::{Outcome, Request, RequestHandler, Service};
//! use vdpa_core::features::Features;
//! use vdpa_core::parent::Profile;
//! use vdpa_core::ring::Fault;
//!
//! struct Rng;
//!
//! impl RequestHandler for Rng {
//!     fn handle(&mut self, _queue: u16, request: &Request<'_>) -> Result<Outcome, Fault> {
//!         let random = [4; 16]; // chosen by a fair die
//!         let fits = request.writable().write(request.memory(), &random)?;
//!         Ok(Outcome::Done(if fits { 16 } else { 0 }))
//!     }
//! }
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let service = Service::mount(Path::new("/run/rng"))?;
//!     let path = service.add("rng0", Profile::on_objects(4, Features::NONE, 1), &[], Rng)?;
//!     println!("{}", path.display());
//!     Ok(service.run()?)
//! }
//! ```
//!
//! `examples/ram_disk.rs` is a disk, and docs/writing-a-device.md of the repository builds it step by step.
//!
//! # What to implement
//!
//! | the device | implements | is made by |
//! |---|---|---|
//! | answers each request at once | [`RequestHandler`] | [`Service::add`], or [`SimpleDevice`] |
//! | waits for files, sockets or timers between request and answer | [`QueueHandler`](worker::QueueHandler), which submits io_uring operations; and [`Parent`](vdpa_core::parent::Parent) | [`WorkerPool::add`](worker::WorkerPool::add), [`Service::add_parent`] |
//! | has no rings to serve: hardware, or another program, does it | [`Parent`](vdpa_core::parent::Parent) | [`Service::add_parent`] |
//!
//! # Threads
//!
//! | thread | what it calls | may the called code block? |
//! |---|---|---|
//! | reader, one per program | nothing of a device | |
//! | one per open device file, under the device's lock | [`Parent`](vdpa_core::parent::Parent), one request of the client after the other | yes: only that client waits. After the request time-out (30 s) it gets `EIO` |
//! | worker, each for many devices | [`RequestHandler`], [`QueueHandler`](worker::QueueHandler) | no: all devices of the thread wait |
//!
//! The two sides of a device share nothing but what its author lets them share. The control side, a
//! [`QueueControl`](worker::QueueControl), sends commands to the worker thread and waits for the reply. So these hold for
//! every device, and no device has to do anything for them:
//!
//! - A queue that was stopped (SUSPEND, reset, GET_VRING_BASE) touches no client memory, and has no used element and no
//!   interrupt pending, when the client's request returns.
//! - A mapping that was removed is not used by any request when the removal returns.
//! - A client can be replaced by another process while requests are in flight (`VHOST_NEW_OWNER`).
//!
//! # Client memory
//!
//! Clients are not trusted. A [`MemoryView`](worker::MemoryView) translates I/O virtual addresses by the mappings that the
//! client has made; an address that is not mapped is a [`Fault`](vdpa_core::ring::Fault), never a crash, also when the
//! client truncates the file behind its memory. The client can change bytes while they are read: read what decides something
//! once, then check it, then use it.
//!
//! # Features and limits
//!
//! - `INDIRECT_DESC`, `EVENT_IDX`, `RING_PACKED` and `IN_ORDER` are served by the crate for every device that offers them
//!   in its [`Profile`](vdpa_core::parent::Profile).
//! - The files need `/dev/fuse` and the right to mount; an ordinary user gets both in a user namespace of their own
//!   ([`vdpa_sys::userns`]).
//! - There is no unsafe code in this crate, and none is needed in a device.
#![forbid(unsafe_code)]

pub mod device;
pub mod front;
mod methods;
pub mod persist;
mod rate;
pub mod service;
mod suspect;
pub mod worker;

pub use device::{Outcome, Request, RequestHandler, SimpleDevice};
pub use service::{Service, ServiceError};

/// What [`queue_methods!`] names.
#[doc(hidden)]
pub mod exports {
    pub use vdpa_core::types::{QueueIndex, Result};
    pub use vdpa_core::vq::{QueueSetup, QueueState};
    pub use vdpa_sys::eventfd::EventFd;
    pub use vdpa_sys::guest::LinuxHost;
}
