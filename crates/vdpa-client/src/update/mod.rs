//! Replaces the program that drives vDPA devices, without closing the devices.
//!
//! # Guarantees
//!
//! 1. **No request is lost, damaged or answered twice.** The driver side of every ring is carried over with
//!    the requests in flight. With [`Strategy::Live`] the device completes them while no driver runs. With the others the
//!    device is stopped, and both programs know its ring positions.
//! 2. **Mappings and pinned pages stay** (all strategies but [`Strategy::Reopen`]): the cost depends on the
//!    number of mappings, never on the number of pages.
//! 3. **A failed update leaves a working program.** Everything that can be checked is checked before a
//!    device is touched. If the update fails before the successor has the devices, the steps are rolled back and
//!    [`Prepared::switch`] returns the sessions with the error. If a new image cannot restore after an exec, it gets the
//!    reason as an error, and all devices are closed: none stays half set up.
//! 4. **One process drives a device.** In a fork or hand-over the predecessor decides until it sends the commit. It closes
//!    its descriptors when the successor has confirmed the commit. A successor that ends without confirming does not get the
//!    devices. If the predecessor dies after it has sent the complete state, the successor takes over.
//!
//! # Ways
//!
//! | way | who has the devices afterwards | downtime of the driver |
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
//! 1. [`Plan::describe`] reads the sessions and takes microseconds.
//! 2. [`Described::prepare`] may be slow. It needs no session, so it can run on another thread while the devices are driven.
//!    [`Plan::prepare`] does both steps.
//! 3. [`Prepared::switch`] is short and has a deadline. Nobody may drive the sessions from here on.
//! 4. [`Incoming::take_over`] does the rest in the successor.
//!
//! execve ends all other threads wherever they are, so let them finish first.
//!
//! # Without a transport
//!
//! The ways above are users of parts that do no I/O but requests to devices. A program that brings the state to its successor by
//! its own means uses them itself: [`Plan::save`] stops the devices, [`Stopped::parcel`] is the state as bytes and named
//! descriptors, [`Loaded::load`] and [`Loaded::take_over`] are the other side, [`Stopped::roll_back`] and [`Stopped::release`] the
//! two ends. Here both sides are in one function:
//!
//! ```
//! use vdpa_client::device::Device;
//! use vdpa_client::features::Features;
//! use vdpa_client::inprocess::{self, SimulatedProcess};
//! use vdpa_client::state::Sections;
//! use vdpa_client::update::{Devices, Loaded, Plan};
//! use vdpa_core::inprocess::{InProcess, Node};
//! use vdpa_core::testing::RamBlk;
//! use vdpa_sys::guest::LinuxHost;
//!
//! type Disk = InProcess<RamBlk<LinuxHost>, SimulatedProcess>;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! inprocess::publish("parcel", &Node::new(RamBlk::on_host(64)));
//! let session = Device::<Disk>::open("parcel")?.negotiate(Features::NONE)?;
//! let stopped = Plan::new().save(Devices::one("disk", session), Sections::new()).map_err(|f| f.error)?;
//! let parcel = stopped.parcel()?;
//! assert!(parcel.descriptors.iter().any(|(name, _)| name == "disk/device"));
//!
//! // Bytes and descriptors are with the successor now.
//! let loaded = Loaded::<Disk>::load(&parcel.bytes, parcel.descriptors)?;
//! let restored = loaded.take_over()?;
//! stopped.release();
//! assert!(restored.devices.get("disk").is_some());
//! # Ok(())
//! # }
//! ```

mod cancel;
pub mod checkpoint;
mod connection;
mod describe;
mod devices;
mod exec;
mod identity;
mod incoming;
mod load;
mod loaded;
mod parcel;
mod plan;
mod predecessor;
mod prepared;
mod preparing;
mod reaper;
mod report;
mod save;
mod steps;
mod stop;
mod stopped;
mod strategy;
mod successor;
mod takeover;
mod taking;
mod waiter;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::feature_names::{backend_text, text};
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::QueueIndex;

pub use self::cancel::Cancel;
pub use self::connection::ConnectionError;
pub use self::describe::Described;
pub use self::devices::{Devices, Iter};
pub use self::incoming::{Incoming, Receiving, incoming, restore};
pub use self::loaded::{Loaded, Restored};
pub use self::parcel::Parcel;
pub use self::plan::{DEADLINE, GRACE, Image, PREPARE_TIMEOUT, Plan, UnknownWay, Via, Way};
pub use self::prepared::{Completed, Failed, Prepared};
pub use self::preparing::Preparing;
pub use self::report::{DeviceReport, Report};
pub use self::stop::{Stopped, Successor};
pub use self::strategy::{Strategy, UnknownStrategy, Unsupported};
pub use self::taking::TakingOver;
use crate::error::{Error as SessionError, MemoryProblem};
use crate::state::StateError;

/// Environment variable with the number of the descriptor that holds the saved state.
pub const STATE_VARIABLE: &str = "VDPA_LIVE_STATE";

