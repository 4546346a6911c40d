//! [`Simulator`]: what the simulators share. The module parameters of the kernel's `vdpa_sim` are attributes of a device here.
//!
//! | `use_va` | `batch_mapping` | reaches client memory by | backend features of the live-update series |
//! |---|---|---|---|
//! | on | on | owner addresses, whole tables | NEW_OWNER, IOTLB_REMAP |
//! | on | off | owner addresses, single mappings | none: REMAP would be required and is unavailable |
//! | off | either | pinned pages | NEW_OWNER |
//! | objects | either | the memory objects behind the addresses, as `blk` does; the kernel's simulators have no such mode | NEW_OWNER |
//!
//! Source: uapi-spec 6.1, 8.6.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::dirty::DirtyTracking;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::iotlb::{Mapping, Table, Tree};
use vdpa_core::net::MAC_BYTES;
use vdpa_core::parent::{
    AddressMode, CompatReset, Dma, DmaMap, Parent, PinLimit, PrivateMemory, Profile, QueueStats, SetMap,
};
use vdpa_core::types::{Asid, IovaRange, QueueIndex, Result};
use vdpa_sys::guest::{GuestMemory, LinuxHost};

use super::options::{
    CPUS_ATTR, IOTLB_ATTR, MEMLOCK_ATTR, QUEUE_SIZE_ATTR, WORKER_ATTR, compat_reset, invalid, iotlb_entries,
    pin_limit, placement, queue_size, reject_unknown,
};
use vdpa_backend::worker::{ClientMemory, Placement, QueueControl};
use vdpa_control::api::{Attrs, CtlError};

/// Entries of the largest ring, as in the kernel's simulators (`VDPASIM_QUEUE_MAX`).
pub(super) const QUEUE_SIZE: u16 = 256;

/// The attributes of every simulator: name, and description of the value.
pub(super) const KNOWN: [(&str, &str); 12] = [
    ("use_va", "on|off|objects"),
    ("batch_mapping", "on|off"),
    IOTLB_ATTR,
    ("compat_reset", "keep|clean"),
    ("verify_remap", "on|off"),
    ("mem_table", "on|off"),
    ("vhost_log", "on|off"),
    ("reset_owner", "on|off"),
    QUEUE_SIZE_ATTR,
    MEMLOCK_ATTR,
    CPUS_ATTR,
    WORKER_ATTR,
];

/// By what a simulator reaches client memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UseVa {
    /// The owner's addresses.
    On,
    /// Pinned pages.
    Off,
    /// The memory objects behind the addresses: for a client that has no addresses, such as the kernel ([`SetMap`] only).
    Objects,
}

impl UseVa {
    fn parse(attrs: &Attrs) -> Result<Self, CtlError> {
        match attrs.get("use_va") {
            None | Some("on") => Ok(Self::On),
            Some("off") => Ok(Self::Off),
            Some("objects") => Ok(Self::Objects),
            Some(text) => Err(CtlError::new(Errno::INVAL, format!("use_va is \"{text}\""))
                .with_hint("\"on\", \"off\" or \"objects\" is right.")),
        }
    }
}

/// How a simulator treats mappings and owners.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// How client memory is accessed.
    pub(super) use_va: UseVa,
    /// Take a whole IOTLB at a time (`set_map`), else single mappings (`dma_map`).
    pub(super) batch_mapping: bool,
    /// Most entries of the simulator's own table, per address space. The IOTLB of the interface may have as many, and not fewer
    /// than in the kernel.
    pub(super) max_iotlb_entries: usize,
    /// Whether a reset clears the simulator's table when the client has not acknowledged IOTLB_PERSIST.
    pub(super) compat_reset: CompatReset,
    /// Refuse a REMAP to memory other than that of the mapping.
    pub(super) verify_remap: bool,
    /// SET_MEM_TABLE maps memory.
    pub(super) mem_table: bool,
    /// Offer the log of vhost.
    pub(super) vhost_log: bool,
    /// Support RESET_OWNER.
    pub(super) reset_owner: bool,
    /// Entries of the largest ring. The kernel's simulators have no parameter for it.
    pub(super) queue_size: u16,
    /// The limit on memory pinned for one owner.
    pub(super) pin_limit: PinLimit,
    /// Which thread serves the rings.
    pub(super) placement: Placement,
}

