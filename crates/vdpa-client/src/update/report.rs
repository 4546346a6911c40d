//! What an update cost.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Strategy;

/// The time of every phase of one update, in ns; 0 for a phase that the strategy does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The strategy used.
    pub strategy: Strategy,
    /// SUSPEND, and for `reset` reading the vring bases and resetting, for `reopen` the close.
    pub suspend: u64,
    /// Collecting the state.
    pub save: u64,
    /// Sealing the state, execve, start of the new image up to the entry of
    /// [`restore`](super::restore()). `CLOCK_MONOTONIC` goes on over an exec, so this is one measurement.
    pub exec: u64,
    /// Reading and checking the state, mapping memory into the new address space.
    pub load: u64,
    /// NEW_OWNER; for `reopen` open, SET_OWNER and negotiation.
    pub new_owner: u64,
    /// REMAP of each mapping, or UPDATE of each for `reopen`.
    pub remap: u64,
    /// Setting up the vrings again.
    pub vrings: u64,
    /// RESUME or DRIVER_OK.
    pub resume: u64,
    /// Mappings the session has.
    pub mappings: u64,
}

impl Report {
    /// A report in which nothing has taken any time yet.
    #[must_use]
    pub const fn new(strategy: Strategy) -> Self {
        Self {
            strategy,
            suspend: 0,
            save: 0,
            exec: 0,
            load: 0,
            new_owner: 0,
            remap: 0,
            vrings: 0,
            resume: 0,
            mappings: 0,
        }
    }

    /// All phases by name, in the order in which they happen, in ns.
    #[must_use]
    pub const fn phases(&self) -> [(&'static str, u64); 8] {
        [
            ("suspend", self.suspend),
            ("save", self.save),
            ("exec", self.exec),
            ("load", self.load),
            ("new_owner", self.new_owner),
            ("remap", self.remap),
            ("vrings", self.vrings),
            ("resume", self.resume),
        ]
    }

    /// The sum of all phases: how long no driver was there.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.phases().iter().fold(0, |sum, (_, ns)| sum.saturating_add(*ns)))
    }
}
