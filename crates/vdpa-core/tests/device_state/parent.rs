//! A parent that keeps book of what it is told, and refuses by rules that depend on nothing else.

use std::collections::BTreeMap;

use std::sync::{Arc, Mutex};

use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyLimits, DirtyRange, DirtySink, DirtyTracking, Tracked, VhostLog};
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::iotlb::{Mapping, Table};
use vdpa_core::parent::{AddressMode, CompatReset, Dma, DmaMap, Parent, PrivateMemory, Profile, SetMap};
use vdpa_core::testing::{TestHost, TestPiece, TestSpace};
use vdpa_core::types::{Asid, GroupIndex, IovaRange, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};

pub(crate) const CONFIG: u32 = 16;

/// What a device is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// Whole tables, single mappings, or neither.
    pub(crate) way: u8,
    pub(crate) mode: u8,
    pub(crate) flags: [bool; 9],
    /// Entries of a table of the interface.
    pub(crate) entries: usize,
    /// Entries of a table of the parent.
    pub(crate) room: usize,
}

impl Kind {
    pub(crate) fn profile(&self) -> Profile {
        let [live, suspend, clean, skip, verify, status, report, identity, groups] = self.flags;
        let address_mode = match self.mode {
            0 => AddressMode::OwnerAddresses,
            1 => AddressMode::Objects,
            2 => AddressMode::Pinned,
            _ => AddressMode::PinnedPages,
        };
        let mut backend_features = BackendFeatures::of(&[BackendFeatures::ENABLE_AFTER_DRIVER_OK]);
        if live {
            backend_features = backend_features.with(BackendFeatures::NEW_OWNER);
        }
        if live && address_mode == AddressMode::OwnerAddresses {
            backend_features = backend_features.with(BackendFeatures::IOTLB_REMAP);
        }
        let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM, Features::RING_PACKED]);
        Profile {
            backend_features,
            queue_groups: vec![GroupIndex(0), GroupIndex(groups.into())],
            groups: 1 + u32::from(groups),
            address_spaces: 2,
            suspend,
            resume: suspend,
            vring_size: true,
            compat_reset: if clean { CompatReset::Clean } else { CompatReset::Keep },
            address_mode,
            private_memory: if skip { PrivateMemory::Skip } else { PrivateMemory::Copy },
            max_iotlb_entries: self.entries,
            verify_remap: verify,
            identity_map: identity,
            reset_owner: true,
            vhost_log: live,
            status_unsuspends: status,
            report_batch_errors: report,
            moves: true,
            ..Profile::simulator(2, features, 3, CONFIG)
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Book {
    profile: Profile,
    kind: Kind,
    pub(crate) tables: BTreeMap<Asid, BTreeMap<u64, Mapping<TestPiece>>>,
    pub(crate) running: BTreeMap<u16, QueueState>,
    /// Size and descriptor area of the queues that run.
    pub(crate) rings: BTreeMap<u16, (u16, u64)>,
    pub(crate) features: Option<Features>,
    pub(crate) owner: Option<TestSpace>,
    pub(crate) config: [u8; CONFIG as usize],
    pub(crate) failed: bool,
    pub(crate) refuse_owner: bool,
    pub(crate) refuse_start: bool,
    pub(crate) refuse_stop: bool,
    /// What was said of the log last.
    pub(crate) log: Arc<LogOnly>,
}

/// Tracks nothing, and keeps the log that it is given.
#[derive(Debug, Default)]
pub(crate) struct LogOnly(Mutex<Option<VhostLog>>);

impl LogOnly {
    pub(crate) fn is_there(&self) -> Option<(u64, bool, bool)> {
        let log = self.0.lock().unwrap();
        log.as_ref().map(|log| (log.bits.pages(), log.signal.is_some(), log.all))
    }
}

impl DirtyTracking for LogOnly {
    fn limits(&self) -> DirtyLimits {
        DirtyLimits::MAP
    }
    fn tracked(&self) -> Option<Tracked> {
        None
    }
    fn start(&self, _: u64, _: &[DirtyRange], _: u64) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }
    fn stop(&self) -> Result<()> {
        Ok(())
    }
    fn report(&self, _: DirtyRange, _: bool, _: DirtySink<'_>) -> Result<()> {
        Err(Errno::INVAL)
    }
    fn set_vhost_log(&self, log: Option<VhostLog>) -> Result<()> {
        *self.0.lock().unwrap() = log;
        Ok(())
    }
}

