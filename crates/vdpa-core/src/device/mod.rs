//! [`Device`]: the vhost-vdpa state machine for every parent.
//!
//! The methods are the requests of the interface, with their checks in the kernel's order. There are four kinds: life cycle
//! ([`open`](Device::open), [`release`](Device::release)); requests with a [`Caller`], which only the owner may make or which
//! change the owner; requests that any process with the device open may make; and getters for the management side.

mod batch;
mod changes;
mod config;
mod default_map;
mod dirty;
mod dma;
mod failure;
#[cfg(any(test, fuzzing))]
mod invariants;
mod mem_table;
pub mod moving;
mod ownership;
mod parent_table;
mod quiesce;
mod remap;
pub mod state;
#[cfg(test)]
mod tests;
mod vhost_log;
mod vring;
mod whole_table;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use dma::IotlbError;
pub use mem_table::{MemRegion, MemTableError};
pub use quiesce::ResumeError;
pub use vhost_log::VhostLogError;
use vring::Vring;
pub use vring::VringInfo;
pub use whole_table::WholeMapping;

use crate::dirty::DirtyTracking;
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::features::{BackendFeatures, Features, Status};
use crate::host::{Caller, Host};
use crate::iotlb::Table;
use crate::owner::Ownership;
use crate::parent::{AddressMode, CompatReset, Dma, Parent, Profile};
use crate::rules;
use crate::types::{Asid, GroupIndex, IovaRange, QueueIndex, Result};

pub(crate) type MemoryOf<P> = <<P as Parent>::Host as Host>::Memory;
pub(crate) type EventOf<P> = <<P as Parent>::Host as Host>::Event;
pub(crate) type SpaceOf<P> = <<P as Parent>::Host as Host>::AddressSpace;

/// The value of `VHOST_GET_FORK_FROM_OWNER` after an open.
const FORK_FROM_OWNER: u8 = 1;

/// A device: the state of the vhost-vdpa interface on top of a parent.
///
/// The front end serialises the requests of each device, as the kernel does with the device mutex (uapi-spec 1.1).
#[derive(Debug)]
pub struct Device<P: Parent> {
    parent: P,
    opened: bool,
    ownership: Ownership<P::Host>,
    status: Status,
    /// The flag of vhost-vdpa: SUSPEND sets it; RESUME and a reset clear it, a status write does not.
    suspended: bool,
    /// The queues are stopped although DRIVER_OK is set. Differs from `suspended` only with
    /// [`Profile::status_unsuspends`].
    paused: bool,
    /// Features in force; `None` until the driver (or an early GET_CONFIG) has set them.
    features: Option<Features>,
    /// The features that select the encoding of vring bases. Survive a reset, as the kernel's copy does.
    base_features: Features,
    acked: BackendFeatures,
    vrings: Vec<Vring<P::Host>>,
    /// Largest ring size in entries, read after the last successful reset.
    num_max: u16,
    group_asids: Vec<Asid>,
    tables: BTreeMap<Asid, Table<MemoryOf<P>>>,
    batch: Option<batch::Batch<MemoryOf<P>>>,
    /// The table that the parent translates with, where it is not the one in `tables`: see [`parent_table`].
    parent_tables: BTreeMap<Asid, parent_table::ParentTable<MemoryOf<P>>>,
    /// By address space: whether the parent has the identity map, since nothing was mapped yet.
    passthrough: Vec<bool>,
    /// Backend features of the parent, without contradictory ones: see [`parent_features`].
    own_features: BackendFeatures,
    /// What tracks the pages that the device writes, if it can.
    dirty: Option<Arc<dyn DirtyTracking>>,
    /// The client's log of them.
    log: vhost_log::Log<P::Host>,
    config_call: Option<EventOf<P>>,
    fork_from_owner: u8,
    /// The back end was removed: see [`fail`](Device::fail).
    failed: bool,
    /// No queue starts: see [`quiesce`](Device::quiesce).
    quiesced: bool,
    /// `None` until somebody asks for changes.
    changes: Option<Box<changes::Changes<MemoryOf<P>>>>,
}

