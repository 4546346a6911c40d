//! What is checked of a saved device before it becomes one.

use std::collections::BTreeMap;

use thiserror::Error;

use super::StateSource;
use super::image::{ApplyError, Image, TableImage};
use super::kind::{self, Kind};
use super::record::{HandleState, HandoverState, MappingState, Record, Shape, TableId};
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features};
use crate::host::{Host, MemoryObject, PAGE_SIZE};
use crate::iotlb::{self, Mapping, RecordId, Table};
use crate::parent::{AddressMode, PrivateMemory, Profile};
use crate::types::{IovaRange, QueueIndex};

/// Why a device cannot be built from records. Nothing is left of the attempt.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The records do not fit each other.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Something that every device has is not there.
    #[error("there is no record \"{kind}\"")]
    Missing {
        /// Name of the kind.
        kind: &'static str,
    },
    /// A record that does not belong into this sequence.
    #[error("record \"{kind}\" does not belong here")]
    Stray {
        /// Name of the kind.
        kind: &'static str,
    },
    /// The device that exists now is of another type.
    #[error("the saved device has the virtio id {saved}, this one {present}")]
    OtherDevice {
        /// Saved id.
        saved: u32,
        /// Id of the device that exists now.
        present: u32,
    },
    /// The device that exists now has less of something.
    #[error("the saved device has {saved} {what}, this one {present}")]
    Fewer {
        /// Of what.
        what: &'static str,
        /// Saved number.
        saved: u64,
        /// Number in the device that exists now.
        present: u64,
    },
    /// The device that exists now does not offer features that a client may rely on.
    #[error("the saved device offers the features {saved}, this one lacks {missing} of them")]
    Features {
        /// Saved word.
        saved: Features,
        /// What is not offered now.
        missing: Features,
    },
    /// As [`Features`](Self::Features), for backend features.
    #[error("the saved device offers the backend features {saved}, this one lacks {missing} of them")]
    BackendFeatures {
        /// Saved word.
        saved: BackendFeatures,
        /// What is not offered now.
        missing: BackendFeatures,
    },
    /// The device that exists now cannot address what the saved one could.
    #[error("the saved device can map {saved}, this one {present}")]
    IovaRange {
        /// Saved range.
        saved: IovaRange,
        /// Range of the device that exists now.
        present: IovaRange,
    },
    /// The device that exists now reaches client memory in another way.
    #[error("the saved device reaches memory by {saved:?}, this one by {present:?}")]
    AddressMode {
        /// Saved way.
        saved: AddressMode,
        /// Way of the device that exists now.
        present: AddressMode,
    },
    /// A value that no device can have.
    #[error("record \"{kind}\": {what}")]
    Invalid {
        /// Name of the kind.
        kind: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// A queue that no device can have.
    #[error("queue {index}: {what}")]
    Vring {
        /// Its index.
        index: QueueIndex,
        /// What is wrong.
        what: &'static str,
    },
    /// A table that no device can have.
    #[error("table {table:?}: {what}")]
    Table {
        /// The table.
        table: TableId,
        /// What is wrong.
        what: &'static str,
    },
    /// A mapping that no device can have.
    #[error("table {table:?}, mapping {range}: {what}")]
    Mapping {
        /// The table.
        table: TableId,
        /// The mapping.
        range: IovaRange,
        /// What is wrong.
        what: &'static str,
    },
    /// An object that the records name cannot be had.
    #[error("the {what} number {id} cannot be had: {errno}")]
    Object {
        /// What it should be.
        what: &'static str,
        /// Its number.
        id: u64,
        /// What the [`StateSource`] reports.
        errno: Errno,
    },
    /// The mappings pin another number of pages than was charged.
    #[error("the mappings pin {computed} pages, and {saved} were charged")]
    Charge {
        /// Pages charged.
        saved: u64,
        /// Pages that the mappings pin here.
        computed: u64,
    },
    /// The parent refuses.
    #[error("the device refuses its saved {what}: {errno}")]
    Parent {
        /// What it refuses.
        what: &'static str,
        /// What it reports.
        errno: Errno,
    },
}

/// Unless `holds`, the record of `kind` is invalid.
pub(crate) fn ensure(holds: bool, kind: &Kind, what: &'static str) -> Result<(), RestoreError> {
    if holds { Ok(()) } else { Err(RestoreError::Invalid { kind: kind.name, what }) }
}

/// Checks that the device that exists now can be what the saved one was.
pub(crate) fn check_shape(saved: &Shape, present: &Shape) -> Result<(), RestoreError> {
    if saved.device_id != present.device_id {
        let (saved, present) = (saved.device_id, present.device_id);
        return Err(RestoreError::OtherDevice { saved, present });
    }
    let numbers: [(&str, u64, u64); 5] = [
        ("queues", saved.queues.into(), present.queues.into()),
        ("entries in its largest ring", saved.queue_size_max.into(), present.queue_size_max.into()),
        ("groups", saved.groups.into(), present.groups.into()),
        ("address spaces", saved.address_spaces.into(), present.address_spaces.into()),
        ("bytes of configuration space", saved.config_size.into(), present.config_size.into()),
    ];
    if let Some(&(what, saved, present)) = numbers.iter().find(|(_, saved, present)| saved > present) {
        return Err(RestoreError::Fewer { what, saved, present });
    }
    if !present.features.contains(saved.features) {
        let missing = Features(saved.features.0 & !present.features.0);
        return Err(RestoreError::Features { saved: saved.features, missing });
    }
    if !present.backend_features.contains(saved.backend_features) {
        let missing = BackendFeatures(saved.backend_features.0 & !present.backend_features.0);
        return Err(RestoreError::BackendFeatures { saved: saved.backend_features, missing });
    }
    if !present.iova_range.contains(saved.iova_range) {
        let (saved, present) = (saved.iova_range, present.iova_range);
        return Err(RestoreError::IovaRange { saved, present });
    }
    if saved.address_mode != present.address_mode {
        let (saved, present) = (saved.address_mode, present.address_mode);
        return Err(RestoreError::AddressMode { saved, present });
    }
    Ok(())
}

