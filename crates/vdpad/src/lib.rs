//! The daemon vdpad: its devices, the bus that names them, and its control interface.
//!
//! | module | what it does |
//! |---|---|
//! | [`daemon`] | start, run and stop of the whole daemon |
//! | [`bus`] | the devices by name, and what makes them |
//! | `devices` | the kinds of devices, on `vdpa-backend` |
//! | `block` | what the block devices share: requests, their operations, and the bytes of the disk they claim |
//! | [`control`] | the control interface, HTTP and JSON on a Unix socket |
#![forbid(unsafe_code)]

mod block;
pub mod bus;
pub mod control;
pub mod daemon;
mod devices;