impl<P: Parent> Device<P> {
    /// A device that is not open.
    pub fn new(mut parent: P) -> Self {
        let own_features = parent_features(&mut parent);
        let passthrough = default_map::initial(&mut parent);
        let dirty = dirty::tracking(&mut parent);
        let profile = parent.profile();
        let vrings = (0..profile.queues).map(|_| Vring::default()).collect();
        let group_asids = vec![Asid(0); profile.groups as usize];
        Self {
            opened: false,
            ownership: Ownership::new(),
            status: Status::RESET,
            suspended: false,
            paused: false,
            features: None,
            base_features: Features::NONE,
            acked: BackendFeatures::NONE,
            vrings,
            num_max: profile.queue_size_max,
            group_asids,
            tables: BTreeMap::new(),
            batch: None,
            parent_tables: BTreeMap::new(),
            passthrough,
            own_features,
            dirty,
            log: vhost_log::Log::default(),
            config_call: None,
            fork_from_owner: FORK_FROM_OWNER,
            failed: false,
            quiesced: false,
            changes: None,
            parent,
        }
    }

    // Life cycle.

    /// A client opens the device (uapi-spec 4.2).
    ///
    /// # Errors
    /// `EBUSY` while it is open; an error of the reset.
    pub fn open(&mut self) -> Result<()> {
        if self.opened {
            return Err(Errno::BUSY);
        }
        self.batch = None;
        // Nothing is negotiated yet, so this reset never cleans the map.
        self.reset_device(false)?;
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        self.touch_all();
        self.acked = BackendFeatures::NONE;
        self.base_features = Features::NONE;
        self.fork_from_owner = FORK_FROM_OWNER;
        self.opened = true;
        Ok(())
    }

    /// Handles the close of the last descriptor (uapi-spec 4.7): resets the device and removes owner, mappings and negotiated
    /// words. Errors are ignored, because no caller could receive them.
    pub fn release(&mut self) {
        if !self.opened {
            return;
        }
        let _ = self.reset_device(self.cleans_map());
        self.forget_owner();
        self.set_config_call(None);
        self.opened = false;
    }

    // Identity and negotiation.

    /// The parent's constants.
    pub fn profile(&self) -> &Profile {
        self.parent.profile()
    }

    /// `VHOST_GET_BACKEND_FEATURES` (uapi-spec 1.4).
    pub fn backend_features(&self) -> BackendFeatures {
        const BASE: BackendFeatures = BackendFeatures::of(&[
            BackendFeatures::IOTLB_MSG_V2,
            BackendFeatures::IOTLB_BATCH,
            BackendFeatures::IOTLB_ASID,
        ]);
        let profile = self.parent.profile();
        let mut offered = BASE | self.own_features;
        if profile.suspend {
            offered = offered.with(BackendFeatures::SUSPEND);
        }
        if profile.resume {
            offered = offered.with(BackendFeatures::RESUME);
        }
        if profile.reset_map {
            offered = offered.with(BackendFeatures::IOTLB_PERSIST);
        }
        if self.dirty.is_some() {
            offered = offered.with(BackendFeatures::DIRTY_LOG);
        }
        if profile.moves {
            offered = offered.with(BackendFeatures::DEVICE_STATE);
        }
        offered
    }

    /// `VHOST_SET_BACKEND_FEATURES`: replaces the acknowledged word (uapi-spec 1.4).
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an unknown bit, or for SUSPEND or a higher bit that is not offered; `EINVAL` for DESC_ASID without
    /// IOTLB_ASID.
    pub fn set_backend_features(&mut self, word: BackendFeatures) -> Result<()> {
        if !faults::is(Fault::BackendAnyBit) {
            self.check_backend_features(word)?;
        }
        self.acked = word;
        Ok(())
    }

