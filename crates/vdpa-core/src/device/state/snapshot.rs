//! From a device to records.

use super::StateSink;
use super::record::{LogState, MappingState, Record, Shape, TableId, VringState};
use crate::device::changes::{Changes, Pending};
use crate::device::{Device, MemoryOf};
use crate::features::Features;
use crate::host::Host;
use crate::iotlb::{self, Mapping};
use crate::parent::Parent;
use crate::types::{Asid, GroupIndex, IovaRange, QueueIndex, Result};

impl<P: Parent> Device<P> {
    /// Everything that the interface remembers. The positions of queues that run are those at which they were started;
    /// [`quiesce`](Self::quiesce) makes them exact.
    ///
    /// Called by whoever saves the device, in any state. Does not block, and changes nothing.
    ///
    /// # Errors
    /// What `sink` reports.
    pub fn snapshot(&self, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        let parts = self.parts(sink)?;
        self.snapshot_after(parts, sink)
    }

    /// A snapshot that begins with `parts`.
    fn snapshot_after(&self, parts: Vec<Record>, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        // In the order of their kinds, as an image has them.
        let (log, mut records): (Vec<_>, Vec<_>) =
            parts.into_iter().partition(|part| matches!(part, Record::Log(_)));
        for index in (0..self.parent.profile().queues).map(QueueIndex) {
            records.extend(self.vring_state(index, sink)?.map(Record::Vring));
        }
        records.extend(log);
        let mut tables: Vec<_> = self.tables_by_role().collect();
        tables.sort_by_key(|(id, _)| *id);
        for (id, table) in tables {
            records.push(Record::Table { table: id, next_update: table.next_record() });
            for mapping in table.iter() {
                records.push(of_interface::<P::Host>(id, mapping, &table.origin(mapping), sink)?);
            }
        }
        Ok(records)
    }

    /// What has changed since the last call; the first call gives a [`snapshot`](Self::snapshot), and so does one that
    /// comes too late, after more changes than are kept. All records since the last snapshot, applied in order, say what a
    /// snapshot says now.
    ///
    /// Called after a request and before its answer, so that a log has it before the client knows. Costs as much as the
    /// request has changed, not as much as is mapped. A device that was never asked keeps no changes. Does not block.
    ///
    /// # Errors
    /// What `sink` reports; the next call gives a snapshot then.
    pub fn take_changes(&mut self, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        self.flush_tables();
        let Some(mut changes) = self.changes.take().filter(|changes| !changes.lost) else {
            let said = self.parts(sink)?;
            let records = self.snapshot_after(said.clone(), sink)?;
            self.changes = Some(Box::new(Changes::new(said, self.tables_mut())));
            return Ok(records);
        };
        // On an error they are not put back: what is lost makes the next call begin anew.
        let records = self.describe_changes(&mut changes, sink)?;
        self.changes = Some(changes);
        Ok(records)
    }

    /// Keeps no changes from now on, until the next [`take_changes`](Self::take_changes).
    pub fn forget_changes(&mut self) {
        self.changes = None;
        self.tables_mut().for_each(|(_, table)| table.stop_logging());
    }

    fn describe_changes(
        &self,
        changes: &mut Changes<MemoryOf<P>>,
        sink: &mut dyn StateSink<P::Host>,
    ) -> Result<Vec<Record>> {
        let mut records = Vec::with_capacity(changes.pending.len());
        for pending in changes.pending.drain(..) {
            records.push(match pending {
                Pending::Record(record) => record,
                Pending::Mapping(table, mapping, update) => {
                    of_interface::<P::Host>(table, &mapping, &update, sink)?
                }
            });
        }
        for index in std::mem::take(&mut changes.vrings) {
            let Some(state) = self.vring_state(index, sink)? else { continue };
            if changes.said_of_vrings.get(&index) != Some(&state) {
                changes.said_of_vrings.insert(index, state.clone());
                records.push(Record::Vring(state));
            }
        }
        let now = self.parts(sink)?;
        let changed = now.iter().zip(&changes.said).filter(|(now, said)| now != said);
        records.extend(changed.map(|(now, _)| now.clone()));
        changes.said = now;
        Ok(records)
    }

    /// Everything but queues and tables. Always the same records in the same order.
    fn parts(&self, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        let owner = self.ownership.owner();
        let mut parts = vec![
            Record::Device(Shape::of(self.parent.profile(), self.backend_features())),
            Record::Open { open: self.opened, failed: self.failed },
            Record::Features { in_force: self.features, base: self.base_features },
            Record::BackendFeatures { acked: self.acked },
            Record::Status {
                status: self.status,
                suspended: self.suspended,
                paused: self.paused,
                ring_max: self.num_max,
            },
            Record::ForkFromOwner { value: self.fork_from_owner },
            Record::Owner { space: owner.map(|space| sink.address_space(space)).transpose()? },
            Record::ConfigCall {
                event: self.config_call.as_ref().map(|event| sink.event(event)).transpose()?,
            },
            Record::Batch { asid: self.batch.as_ref().map(|batch| batch.asid) },
            Record::Pinned { pages: self.ownership.pinned_pages() },
        ];
        let groups = (0..).map(GroupIndex).zip(&self.group_asids);
        parts.extend(groups.map(|(group, &asid)| Record::Group { group, asid }));
        let spaces = (0..).map(Asid).zip(&self.passthrough);
        parts.extend(spaces.map(|(asid, &passthrough)| Record::Translation {
            asid,
            passthrough,
            refused: self.parent_tables.get(&asid).is_some_and(|parent| parent.refused),
        }));
        if self.parent.profile().vhost_log {
            parts.push(Record::Log(self.log_state(sink)?));
        }
        parts.push(Record::Parent { bytes: self.parent.save_state() });
        Ok(parts)
    }

    fn log_state(&self, sink: &mut dyn StateSink<P::Host>) -> Result<LogState> {
        let base = self.log.base.as_ref();
        let base = base.map(|base| Ok((base.uaddr, base.size, sink.memory(&base.memory)?))).transpose()?;
        let event = self.log.event.as_ref().map(|event| sink.event(event)).transpose()?;
        Ok(LogState { base, event, all: self.log.all })
    }

    fn vring_state(
        &self,
        index: QueueIndex,
        sink: &mut dyn StateSink<P::Host>,
    ) -> Result<Option<VringState>> {
        let group = self.parent.profile().group_of(index);
        let vring = self.vrings.get(usize::from(index.0));
        let features = self.features.unwrap_or(Features::NONE);
        vring.map(|vring| vring.save(index, (group, features), sink)).transpose()
    }
}

/// A mapping that is in `table`, and was made by an UPDATE of this number, which covered this range and has lost a part or
/// not.
pub(crate) fn mapping_record<H: Host>(
    table: TableId,
    mapping: &Mapping<H::Memory>,
    update: u64,
    (update_range, broken): (IovaRange, bool),
    sink: &mut dyn StateSink<H>,
) -> Result<Record> {
    Ok(Record::Mapping(MappingState {
        table,
        range: mapping.range,
        uaddr: mapping.uaddr,
        perm: mapping.perm,
        stale: mapping.stale,
        memory: sink.memory(&mapping.memory)?,
        update,
        update_range,
        broken,
    }))
}

fn of_interface<H: Host>(
    table: TableId,
    mapping: &Mapping<H::Memory>,
    origin: &iotlb::Record,
    sink: &mut dyn StateSink<H>,
) -> Result<Record> {
    mapping_record(table, mapping, mapping.record.number(), (origin.range, origin.broken), sink)
}
