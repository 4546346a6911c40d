//! [`Server`]: the control interface on its socket.
use std::time::Duration;

/// What a request may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time for the backend to answer.
    pub backend: Duration,
}
