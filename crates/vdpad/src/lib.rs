//! The daemon vdpad and its tool vdpactl.
//!
//! * [`load`]: verified block load by a tenant that updates itself, for `vdpactl demo` and `vdpactl bench io`.
#![forbid(unsafe_code)]

pub mod load;
