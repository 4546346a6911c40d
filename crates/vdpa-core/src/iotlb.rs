//! Translation tables.

use std::collections::BTreeMap;

use crate::types::{IovaRange, Perm};

/// One entry of a translation table.
#[derive(Clone, Debug)]
pub struct Mapping<M> {
    /// I/O virtual addresses.
    pub range: IovaRange,
    /// Where it was in the owner's address space when it was mapped or last remapped.
    pub uaddr: u64,
    /// What the device may do.
    pub perm: Perm,
    /// The memory; its first byte is at `range.first()`.
    pub memory: M,
    /// The owner changed and has not remapped it: the data path treats it as unmapped.
    pub stale: bool,
}

/// One address space's translation, ordered by address.
#[derive(Clone, Debug)]
pub struct Table<M> {
    entries: BTreeMap<u64, Mapping<M>>,
}
impl<M> Table<M> {
    /// Entries in address order.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping<M>> {
        self.entries.values()
    }
}