    fn check_backend_features(&self, word: BackendFeatures) -> Result<()> {
        const KNOWN: u64 = 0x1fe;
        const UNCHECKED: u64 = 0x4e;
        let offered = self.backend_features();
        let acceptable = BackendFeatures(KNOWN | offered.0 & !1);
        if !acceptable.contains(word) {
            return Err(Errno::OPNOTSUPP);
        }
        let missing = |bit| word.has(bit) && !offered.has(bit);
        if missing(BackendFeatures::SUSPEND) || missing(BackendFeatures::RESUME) {
            return Err(Errno::OPNOTSUPP);
        }
        if word.has(BackendFeatures::DESC_ASID) && !word.has(BackendFeatures::IOTLB_ASID) {
            return Err(Errno::INVAL);
        }
        if !(offered | BackendFeatures(UNCHECKED)).contains(word) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(())
    }

    /// Backend features the client acknowledged.
    pub const fn acked_backend_features(&self) -> BackendFeatures {
        self.acked
    }

    /// Negotiated features; `None` before SET_FEATURES or an early GET_CONFIG has set them.
    pub const fn negotiated_features(&self) -> Option<Features> {
        self.features
    }

    /// `VHOST_SET_FEATURES` (uapi-spec 1.4). Where the device offers [`LOG_ALL`](Features::LOG_ALL), this bit, which is none of the
    /// driver's, can be changed at any time; that blocks until requests are done that the device had begun before.
    ///
    /// # Errors
    /// `EBUSY` after FEATURES_OK; `EINVAL` when the parent refuses the word; `EFAULT` when the log is too short.
    pub fn set_features(&mut self, word: Features) -> Result<()> {
        let mut word = word;
        if self.parent.profile().vhost_log {
            let all = word.has(Features::LOG_ALL);
            word = word.without(Features::LOG_ALL);
            let same = self.features == Some(word & self.parent.profile().features);
            if same && self.status.contains(Status::FEATURES_OK) {
                return self.set_log_all(all).map_err(VhostLogError::errno);
            }
            self.check_features_open()?;
            self.set_log_all(all).map_err(VhostLogError::errno)?;
        }
        self.check_features_open()?;
        let in_force = self.parent.negotiate(word).map_err(|_| Errno::INVAL)?;
        self.features = Some(in_force);
        self.base_features = in_force;
        // Queues that run go on with other features than the next start.
        self.touch_all();
        Ok(())
    }

    fn check_features_open(&self) -> Result<()> {
        let fixed = self.status.contains(Status::FEATURES_OK) && !faults::is(Fault::FeaturesAnyTime);
        if fixed { Err(Errno::BUSY) } else { Ok(()) }
    }

    // Status.

    /// Whether SUSPEND is in force.
    pub const fn suspended(&self) -> bool {
        self.suspended
    }

    /// `VHOST_VDPA_SET_STATUS` (uapi-spec 1.5, 4.4, 4.5). Writing 0 blocks until requests in flight are completed.
    ///
    /// # Errors
    /// `EINVAL` when a value other than 0 clears a bit; an error of the reset; for DRIVER_OK an error of the parent's
    /// [`claim`](Parent::claim); an error of the device behind.
    pub fn set_status(&mut self, new: Status) -> Result<()> {
        if new == Status::RESET {
            return self.reset_device(self.cleans_map());
        }
        if !new.contains(self.status) && !faults::is(Fault::StatusClears) {
            return Err(Errno::INVAL);
        }
        if new.contains(Status::DRIVER_OK) {
            self.parent.claim()?;
        }
        self.status = match self.parent.upstream() {
            // It may leave bits clear that it refuses.
            Some(upstream) => upstream.set_status(new).and_then(|()| upstream.status())?,
            None => new,
        };
        if new.contains(Status::DRIVER_OK) && self.parent.profile().status_unsuspends {
            self.paused = false;
        }
        self.start_ready();
        self.signal_failure();
        Ok(())
    }

