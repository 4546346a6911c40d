//! A [`Handover`] and its handles as [`Record`]s: see [`device::state`](crate::device::state).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::{ConfigWrites, Handle, Handover, MemoryOf, Pending, Shared, Tables, lock};
use crate::device::state::{
    self, ConfigBytes, HandleState, HandoverState, Image, Record, RestoreError, Shape, StateSink,
    StateSource, TableId, TableRole,
};
use crate::iotlb::Table;
use crate::parent::{Dma, Parent, Profile};
use crate::types::Result;

impl<P: Parent> Handover<P> {
    /// Increases whenever a table of a [`snapshot`](Self::snapshot) may have changed, and when a handle comes or goes. Whoever
    /// keeps a log compares what comes [before the tables](Self::state) by itself.
    #[must_use]
    pub fn changes(&self) -> u64 {
        lock(&self.shared).changes
    }

    /// The records with which a [`snapshot`](Self::snapshot) begins: all but those of tables. Costs little, whatever is mapped.
    ///
    /// # Errors
    /// What `sink` reports.
    pub fn state(&self, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        lock(&self.shared).state(sink)
    }

    /// What its handles share, and what each has asked for. The devices around the handles are saved by themselves.
    ///
    /// Called by whoever saves these devices, when none of them makes requests. Costs as much as is mapped. Does not
    /// block.
    ///
    /// # Errors
    /// What `sink` reports.
    pub fn snapshot(&self, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        let shared = lock(&self.shared);
        let mut records = shared.state(sink)?;
        save_tables::<P>(TableRole::Installed, &shared.installed, sink, &mut records)?;
        for (&id, pending) in &shared.pending {
            save_tables::<P>(TableRole::Handle(id), &pending.tables, sink, &mut records)?;
        }
        Ok(records)
    }

    /// Puts handles in front of a parent that was just made, as they were in another process; they come in the order of
    /// their [numbers](Handle::id). A [`Device`](crate::device::Device) is to be restored around each.
    ///
    /// Nothing in `records` is believed. May block as long as [`set_map`](crate::parent::SetMap::set_map) does.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(
        parent: P,
        records: &[Record],
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<(Self, Vec<Handle<P>>), RestoreError> {
        let image = Image::of(records)?;
        let this = Self::new(parent).map_err(|errno| RestoreError::Parent { what: "handover", errno })?;
        let handles = {
            let mut shared = lock(&this.shared);
            let state = image.handover()?;
            state::check_shape(&state.shape, &shape(shared.parent.profile()))?;
            shared.restore_handles(state, &image, source)?;
            shared.tell_parent(&state.parent)?;
            let profile = shared.parent.profile();
            let handle = |&id| restored_handle(id, profile.clone(), &this.shared);
            shared.pending.keys().map(handle).collect()
        };
        Ok((this, handles))
    }
}

fn restored_handle<P: Parent>(id: u64, profile: Profile, shared: &Arc<Mutex<Shared<P>>>) -> Handle<P> {
    Handle { id, profile, restored: true, shared: Arc::clone(shared) }
}

impl<P: Parent> Shared<P> {
    fn state(&self, sink: &mut dyn StateSink<P::Host>) -> Result<Vec<Record>> {
        let mut records = vec![Record::Handover(HandoverState {
            shape: shape(self.parent.profile()),
            active: self.active,
            deferred: self.deferred,
            next_handle: self.next_id,
            written: config_bytes(&self.config),
            written_before: config_bytes(&self.previous_config),
            parent: self.parent.save_state(),
        })];
        for (&id, pending) in &self.pending {
            records.push(Record::Handle(HandleState {
                id,
                features: pending.features,
                owner: pending.owner.as_ref().map(|owner| sink.address_space(owner)).transpose()?,
                superseded: pending.superseded,
                written: config_bytes(&pending.config),
            }));
        }
        Ok(records)
    }