impl Book {
    pub(crate) fn new(kind: &Kind) -> Self {
        Self {
            profile: kind.profile(),
            kind: *kind,
            tables: BTreeMap::new(),
            running: BTreeMap::new(),
            rings: BTreeMap::new(),
            features: None,
            owner: None,
            config: [7; CONFIG as usize],
            failed: false,
            refuse_owner: false,
            refuse_start: false,
            refuse_stop: false,
            log: Arc::default(),
        }
    }
}

fn advanced(state: QueueState) -> QueueState {
    match state {
        QueueState::Split { avail_index } => QueueState::Split { avail_index: avail_index.wrapping_add(1) },
        QueueState::Packed { last_avail_wrap, last_used_idx, last_used_wrap, .. } => {
            QueueState::Packed { last_avail_idx: 1, last_avail_wrap, last_used_idx, last_used_wrap }
        }
    }
}

impl Parent for Book {
    type Host = TestHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let from = offset as usize;
        out.copy_from_slice(&self.config[from..from + out.len()]);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let from = offset as usize;
        self.config[from..from + data.len()].copy_from_slice(data);
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        let in_force = self.profile.mask_features(features)?;
        self.features = Some(in_force);
        Ok(in_force)
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<TestHost>,
        state: QueueState,
    ) -> Result<()> {
        if self.refuse_start {
            return Err(Errno::FAULT);
        }
        assert!(self.running.insert(index.0, state).is_none(), "queue {index} started twice");
        self.rings.insert(index.0, (setup.size, setup.desc));
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        if self.refuse_stop {
            return Err(Errno::IO);
        }
        self.rings.remove(&index.0);
        Ok(self.running.remove(&index.0).map(advanced))
    }

    fn dma(&mut self) -> Dma<'_, TestHost> {
        match self.kind.way {
            0 => Dma::SetMap(self),
            1 => Dma::DmaMap(self),
            _ => Dma::Platform,
        }
    }

    fn reset(&mut self) {
        self.features = None;
    }

    fn fail(&mut self) -> Result<()> {
        self.failed = true;
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        self.config = state.try_into().map_err(|_| Errno::INVAL)?;
        Ok(())
    }

    fn bind_owner(&mut self, owner: Option<&TestSpace>) -> Result<()> {
        if self.refuse_owner && owner.is_some() {
            return Err(Errno::NOMEM);
        }
        self.owner = owner.cloned();
        Ok(())
    }
}

impl SetMap<TestHost> for Book {
    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        Some(Arc::clone(&self.log) as _)
    }

    fn set_map(&mut self, asid: Asid, table: &Table<TestPiece>) -> Result<()> {
        let fits = table.len() <= self.kind.room;
        let entries = table.iter().filter(|_| fits);
        self.tables.insert(asid, entries.map(|entry| (entry.range.first(), entry.clone())).collect());
        if fits { Ok(()) } else { Err(Errno::NOSPC) }
    }
}

impl DmaMap<TestHost> for Book {
    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        Some(Arc::clone(&self.log) as _)
    }

    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<TestPiece>) -> Result<()> {
        let table = self.tables.entry(asid).or_default();
        if table.len() >= self.kind.room {
            return Err(Errno::NOSPC);
        }
        let before = table.insert(mapping.range.first(), mapping.clone());
        assert!(before.is_none(), "mapped twice: {before:?}");
        Ok(())
    }

    fn dma_unmap(&mut self, asid: Asid, range: IovaRange) {
        self.tables.entry(asid).or_default().retain(|_, mapping| !range.contains(mapping.range));
    }
}