    /// `VHOST_VDPA_SUSPEND` (uapi-spec 1.8, 8.7). Blocks until requests in flight are completed. When it
    /// returns, client memory is no longer accessed and vring bases are stable.
    ///
    /// # Errors
    /// `EOPNOTSUPP`; `EIO` when a queue cannot be stopped, and the device continues to run then; an error of the device behind.
    pub fn suspend(&mut self) -> Result<()> {
        if !self.status.contains(Status::DRIVER_OK) {
            return Ok(());
        }
        if !self.parent.profile().suspend {
            return Err(Errno::OPNOTSUPP);
        }
        if faults::is(Fault::SuspendRunsOn) {
            self.suspended = true;
            return Ok(());
        }
        if let Some(upstream) = self.parent.upstream() {
            upstream.suspend()?;
        }
        let before = std::mem::replace(&mut self.paused, true);
        if let Err(error) = self.stop_all() {
            self.paused = before;
            self.start_ready();
            return Err(error);
        }
        self.suspended = true;
        Ok(())
    }

    /// `VHOST_VDPA_RESUME` (uapi-spec 1.8). Kicks that came while suspended are served.
    ///
    /// # Errors
    /// `EOPNOTSUPP`; an error of the parent's [`claim`](Parent::claim), or of the device behind.
    pub fn resume(&mut self) -> Result<()> {
        if !self.status.contains(Status::DRIVER_OK) {
            return Ok(());
        }
        if !self.parent.profile().resume {
            return Err(Errno::OPNOTSUPP);
        }
        self.parent.claim()?;
        if let Some(upstream) = self.parent.upstream() {
            upstream.resume()?;
        }
        self.suspended = false;
        if faults::is(Fault::ResumeStaysStopped) {
            return Ok(());
        }
        self.paused = false;
        self.start_ready();
        Ok(())
    }

    /// Whether a client reset drops the parent's translation. An acknowledged NEW_OWNER counts as PERSIST:
    /// clients of the live-update series acknowledge only that (uapi-spec 8.8).
    fn cleans_map(&self) -> bool {
        self.parent.profile().compat_reset == CompatReset::Clean && rules::reset_cleans_map(self.acked.0)
    }

    /// One device reset (uapi-spec 4.5). IOTLB, pins, owner, backend features, eventfds and batch survive.
    fn reset_device(&mut self, clean_map: bool) -> Result<()> {
        self.suspended &= faults::is(Fault::ResetKeepsSuspended);
        self.paused = false;
        self.num_max = 0;
        self.features = None;
        if let Some(upstream) = self.parent.upstream() {
            upstream.set_status(Status::RESET)?;
        }
        self.stop_all()?;
        // Features go, and this one with them; where the log is stays, as it does in vhost.
        self.set_log_all(false).map_err(VhostLogError::errno)?;
        self.status = Status::RESET;
        self.vrings.iter_mut().for_each(Vring::reset);
        self.touch_all();
        self.group_asids.iter_mut().for_each(|asid| *asid = Asid(0));
        self.parent.reset();
        if clean_map && !faults::is(Fault::ResetKeepsTranslation) {
            self.restore_default_map();
        }
        if faults::is(Fault::ResetUnmaps) {
            self.unmap_everything();
        }
        if faults::is(Fault::ResetDisowns) {
            self.ownership.clear();
        }
        self.num_max = self.parent.profile().queue_size_max;
        Ok(())
    }

    // Groups.

