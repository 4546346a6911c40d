//! [`Image`]: what a sequence of records says.

use std::collections::BTreeMap;

use thiserror::Error;

use super::kind::{self, Kind};
use super::record::{MappingState, Record, TableId, TableRole};
use crate::types::IovaRange;

/// A record that does not fit what came before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The sequence does not begin with what a snapshot begins with.
    #[error(
        "record \"{kind}\" comes before any \"device\" or \"handover\": the beginning of the sequence is missing"
    )]
    NoBeginning {
        /// Name of the kind.
        kind: &'static str,
    },
    /// A record about a table that does not exist.
    #[error("record \"{kind}\" is about the table {table:?}, which does not exist")]
    NoTable {
        /// Name of the kind.
        kind: &'static str,
        /// The table.
        table: TableId,
    },
    /// A copy that is never made. Every other one is of a table that was described in full.
    #[error("the table {from:?} is never copied to {to:?}")]
    Copy {
        /// The table to copy.
        from: TableId,
        /// The table that would be replaced.
        to: TableId,
    },
}

/// What a sequence of records says, without whatever later records have made untrue.
///
/// Two sequences that say the same give equal images, and [`records`](Self::records) is the shortest one that gives an
/// image: that of [`Device::snapshot`](crate::device::Device::snapshot). Whoever keeps a log shortens it this way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// By kind and, where there are several of one kind, by what they are about.
    parts: BTreeMap<(u16, u64), Record>,
    pub(super) tables: BTreeMap<TableId, TableImage>,
}

/// A table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TableImage {
    pub(super) next_update: u64,
    /// By first address.
    pub(super) mappings: BTreeMap<u64, MappingState>,
}

impl Image {
    /// What `records` say.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Result<Self, ApplyError> {
        let mut image = Self::default();
        records.into_iter().try_for_each(|record| image.apply(record))?;
        Ok(image)
    }

    /// Adds what one more record says. Costs a search, and more only for records about many mappings.
    ///
    /// # Errors
    /// [`ApplyError`]; nothing has changed then.
    pub fn apply(&mut self, record: &Record) -> Result<(), ApplyError> {
        let kind = record.kind();
        match record {
            Record::Device(_) | Record::Handover(_) => *self = Self::default(),
            _ if self.parts.is_empty() => return Err(ApplyError::NoBeginning { kind: kind.name }),
            _ => {}
        }
        match record {
            Record::Table { table, next_update } => {
                self.tables.entry(*table).or_default().next_update = *next_update;
            }
            Record::TableCopied { from, to } => self.copy(*from, *to)?,
            Record::TableRemoved { table } => {
                self.tables.remove(table);
            }
            Record::Mapping(mapping) => {
                let table = self.table(mapping.table, kind)?;
                table.mappings.insert(mapping.range.first(), mapping.clone());
            }
            Record::Unmapped { table, firsts } => {
                let mappings = &mut self.table(*table, kind)?.mappings;
                // Not `retain`, which would visit every mapping for each of few.
                let keys = mappings.range(firsts.first()..=firsts.last()).map(|(key, _)| *key);
                let keys: Vec<u64> = keys.collect();
                for key in keys {
                    mappings.remove(&key);
                }
            }
            Record::Stale { table } => {
                self.table(*table, kind)?.mappings.values_mut().for_each(|mapping| mapping.stale = true);
            }
            Record::Broken { table, update, range } => {
                let mappings = self.table(*table, kind)?.mappings.range_mut(range.first()..=range.last());
                let of_it = mappings.filter(|(_, mapping)| mapping.update == *update);
                of_it.for_each(|(_, mapping)| mapping.broken = true);
            }
            other => {
                self.parts.insert((kind.number, about(other)), other.clone());
            }
        }
        Ok(())
    }

    /// The shortest sequence of records that says the same.
    #[must_use]
    pub fn records(&self) -> Vec<Record> {
        let mut records: Vec<_> = self.parts.values().cloned().collect();
        for (&table, image) in &self.tables {
            records.push(Record::Table { table, next_update: image.next_update });
            records.extend(image.mappings.values().cloned().map(Record::Mapping));
        }
        records
    }

    /// The record of a kind of which there is one at most.
    pub(crate) fn part(&self, kind: &Kind) -> Option<&Record> {
        self.parts.get(&(kind.number, 0))
    }

    /// The records of a kind of which there may be several.
    pub(crate) fn parts(&self, kind: &Kind) -> impl Iterator<Item = &Record> {
        self.parts.range((kind.number, 0)..=(kind.number, u64::MAX)).map(|(_, record)| record)
    }

    fn table(&mut self, table: TableId, kind: &Kind) -> Result<&mut TableImage, ApplyError> {
        self.tables.get_mut(&table).ok_or(ApplyError::NoTable { kind: kind.name, table })
    }

    fn copy(&mut self, from: TableId, to: TableId) -> Result<(), ApplyError> {
        let role =
            matches!((from.role, to.role), (TableRole::Interface, TableRole::Rollback | TableRole::Parent));
        if !role || from.asid != to.asid {
            return Err(ApplyError::Copy { from, to });
        }
        let mut copy = self.table(from, &kind::TABLE_COPIED)?.clone();
        copy.mappings.values_mut().for_each(|mapping| mapping.table = to);
        self.tables.insert(to, copy);
        Ok(())
    }
}

impl TableImage {
    /// The first mapping that overlaps the one before it, and that one.
    pub(super) fn overlap(&self) -> Option<(IovaRange, IovaRange)> {
        let ranges = || self.mappings.values().map(|mapping| mapping.range);
        ranges().zip(ranges().skip(1)).find(|(before, after)| before.last() >= after.first())
    }
}

/// What tells a record from others of its kind.
fn about(record: &Record) -> u64 {
    match record {
        Record::Group { group, .. } => group.0.into(),
        Record::Translation { asid, .. } => asid.0.into(),
        Record::Vring(vring) => vring.index.0.into(),
        Record::Handle(handle) => handle.id,
        _ => 0,
    }
}
