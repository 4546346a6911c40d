//! The kinds of [`Record`]s: their numbers, names and versions.

use std::ops::RangeInclusive;

use super::record::Record;

/// A kind of [`Record`], as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its number; never given to another kind.
    pub number: u16,
    /// Its name, for messages and documents.
    pub name: &'static str,
    /// The version of its payload that this program writes.
    pub version: u16,
    /// The oldest version that this program reads. It reads all from there to [`version`](Self::version).
    pub oldest: u16,
}

impl Kind {
    const fn first(number: u16, name: &'static str) -> Self {
        Self { number, name, version: 1, oldest: 1 }
    }

    /// The versions that this program reads.
    #[must_use]
    pub const fn versions(&self) -> RangeInclusive<u16> {
        self.oldest..=self.version
    }

    /// The kind with this number, if this program knows it.
    #[must_use]
    pub fn by_number(number: u16) -> Option<&'static Self> {
        KINDS.iter().find(|kind| kind.number == number)
    }
}

pub(crate) const DEVICE: Kind = Kind::first(1, "device");
pub(crate) const OPEN: Kind = Kind::first(2, "open");
pub(crate) const FEATURES: Kind = Kind::first(3, "features");
pub(crate) const BACKEND_FEATURES: Kind = Kind::first(4, "backend-features");
pub(crate) const STATUS: Kind = Kind::first(5, "status");
pub(crate) const FORK_FROM_OWNER: Kind = Kind::first(6, "fork-from-owner");
pub(crate) const OWNER: Kind = Kind::first(7, "owner");
pub(crate) const CONFIG_CALL: Kind = Kind::first(8, "config-call");
pub(crate) const BATCH: Kind = Kind::first(9, "batch");
pub(crate) const PINNED: Kind = Kind::first(10, "pinned");
pub(crate) const GROUP: Kind = Kind::first(11, "group");
pub(crate) const TRANSLATION: Kind = Kind::first(12, "translation");
pub(crate) const PARENT: Kind = Kind::first(13, "parent");
pub(crate) const VRING: Kind = Kind { version: 2, ..Kind::first(14, "vring") };
pub(crate) const HANDOVER: Kind = Kind::first(15, "handover");
pub(crate) const HANDLE: Kind = Kind::first(16, "handle");
pub(crate) const TABLE: Kind = Kind::first(17, "table");
pub(crate) const TABLE_COPIED: Kind = Kind::first(18, "table-copied");
pub(crate) const TABLE_REMOVED: Kind = Kind::first(19, "table-removed");
pub(crate) const MAPPING: Kind = Kind::first(20, "mapping");
pub(crate) const UNMAPPED: Kind = Kind::first(21, "unmapped");
pub(crate) const STALE: Kind = Kind::first(22, "stale");
pub(crate) const BROKEN: Kind = Kind::first(23, "broken");
pub(crate) const LOG: Kind = Kind::first(24, "log");
pub(crate) const CONFIG: Kind = Kind::first(25, "config");

/// Every kind that this program knows, by number.
pub const KINDS: &[Kind] = &[
    DEVICE,
    OPEN,
    FEATURES,
    BACKEND_FEATURES,
    STATUS,
    FORK_FROM_OWNER,
    OWNER,
    CONFIG_CALL,
    BATCH,
    PINNED,
    GROUP,
    TRANSLATION,
    PARENT,
    VRING,
    HANDOVER,
    HANDLE,
    TABLE,
    TABLE_COPIED,
    TABLE_REMOVED,
    MAPPING,
    UNMAPPED,
    STALE,
    BROKEN,
    LOG,
    CONFIG,
];

impl Record {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> &'static Kind {
        match self {
            Self::Device(_) => &DEVICE,
            Self::Open { .. } => &OPEN,
            Self::Features { .. } => &FEATURES,
            Self::BackendFeatures { .. } => &BACKEND_FEATURES,
            Self::Status { .. } => &STATUS,
            Self::ForkFromOwner { .. } => &FORK_FROM_OWNER,
            Self::Owner { .. } => &OWNER,
            Self::ConfigCall { .. } => &CONFIG_CALL,
            Self::Batch { .. } => &BATCH,
            Self::Pinned { .. } => &PINNED,
            Self::Group { .. } => &GROUP,
            Self::Translation { .. } => &TRANSLATION,
            Self::Vring(_) => &VRING,
            Self::Parent { .. } => &PARENT,
            Self::Handover(_) => &HANDOVER,
            Self::Handle(_) => &HANDLE,
            Self::Table { .. } => &TABLE,
            Self::TableCopied { .. } => &TABLE_COPIED,
            Self::TableRemoved { .. } => &TABLE_REMOVED,
            Self::Mapping(_) => &MAPPING,
            Self::Unmapped { .. } => &UNMAPPED,
            Self::Stale { .. } => &STALE,
            Self::Broken { .. } => &BROKEN,
            Self::Log(_) => &LOG,
            Self::Config { .. } => &CONFIG,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_numbered_without_gaps_and_have_names_of_their_own() {
        for (kind, number) in KINDS.iter().zip(1..) {
            assert_eq!(kind.number, number, "{}", kind.name);
            assert_eq!(Kind::by_number(number), Some(kind));
            assert_eq!(KINDS.iter().filter(|other| other.name == kind.name).count(), 1, "{}", kind.name);
            assert!(kind.oldest >= 1 && kind.oldest <= kind.version, "{}", kind.name);
        }
        assert_eq!(Kind::by_number(0), None);
    }
}