    /// `VHOST_VDPA_SET_GROUP_ASID` (uapi-spec 1.6). The first word is checked against the number of *queues*
    /// before the number of groups, because the kernel's handler reads it as a queue index.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EINVAL` for group or asid; `EBUSY` after DRIVER_OK, suspended or not; an error of the device behind.
    pub fn set_group_asid(
        &mut self,
        caller: &dyn Caller<P::Host>,
        group: GroupIndex,
        asid: Asid,
    ) -> Result<()> {
        self.ownership.check(caller)?;
        let profile = self.parent.profile();
        if group.0 >= u32::from(profile.queues) {
            return Err(Errno::NOBUFS);
        }
        if group.0 >= profile.groups || asid.0 >= profile.address_spaces {
            return Err(Errno::INVAL);
        }
        if self.status.contains(Status::DRIVER_OK) && !faults::is(Fault::GroupAsidAnyTime) {
            return Err(Errno::BUSY);
        }
        if let Some(upstream) = self.parent.upstream() {
            upstream.set_group_asid(group, asid)?;
        }
        self.group_asids[group.0 as usize] = asid;
        Ok(())
    }

    fn asid_of(&self, queue: QueueIndex) -> Asid {
        let group = self.parent.profile().group_of(queue);
        self.group_asids.get(group.0 as usize).copied().unwrap_or_default()
    }

    // For the management side.

    /// Whether a client has it open.
    pub const fn is_open(&self) -> bool {
        self.opened
    }

    /// The owner's address space.
    pub fn owner(&self) -> Option<&SpaceOf<P>> {
        self.ownership.owner()
    }

    /// Pages pinned for this device, on the owner's account.
    pub const fn pinned_pages(&self) -> u64 {
        self.ownership.pinned_pages()
    }

    /// Number of mapped entries and bytes over all address spaces, and of entries that need a REMAP.
    pub fn mapped(&self) -> Mapped {
        let mut sum = Mapped::default();
        for entry in self.tables.values().flat_map(Table::iter) {
            sum.entries += 1;
            sum.bytes = sum.bytes.saturating_add(entry.range.size());
            sum.stale += usize::from(entry.stale);
        }
        sum
    }

    /// Checks that `caller` is the owner.
    ///
    /// # Errors
    /// `EPERM`.
    pub fn check_owner(&self, caller: &dyn Caller<P::Host>) -> Result<()> {
        self.ownership.check(caller).map(drop)
    }

    /// Usable I/O virtual addresses.
    pub fn iova_range(&self) -> IovaRange {
        self.parent.profile().iova_range
    }

    /// The parent.
    pub const fn parent(&self) -> &P {
        &self.parent
    }

    /// The parent, for its own management requests. The caller must not start or stop queues or change mappings.
    pub const fn parent_mut(&mut self) -> &mut P {
        &mut self.parent
    }
}

/// The backend features of the parent's profile, without those that contradict its translation (uapi-spec 1.4, 8.6).
///
/// REMAP requires owner addresses in whole tables (R3, O4, O5), and a device that uses owner addresses offers both NEW_OWNER
/// and REMAP or neither. A device without a translation of its own always offers PERSIST: no reset can drop its mappings.
fn parent_features<P: Parent>(parent: &mut P) -> BackendFeatures {
    const LIVE: BackendFeatures =
        BackendFeatures::of(&[BackendFeatures::NEW_OWNER, BackendFeatures::IOTLB_REMAP]);
    let whole_tables = matches!(parent.dma(), Dma::SetMap(_));
    let platform = matches!(parent.dma(), Dma::Platform);
    let profile = parent.profile();
    let mut own = profile.backend_features;
    if profile.address_mode != AddressMode::OwnerAddresses {
        own = own.without(BackendFeatures::IOTLB_REMAP);
    } else if !whole_tables || !own.contains(LIVE) {
        own = own.without(BackendFeatures::NEW_OWNER).without(BackendFeatures::IOTLB_REMAP);
    }
    if platform { own.with(BackendFeatures::IOTLB_PERSIST) } else { own }
}

/// A summary of what is mapped: see [`Device::mapped`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Number of entries.
    pub entries: usize,
    /// Number of bytes.
    pub bytes: u64,
    /// Number of stale entries.
    pub stale: usize,
}
