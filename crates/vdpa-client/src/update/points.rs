//! Named places in an update at which a test can end, stop or fail a process.
//!
//! Nothing happens at them unless the crate is built with the feature `fault-points` and a hook is set.

/// A place in an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Point {
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
    Leaving,
    /// Predecessor: the complete state was sent.
    Sent,
    /// Predecessor: the successor says that it has the devices.
    TakenHeard,
    /// Predecessor: the commit was sent.
    Committed,
    /// Predecessor: the devices were let go.
    Departed,
    /// Successor: it begins to look for what is incoming.
    Entered,
    /// Successor: it has the offer, or the whole state for an exec.
    Received,
    /// Successor: all memory is mapped and everything known was checked.
    Loaded,
    /// Successor: it has said that it is ready.
    ReadySent,
    /// Successor: it has the complete state.
    SwitchHeard,
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
    CommitHeard,
}

impl Point {
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
        Self::Leaving,
        Self::Sent,
        Self::TakenHeard,
        Self::Committed,
        Self::Departed,
        Self::Entered,
        Self::Received,
        Self::Loaded,
        Self::ReadySent,
        Self::SwitchHeard,
        Self::Adopted,
        Self::Owned,
        Self::Vrings,
        Self::Remapped,
        Self::Running,
        Self::TakenSent,
        Self::CommitHeard,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// Whether the successor comes by it, and not the predecessor.
    #[must_use]
    pub const fn is_successors(self) -> bool {
        self as u8 >= Self::Entered as u8
    }
}

#[cfg(feature = "fault-points")]
mod hook {
    use std::sync::OnceLock;

    use super::Point;

    type Hook = Box<dyn Fn(Point) + Send + Sync>;
    static HOOK: OnceLock<Hook> = OnceLock::new();

    /// Has `hook` called at every point this process comes by. The first hook stays.
    pub fn on_reach(hook: impl Fn(Point) + Send + Sync + 'static) {
        let _ = HOOK.set(Box::new(hook));
    }

    pub(crate) fn reach(point: Point) {
        if let Some(hook) = HOOK.get() {
            hook(point);
        }
    }
}

#[cfg(feature = "fault-points")]
pub use hook::on_reach;
#[cfg(feature = "fault-points")]
pub(super) use hook::reach;

#[cfg(not(feature = "fault-points"))]
pub(super) const fn reach(_: Point) {}