    fn restore_handles(
        &mut self,
        state: &HandoverState,
        image: &Image,
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<(), RestoreError> {
        let profile = self.parent.profile().clone();
        self.next_id = state.next_handle;
        for saved in image.handles() {
            let valid = saved.id < state.next_handle
                && saved.features.is_none_or(|word| profile.features.contains(word))
                && written(&saved.written, &profile).is_some();
            state::ensure_handle(valid, "its number, its features or what it has written is not possible")?;
            let object = |id, errno| RestoreError::Object { what: "address space", id, errno };
            let owner = saved.owner.map(|id| source.address_space(id).map_err(|errno| object(id, errno)));
            let pending = Pending {
                features: saved.features,
                tables: BTreeMap::new(),
                owner: owner.transpose()?,
                // The device around the handle has it.
                config_call: None,
                config: written(&saved.written, &profile).unwrap_or_default(),
                superseded: saved.superseded,
            };
            self.pending.insert(saved.id, pending);
        }
        let active = state.active.is_none_or(|id| self.pending.contains_key(&id));
        state::ensure_handle(active, "the active handle does not exist")?;
        let bytes = written(&state.written, &profile).zip(written(&state.written_before, &profile));
        state::ensure_handle(bytes.is_some(), "bytes outside of configuration space were written")?;
        (self.config, self.previous_config) = bytes.unwrap_or_default();
        (self.active, self.deferred) = (state.active, state.deferred);
        for id in image.table_ids() {
            let table = image.build_table(id, &profile, false, source)?;
            let tables = match id.role {
                TableRole::Installed => Some(&mut self.installed),
                TableRole::Handle(handle) => self.pending.get_mut(&handle).map(|pending| &mut pending.tables),
                TableRole::Interface | TableRole::Rollback | TableRole::Parent => None,
            };
            let what = "it is of a device, or of a handle that does not exist";
            tables.ok_or(RestoreError::Table { table: id, what })?.insert(id.asid, table);
        }
        Ok(())
    }

    /// Makes the parent what it was, but for queues.
    fn tell_parent(&mut self, own_state: &[u8]) -> Result<(), RestoreError> {
        let refused = |what| move |errno| RestoreError::Parent { what, errno };
        let only = self.pending.keys().next().copied().filter(|_| self.has_one_handle());
        if let Some(pending) = self.active.or(only).and_then(|id| self.pending.get(&id)) {
            if pending.owner.is_some() {
                self.parent.bind_owner(pending.owner.as_ref()).map_err(refused("owner"))?;
            }
            if let Some(word) = pending.features {
                self.parent.negotiate(word).map_err(refused("features"))?;
            }
        }
        self.parent.restore_state(own_state).map_err(refused("own state"))?;
        let Dma::SetMap(map) = self.parent.dma() else { return Ok(()) };
        self.installed
            .iter()
            .try_for_each(|(&asid, table)| map.set_map(asid, table))
            .map_err(refused("mappings"))
    }
}

fn shape(profile: &Profile) -> Shape {
    Shape::of(profile, profile.backend_features)
}

fn config_bytes(written: &ConfigWrites) -> ConfigBytes {
    written.iter().map(|(&offset, &byte)| (offset, byte)).collect()
}

/// The bytes, if all are in configuration space.
fn written(bytes: &ConfigBytes, profile: &Profile) -> Option<ConfigWrites> {
    bytes.iter().all(|(offset, _)| *offset < profile.config_size).then(|| bytes.iter().copied().collect())
}

/// Saves tables. Which UPDATE made a mapping is the interface's business: here each is one of its own.
fn save_tables<P: Parent>(
    role: TableRole,
    tables: &Tables<P>,
    sink: &mut dyn StateSink<P::Host>,
    records: &mut Vec<Record>,
) -> Result<()> {
    for (&asid, table) in tables {
        let id = TableId { role, asid };
        let table: &Table<MemoryOf<P>> = table;
        records.push(Record::Table { table: id, next_update: table.len() as u64 });
        for (mapping, number) in table.iter().zip(0..) {
            records.push(state::mapping_record::<P::Host>(
                id,
                mapping,
                number,
                (mapping.range, false),
                sink,
            )?);
        }
    }
    Ok(())
}
