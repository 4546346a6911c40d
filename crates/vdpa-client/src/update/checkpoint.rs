//! Named places in the code of an update at which a test can kill or stop the process.
//!
//! Without the feature `fault-points` a checkpoint compiles to nothing. With it, a checkpoint calls the hook that was set.

/// A place in an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Checkpoint {
    /// Predecessor: all checks of prepare have passed.
    Checked,
    /// Predecessor: the successor was started (fork) or accepted (hand-over).
    Connected,
    /// Predecessor: the offer was sent.
    Offered,
    /// Predecessor: the successor has reported that it is ready; for an exec, everything is prepared.
    Ready,
    /// Predecessor: the switch has begun.
    Switching,
    /// Predecessor: a device was suspended.
    Suspended,
    /// Predecessor: a device is stopped as its strategy says; with `live` it runs.
    Stopped,
    /// Predecessor: the state is complete.
    Saved,
    /// Predecessor: the next step is execve.
    BeforeExec,
    /// Predecessor: the complete state was sent.
    Sent,
    /// Predecessor: it has received that the successor took the devices over.
    TakenReceived,
    /// Predecessor: the commit was sent.
    Committed,
    /// Predecessor: all descriptors of the devices are closed.
    Released,
    /// Successor: it has entered `incoming`.
    Entered,
    /// Successor: it has the offer, or the whole state for an exec.
    Received,
    /// Successor: everything known was checked; it maps the memory next.
    Loaded,
    /// Successor: it has reported that it is ready.
    ReadySent,
    /// Successor: it has received the complete state.
    SwitchReceived,
    /// Successor: the driver side of a device's rings was adopted.
    Adopted,
    /// Successor: it owns a device.
    Owned,
    /// Successor: a device's vrings are set up again.
    Vrings,
    /// Successor: a device has the new addresses of its mappings.
    Remapped,
    /// Successor: a device runs.
    Running,
    /// Successor: it has reported that it took the devices over.
    TakenSent,
    /// Successor: it has received the commit and sent its confirmation.
    CommitReceived,
}

impl Checkpoint {
    /// All, first those of the predecessor.
    pub const ALL: [Self; 25] = [
        Self::Checked,
        Self::Connected,
        Self::Offered,
        Self::Ready,
        Self::Switching,
        Self::Suspended,
        Self::Stopped,
        Self::Saved,
        Self::BeforeExec,
        Self::Sent,
        Self::TakenReceived,
        Self::Committed,
        Self::Released,
        Self::Entered,
        Self::Received,
        Self::Loaded,
        Self::ReadySent,
        Self::SwitchReceived,
        Self::Adopted,
        Self::Owned,
        Self::Vrings,
        Self::Remapped,
        Self::Running,
        Self::TakenSent,
        Self::CommitReceived,
    ];

    /// Name of the variant, for logs and tests.
    #[must_use]
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// Whether the successor passes it; otherwise the predecessor does.
    #[must_use]
    pub const fn is_in_successor(self) -> bool {
        self as u8 >= Self::Entered as u8
    }
}

#[cfg(feature = "fault-points")]
mod hook {
    use std::sync::OnceLock;

    use super::Checkpoint;

    type Hook = Box<dyn Fn(Checkpoint) + Send + Sync>;
    static HOOK: OnceLock<Hook> = OnceLock::new();

    /// Sets the hook that every checkpoint of this process calls, on the thread that passes it. Only the first call has an
    /// effect.
    pub fn on_checkpoint(hook: impl Fn(Checkpoint) + Send + Sync + 'static) {
        let _ = HOOK.set(Box::new(hook));
    }

    pub(crate) fn checkpoint(point: Checkpoint) {
        if let Some(hook) = HOOK.get() {
            hook(point);
        }
    }
}

#[cfg(feature = "fault-points")]
pub(super) use hook::checkpoint;
#[cfg(feature = "fault-points")]
pub use hook::on_checkpoint;

#[cfg(not(feature = "fault-points"))]
pub(super) const fn checkpoint(_: Checkpoint) {}
