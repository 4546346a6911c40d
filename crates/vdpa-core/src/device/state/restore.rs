//! From records to a device.

use super::image::Image;
use super::kind;
use super::record::{LogState, Record, Ring, Shape, TableId, TableRole};
use super::validate::{RestoreError, check_shape, ensure, no_stray, require};
use super::{StateSource, VringState};
use crate::device::parent_table::ParentTable;
use crate::device::vring::{self, Vring};
use crate::device::{Device, EventOf, MemoryOf, SpaceOf, batch, default_map, vhost_log};
use crate::errno::Errno;
use crate::features::{Features, Status};
use crate::iotlb::Table;
use crate::parent::{Dma, Parent, Profile};
use crate::types::{Asid, Perm};

impl<P: Parent> Device<P> {
    /// Builds a device from records, around a parent that was just made. Its queues are stopped until
    /// [`resume_queues`](Self::resume_queues), which has to be called even when none ran.
    ///
    /// Nothing in `records` is believed: each value is checked as if a client had asked for it, against the parent that
    /// exists now. The parent is told of owner, features, events and mappings, unless it
    /// [was restored](Parent::is_restored) by itself. The owner's account is charged for pinned pages once, by this call,
    /// whatever the owner's limit is now; [`release`](Self::release) takes the charge back.
    ///
    /// Called by whoever takes the device over, before the first request. May block as long as
    /// [`set_map`](crate::parent::SetMap::set_map) does.
    ///
    /// # Errors
    /// See [`RestoreError`]; nothing is charged then.
    pub fn restore(
        parent: P,
        records: &[Record],
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<Self, RestoreError> {
        let image = Image::of(records)?;
        let mut device = Self::new(parent);
        device.quiesced = true;
        no_stray(&image, true)?;
        device.check_shape(&image)?;
        device.restore_words(&image)?;
        device.restore_status(&image)?;
        let owner = device.restore_owner(&image, source)?;
        device.restore_config_call(&image, source)?;
        device.restore_groups(&image)?;
        for part in image.parts(&kind::VRING) {
            let Record::Vring(saved) = part else { continue };
            device.restore_vring(saved, source)?;
        }
        device.restore_tables(&image, source)?;
        device.restore_log(&image, source)?;
        let pages = device.check_pages(&image)?;
        device.check_owned(owner.is_some(), pages)?;
        if device.parent.is_restored() {
            device.parent.set_config_call(device.config_call.as_ref());
        } else {
            device.tell_parent(owner.as_ref(), &image)?;
        }
        device.restore_failure()?;
        device.tell_log().map_err(|errno| RestoreError::Parent { what: "log", errno })?;
        if let Some(owner) = owner {
            device.ownership.restore(owner, pages).map_err(|_| RestoreError::Invalid {
                kind: kind::PINNED.name,
                what: "the owner's account cannot count so many pages",
            })?;
        }
        if !device.parent.is_restored() {
            device.restore_default_maps();
        }
        Ok(device)
    }

    /// Drops a device that was restored and has not been served: takes the charge for pinned pages back, and does nothing else.
    pub fn discard(mut self) {
        self.ownership.uncharge(self.ownership.pinned_pages());
    }

    fn check_shape(&self, image: &Image) -> Result<(), RestoreError> {
        let Record::Device(saved) = require(image, &kind::DEVICE)? else { return Ok(()) };
        check_shape(saved, &Shape::of(self.parent.profile(), self.backend_features()))
    }

    fn restore_words(&mut self, image: &Image) -> Result<(), RestoreError> {
        if let Record::Features { in_force, base } = require(image, &kind::FEATURES)? {
            let offered = self.parent.profile().features;
            let all = in_force.unwrap_or(Features::NONE) | *base;
            ensure(offered.contains(all), &kind::FEATURES, "the device does not offer these features")?;
            (self.features, self.base_features) = (*in_force, *base);
        }
        if let Record::BackendFeatures { acked } = require(image, &kind::BACKEND_FEATURES)? {
            let acceptable = self.check_backend_features(*acked).is_ok();
            ensure(acceptable, &kind::BACKEND_FEATURES, "the device does not take this word")?;
            self.acked = *acked;
        }
        if let Record::ForkFromOwner { value } = require(image, &kind::FORK_FROM_OWNER)? {
            ensure(*value <= 1, &kind::FORK_FROM_OWNER, "the value is neither 0 nor 1")?;
            self.fork_from_owner = *value;
        }
        Ok(())
    }

    fn restore_status(&mut self, image: &Image) -> Result<(), RestoreError> {
        if let Record::Open { open, failed } = require(image, &kind::OPEN)? {
            (self.opened, self.failed) = (*open, *failed);
        }
        let Record::Status { status, suspended, paused, ring_max } = *require(image, &kind::STATUS)? else {
            return Ok(());
        };
        let profile = self.parent.profile();
        let can_suspend = profile.suspend && status.contains(Status::DRIVER_OK);
        ensure(can_suspend || !suspended, &kind::STATUS, "suspended, and the device cannot be")?;
        ensure(suspended || !paused, &kind::STATUS, "queues stopped by SUSPEND, which is not in force")?;
        ensure(ring_max <= profile.queue_size_max, &kind::STATUS, "rings are larger than the device's")?;
        (self.status, self.suspended, self.paused, self.num_max) = (status, suspended, paused, ring_max);
        Ok(())
    }

    fn restore_owner(
        &self,
        image: &Image,
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<Option<SpaceOf<P>>, RestoreError> {
        let Record::Owner { space } = *require(image, &kind::OWNER)? else { return Ok(None) };
        let object = |id, errno| RestoreError::Object { what: "address space", id, errno };
        space.map(|id| source.address_space(id).map_err(|errno| object(id, errno))).transpose()
    }

    fn restore_config_call(
        &mut self,
        image: &Image,
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<(), RestoreError> {
        if let Record::ConfigCall { event } = *require(image, &kind::CONFIG_CALL)? {
            self.config_call = event_of::<P>(event, source)?;
        }
        Ok(())
    }

    pub(crate) fn restore_groups(&mut self, image: &Image) -> Result<(), RestoreError> {
        let spaces = self.parent.profile().address_spaces;
        for part in image.parts(&kind::GROUP) {
            let Record::Group { group, asid } = part else { continue };
            ensure(asid.0 < spaces, &kind::GROUP, "the device has no such address space")?;
            let at = usize::try_from(group.0).unwrap_or(usize::MAX);
            let place = self.group_asids.get_mut(at);
            ensure(place.is_some(), &kind::GROUP, "the device has no such group")?;
            place.into_iter().for_each(|place| *place = *asid);
        }
        let may_pass = default_map::initial(&mut self.parent).first().copied().unwrap_or(false);
        for part in image.parts(&kind::TRANSLATION) {
            let Record::Translation { asid, passthrough, refused } = *part else { continue };
            let passes = self.passthrough.get_mut(usize::try_from(asid.0).unwrap_or(usize::MAX));
            ensure(passes.is_some(), &kind::TRANSLATION, "the device has no such address space")?;
            ensure(may_pass || !passthrough, &kind::TRANSLATION, "the device passes no addresses through")?;
            passes.into_iter().for_each(|passes| *passes = passthrough);
            if refused {
                self.parent_tables.insert(asid, ParentTable { other: None, refused });
            }
        }
        Ok(())
    }

    fn restore_vring(
        &mut self,
        saved: &VringState,
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<(), RestoreError> {
        let index = saved.index;
        let profile = self.parent.profile();
        let runs = self.opened && self.status.contains(Status::DRIVER_OK) && !self.paused;
        let wrong = |what| Err(RestoreError::Vring { index, what });
        check_vring(saved, profile)?;
        check_group(saved, profile)?;
        let started = saved.started.as_ref();
        let features = self.features.unwrap_or(Features::NONE);
        let set = saved.addr.map(|addr| Ring { size: saved.num, addr, features });
        if started.is_some_and(|ring| !saved.running || !profile.features.contains(ring.features)) {
            return wrong("it does not run, or not with such features");
        }
        // A queue that did not come to rest in a reset or a close is at rest now: nobody counts on it.
        let resumes = saved.running && self.opened && self.num_max != 0;
        let ring = saved.started.or(set).filter(|ring| ring.size != 0);
        if resumes && !(runs && saved.enabled && ring.is_some()) {
            return wrong("it ran, and the device does not run or the queue is not set up");
        }
        let events = [saved.kick, saved.call, saved.err].map(|event| event_of::<P>(event, source));
        let [kick, call, err] = events;
        let vring = Vring::restore(saved, [kick?, call?, err?], ring.filter(|_| resumes));
        if let Some(place) = self.vrings.get_mut(usize::from(index.0)) {
            *place = vring;
        }
        Ok(())
    }

    fn restore_tables(
        &mut self,
        image: &Image,
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<(), RestoreError> {
        if let Record::Batch { asid: Some(asid) } = *require(image, &kind::BATCH)? {
            self.batch = Some(batch::Batch::new(asid));
        }
        let stale = self.offers_remap();
        for id in image.table_ids() {
            let table = image.build_table(id, self.parent.profile(), stale, source)?;
            let batch = self.batch.as_mut().filter(|batch| batch.asid == id.asid);
            let wrong = |what| Err(RestoreError::Table { table: id, what });
            match (id.role, batch) {
                (TableRole::Interface, _) => drop(self.tables.insert(id.asid, table)),
                (TableRole::Rollback, Some(batch)) => batch.without_remaps = Some(table),
                (TableRole::Rollback, None) => return wrong("no batch of its address space is open"),
                (TableRole::Parent, _) => {
                    let none = ParentTable { other: None, refused: false };
                    self.parent_tables.entry(id.asid).or_insert(none).other = Some(table);
                }
                (TableRole::Installed | TableRole::Handle(_), _) => return wrong("it is a handover's"),
            }
        }
        // Tables come in order of their roles, so that all of these are there.
        let without = |asid: &Asid| !self.tables.contains_key(asid);
        match self.batch.iter().map(|batch| &batch.asid).chain(self.parent_tables.keys()).find(|a| without(a))
        {
            Some(&asid) => {
                let table = TableId { role: TableRole::Interface, asid };
                Err(RestoreError::Table { table, what: "it does not exist, and something refers to it" })
            }
            None => Ok(()),
        }
    }

    /// A device that offers no log has saved none, and one that was saved by a program without it has no record of it.
    fn restore_log(
        &mut self,
        image: &Image,
        source: &mut dyn StateSource<P::Host>,
    ) -> Result<(), RestoreError> {
        let Some(Record::Log(LogState { base, event, all })) = image.part(&kind::LOG) else { return Ok(()) };
        let can = self.parent.profile().vhost_log;
        ensure(can, &kind::LOG, "the device has no log")?;
        self.log.all = *all;
        self.log.event = event_of::<P>(*event, source)?;
        let Some((uaddr, size, at)) = *base else { return Ok(()) };
        let object = |errno| RestoreError::Object { what: "memory", id: at.id, errno };
        let memory = source.memory(at, size, Perm::RW).map_err(object)?;
        self.log.base = vhost_log::base_of(uaddr, size, memory);
        ensure(self.log.base.is_some(), &kind::LOG, "its memory cannot be a log")
    }

    /// Checks that the mappings pin what was charged; returns the pages.
    fn check_pages(&self, image: &Image) -> Result<u64, RestoreError> {
        let Record::Pinned { pages: saved } = *require(image, &kind::PINNED)? else { return Ok(0) };
        let computed = self.pages_of_mappings();
        if computed == saved { Ok(saved) } else { Err(RestoreError::Charge { saved, computed }) }
    }

    /// Checks that a device without a client or an owner has nothing of one.
    fn check_owned(&self, has_owner: bool, pages: u64) -> Result<(), RestoreError> {
        let has_mappings = pages != 0 || self.mapped().entries != 0 || self.log.base.is_some();
        ensure(has_owner || !has_mappings, &kind::OWNER, "mappings and no owner")?;
        ensure(self.opened || !has_owner, &kind::OPEN, "an owner, and nobody has the device open")
    }

    /// Makes the parent what it was, but for queues.
    fn tell_parent(&mut self, owner: Option<&SpaceOf<P>>, image: &Image) -> Result<(), RestoreError> {
        let refused = |what| move |errno| RestoreError::Parent { what, errno };
        if owner.is_some() {
            self.parent.bind_owner(owner).map_err(refused("owner"))?;
        }
        if let Some(word) = self.features {
            match self.parent.negotiate(word) {
                Ok(in_force) if in_force == word => {}
                // An early GET_CONFIG sets the empty word even where the parent refuses it.
                Err(_) if word == Features::NONE => {}
                Ok(_) => return Err(refused("features")(Errno::INVAL)),
                Err(errno) => return Err(refused("features")(errno)),
            }
        }
        if let Record::Parent { bytes } = require(image, &kind::PARENT)? {
            self.parent.restore_state(bytes).map_err(refused("own state"))?;
        }
        self.parent.set_config_call(self.config_call.as_ref());
        for asid in (0..).map(Asid).take(self.passthrough.len()) {
            self.give_parent_its_table(asid).map_err(refused("mappings"))?;
        }
        Ok(())
    }

    fn restore_failure(&mut self) -> Result<(), RestoreError> {
        match if self.failed { self.parent.fail() } else { Ok(()) } {
            // No request is in flight yet that could be waited for.
            Ok(()) | Err(Errno::TIMEDOUT) => Ok(()),
            Err(errno) => Err(RestoreError::Parent { what: "failure", errno }),
        }
    }

    /// Gives the parent the table it had. One that it refused it may refuse again.
    fn give_parent_its_table(&mut self, asid: Asid) -> Result<(), Errno> {
        if self.has_identity_map(asid) {
            return Ok(());
        }
        let saved = self.parent_tables.get(&asid);
        let refused = saved.is_some_and(|saved| saved.refused);
        let other = saved.and_then(|saved| saved.other.as_ref());
        let table: Option<&Table<MemoryOf<P>>> = other.or_else(|| self.tables.get(&asid));
        let Some(table) = table.filter(|table| !table.is_empty()) else { return Ok(()) };
        let result = match self.parent.dma() {
            Dma::SetMap(map) => map.set_map(asid, table),
            Dma::DmaMap(map) => table.iter().try_for_each(|entry| map.dma_map(asid, entry)),
            Dma::Platform => Ok(()),
        };
        if refused { Ok(()) } else { result }
    }
}

/// Checks that a queue is in the group in which it was. A device may say so only when features are in force.
pub(crate) fn check_group(saved: &VringState, profile: &Profile) -> Result<(), RestoreError> {
    let (index, group) = (saved.index, profile.group_of(saved.index));
    let same = saved.group == group;
    if same { Ok(()) } else { Err(RestoreError::Vring { index, what: "it is in another group now" }) }
}

/// Checks that a device can have a queue: its index, sizes and addresses.
pub(crate) fn check_vring(saved: &VringState, profile: &Profile) -> Result<(), RestoreError> {
    let index = saved.index;
    let wrong = |what| Err(RestoreError::Vring { index, what });
    if index.0 >= profile.queues {
        return wrong("the device has no such queue");
    }
    let may_be = |size: u16| size <= profile.queue_size_max && (size == 0 || size.is_power_of_two());
    if !may_be(saved.num) || saved.started.is_some_and(|ring| !may_be(ring.size)) {
        return wrong("its size is neither 0 nor a power of two up to the largest");
    }
    let started = saved.started.as_ref();
    let mut addresses = saved.addr.iter().chain(started.map(|ring| &ring.addr));
    if addresses.any(|addr| vring::check_addr(addr).is_err()) {
        return wrong("its addresses have unknown flags or are misaligned");
    }
    Ok(())
}

fn event_of<P: Parent>(
    event: Option<u64>,
    source: &mut dyn StateSource<P::Host>,
) -> Result<Option<EventOf<P>>, RestoreError> {
    let object = |id, errno| RestoreError::Object { what: "event", id, errno };
    event.map(|id| source.event(id).map_err(|errno| object(id, errno))).transpose()
}