/// Environment variable with the process id that [`STATE_VARIABLE`] is meant for. An exec keeps the id. A child that inherits
/// both variables has another id and ignores them.
pub const PID_VARIABLE: &str = "VDPA_LIVE_PID";

/// Environment variable with the socket on which the predecessor of a fork offers the devices, as `NUMBER:INODE`. A process
/// that inherits the variable without the socket finds another inode, or none, and ignores it.
pub const SOCKET_VARIABLE: &str = "VDPA_LIVE_SOCKET";

/// The step at which an update failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Phase {
    /// Checks, and contact with the successor; no device was touched.
    #[error("prepare")]
    Prepare,
    /// Stopping the device as its strategy says.
    #[error("suspend")]
    Suspend,
    /// Collecting and writing the state.
    #[error("save")]
    Save,
    /// execve, or sending the state to the successor.
    #[error("transfer")]
    Transfer,
    /// Reading and checking the state, mapping the memory.
    #[error("load")]
    Load,
    /// Becoming the owner (`VHOST_NEW_OWNER`, or open and `VHOST_SET_OWNER`).
    #[error("new owner")]
    NewOwner,
    /// Sending the device the new addresses (REMAP, or UPDATE for `reopen`).
    #[error("remap")]
    Remap,
    /// Setting up the vrings again.
    #[error("vrings")]
    Vrings,
    /// Starting the device (RESUME or DRIVER_OK).
    #[error("resume")]
    Resume,
    /// The commit of the predecessor and its confirmation.
    #[error("commit")]
    Commit,
}

/// An update failed.
#[derive(Debug, Error)]
#[error("update failed in phase {phase}{}", of_device(.device.as_deref()))]
#[non_exhaustive]
pub struct UpdateError {
    /// The step that failed.
    pub phase: Phase,
    /// Name of the device, if the step concerned one device.
    pub device: Option<String>,
    /// The reason.
    pub source: Cause,
}

fn of_device(device: Option<&str>) -> String {
    device.map_or_else(String::new, |name| format!(" of device {name}"))
}

