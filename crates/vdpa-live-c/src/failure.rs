//! What a function fails with: a number for programs, a text for people.

use std::fmt::Display;

use vdpa_client::Error;
use vdpa_client::error::{QueueProblem, RegionProblem, chain};
use vdpa_client::state::StateError;
use vdpa_client::update::{Cause, ConnectionError, Failed, UpdateError};

/// Numbers of `errno.h` that this library returns by itself. Those of requests to a device are passed on.
pub(crate) mod errno {
    pub(crate) const ENOENT: i32 = 2;
    pub(crate) const EIO: i32 = 5;
    pub(crate) const ECHILD: i32 = 10;
    pub(crate) const ENOMEM: i32 = 12;
    pub(crate) const EBUSY: i32 = 16;
    pub(crate) const EEXIST: i32 = 17;
    pub(crate) const ENODEV: i32 = 19;
    pub(crate) const EINVAL: i32 = 22;
    pub(crate) const ERANGE: i32 = 34;
    pub(crate) const EBADMSG: i32 = 74;
    pub(crate) const EOPNOTSUPP: i32 = 95;
    pub(crate) const ECONNRESET: i32 = 104;
    pub(crate) const ETIMEDOUT: i32 = 110;
    pub(crate) const ESTALE: i32 = 116;
    pub(crate) const ECANCELED: i32 = 125;
    pub(crate) const ENOTRECOVERABLE: i32 = 131;
}
use errno::*;

/// An error on its way to C.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) errno: i32,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(errno: i32, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    /// An argument that makes no sense.
    pub(crate) fn invalid(text: impl Display) -> Self {
        Self::new(EINVAL, text.to_string())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(of_session(&error), chain(&error))
    }
}

impl From<UpdateError> for Failure {
    fn from(error: UpdateError) -> Self {
        Self::new(of_cause(&error.source), chain(&error))
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::new(EBADMSG, error.to_string())
    }
}

impl<D> From<&Failed<D>> for Failure {
    /// The error of the update; what was lost besides is told too.
    fn from(failed: &Failed<D>) -> Self {
        let mut text = chain(&failed.error);
        for lost in &failed.lost {
            text.push_str("; lost: ");
            text.push_str(&chain(lost));
        }
        Self::new(of_cause(&failed.error.source), text)
    }
}

fn of_session(error: &Error) -> i32 {
    match error {
        Error::Open { source, .. }
        | Error::Request { source, .. }
        | Error::NoDevice { source }
        | Error::Map { source, .. } => source.raw(),
        Error::Owned => EBUSY,
        Error::FeaturesMissing { .. } | Error::Legacy { .. } | Error::FeaturesRefused { .. } => EOPNOTSUPP,
        Error::Memlock { .. } => ENOMEM,
        Error::Region { problem, .. } => match problem {
            RegionProblem::Exists => EEXIST,
            RegionProblem::Unknown | RegionProblem::NotMapped { .. } => ENOENT,
            RegionProblem::OutOfRange { .. } => ERANGE,
            _ => EINVAL,
        },
        Error::Queue { problem, .. } => match problem {
            QueueProblem::Exists => EEXIST,
            QueueProblem::Unknown => ENOENT,
            QueueProblem::Running | QueueProblem::Taken => EBUSY,
            _ => EINVAL,
        },
        _ => EIO,
    }
}

fn of_cause(cause: &Cause) -> i32 {
    match cause {
        Cause::Session(error) => of_session(error),
        Cause::Connection(error) => of_connection(error),
        Cause::Unsupported(_) | Cause::Features { .. } | Cause::BackendFeatures { .. } => EOPNOTSUPP,
        Cause::State(_) | Cause::StateFile(_) | Cause::Invalid { .. } => EBADMSG,
        Cause::Memory { .. }
        | Cause::DuplicateName { .. }
        | Cause::UnknownDevice { .. }
        | Cause::Late { .. }
        | Cause::Nul { .. }
        | Cause::NoPath => EINVAL,
        Cause::Changed { .. } => ESTALE,
        Cause::QueueTaken { .. }
        | Cause::Suspended { .. }
        | Cause::InFlight { .. }
        | Cause::GuestInFlight => EBUSY,
        Cause::NotReady { .. } | Cause::Deadline => ETIMEDOUT,
        Cause::SuccessorEnded { .. } => ECHILD,
        Cause::Successor { .. } | Cause::Refused { .. } | Cause::Aborted | Cause::DryRun => ECANCELED,
        Cause::Unresponsive { .. } => ENODEV,
        Cause::Descriptor { source, .. } | Cause::System { source, .. } => source.raw(),
        Cause::Io { source, .. } | Cause::Image { source, .. } => source.raw_os_error().unwrap_or(EINVAL),
        _ => EIO,
    }
}

fn of_connection(error: &ConnectionError) -> i32 {
    match error {
        ConnectionError::NotUnixStream => EINVAL,
        ConnectionError::ForbiddenUser { .. } => vdpa_client::Errno::PERM.raw(),
        ConnectionError::Closed => ECONNRESET,
        ConnectionError::TimedOut => ETIMEDOUT,
        ConnectionError::Cancelled => ECANCELED,
        ConnectionError::Protocol { .. } => EBADMSG,
        ConnectionError::Descriptors => vdpa_client::Errno::MFILE.raw(),
        ConnectionError::System { source, .. } => source.raw(),
        _ => EIO,
    }
}
