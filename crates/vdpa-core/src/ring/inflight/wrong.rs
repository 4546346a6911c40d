//! Wrong orders of stores, for the proof that the tests notice them. Nothing of them is compiled outside the unit tests.

#[cfg(test)]
use std::cell::Cell;

/// A wrong order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ring) enum Wrong {
    /// The log says "pushed" before the used element is in the ring.
    LogBeforeElement,
    /// A used descriptor of a packed ring has its flags before the log says "pushed".
    FlagsBeforeLog,
    /// The published count is not kept.
    NoPublished,
    /// The published count is stored before the flags of a packed ring.
    PublishedBeforeFlags,
    /// A name of a packed ring is free again before the publication.
    NameFreedAtPush,
    /// The log says "taken" before the descriptors are in it.
    TakenBeforeDescriptors,
}

#[cfg(test)]
thread_local! {
    static PLANTED: Cell<Option<Wrong>> = const { Cell::new(None) };
}

/// Whether this one was planted.
#[cfg(not(test))]
pub(in crate::ring) const fn is(_: Wrong) -> bool {
    false
}

/// Whether this one was planted.
#[cfg(test)]
pub(in crate::ring) fn is(wrong: Wrong) -> bool {
    PLANTED.get() == Some(wrong)
}

#[cfg(test)]
/// Plants one for this thread, or none.
pub(in crate::ring) fn plant(wrong: Option<Wrong>) {
    PLANTED.set(wrong);
}
