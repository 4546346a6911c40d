//! Being replaced by another program without losing the device.
//!
//! # Guarantees
//!
//! 1. **No request is lost, damaged or answered twice.** The driver side of every ring is carried over with
//!    the requests in flight. With [`Strategy::Live`] the device completes them while no driver exists; with
//!    the others it stands still at a place both sides agree on.
//! 2. **Mappings and pinned pages stay** (all strategies but [`Strategy::Reopen`]): the cost depends on the
//!    number of mappings, never on the number of pages.
//! 3. **A failed update leaves a working program.** Everything that can be checked is checked before a
//!    device is touched. When anything fails before the new program has the devices, the steps taken are undone and
//!    [`Prepared::switch`] returns the sessions with the error. When a new image cannot restore after an exec, it gets an
//!    error that says what is wrong, and the devices are closed with it: nobody has half of one.
//! 4. **One process has a device.** In a hand-over the predecessor decides, up to its commit. It lets go when the successor
//!    has heard that; a successor that has ended without hearing it does not get the devices. When it has let go, it has
//!    nothing left by which it could reach a device. A predecessor that dies after it has sent the complete state has
//!    decided by that: the successor takes over.
//!
//! # Ways
//!
//! | way | who has the devices afterwards | no driver is there for |
//! |---|---|---|
//! | [`Via::Exec`] | the new image in this process | an execve and the start of a program |
//! | [`Via::Fork`] | a child that was started before | two messages |
//! | [`Via::HandOver`] | a process that ran already | two messages |
//!
//! # Strategies
//!
//! | strategy | predecessor | successor |
//! |---|---|---|
//! | live | | NEW_OWNER |
//! | resume | SUSPEND | NEW_OWNER, REMAP each, RESUME |
//! | reset | SUSPEND, bases, reset | NEW_OWNER, features, vrings, REMAP each, DRIVER_OK |
//! | reopen | SUSPEND, bases, close | open, SET_OWNER, features, UPDATE each, vrings, DRIVER_OK |
//!
//! REMAP is sent where the device offers IOTLB_REMAP: such a device uses addresses of its owner.
//!
//! # Phases
//!
//! [`Plan::describe`] looks at the sessions; [`Described::prepare`] may take its time, on another thread if the devices
//! have to be driven meanwhile ([`Plan::prepare`] does both). [`Prepared::switch`] is short, and has a
//! deadline. What comes after, [`Incoming::take_over`] does in the successor. Nothing may be driving the sessions while
//! they are in [`Prepared::switch`]. For an exec no other thread should be in the middle of anything: execve ends them
//! where they are.

pub mod checkpoint;
mod connection;
mod devices;
mod incoming;
mod keeper;
mod leave;
mod load;
mod plan;
mod predecessor;
mod prepared;
mod report;
mod rest;
mod same;
mod save;
mod steps;
mod strategy;
mod successor;
mod taking;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};

pub use self::connection::{Cancel, ConnectionError};
pub use self::devices::{Devices, Iter};
pub use self::incoming::{Incoming, Restored, incoming, restore};
pub use self::plan::{DEADLINE, GRACE, Image, Plan, UnknownWay, Via, Way};
pub use self::prepared::{Completed, Described, Failed, Prepared};
pub use self::report::{DeviceReport, Report};
pub use self::strategy::{Strategy, UnknownStrategy, Unsupported};
use crate::error::{Error as SessionError, MemoryProblem};
use crate::state::StateError;

/// Environment variable with the number of the descriptor that holds the saved state.
pub const STATE_VARIABLE: &str = "VDPA_LIVE_STATE";

/// Environment variable with the process id that [`STATE_VARIABLE`] is meant for. An exec keeps it; children that
/// inherit the variables find that they are not meant.
pub const PID_VARIABLE: &str = "VDPA_LIVE_PID";

/// Environment variable with the number of the socket on which the predecessor of a fork offers the devices, and its inode,
/// by which processes for which it is not meant notice.
pub const SOCKET_VARIABLE: &str = "VDPA_LIVE_SOCKET";