/// Why an update failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Cause {
    /// The device does not offer what the strategy needs.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// The device answered with an error, or memory could not be mapped.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The state cannot be encoded or decoded.
    #[error(transparent)]
    State(#[from] StateError),
    /// Memory that would not have the same contents in the successor.
    #[error("region \"{name}\" {problem}")]
    Memory {
        /// Name of the region.
        name: String,
        /// The reason.
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
    /// The plan has a strategy for a device that is not among the devices.
    #[error("a strategy is given for device \"{name}\"; there are: {present}")]
    UnknownDevice {
        /// Name in the plan.
        name: String,
        /// Names of the devices, separated by commas.
        present: String,
    },
    /// A descriptor of the caller could not be copied.
    #[error("descriptor \"{name}\" cannot be copied")]
    Descriptor {
        /// Name of the descriptor.
        name: String,
        /// Error of duplicating it.
        source: Errno,
    },
    /// A section given to [`Prepared::switch`] differs from its announcement by [`Plan::late_section`].
    #[error("section \"{name}\" {problem}")]
    Late {
        /// Name of the section.
        name: String,
        /// How it differs.
        problem: &'static str,
    },
    /// The devices given to [`Prepared::switch`] differ from those that were prepared.
    #[error("the session {problem} since the update was prepared; prepare again")]
    Changed {
        /// How the session differs.
        problem: &'static str,
    },
    /// A queue is with the caller that took it.
    #[error("queue {index} is taken: give it back with Session::put_queue before the switch")]
    QueueTaken {
        /// Index of the queue.
        index: QueueIndex,
    },
    /// The caller has suspended the device, and the strategy would start it.
    #[error("the device is suspended, and strategy {strategy} would start it: resume it before, or use live")]
    Suspended {
        /// Strategy of the device.
        strategy: Strategy,
    },
    /// The successor was not ready in time.
    #[error(
        "the successor (process {pid}) was not ready within {after:?} (Plan::prepare_timeout){}",
        if *.child { "; does its main call update::incoming()?" } else { "" }
    )]
    NotReady {
        /// Process id of the successor.
        pid: i32,
        /// The time that it had.
        after: Duration,
        /// Whether it was started by this process.
        child: bool,
    },
    /// The program that was started has ended before it was ready.
    #[error("the successor (process {pid}) has ended before it was ready: {status}")]
    SuccessorEnded {
        /// Process id of the successor.
        pid: i32,
        /// How it has ended, as `exit status: 1` or `signal: 9 (SIGKILL)`.
        status: String,
    },
    /// The deadline of the switch passed before the successor could begin.
    #[error("the deadline of the switch was over before the successor could begin")]
    Deadline,
    /// A message could not be exchanged with the other process.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The successor refused the devices or failed to take them over.
    #[error("the successor (process {pid}) failed in phase {phase}{}: {reason}", of_device(.device.as_deref()))]
    Successor {
        /// Process id of the successor.
        pid: i32,
        /// Phase in which it failed.
        phase: Phase,
        /// Name of the device with which it failed, if the failure concerns a single device.
        device: Option<String>,
        /// Reason that the successor sent.
        reason: String,
    },
    /// The successor neither answers nor can be killed (a process in an uninterruptible wait), so it may still drive the
    /// devices. This process closes them.
    #[error(
        "the successor (process {pid}) neither answers nor can be killed: the devices are left to it, since two processes must not drive one"
    )]
    Unresponsive {
        /// Process id of the successor.
        pid: i32,
    },
    /// The predecessor aborted the update and keeps the devices.
    #[error("the predecessor has called the update off and goes on")]
    Aborted,
    /// This was a dry run ([`Plan::dry_run`]): the predecessor keeps the devices.
    #[error("this was a rehearsal: everything is understood, and the predecessor goes on")]
    DryRun,
    /// This program refused the update ([`Incoming::refuse`]).
    #[error("refused: {reason}")]
    Refused {
        /// Reason given to [`Incoming::refuse`].
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    Io {
        /// The action for which it was made.
        action: &'static str,
        /// Error of the system call.
        source: io::Error,
    },
    /// The new image does not exist or cannot be executed.
    #[error("the new image {} cannot be run", path.display())]
    Image {
        /// Path of the image.
        path: PathBuf,
        /// Error of opening or starting it.
        source: io::Error,
    },
    /// An argument or variable with a NUL byte.
    #[error("the {what} of the new image contains a NUL byte")]
    Nul {
        /// `path`, `argument` or `environment`.
        what: &'static str,
    },
    /// Requests are in flight on a device that cannot be suspended, and `reopen` would lose them.
    #[error(
        "{in_flight} requests are in flight and the device does not offer SUSPEND (bit 4): wait for them \
         before updating with strategy reopen"
    )]
    InFlight {
        /// Number of requests in flight.
        in_flight: usize,
    },
    /// A guest may have requests in flight on a device that cannot be suspended, and `reopen` would lose them.
    #[error(
        "the device runs with rings of a guest and does not offer SUSPEND (bit 4): what is in flight would be lost with \
         strategy reopen"
    )]
    GuestInFlight,
    /// Strategy `reopen` needs the path of the device, and none is known.
    #[error("strategy reopen needs the path of the device; say it with Device::at")]
    NoPath,
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// The action for which it was made.
        action: &'static str,
        /// Error of the system call.
        source: Errno,
    },
    /// The saved state cannot be found or read.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    /// Saved state that contradicts itself or this process.
    #[error("saved {what} cannot be restored: {reason}")]
    Invalid {
        /// Part of the state.
        what: String,
        /// Why it cannot be restored.
        reason: String,
    },
    /// The device does not offer a feature that the previous image had negotiated.
    #[error("the device offers features {}, but the saved session uses {}", text(*.present, 0), text(*.saved, 0))]
    Features {
        /// Features that the previous image had negotiated.
        saved: Features,
        /// Features that the device offers now.
        present: Features,
    },
    /// The device does not offer a backend feature that the previous image had acknowledged.
    #[error("the device offers backend features {}, but the saved session uses {}", backend_text(*.present), backend_text(*.saved))]
    BackendFeatures {
        /// Backend features that the previous image had acknowledged.
        saved: BackendFeatures,
        /// Backend features that the device offers now.
        present: BackendFeatures,
    },
}

impl Cause {
    /// A copy, so that each lost device gets one. Errors that cannot be cloned become [`Cause::Refused`] with their text; in
    /// practice `self` is [`Cause::Unresponsive`].
    pub(crate) fn repeat(&self) -> Self {
        match self {
            Self::Unresponsive { pid } => Self::Unresponsive { pid: *pid },
            other => Self::Refused { reason: other.to_string() },
        }
    }
}

/// Why the descriptor that [`STATE_VARIABLE`] names has no saved state.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateFileError {
    /// The variable is not a number.
    #[error("{STATE_VARIABLE} is \"{value}\", not the number of a descriptor")]
    NotANumber {
        /// Value of the variable.
        value: String,
    },
    /// This process has inherited no such descriptor.
    #[error("descriptor {number}, named by {STATE_VARIABLE}, was not inherited")]
    NotInherited {
        /// Number of the descriptor.
        number: i32,
        /// Error of using it.
        source: Errno,
    },
    /// The descriptor is not that of a memfd.
    #[error("descriptor {number}, named by {STATE_VARIABLE}, is not a memfd")]
    NotMemfd {
        /// Number of the descriptor.
        number: i32,
    },
    /// The memfd is not sealed, so another process could still change it.
    #[error("the memfd with the saved state (descriptor {number}) is not sealed")]
    NotSealed {
        /// Number of the descriptor.
        number: i32,
    },
    /// The memfd cannot be read.
    #[error("the memfd with the saved state (descriptor {number}) cannot be read: {reason}")]
    Unreadable {
        /// Number of the descriptor.
        number: i32,
        /// Error of reading it.
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

    /// Converts the saved driver side of a ring to the state that the ring restores.
    #[must_use]
    pub fn adopt_driver(driver: v1::Driver, size: u16, features: Features) -> DriverState {
        driver.restore(size, features)
    }
}