impl Default for Options {
    /// The kernel's defaults. REMAP is checked in addition, since its contract demands the same memory.
    fn default() -> Self {
        Self {
            use_va: UseVa::On,
            batch_mapping: true,
            max_iotlb_entries: 2048,
            compat_reset: CompatReset::Clean,
            verify_remap: true,
            mem_table: false,
            vhost_log: false,
            reset_owner: false,
            queue_size: QUEUE_SIZE,
            pin_limit: PinLimit::Rlimit,
            placement: Placement::default(),
        }
    }
}

impl Options {
    /// Parses the attributes of a device of `kind`, which takes those in `own` in addition to [`KNOWN`].
    pub(super) fn parse(kind: &str, attrs: &Attrs, own: &[(&str, &str)]) -> Result<Self, CtlError> {
        reject_unknown(kind, attrs, &[own, &KNOWN].concat())?;
        let default = Self::default();
        let switch = |key, default| attrs.switch(key).map_err(invalid).map(|on| on.unwrap_or(default));
        Ok(Self {
            use_va: UseVa::parse(attrs)?,
            batch_mapping: switch("batch_mapping", default.batch_mapping)?,
            max_iotlb_entries: iotlb_entries(attrs, default.max_iotlb_entries)?,
            compat_reset: compat_reset(attrs, default.compat_reset)?,
            verify_remap: switch("verify_remap", default.verify_remap)?,
            mem_table: switch("mem_table", default.mem_table)?,
            vhost_log: switch("vhost_log", default.vhost_log)?,
            reset_owner: switch("reset_owner", default.reset_owner)?,
            queue_size: queue_size(attrs, default.queue_size)?,
            pin_limit: pin_limit(attrs)?,
            placement: placement(attrs)?,
        })
    }

    /// `base`, a [`Profile::simulator`], with the changes that the options make.
    fn apply(&self, base: Profile) -> Profile {
        let live: &[_] = match (self.use_va, self.batch_mapping) {
            (UseVa::On, true) => &[BackendFeatures::NEW_OWNER, BackendFeatures::IOTLB_REMAP],
            (UseVa::On, false) => &[],
            (UseVa::Off | UseVa::Objects, _) => &[BackendFeatures::NEW_OWNER],
        };
        let (address_mode, private_memory) = match self.use_va {
            UseVa::On => (AddressMode::OwnerAddresses, PrivateMemory::Skip),
            UseVa::Off => (AddressMode::PinnedPages, PrivateMemory::Copy),
            UseVa::Objects => (AddressMode::Objects, PrivateMemory::Copy),
        };
        Profile {
            backend_features: base.backend_features | BackendFeatures::of(live),
            queue_size_max: self.queue_size,
            pin_limit: self.pin_limit,
            vring_size: !self.batch_mapping,
            compat_reset: self.compat_reset,
            address_mode,
            private_memory,
            identity_map: base.identity_map && self.use_va != UseVa::Objects,
            verify_remap: self.verify_remap,
            mem_table: self.mem_table,
            vhost_log: self.vhost_log,
            reset_owner: self.reset_owner,
            max_iotlb_entries: self.max_iotlb_entries.max(base.max_iotlb_entries),
            moves: true,
            ..base
        }
    }

    /// Checks that a table may have `entries` entries.
    ///
    /// # Errors
    /// `ENOSPC`.
    pub(super) fn check_room(&self, entries: usize) -> Result<()> {
        if entries <= self.max_iotlb_entries { Ok(()) } else { Err(Errno::NOSPC) }
    }
}

