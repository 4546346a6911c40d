//! The daemon vdpad and its tool vdpactl.
//!
//! * [`bus`]: the devices by name, and what makes them.
//! * [`front`]: how requests of clients arrive.
//! * [`parent`]: the kinds of devices; `worker` serves their rings.
//! * [`ctl`]: the control interface, HTTP and JSON on a Unix socket, and its client.
//! * [`daemon`]: start, run and stop of the whole daemon.
//! * [`load`]: verified block load by a tenant that replaces itself, for `vdpactl demo`.
#![forbid(unsafe_code)]

pub mod bus;
pub mod ctl;
pub mod daemon;
pub mod front;
pub mod load;
pub mod parent;
mod rate;
mod worker;
