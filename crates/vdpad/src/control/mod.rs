//! The server of the control API: HTTP and JSON on a Unix socket (docs/control-api.md). The types are in [`vdpa_control`].
//!
//! ```text
//!  control.sock --> Server --> dyn Backend (the bus)
//! ```

mod backend;
mod metrics;
mod server;

pub use backend::Backend;
pub use server::{
    Access, BindError, ControlSocket, Limits, MetricsSocket, Paused, Pauser, Server, StartError,
};
