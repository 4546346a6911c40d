//! The daemon vdpad and its tool vdpactl.
#![forbid(unsafe_code)]

pub mod front;
