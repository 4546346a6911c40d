//! The control interface: HTTP and JSON on a Unix socket (docs/control-api.md).
//!
//! ```text
//!   vdpactl, curl                            vdpad
//!  +---------------+   control.sock    +------------------+
//!  | client::Client| ----------------> | server::Server   | --> dyn api::Backend (the bus)
//!  +---------------+  api types, JSON  +------------------+
//! ```

pub mod api;
pub mod client;
pub mod config;
pub mod server;

/// Where vdpad listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vdpad/control.sock";
