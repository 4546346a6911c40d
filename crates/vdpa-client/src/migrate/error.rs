//! Why a migration fails.

use std::io;

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::Features;

use super::wire::PROTOCOL_VERSION;
use crate::error::Error;
use crate::state::StateError;

/// An error of the program that uses this library: of its machine, its memory, its disks.
pub type MachineError = Box<dyn std::error::Error + Send + Sync>;

/// Why a migration fails. Each leaves both sides as the documentation of the function says.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The stream is cut, or a time that the caller has set for it is over.
    #[error("the connection to the other side has failed")]
    Stream(#[from] io::Error),
    /// What arrives is not what this protocol has.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The other side has ended the migration.
    #[error("the other side has ended the migration: {reason}")]
    Refused {
        /// What it says.
        reason: String,
    },
    /// A request to the device failed.
    #[error(transparent)]
    Device(#[from] Error),
    /// The caller's program has failed.
    #[error("{step} failed")]
    Machine {
        /// What was to be done.
        step: &'static str,
        /// The reason.
        source: MachineError,
    },
    /// State of the machine cannot be written or read.
    #[error(transparent)]
    State(#[from] StateError),
    /// This session cannot move.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// Memory cannot be accessed: its file was truncated.
    #[error("a page of region \"{region}\" cannot be accessed: the file behind it has become shorter")]
    Memory {
        /// Name of the region.
        region: String,
    },
    /// More is written than can be sent, and the plan says not to stop the machine for that.
    #[error(
        "the memory does not come to rest: {pages} pages are left after {rounds} rounds, for which the machine would stand still for about {ms} ms; allow a longer downtime, or slow the machine down"
    )]
    NoConvergence {
        /// Rounds that were made.
        rounds: u32,
        /// Pages that are left.
        pages: u64,
        /// Estimated downtime in ms.
        ms: u64,
    },
    /// The caller has cancelled it.
    #[error("the migration was cancelled")]
    Cancelled,
}

/// What is wrong with a message.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The other side speaks something else.
    #[error("this is no migration: a message begins with \"{}\" and not with \"VDPM\"", found.escape_ascii())]
    Magic {
        /// Its first bytes.
        found: [u8; 4],
    },
    /// The other side speaks another version.
    #[error("the other side speaks version {found}; this program speaks version {PROTOCOL_VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// A message that this version does not have.
    #[error("a message of kind {number} is not known")]
    Kind {
        /// Its kind.
        number: u16,
    },
    /// Longer than any.
    #[error("a message \"{kind}\" of {len} bytes; it has at most {most}")]
    Long {
        /// Name of its kind.
        kind: &'static str,
        /// Its length.
        len: u64,
        /// The most there may be.
        most: u64,
    },
    /// The checksum does not fit.
    #[error("a message \"{kind}\" is damaged")]
    Damaged {
        /// Name of its kind.
        kind: &'static str,
    },
    /// A payload cannot be read.
    #[error("a message \"{kind}\" cannot be read: {reason}")]
    Text {
        /// Name of its kind.
        kind: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// Pages that were not offered.
    #[error("a message \"pages\" cannot be read: {what}")]
    Pages {
        /// What is wrong.
        what: &'static str,
    },
    /// A message that does not come now.
    #[error("a message \"{found}\" comes where \"{wanted}\" would be right")]
    Unexpected {
        /// Name of its kind.
        found: &'static str,
        /// Name of the kind that is right.
        wanted: &'static str,
    },
    /// An offer that contradicts itself.
    #[error("an offer cannot be taken: {what}")]
    Offer {
        /// What is wrong.
        what: String,
    },
}

/// Why a session cannot move, or not here.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unfit {
    /// The device has no requests for that.
    #[error("the device cannot move: it does not offer DEVICE_STATE, as devices of the kernel do not")]
    NoState,
    /// The device cannot tell what it writes.
    #[error(
        "the device does not offer DIRTY_LOG, so pages that it writes are not known; all memory can be copied while the machine stands still (Plan::track)"
    )]
    NoTracking,
    /// This program drives a queue.
    #[error("this program drives queue {index} itself; only rings of a guest can move")]
    OwnQueue {
        /// Its index.
        index: u16,
    },
    /// Mappings without a name.
    #[error(
        "the session has mappings without a name; the memory of a machine that moves is mapped as regions"
    )]
    Nameless,
    /// The caller has suspended the device.
    #[error("the device is suspended; a migration suspends it by itself, and resumes it")]
    Suspended,
    /// Regions were added or removed since the offer.
    #[error("the memory of the machine has changed since the migration began")]
    MemoryChanged,
    /// The device at the destination is of another type.
    #[error("the device that moves has the virtio id {offered}, this one {present}")]
    OtherDevice {
        /// Id of the one that moves.
        offered: u32,
        /// Id of this one.
        present: u32,
    },
    /// The device at the destination does not offer features that the driver uses.
    #[error("the driver uses the features {used}, and this device lacks {missing} of them")]
    Features {
        /// What it uses.
        used: Features,
        /// What is missing.
        missing: Features,
    },
}

impl MigrateError {
    pub(super) fn machine(step: &'static str) -> impl FnOnce(MachineError) -> Self {
        move |source| Self::Machine { step, source }
    }

    /// The text for the other side, with all causes.
    pub(super) fn text(&self) -> String {
        crate::error::chain(self)
    }
}

/// The error of a request to the device.
pub(super) fn request(name: &'static str) -> impl FnOnce(Errno) -> MigrateError {
    move |source| MigrateError::Device(Error::Request { request: name, source })
}
