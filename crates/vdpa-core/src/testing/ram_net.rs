//! [`RamNet`]: the kernel's network simulator without a thread, on any platform whose memory can be copied.

use std::fmt;
use std::sync::Arc;

use super::table::{Maps, RamQueue, TableArea, View};
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features};
use crate::host::{Bytes, Event, Host};
use crate::net::NetConfig;
use crate::net::loopback::{CONTROL, FEATURES, Loopback, LoopbackQueue, Notify, QUEUES, RX, Shared, TX};
use crate::parent::{Dma, Parent, Profile, QueueStats};
use crate::ring::split::SplitQueue;
use crate::ring::{Chain, RingError};
use crate::testing::TestHost;
use crate::types::{GroupIndex, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

/// A network device that receives what it sends, with the profile of the kernel's simulator (uapi-spec 6.2). Queues are
/// served when one starts and when [`serve`](Self::serve) is called, in place of a kick.
pub struct RamNet<H: Host = TestHost> {
    profile: Profile,
    shared: Arc<Shared>,
    logic: Loopback,
    maps: Maps<H>,
    queues: [Option<RamQueue<H>>; QUEUES as usize],
}

impl<H: Host> fmt::Debug for RamNet<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamNet").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl<H: Host> Default for RamNet<H> {
    fn default() -> Self {
        Self::new()
    }
}

impl<H: Host> RamNet<H> {
    /// A device whose address is all zero.
    #[must_use]
    pub fn new() -> Self {
        let shared = Arc::new(Shared::new(NetConfig { mtu: 1500.into(), ..NetConfig::default() }));
        Self {
            profile: profile(),
            logic: Loopback::new(Arc::clone(&shared)),
            shared,
            maps: Maps::new(),
            queues: [const { None }; QUEUES as usize],
        }
    }
}

fn profile() -> Profile {
    let config_size = u32::try_from(size_of::<NetConfig>()).unwrap_or(0);
    let sim = Profile::simulator(1, FEATURES, QUEUES, config_size);
    Profile {
        backend_features: sim
            .backend_features
            .with(BackendFeatures::NEW_OWNER)
            .with(BackendFeatures::IOTLB_REMAP),
        queue_groups: vec![GroupIndex(0), GroupIndex(0), GroupIndex(1)],
        groups: 2,
        address_spaces: 2,
        ..sim
    }
}

impl<H: Host<Memory: Bytes>> RamNet<H> {
    /// Processes the available requests of all running queues. Call it after a kick of any of them.
    pub fn serve(&mut self) {
        let mut control = self.side(CONTROL);
        if let Some(control) = control.as_mut().filter(|side| side.features().has(Features::NET_CTRL_VQ)) {
            while self.logic.control(control) {}
        }
        let (mut tx, mut rx) = (self.side(TX), self.side(RX));
        if let (Some(tx), Some(rx)) = (tx.as_mut(), rx.as_mut()) {
            while self.logic.loop_back(tx, rx) {}
        }
        for (index, side) in [(CONTROL, control), (TX, tx), (RX, rx)] {
            if let (Some(queue), Some(side)) = (self.queue(index), side) {
                queue.save(&side.ring);
            }
        }
    }

    /// The queue, if it is running and its ring can be accessed. Otherwise it waits for a mapping and the next call.
    fn side(&self, index: u16) -> Option<Side<H>> {
        let queue = self.queues.get(usize::from(index))?.as_ref()?;
        let memory = self.maps.view(queue.setup.asid);
        let ring = queue.ring(&memory).ok()?;
        Some(Side { setup: queue.setup.clone(), memory, ring })
    }
}

impl<H: Host> RamNet<H> {
    fn queue(&mut self, index: u16) -> Option<&mut RamQueue<H>> {
        self.queues.get_mut(usize::from(index)).and_then(Option::as_mut)
    }
}

/// A queue while it is processed.
struct Side<H: Host<Memory: Bytes>> {
    setup: QueueSetup<H>,
    memory: View<H>,
    ring: SplitQueue<TableArea<H::Memory>>,
}

impl<H: Host<Memory: Bytes>> LoopbackQueue for Side<H> {
    type Memory = View<H>;

    fn memory(&self) -> &View<H> {
        &self.memory
    }

    fn features(&self) -> Features {
        self.setup.features
    }

    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        self.ring.pop(&self.memory, chain)
    }

    fn complete(&mut self, head: u16, len: usize, notify: Notify) {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        // After an error of the ring nothing was published, so there is nothing to notify about.
        let enabled = self.ring.push_used(head, len).and_then(|()| self.ring.publish()).unwrap_or(false);
        if let Some(call) = self.setup.call.as_ref().filter(|_| enabled || notify == Notify::Always) {
            call.signal();
        }
    }
}

impl<H: Host<Memory: Bytes> + Send> Parent for RamNet<H> {
    type Host = H;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.shared.read_config(offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.shared.write_config(offset, data);
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        self.profile.mask_features(features)
    }

    fn start_queue(&mut self, index: QueueIndex, setup: &QueueSetup<H>, state: QueueState) -> Result<()> {
        let place = self.queues.get_mut(usize::from(index.0)).ok_or(Errno::INVAL)?;
        if place.is_none() {
            *place = Some(RamQueue::new(setup, state));
            self.serve();
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        let place = self.queues.get_mut(usize::from(index.0));
        Ok(place.and_then(Option::take).map(|queue| queue.state))
    }

    fn dma(&mut self) -> Dma<'_, H> {
        Dma::SetMap(&mut self.maps)
    }

    fn save_state(&self) -> Vec<u8> {
        self.shared.save_state()
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        self.shared.restore_state(state)
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.shared.stats.queue(index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        self.shared.stats.vendor(index)
    }
}
