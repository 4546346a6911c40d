//! `sim-net`: a model of the kernel's network simulator (`vdpa_sim_net`), with its constants and its quirks. Every packet that
//! is sent is received again.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::net::loopback::{
    CONTROL, FEATURES, Loopback, LoopbackQueue, Notify, QUEUES, RX, Shared, StatsMemory, TX,
};
use vdpa_core::net::{MAC_BYTES, NetConfig};
use vdpa_core::parent::{Profile, QueueStats};
use vdpa_core::ring::{Chain, RingError};
use vdpa_core::types::{GroupIndex, QueueIndex, Result};
use vdpa_sys::snapshot::Snapshot;

use super::net_attrs::{NetAttr, NetAttrs};
use super::options::no_worker;
use super::sim::{Model, Options, Simulator};
use super::{Kept, MgmtDevice};
use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::{MemoryView, Popped, Queue, QueueControl, QueueHandler, Queues, Size, WorkerPool};
use vdpa_control::api::{Attrs, CtlError, ID_NET, MgmtDev};

const ADDRESS_SPACES: u32 = 2;

/// Default MTU, in bytes.
const MTU: u16 = 1500;

/// The attributes that only this simulator has: name, and description of the value.
pub(super) const KNOWN: [(&str, &str); 3] = [("mac", "MAC"), ("mtu", "68-65535"), ("device_features", "HEX")];

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

    fn create(
        &self,
        name: &str,
        attrs: &Attrs,
        pool: &WorkerPool,
        _kept: &Kept,
    ) -> Result<AnyParent, CtlError> {
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
        let shared = Shared::new(NetConfig {
            mac: attrs.mac.unwrap_or_default().0,
            mtu: attrs.mtu.unwrap_or(MTU).into(),
            ..NetConfig::default()
        });
        let shared = Arc::new(match pool.own_counters() {
            Some(words) => shared.with_stats(&(Arc::new(words) as StatsMemory)),
            None => shared,
        });
        let size = Size { queues: QUEUES, address_spaces: ADDRESS_SPACES as usize };
        let place = &options.placement;
        let worker = pool.add(name, size, place, Handler(Loopback::new(Arc::clone(&shared))));
        let worker = worker.map_err(|errno| no_worker(name, place, errno))?;
        Ok(Box::new(Simulator::new(name, profile(features), options, Net(shared), worker)))
    }
}

fn profile(features: Features) -> Profile {
    let config_size = u32::try_from(size_of::<NetConfig>()).unwrap_or(0);
    Profile {
        // The control queue can have an address space of its own, which a hypervisor does not share with the guest.
        queue_groups: vec![GroupIndex(0), GroupIndex(0), GroupIndex(1)],
        groups: 2,
        address_spaces: ADDRESS_SPACES,
        ..Profile::simulator(ID_NET, features, QUEUES, config_size)
    }
}

#[derive(Debug)]
struct Net(Arc<Shared>);

impl Model for Net {
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.0.read_config(offset, out);
    }

    fn write_config(&self, offset: u32, data: &[u8]) {
        self.0.write_config(offset, data);
    }

    fn queue_stats(&self, worker: &QueueControl, index: QueueIndex) -> QueueStats {
        QueueStats { poison: worker.stats(index).poison, ..self.0.stats.queue(index) }
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        self.0.stats.vendor(index)
    }

    fn save_state(&self) -> Vec<u8> {
        self.0.save_state()
    }

    fn restore_state(&self, state: &[u8]) -> Result<()> {
        self.0.restore_state(state)
    }

    fn set_mac(&self, mac: [u8; MAC_BYTES]) -> Result<()> {
        self.0.config().mac = mac;
        Ok(())
    }
}

/// The queues of the simulator.
struct Handler(Loopback);

impl QueueHandler for Handler {
    fn retry_on_map_change(&self) -> bool {
        // The kernel's simulator processes its rings only when it is kicked.
        false
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    /// Serves all queues, whichever was kicked, because the kernel's simulator has one work item for all.
    fn serve(&mut self, queues: &mut Queues) {
        if !queues.has_work() {
            return;
        }
        queues.iter_mut().for_each(|queue| queue.set_pending(false));
        if let Some(mut queue) = queues.take(CONTROL) {
            if queue.is_running() && queue.setup().features.has(Features::NET_CTRL_VQ) {
                let more = self.0.control(&mut Running::new(queues, CONTROL, &mut queue));
                queue.set_pending(more);
            }
            queues.put(CONTROL, queue);
        }
        let (tx, mut rx) = (queues.take(TX), queues.take(RX));
        if let Some(mut tx) = tx {
            if let Some(rx) = rx.as_mut().filter(|rx| rx.is_running())
                && tx.is_running()
            {
                let (mut from, mut to) = (Running::new(queues, TX, &mut tx), Running::new(queues, RX, rx));
                let more = self.0.loop_back(&mut from, &mut to);
                tx.set_pending(more);
            }
            queues.put(TX, tx);
        }
        if let Some(rx) = rx {
            queues.put(RX, rx);
        }
    }
}

/// A running queue that was taken out of [`Queues`].
struct Running<'a> {
    queues: &'a Queues,
    index: u16,
    queue: &'a mut Queue,
    view: Arc<MemoryView>,
}

impl<'a> Running<'a> {
    fn new(queues: &'a Queues, index: u16, queue: &'a mut Queue) -> Self {
        let view = queues.view(queue);
        Self { queues, index, queue, view }
    }

    fn pop_request(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        loop {
            let ring = self.queue.ring(&self.view)?;
            // A buffer is taken for a packet that was popped before.
            let popped = match self.index {
                RX => ring.pop_along(self.view.snapshot(), chain)?,
                _ => ring.pop(self.view.snapshot(), chain)?,
            };
            match popped {
                Popped::None => return Ok(false),
                Popped::Request => return Ok(true),
                Popped::Poison => {
                    let bytes = chain.readable().len() + chain.writable().len();
                    let what = format_args!(
                        "three processes have died with a request of {bytes} bytes: it is not tried again"
                    );
                    self.queues.log_error(self.index, &what);
                    self.queues.count_poison(self.index);
                    self.use_chain(chain.head, 0)?;
                }
            }
        }
    }

    fn use_chain(&mut self, head: u16, len: usize) -> Result<(), RingError> {
        // A packet has at most 4096 bytes.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.queue.ring(&self.view)?.push_used(head, len)?;
        self.queues.publish(self.queue)
    }
}

impl LoopbackQueue for Running<'_> {
    type Memory = Snapshot;

    fn memory(&self) -> &Snapshot {
        self.view.snapshot()
    }

    fn features(&self) -> Features {
        self.queue.setup().features
    }

    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        self.pop_request(chain).inspect_err(|error| self.queues.log_error(self.index, error))
    }

    fn is_repeated(&mut self, head: u16) -> bool {
        self.queue.ring(&self.view).is_ok_and(|ring| ring.is_repeated(head))
    }

    fn complete(&mut self, head: u16, len: usize, notify: Notify) {
        if let Err(error) = self.use_chain(head, len) {
            self.queues.log_error(self.index, &error);
        }
        if notify == Notify::Always
            && let Some(call) = &self.queue.setup().call
        {
            call.signal();
        }
    }
}