/// The one record of a kind.
pub(crate) fn require<'a>(image: &'a Image, kind: &Kind) -> Result<&'a Record, RestoreError> {
    image.part(kind).ok_or(RestoreError::Missing { kind: kind.name })
}

/// Refuses records of kinds that are another sequence's.
pub(super) fn no_stray(image: &Image, device: bool) -> Result<(), RestoreError> {
    let other: &[Kind] = if device {
        &[kind::HANDOVER, kind::HANDLE, kind::CONFIG]
    } else {
        &[kind::DEVICE, kind::VRING, kind::CONFIG]
    };
    match other.iter().find(|kind| image.parts(kind).next().is_some()) {
        Some(kind) => Err(RestoreError::Stray { kind: kind.name }),
        None => Ok(()),
    }
}

/// Unless `holds`, what is saved of a [`Handover`](crate::handover::Handover) is invalid.
pub(crate) fn ensure_handle(holds: bool, what: &'static str) -> Result<(), RestoreError> {
    ensure(holds, &kind::HANDLE, what)
}

impl Image {
    /// What handles share.
    pub(crate) fn handover(&self) -> Result<&HandoverState, RestoreError> {
        no_stray(self, false)?;
        match require(self, &kind::HANDOVER)? {
            Record::Handover(state) => Ok(state),
            _ => Err(RestoreError::Missing { kind: kind::HANDOVER.name }),
        }
    }

    /// Every handle.
    pub(crate) fn handles(&self) -> impl Iterator<Item = &HandleState> {
        self.parts(&kind::HANDLE).filter_map(|part| match part {
            Record::Handle(handle) => Some(handle),
            _ => None,
        })
    }

    /// Every table.
    pub(crate) fn table_ids(&self) -> impl Iterator<Item = TableId> {
        self.tables.keys().copied()
    }

    /// One of them, checked: see [`build_table`].
    pub(crate) fn build_table<H: Host>(
        &self,
        id: TableId,
        profile: &Profile,
        may_be_stale: bool,
        source: &mut dyn StateSource<H>,
    ) -> Result<Table<H::Memory>, RestoreError> {
        match self.tables.get(&id) {
            Some(table) => build_table(id, table, profile, may_be_stale, source),
            None => Ok(Table::default()),
        }
    }
}

/// Builds a table, checking each mapping as an UPDATE is checked, and that the mappings fit each other.
fn build_table<H: Host>(
    id: TableId,
    image: &TableImage,
    profile: &Profile,
    may_be_stale: bool,
    source: &mut dyn StateSource<H>,
) -> Result<Table<H::Memory>, RestoreError> {
    let wrong = |what| Err(RestoreError::Table { table: id, what });
    if id.asid.0 >= profile.address_spaces {
        return wrong("the device has no such address space");
    }
    if image.mappings.len() > profile.max_iotlb_entries {
        return wrong("it has more mappings than the device allows");
    }
    // Far more than anybody makes, so that further ones can be numbered without a check.
    if image.next_update > u64::MAX / 2 {
        return wrong("its next UPDATE has a number that is not possible");
    }
    if let Some((_, range)) = image.overlap() {
        return Err(RestoreError::Mapping { table: id, range, what: "it overlaps the one before it" });
    }
    let mut table = Table::default();
    let mut updates: BTreeMap<u64, (IovaRange, bool)> = BTreeMap::new();
    for saved in image.mappings.values() {
        let invalid = |what| RestoreError::Mapping { table: id, range: saved.range, what };
        check_mapping(saved, profile, may_be_stale).map_err(invalid)?;
        if saved.update >= image.next_update {
            return Err(invalid("its UPDATE has a number that is not given out yet"));
        }
        let update = (saved.update_range, saved.broken);
        if *updates.entry(saved.update).or_insert(update) != update {
            return Err(invalid("another mapping of its UPDATE says something else of that UPDATE"));
        }
        let memory = source.memory(saved.memory, saved.range.size(), saved.perm);
        let memory =
            memory.map_err(|errno| RestoreError::Object { what: "memory", id: saved.memory.id, errno })?;
        if profile.private_memory != PrivateMemory::Copy && !memory.is_shared() {
            return Err(invalid("its memory is private, which the device does not map"));
        }
        let origin = iotlb::Record::without_fragments(saved.update_range, saved.broken);
        table.adopt(
            &origin,
            Mapping {
                range: saved.range,
                uaddr: saved.uaddr,
                perm: saved.perm,
                memory,
                stale: saved.stale,
                record: RecordId::from_number(saved.update),
            },
        );
    }
    table.number_from(image.next_update);
    Ok(table)
}

fn check_mapping(saved: &MappingState, profile: &Profile, may_be_stale: bool) -> Result<(), &'static str> {
    let pages = saved.range.first().is_multiple_of(PAGE_SIZE) && saved.range.size().is_multiple_of(PAGE_SIZE);
    if !profile.iova_range.contains(saved.range) {
        Err("the device cannot address it")
    } else if profile.address_mode == AddressMode::PinnedPages && !pages {
        Err("it is not made of whole pages")
    } else if saved.stale && !may_be_stale {
        Err("it waits for a REMAP, which the device does not offer")
    } else if !saved.update_range.contains(saved.range) {
        Err("it is not within its UPDATE")
    } else {
        Ok(())
    }
}
