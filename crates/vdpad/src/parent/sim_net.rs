//! `sim-net`: the kernel's network simulator (`vdpa_sim_net`) with its constants and its quirks. What is sent is
//! received again.

mod loopback;
mod stats;

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::net::{LINK_UP, NetConfig};
use vdpa_core::parent::{
    AddressMode, CompatReset, Dma, Parent, PinLimit, PrivateMemory, Profile, QueueStats,
};
use vdpa_core::ring::{Chain, RingError};
use vdpa_core::types::{GroupIndex, IovaRange, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::snapshot::Snapshot;
use zerocopy::IntoBytes;

use self::loopback::{End, Loopback, Shared, Tell};
use super::MgmtDevice;
use super::net_attrs::{NetAttr, NetAttrs};
use super::sim::{Options, QUEUE_SIZE, Simulator, no_worker};
use crate::ctl::api::{Attrs, CtlError, ID_NET, MgmtDev};
use crate::front::vhost::AnyParent;
use crate::worker::{Logic, Queue, Queues, Size, View, Worker};

/// The receive queue.
const RX: u16 = 0;
/// The transmit queue.
const TX: u16 = 1;
/// The control queue.
const CONTROL: u16 = 2;
/// All of them.
const QUEUES: u16 = 3;

const ADDRESS_SPACES: u32 = 2;

/// What the simulator can offer.
const FEATURES: Features = Features(0x3_0883_0028);

/// The MTU of a device that was given none, in bytes.
const MTU: u16 = 1500;

/// Attributes of its own, and what they take.
const KNOWN: [(&str, &str); 3] = [("mac", "MAC"), ("mtu", "68-65535"), ("device_features", "HEX")];

/// The management device `sim-net`.
#[derive(Debug)]
pub(crate) struct SimNetMgmt;

impl MgmtDevice for SimNetMgmt {
    fn describe(&self) -> MgmtDev {
        MgmtDev {
            name: "sim-net".into(),
            bus: None,
            supported_classes: vec![ID_NET],
            max_supported_vqs: QUEUES.into(),
            dev_features: FEATURES,
        }
    }

    fn net_attrs(&self) -> &'static [NetAttr] {
        &[NetAttr::Mac, NetAttr::Mtu, NetAttr::Features]
    }

    fn create(&self, name: &str, attrs: &Attrs) -> Result<AnyParent, CtlError> {
        let options = Options::parse("sim-net", attrs, &KNOWN)?;
        let attrs = NetAttrs::parse(attrs)?;
        let features = attrs.features.unwrap_or(FEATURES);
        if !FEATURES.contains(features) {
            return Err(CtlError::new(
                Errno::INVAL,
                format!("features {features} are more than sim-net can offer"),
            )
            .with_hint(format!("A subset of {FEATURES} is right.")));
        }
        let shared = Arc::new(Shared::default());
        *shared.config.lock() = NetConfig {
            mac: attrs.mac.unwrap_or_default().0,
            mtu: attrs.mtu.unwrap_or(MTU).into(),
            ..NetConfig::default()
        };
        let size = Size { queues: QUEUES, address_spaces: ADDRESS_SPACES as usize };
        let worker = Worker::spawn_logic(name, size, Loopback::new(Arc::clone(&shared)))
            .map_err(|errno| no_worker(name, errno))?;
        let profile = options.apply(profile(features));
        Ok(Box::new(SimNet { profile, shared, sim: Simulator::new(worker, options) }))
    }
}

/// What the options leave open; they decide the rest.
fn profile(features: Features) -> Profile {
    Profile {
        device_id: ID_NET,
        vendor_id: 0,
        features,
        backend_features: BackendFeatures::NONE,
        queues: QUEUES,
        queue_size_max: QUEUE_SIZE,
        // The control queue may have an address space of its own, which a hypervisor keeps from the guest.
        queue_groups: vec![GroupIndex(0), GroupIndex(0), GroupIndex(1)],
        groups: 2,
        address_spaces: ADDRESS_SPACES,
        iova_range: IovaRange::ALL,
        config_size: u32::try_from(size_of::<NetConfig>()).unwrap_or(0),
        suspend: true,
        resume: true,
        vring_size: false,
        reset_map: true,
        compat_reset: CompatReset::Clean,
        address_mode: AddressMode::OwnerAddresses,
        pin_limit: PinLimit::Rlimit,
        private_memory: PrivateMemory::Skip,
        max_iotlb_entries: 2048,
        verify_remap: true,
        identity_map: true,
        reset_owner: false,
        strict_new_owner: false,
        status_unsuspends: true,
        report_batch_errors: false,
    }
}

