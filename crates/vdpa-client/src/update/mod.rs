//! Being replaced by another program image without losing the device.
//!
//! # Guarantees
//!
//! 1. **No request is lost, damaged or answered twice.** The driver side of every ring is carried over with
//!    the requests in flight. With [`Strategy::Live`] the device completes them while no driver exists; with
//!    the others it stands still at a place both sides agree on.
//! 2. **Mappings and pinned pages stay** (all strategies but [`Strategy::Reopen`]): the cost depends on the
//!    number of mappings, never on the number of pages.
//! 3. **A failed update leaves a working program.** Everything that can be checked is checked before the
//!    device is touched. When anything fails before the new image runs, execve included, the steps taken are
//!    undone and [`exec`](exec()) returns the session with the error. When the new image cannot restore, it gets an
//!    error that says what is wrong; the device then still has its mappings, since nothing was unmapped.
//!
//! # Sequences
//!
//! | strategy | old image | new image |
//! |---|---|---|
//! | live | exec | NEW_OWNER |
//! | resume | SUSPEND, exec | NEW_OWNER, REMAP each, RESUME |
//! | reset | SUSPEND, bases, reset, exec | NEW_OWNER, features, vrings, REMAP each, DRIVER_OK |
//! | reopen | SUSPEND, bases, close, exec | open, SET_OWNER, features, UPDATE each, vrings, DRIVER_OK |
//!
//! REMAP is sent where the device offers IOTLB_REMAP: such a device uses addresses of its owner.
//!
//! # What the caller does
//!
//! Nothing may be driving the session while it is handed to [`exec`](exec()), and no other thread should be in
//! the middle of anything: execve ends them where they are. State of the caller travels as named sections,
//! its open files with [`Plan::keep`].

mod exec;
mod report;
mod restore;
mod steps;
mod strategy;

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};

pub use self::exec::{Failed, Plan, exec};
pub use self::report::Report;
#[cfg(fuzzing)]
pub use self::restore::fuzzing;
pub use self::restore::{Restored, restore, restore_from};
pub use self::strategy::{Strategy, UnknownStrategy, Unsupported};
use crate::error::Error as SessionError;
use crate::state::StateError;

/// Environment variable with the number of the descriptor that holds the saved state.
pub const STATE_VARIABLE: &str = "VDPA_LIVE_STATE";

/// Environment variable with the process id that [`STATE_VARIABLE`] is meant for. An exec keeps it; children that
/// inherit the variables find that they are not meant.
pub const PID_VARIABLE: &str = "VDPA_LIVE_PID";

/// The step at which an update failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum Phase {
    /// Before anything was touched.
    #[error("check")]
    Check,
    /// Bringing the device to rest.
    #[error("suspend")]
    Suspend,
    /// Writing the state.
    #[error("save")]
    Save,
    /// Replacing the program.
    #[error("exec")]
    Exec,
    /// Reading the state, mapping the memory.
    #[error("load")]
    Load,
    /// Becoming the owner.
    #[error("new owner")]
    NewOwner,
    /// Telling the device the new addresses.
    #[error("remap")]
    Remap,
    /// Setting up the vrings again.
    #[error("vrings")]
    Vrings,
    /// Letting the device run.
    #[error("resume")]
    Resume,
}

/// An update failed.
#[derive(Debug, Error)]
#[error("update failed in phase {phase}")]
pub struct UpdateError {
    /// Where.
    pub phase: Phase,
    /// Why.
    pub source: Cause,
}

impl UpdateError {
    pub(crate) fn at<C: Into<Cause>>(phase: Phase) -> impl Fn(C) -> Self {
        move |cause| Self { phase, source: cause.into() }
    }
}

/// Why an update failed.
#[derive(Debug, Error)]
pub enum Cause {
    /// The device cannot do what was asked for.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The device answered with an error, or memory could not be mapped.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The state cannot be encoded or decoded.
    #[error(transparent)]
    State(#[from] StateError),
    /// Memory that ends with this address space.
    #[error(
        "region \"{name}\" is memory of the caller without a memory object: it ends with this program. \
         Map it from a memfd (Backing::Object) to update by exec"
    )]
    PrivateMemory {
        /// Name of the region.
        name: String,
    },
    /// There is no program to exec.
    #[error("the new image {} cannot be run", path.display())]
    Image {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An argument or variable with a NUL byte.
    #[error("the {what} of the new image contains a NUL byte")]
    Nul {
        /// `path`, `argument` or `environment`.
        what: &'static str,
    },
    /// Requests in flight on a device that cannot come to rest.
    #[error(
        "{in_flight} requests are in flight and the device does not offer SUSPEND (bit 4): wait for them \
         before updating with strategy reopen"
    )]
    InFlight {
        /// How many.
        in_flight: usize,
    },
    /// The device was opened by somebody else.
    #[error("strategy reopen needs the path of the device; say it with Device::at")]
    NoPath,
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// The error.
        source: Errno,
    },
    /// The saved state cannot be found or read.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    /// Saved state that contradicts itself or this process.
    #[error("saved {what} cannot be restored: {reason}")]
    Invalid {
        /// Which part.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The present device lacks features that the old image had negotiated.
    #[error("the device offers features {present}, but the saved session uses {saved}")]
    Features {
        /// Negotiated by the old image.
        saved: Features,
        /// Offered now.
        present: Features,
    },
    /// The same for backend features.
    #[error("the device offers backend features {present}, but the saved session uses {saved}")]
    BackendFeatures {
        /// Acknowledged by the old image.
        saved: BackendFeatures,
        /// Offered now.
        present: BackendFeatures,
    },
}

/// What is wrong with the descriptor that [`STATE_VARIABLE`] names.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// Not a number.
    #[error("{STATE_VARIABLE} is \"{value}\", not the number of a descriptor")]
    NotANumber {
        /// Its value.
        value: String,
    },
    /// No such descriptor was inherited.
    #[error("descriptor {number}, named by {STATE_VARIABLE}, was not inherited")]
    NotInherited {
        /// Its number.
        number: i32,
        /// The reason.
        source: Errno,
    },
    /// Something else than a memfd.
    #[error("descriptor {number}, named by {STATE_VARIABLE}, is not a memfd")]
    NotMemfd {
        /// Its number.
        number: i32,
    },
    /// It could still be changed by somebody else.
    #[error("the memfd with the saved state (descriptor {number}) is not sealed")]
    NotSealed {
        /// Its number.
        number: i32,
    },
    /// Reading failed.
    #[error("the memfd with the saved state (descriptor {number}) cannot be read: {reason}")]
    Unreadable {
        /// Its number.
        number: i32,
        /// Why.
        reason: String,
    },
}
