//! A parent that records the calls of the device and refuses them on request.

use std::collections::{BTreeMap, BTreeSet};

use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::iotlb::{Mapping, Table};
use vdpa_core::parent::{Dma, DmaMap, Parent, Profile, SetMap};
use vdpa_core::types::{Asid, IovaRange, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};

use crate::process::{FuzzHost, FuzzMemory, Space};

/// How the device passes translations to the parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, arbitrary::Arbitrary)]
pub enum DmaKind {
    SetMap,
    DmaMap,
    Platform,
}

/// An entry as the parent received it: last address, memory, and whether it is stale.
pub type Entry = (u64, FuzzMemory, bool);

#[derive(Debug)]
pub struct FuzzParent {
    pub profile: Profile,
    pub dma_kind: DmaKind,
    /// The translation accepted last, by address space and first address.
    pub tables: BTreeMap<Asid, BTreeMap<u64, Entry>>,
    pub running: Vec<bool>,
    /// Position that the last stop returned.
    pub position: u16,
    /// Number of the next translations to refuse.
    pub refuse: u8,
    pub refuse_owner: bool,
    pub refuse_start: bool,
    pub refuse_stop: bool,
    /// Address spaces whose last table was refused, so that the parent's table may be outdated.
    pub refused: BTreeSet<Asid>,
}

impl FuzzParent {
    pub fn new(profile: Profile, dma_kind: DmaKind) -> Self {
        let running = vec![false; usize::from(profile.queues)];
        Self {
            profile,
            dma_kind,
            tables: BTreeMap::new(),
            running,
            position: 0,
            refuse: 0,
            refuse_owner: false,
            refuse_start: false,
            refuse_stop: false,
            refused: BTreeSet::new(),
        }
    }

    fn refuses(&mut self) -> bool {
        let refuses = self.refuse > 0;
        self.refuse = self.refuse.saturating_sub(1);
        refuses
    }
}

fn entry(mapping: &Mapping<FuzzMemory>) -> (u64, Entry) {
    (mapping.range.first(), (mapping.range.last(), mapping.memory.clone(), mapping.stale))
}

impl Parent for FuzzParent {
    type Host = FuzzHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        assert!(offset as usize + out.len() <= self.profile.config_size as usize);
        out.fill(7);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        assert!(offset as usize + data.len() <= self.profile.config_size as usize);
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        if features.has(Features::ACCESS_PLATFORM) {
            Ok(features & self.profile.features)
        } else {
            Err(Errno::INVAL)
        }
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<FuzzHost>,
        _state: QueueState,
    ) -> Result<()> {
        assert!(setup.size.is_power_of_two() && setup.size <= self.profile.queue_size_max);
        assert!(setup.asid.0 < self.profile.address_spaces);
        assert!(!self.running[usize::from(index.0)], "queue {index} started twice");
        if self.refuse_start {
            return Err(Errno::FAULT);
        }
        self.running[usize::from(index.0)] = true;
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        if self.refuse_stop {
            return Err(Errno::IO);
        }
        self.position = self.position.wrapping_add(1);
        let ran = std::mem::take(&mut self.running[usize::from(index.0)]);
        Ok(ran.then_some(QueueState::Split { avail_index: self.position }))
    }

    fn dma(&mut self) -> Dma<'_, FuzzHost> {
        match self.dma_kind {
            DmaKind::SetMap => Dma::SetMap(self),
            DmaKind::DmaMap => Dma::DmaMap(self),
            DmaKind::Platform => Dma::Platform,
        }
    }

    fn reset(&mut self) {
        assert!(!self.running.contains(&true), "reset with a running queue");
    }

    fn bind_owner(&mut self, _owner: Option<&Space>) -> Result<()> {
        if self.refuse_owner { Err(Errno::NOMEM) } else { Ok(()) }
    }
}

impl SetMap<FuzzHost> for FuzzParent {
    fn set_map(&mut self, asid: Asid, table: &Table<FuzzMemory>) -> Result<()> {
        if self.refuses() {
            self.refused.insert(asid);
            return Err(Errno::NOSPC);
        }
        self.refused.remove(&asid);
        self.tables.insert(asid, table.iter().map(entry).collect());
        Ok(())
    }
}

impl DmaMap<FuzzHost> for FuzzParent {
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<FuzzMemory>) -> Result<()> {
        if self.refuses() {
            return Err(Errno::NOSPC);
        }
        let (first, entry) = entry(mapping);
        let before = self.tables.entry(asid).or_default().insert(first, entry);
        assert!(before.is_none(), "mapped twice at {first:#x}");
        Ok(())
    }

    fn dma_unmap(&mut self, asid: Asid, range: IovaRange) {
        self.tables.entry(asid).or_default().remove(&range.first());
    }
}