#[derive(Debug)]
struct SimNet {
    profile: Profile,
    shared: Arc<Shared>,
    sim: Simulator,
}

impl Parent for SimNet {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let mut config = self.shared.config.lock();
        // Whatever the driver wrote, the link is up.
        config.status = LINK_UP.into();
        let part = usize::try_from(offset).ok().and_then(|from| config.as_bytes().get(from..));
        if let Some(part) = part.and_then(|rest| rest.get(..out.len())) {
            out.copy_from_slice(part);
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let mut config = self.shared.config.lock();
        let part = usize::try_from(offset).ok().and_then(|from| config.as_mut_bytes().get_mut(from..));
        if let Some(part) = part.and_then(|rest| rest.get_mut(..data.len())) {
            part.copy_from_slice(data);
        }
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
        setup: &QueueSetup<LinuxHost>,
        state: QueueState,
    ) -> Result<()> {
        self.sim.worker.start(index, setup, state)
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        self.sim.worker.stop(index)
    }

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        self.sim.dma()
    }

    fn reset(&mut self) {
        self.sim.worker.reset();
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.shared.stats.queue(index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        self.shared.stats.vendor(index)
    }
}

impl Logic for Loopback {
    // The kernel's simulator looks at its rings when it is kicked.
    const MAP_WAKES: bool = false;

    /// One pass over all queues, whichever was kicked: the kernel's device has one work item.
    fn serve(&mut self, queues: &mut Queues) {
        if !queues.has_work() {
            return;
        }
        queues.iter_mut().for_each(|queue| queue.pending = false);
        if let Some(mut queue) = queues.take(CONTROL) {
            if queue.is_running() && queue.setup.features.has(Features::NET_CTRL_VQ) {
                queue.pending = self.control(&mut Running::new(queues, CONTROL, &mut queue));
            }
            queues.put(CONTROL, queue);
        }
        let (tx, mut rx) = (queues.take(TX), queues.take(RX));
        if let Some(mut tx) = tx {
            if let Some(rx) = rx.as_mut().filter(|rx| rx.is_running())
                && tx.is_running()
            {
                let (mut from, mut to) = (Running::new(queues, TX, &mut tx), Running::new(queues, RX, rx));
                tx.pending = self.loop_back(&mut from, &mut to);
            }
            queues.put(TX, tx);
        }
        if let Some(rx) = rx {
            queues.put(RX, rx);
        }
    }
}

/// A queue that was taken out of its place.
struct Running<'a> {
    queues: &'a Queues,
    index: u16,
    queue: &'a mut Queue,
    view: Arc<View>,
}

impl<'a> Running<'a> {
    fn new(queues: &'a Queues, index: u16, queue: &'a mut Queue) -> Self {
        let view = queues.view(queue);
        Self { queues, index, queue, view }
    }

    fn use_chain(&mut self, head: u16, len: usize) -> Result<(), RingError> {
        // A packet has at most 4096 bytes.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.queue.ring(&self.view)?.push_used(head, len)?;
        self.queues.publish(self.queue)
    }
}

impl End for Running<'_> {
    type Memory = Snapshot;

    fn memory(&self) -> &Snapshot {
        self.view.snapshot()
    }

    fn features(&self) -> Features {
        self.queue.setup.features
    }

    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let ring = self.queue.ring(&self.view);
        let found = ring.and_then(|ring| ring.pop(self.view.snapshot(), chain));
        found.inspect_err(|error| self.queues.complain(self.index, error))
    }

    fn complete(&mut self, head: u16, len: usize, tell: Tell) {
        if let Err(error) = self.use_chain(head, len) {
            self.queues.complain(self.index, &error);
        }
        if tell == Tell::Always
            && let Some(call) = &self.queue.setup.call
        {
            call.signal();
        }
    }
}
