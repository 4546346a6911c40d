//! The control API of vdpad, HTTP and JSON on a Unix socket (docs/control-api.md): the types of its messages, and a client.
//!
//! ```text
//!   vdpactl, curl                            vdpad
//!  +----------------+   control.sock    +-----------------+
//!  | client::Client | ----------------> | HTTP server     | --> the devices
//!  +----------------+    api, config    +-----------------+
//! ```
//!
//! This crate is all that daemon and tool share. [`client`] needs the feature `client`, [`files`] the feature `files`, [`cdi`]
//! the feature `cdi`.
#![forbid(unsafe_code)]

pub mod api;
#[cfg(feature = "cdi")]
pub mod cdi;
#[cfg(feature = "client")]
pub mod client;
pub mod config;
#[cfg(feature = "files")]
pub mod files;
mod front;

pub use front::Front;

/// Environment variable with the path of the control socket, for daemon and tool; their option `--socket` overrides it.
pub const SOCKET_ENV: &str = "VDPAD_SOCKET";

/// Default path of the control socket.
pub const DEFAULT_SOCKET: &str = "/run/vdpad/control.sock";
