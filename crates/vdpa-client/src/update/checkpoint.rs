//! Named places in an update at which a test can end, stop or fail a process.
//!
//! Nothing happens at them unless the crate is built with the feature `fault-points` and a hook is set.

/// A place in an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Checkpoint {
    /// Predecessor: everything that can be checked was checked.
    Checked,
    /// Predecessor: the successor was started (fork) or accepted (hand-over).
    Connected,
    /// Predecessor: the offer was sent.
    Offered,
    /// Predecessor: the successor says that it is ready; for an exec, everything is prepared.
    Ready,
    /// Predecessor: the switch has begun.
    Switching,
    /// Predecessor: a device was suspended.
    Suspended,
    /// Predecessor: a device is as its strategy wants it for the switch.
    AtRest,
    /// Predecessor: the state is complete.
    Saved,
    /// Predecessor: the next step is execve.
    BeforeExec,
    /// Predecessor: the complete state was sent.
    Sent,
    /// Predecessor: the successor says that it has the devices.
    TakenReceived,
    /// Predecessor: the commit was sent.
    Committed,
    /// Predecessor: the devices were let go.
    Released,
    /// Successor: it begins to look for what is incoming.
    Entered,
    /// Successor: it has the offer, or the whole state for an exec.
    Received,
    /// Successor: all memory is mapped and everything known was checked.
    Loaded,
    /// Successor: it has said that it is ready.
    ReadySent,
    /// Successor: it has the complete state.
    SwitchReceived,
    /// Successor: the driver side of a device's rings was adopted.
    Adopted,
    /// Successor: it owns a device.
    Owned,
    /// Successor: a device's vrings are set up again.
    Vrings,
    /// Successor: a device knows the new addresses.
    Remapped,
    /// Successor: a device runs.
    Running,
    /// Successor: it has said that it has the devices.
    TakenSent,
    /// Successor: the update is done, for both.
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
        Self::AtRest,
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

    /// Its name.
    #[must_use]
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// Whether the successor comes by it, and not the predecessor.
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

    /// Has `hook` called at every point this process comes by. The first hook stays.
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