/// The step at which an update failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Before anything was touched.
    #[error("prepare")]
    Prepare,
    /// Bringing the device to rest.
    #[error("suspend")]
    Suspend,
    /// Writing the state.
    #[error("save")]
    Save,
    /// Replacing the program, or telling the successor.
    #[error("transfer")]
    Transfer,
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
    /// Agreeing that it is done.
    #[error("commit")]
    Commit,
}

/// An update failed.
#[derive(Debug, Error)]
#[error("update failed in phase {phase}{}", of_device(.device.as_deref()))]
pub struct UpdateError {
    /// Where.
    pub phase: Phase,
    /// With which device, if it was one.
    pub device: Option<String>,
    /// Why.
    pub source: Cause,
}

fn of_device(device: Option<&str>) -> String {
    device.map_or_else(String::new, |name| format!(" of device {name}"))
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
    /// Memory that the next program would not find the same.
    #[error("region \"{name}\" {problem}")]
    Memory {
        /// Name of the region.
        name: String,
        /// What is wrong with it.
        problem: MemoryProblem,
    },
    /// A name that must be unique is not.
    #[error("there are two of {what} \"{name}\"; names must be unique in an update")]
    DuplicateName {
        /// `device`, `section` or `descriptor`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A strategy for a device that is not there.
    #[error("a strategy is given for device \"{name}\"; there are: {present}")]
    UnknownDevice {
        /// The name given.
        name: String,
        /// Those there are.
        present: String,
    },
    /// A descriptor of the caller could not be copied.
    #[error("descriptor \"{name}\" cannot be copied")]
    Descriptor {
        /// Its name.
        name: String,
        /// Why not.
        source: Errno,
    },
    /// A section given at the switch is not as it was announced.
    #[error("section \"{name}\" {problem}")]
    Late {
        /// Its name.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The devices are not those that were prepared.
    #[error("the session {problem} since the update was prepared; prepare again")]
    Changed {
        /// What is different.
        problem: &'static str,
    },
    /// The deadline of the switch is over.
    #[error("the deadline of the switch was over before the successor could begin")]
    Deadline,
    /// The other process cannot be talked to.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The successor does not want the devices or could not take them.
    #[error("the successor (process {pid}) failed in phase {phase}{}: {reason}", of_device(.device.as_deref()))]
    Successor {
        /// Its process id.
        pid: i32,
        /// Where it failed.
        phase: Phase,
        /// With which device, if it was one.
        device: Option<String>,
        /// What it said.
        reason: String,
    },
    /// The successor can be neither heard nor killed, so that it cannot be ruled out that it drives the devices.
    #[error(
        "the successor (process {pid}) neither answers nor can be killed: the devices are left to it, since two processes must not drive one"
    )]
    Unresponsive {
        /// Its process id.
        pid: i32,
    },
    /// The predecessor goes on by itself.
    #[error("the predecessor has called the update off and goes on")]
    Aborted,
    /// This was a rehearsal.
    #[error("this was a rehearsal: everything is understood, and the predecessor goes on")]
    DryRun,
    /// This program does not want it.
    #[error("refused: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The error.
        source: io::Error,
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
    /// A guest may have requests in flight on a device that cannot come to rest.
    #[error(
        "the device runs with rings of a guest and does not offer SUSPEND (bit 4): what is in flight would be lost with \
         strategy reopen"
    )]
    GuestInFlight,
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

impl Cause {
    /// The same once more, for each device that it concerns. Only of [`Cause::Unresponsive`].
    pub(crate) fn repeat(&self) -> Self {
        match self {
            Self::Unresponsive { pid } => Self::Unresponsive { pid: *pid },
            other => Self::Refused { reason: other.to_string() },
        }
    }
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

/// What a successor checks before it adopts a descriptor, for fuzz targets.
#[cfg(fuzzing)]
pub mod fuzzing {
    use vdpa_core::features::Features;
    use vdpa_core::ring::driver::DriverState;

    use crate::state::{v1, v2};

    /// The checks of the state against itself.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn validate(state: &v2::Prepared) -> Result<(), String> {
        super::load::check_numbers(state).map_err(|e| e.to_string())
    }

    /// The driver side of a ring as it is given to be adopted.
    #[must_use]
    pub fn adopt_driver(driver: v1::Driver, size: u16, features: Features) -> DriverState {
        driver.restore(size, features)
    }
}