/// What differs between the simulators.
pub(super) trait Model: Debug + Send {
    /// See [`Parent::read_config`].
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// See [`Parent::write_config`].
    fn write_config(&self, offset: u32, data: &[u8]);

    /// See [`Parent::queue_stats`].
    fn queue_stats(&self, worker: &QueueControl, index: QueueIndex) -> QueueStats;

    /// See [`Parent::fail`].
    fn fail(&self, _worker: &QueueControl) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// See [`Parent::vendor_stats`].
    fn vendor_stats(&self, _index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        Err(Errno::OPNOTSUPP)
    }

    /// See [`Parent::save_state`].
    fn save_state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// See [`Parent::restore_state`].
    fn restore_state(&self, state: &[u8]) -> Result<()> {
        if state.is_empty() { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// See [`Parent::set_mac`].
    fn set_mac(&self, _mac: [u8; MAC_BYTES]) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }
}

/// A simulator: its profile, its model, and the worker that serves its queues.
#[derive(Debug)]
pub(super) struct Simulator<M> {
    profile: Profile,
    model: M,
    mappings: Mappings,
}

impl<M: Model> Simulator<M> {
    /// `base` is a [`Profile::simulator`].
    pub(super) fn new(name: &str, base: Profile, options: Options, model: M, worker: QueueControl) -> Self {
        let profile = options.apply(base);
        let memory = ClientMemory::new(name, worker, false);
        Self { profile, model, mappings: Mappings { memory, options, single: BTreeMap::new() } }
    }
}

impl<M: Model> Parent for Simulator<M> {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.model.read_config(offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.model.write_config(offset, data);
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        self.profile.mask_features(features)
    }

    vdpa_backend::queue_methods!(self => self.mappings.worker());

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        if self.mappings.options.batch_mapping {
            Dma::SetMap(&mut self.mappings)
        } else {
            Dma::DmaMap(&mut self.mappings)
        }
    }

    fn reset(&mut self) {
        self.mappings.worker().reset();
    }

    fn fail(&mut self) -> Result<()> {
        self.model.fail(self.mappings.worker())
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.model.queue_stats(self.mappings.worker(), index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        self.model.vendor_stats(index)
    }

    fn save_state(&self) -> Vec<u8> {
        self.model.save_state()
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        self.model.restore_state(state)
    }

    fn set_mac(&mut self, mac: [u8; MAC_BYTES]) -> Result<()> {
        self.model.set_mac(mac)
    }
}

/// The part of a simulator that accesses client memory: its worker, and the table of each address space.
#[derive(Debug)]
struct Mappings {
    memory: ClientMemory,
    options: Options,
    /// With `batch_mapping off`: by first I/O virtual address.
    single: BTreeMap<Asid, Tree<Mapping<GuestMemory>>>,
}

impl Mappings {
    const fn worker(&self) -> &QueueControl {
        self.memory.queues()
    }

    fn set_single(&mut self, asid: Asid) -> Result<()> {
        let entries = self.single.get(&asid).cloned().unwrap_or_default();
        self.memory.set_entries(asid, &entries)
    }
}

impl SetMap<LinuxHost> for Mappings {
    fn set_map(&mut self, asid: Asid, table: &Table<GuestMemory>) -> Result<()> {
        if let Err(full) = self.options.check_room(table.len()) {
            // As in the kernel, which empties the table before it fills it.
            self.memory.set_map(asid, &Table::default())?;
            return Err(full);
        }
        self.memory.set_map(asid, table)
    }

    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        Some(self.worker().dirty_tracking())
    }
}

