//! The daemon vdpad and its tool vdpactl.
//!
//! * [`front`]: how requests of clients arrive.
//! * [`ctl`]: the control interface, HTTP and JSON on a Unix socket, and its client.
//! * [`daemon`]: start, run and stop of the whole daemon.
//! * [`load`]: verified block load by a tenant that replaces itself, for `vdpactl demo`.
#![forbid(unsafe_code)]

pub mod ctl;
pub mod daemon;
pub mod front;
pub mod load;
