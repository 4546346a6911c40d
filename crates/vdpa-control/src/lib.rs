//! The control API of vdpad: the types that its HTTP interface on a Unix socket carries as JSON (docs/control-api.md),
//! and a client of it.
//!
//! ```text
//!   vdpactl, curl                            vdpad
//!  +----------------+   control.sock    +-----------------+
//!  | client::Client | ----------------> | HTTP server     | --> the devices
//!  +----------------+    api, config    +-----------------+
//! ```
//!
//! Daemon and tool share this crate and nothing else. [`client`] needs the feature of that name.
#![forbid(unsafe_code)]

pub mod api;
#[cfg(feature = "client")]
pub mod client;
pub mod config;
mod front;

pub use front::Front;

/// Where vdpad listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vdpad/control.sock";