impl DmaMap<LinuxHost> for Mappings {
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<GuestMemory>) -> Result<()> {
        let entries = self.single.entry(asid).or_default();
        self.options.check_room(entries.len() + 1)?;
        entries.insert(mapping.range.first(), mapping.clone());
        self.set_single(asid)
    }

    fn dma_unmap(&mut self, asid: Asid, range: IovaRange) {
        let entries = self.single.entry(asid).or_default();
        let inside = entries.range(range.first()..=range.last());
        let inside = inside.filter(|(_, mapping)| range.contains(mapping.range)).map(|(first, _)| first);
        inside.collect::<Vec<_>>().into_iter().for_each(|first| drop(entries.remove(first)));
        if let Err(errno) = self.set_single(asid) {
            tracing::error!("the worker has ended, so its mappings are not in use any more: {errno}");
        }
    }

    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        Some(self.worker().dirty_tracking())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> Result<Options, CtlError> {
        let mut attrs = Attrs::new();
        pairs.iter().for_each(|(name, value)| attrs.insert(*name, *value).unwrap());
        Options::parse("sim", &attrs, &[("mac", "MAC")])
    }

    fn profile(pairs: &[(&str, &str)]) -> Profile {
        options(pairs).unwrap().apply(Profile::simulator(2, Features::NONE, 1, 0))
    }

    #[test]
    fn backend_features_follow_the_address_mode() {
        for (pairs, own, size) in [
            (&[][..], 0x640, false),
            (&[("batch_mapping", "off")], 0x040, true),
            (&[("use_va", "off")], 0x240, false),
            (&[("use_va", "off"), ("batch_mapping", "off")], 0x240, true),
            (&[("use_va", "objects")], 0x240, false),
        ] {
            let profile = profile(pairs);
            assert_eq!((profile.backend_features.0, profile.vring_size), (own, size), "{pairs:?}");
        }
        assert_eq!(profile(&[("use_va", "off")]).private_memory, PrivateMemory::Copy);
        let objects = profile(&[("use_va", "objects")]);
        assert_eq!(objects.address_mode, AddressMode::Objects);
        assert!(!objects.identity_map && profile(&[]).identity_map, "addresses of whom would that be?");
        assert_eq!(profile(&[("compat_reset", "keep")]).compat_reset, CompatReset::Keep);
        let logs = profile(&[("vhost_log", "on")]);
        assert!(logs.vhost_log && logs.offered_features().has(Features::LOG_ALL));
        assert_eq!(profile(&[]).offered_features(), Features::NONE);
        assert!(profile(&[("mem_table", "on")]).mem_table && !profile(&[]).mem_table);
        assert!(profile(&[("reset_owner", "on")]).reset_owner && !profile(&[]).reset_owner);
        assert!(!profile(&[("verify_remap", "off")]).verify_remap);
        assert_eq!(profile(&[]).queue_size_max, 256);
        assert_eq!(profile(&[("queue_size", "1024")]).queue_size_max, 1024);
        assert_eq!(profile(&[("memlock", "8192")]).pin_limit, PinLimit::Pages(2));
        let entries = |value| profile(&[("max_iotlb_entries", value)]).max_iotlb_entries;
        assert_eq!(["16", "1000000"].map(entries), [2048, 1_000_000], "the interface's table");
    }

    #[test]
    fn errors_name_the_attribute() {
        for (name, value, errno) in [
            ("use_va", "yes", Errno::INVAL),
            ("max_iotlb_entries", "1", Errno::INVAL),
            ("compat_reset", "on", Errno::INVAL),
            ("queue_size", "1000", Errno::INVAL),
            ("path", "/d", Errno::OPNOTSUPP),
        ] {
            let error = options(&[(name, value)]).unwrap_err();
            assert_eq!(error.errno, errno, "{name}");
            assert!(error.message.contains(name), "{error}");
        }
        assert_eq!(options(&[("mac", "00:11:22:33:44:55")]).unwrap(), Options::default());
    }

    #[test]
    fn the_table_has_a_limit() {
        let options = options(&[("max_iotlb_entries", "2")]).unwrap();
        assert_eq!(options.check_room(2), Ok(()));
        assert_eq!(options.check_room(3), Err(Errno::NOSPC));
    }
}
