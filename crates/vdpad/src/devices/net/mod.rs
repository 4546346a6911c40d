//! `net`: a virtio network card on a TAP interface.
//!
//! | module | what it does |
//! |---|---|
//! | `options` | the attributes |
//! | `taps` | the queues of the interface |
//! | `card` | [`Card`], the queue handler: control queue and polls |
//! | `receive`, `transmit` | the data path, one direction each |

mod card;
mod options;
mod receive;
mod taps;
mod transmit;

use std::sync::{Arc, Weak};

use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::{ClientMemory, OWN_COUNTERS, QueueControl, Size, WorkerPool};
use vdpa_control::api::{Attrs, CtlError, ID_NET, MgmtDev};
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::net::card::{CardState, GUEST_OFFLOADS, PAIRS_MAX};
use vdpa_core::net::loopback::StatsMemory;
use vdpa_core::net::{MAC_BYTES, NetConfig, missing_dependency};
use vdpa_core::parent::{Dma, Parent, Profile, QueueStats};
use vdpa_core::types::{GroupIndex, QueueIndex, Result};
use vdpa_sys::guest::LinuxHost;
use zerocopy::IntoBytes;

use self::card::Card;
#[cfg(test)]
pub(super) use self::options::KNOWN;
use self::options::Options;
use self::taps::{Taps, possible_offloads};
use super::net_attrs::NetAttr;
use super::options::no_worker;
use super::{Kept, MgmtDevice};

/// The control queue can have an address space of its own.
const ADDRESS_SPACES: u32 = 2;

/// What is offered on every kernel, beside the offloads of the driver.
const FEATURES: Features = Features::of(&[
    Features::NET_CSUM,
    Features::NET_CTRL_GUEST_OFFLOADS,
    Features::NET_MTU,
    Features::NET_MAC,
    Features::NET_HOST_TSO4,
    Features::NET_HOST_TSO6,
    Features::NET_HOST_ECN,
    Features::NET_MRG_RXBUF,
    Features::NET_STATUS,
    Features::NET_CTRL_VQ,
    Features::NET_CTRL_RX,
    Features::NET_CTRL_VLAN,
    Features::NET_CTRL_RX_EXTRA,
    Features::NET_GUEST_ANNOUNCE,
    Features::NET_CTRL_MAC_ADDR,
    Features::RING_INDIRECT_DESC,
    Features::RING_EVENT_IDX,
    Features::VERSION_1,
    Features::ACCESS_PLATFORM,
]);

/// The management device `net`.
#[derive(Debug)]
pub(crate) struct NetMgmt;

impl MgmtDevice for NetMgmt {
    fn describe(&self) -> MgmtDev {
        let all = FEATURES | GUEST_OFFLOADS;
        let all = all.with(Features::NET_HOST_USO).with(Features::NET_MQ);
        MgmtDev {
            name: "net".into(),
            bus: None,
            supported_classes: vec![ID_NET],
            max_supported_vqs: (2 * PAIRS_MAX + 1).into(),
            dev_features: all.with(Features::RING_PACKED).with(Features::IN_ORDER),
        }
    }

    fn net_attrs(&self) -> &'static [NetAttr] {
        &[NetAttr::Mac, NetAttr::Mtu, NetAttr::MaxVqp, NetAttr::Features]
    }

    fn create(
        &self,
        name: &str,
        attrs: &Attrs,
        pool: &WorkerPool,
        kept: &Kept,
    ) -> Result<AnyParent, CtlError> {
        let options = Options::parse(attrs)?;
        let taps = Taps::open(&options.tap, options.create, options.pairs, options.mtu, kept)?;
        let taps = Arc::new(taps);
        let features = offered(&options, possible_offloads())?;
        Ok(Box::new(Net::new(name, &options, features, &taps, pool)?))
    }
}

/// What a device offers: everything, or the part that `device_features` has.
fn offered(options: &Options, offloads: Features) -> Result<Features, CtlError> {
    let mut all = FEATURES | offloads;
    if offloads.has(Features::NET_GUEST_USO4) {
        all = all.with(Features::NET_HOST_USO);
    }
    if options.pairs > 1 {
        all = all.with(Features::NET_MQ);
    }
    if options.packed {
        all = all.with(Features::RING_PACKED);
    }
    if options.in_order {
        all = all.with(Features::IN_ORDER);
    }
    let Some(chosen) = options.features else { return Ok(all) };
    if !all.contains(chosen) {
        return Err(CtlError::new(
            Errno::INVAL,
            format!("features {chosen} are more than net can offer here"),
        )
        .with_hint(format!("A subset of {all} is right.")));
    }
    let needed = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    if !chosen.contains(needed) {
        return Err(CtlError::new(Errno::INVAL, format!("features {chosen} are too few"))
            .with_hint(format!("No client can do without {needed}.")));
    }
    match missing_dependency(chosen) {
        None => Ok(chosen),
        Some(missing) => Err(CtlError::new(Errno::INVAL, format!("features {chosen} are not complete"))
            .with_hint(format!("They need bit {} too.", missing.0))),
    }
}

#[derive(Debug)]
struct Net {
    profile: Profile,
    /// The profile for a driver that has not accepted several pairs: its control queue is the third.
    single: Profile,
    pairs: u16,
    mtu: u16,
    /// Features that the driver has accepted.
    accepted: Features,
    state: CardState,
    /// The state is in memory that has outlived another process.
    outlived: bool,
    /// The queue handler has it, until the device fails.
    taps: Weak<Taps>,
    memory: ClientMemory,
}

impl Net {
    fn new(
        name: &str,
        options: &Options,
        features: Features,
        taps: &Arc<Taps>,
        pool: &WorkerPool,
    ) -> Result<Self, CtlError> {
        let (pairs, mtu) = (options.pairs, options.mtu);
        let words = pool.own_counters().map(|words| Arc::new(words) as StatsMemory);
        let outlived = words.is_some();
        let state = match words {
            Some(words) => CardState::within(words, options.mac),
            None => CardState::new(options.mac),
        };
        let control = features.has(Features::NET_CTRL_VQ);
        let profile = profile(options, features, 2 * pairs + u16::from(control));
        let single = Profile { queue_groups: groups(2, control), ..profile.clone() };
        let place = &options.placement;
        let size = Size { queues: profile.queues, address_spaces: ADDRESS_SPACES as usize };
        let queues = pool.add(name, size, place, Card::new(Arc::clone(taps), state.clone(), pairs));
        let queues = queues.map_err(|errno| no_worker(name, place, errno))?;
        let memory = ClientMemory::new(name, queues, false);
        let (accepted, taps) = (Features::NONE, Arc::downgrade(taps));
        Ok(Self { profile, single, pairs, mtu, accepted, state, outlived, taps, memory })
    }

    const fn queues(&self) -> &QueueControl {
        self.memory.queues()
    }

    fn config(&self) -> NetConfig {
        let offers = |bit| self.profile.features.has(bit);
        let mut config = NetConfig::default();
        if offers(Features::NET_MAC) {
            config.mac = self.state.mac();
        }
        if offers(Features::NET_STATUS) {
            config.status = self.state.status(self.accepted).into();
        }
        if offers(Features::NET_MQ) {
            config.max_virtqueue_pairs = self.pairs.into();
        }
        if offers(Features::NET_MTU) {
            config.mtu = self.mtu.into();
        }
        config
    }

    /// Has the interface hand over what the driver takes.
    fn take_offloads(&self) -> Result<()> {
        let taps = self.taps.upgrade().ok_or(Errno::IO)?;
        taps.take(self.state.offloads(self.accepted))
    }
}

/// The groups of a device whose control queue has this index.
fn groups(control: u16, offered: bool) -> Vec<GroupIndex> {
    let mut groups = vec![GroupIndex(0); control.into()];
    if offered {
        groups.push(GroupIndex(1));
    }
    groups
}

fn profile(options: &Options, features: Features, queues: u16) -> Profile {
    let control = features.has(Features::NET_CTRL_VQ);
    let index = if features.has(Features::NET_MQ) { 2 * options.pairs } else { 2 };
    let base = Profile::on_objects(ID_NET, features, queues);
    Profile {
        features,
        queue_groups: groups(index, control),
        groups: 2,
        address_spaces: ADDRESS_SPACES,
        queue_size_max: options.queue_size,
        config_size: u32::try_from(size_of::<NetConfig>()).unwrap_or(0),
        compat_reset: options.compat_reset,
        max_iotlb_entries: options.max_iotlb_entries,
        mem_table: options.mem_table,
        vhost_log: options.vhost_log,
        reset_owner: options.reset_owner,
        strict_new_owner: options.strict_new_owner,
        moves: true,
        ..base
    }
}

impl Parent for Net {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        let single = self.accepted != Features::NONE && !self.accepted.has(Features::NET_MQ);
        if single { &self.single } else { &self.profile }
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config = self.config();
        let part = usize::try_from(offset).ok().and_then(|from| config.as_bytes().get(from..));
        if let Some(part) = part.and_then(|rest| rest.get(..out.len())) {
            out.copy_from_slice(part);
        }
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // All fields are read-only for drivers of version 1 (virtio 1.2 section 5.1.4).
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        if !features.has(Features::ACCESS_PLATFORM) || !features.has(Features::VERSION_1) {
            return Err(Errno::INVAL);
        }
        let accepted = features & self.profile.features;
        if missing_dependency(accepted).is_some() {
            return Err(Errno::INVAL);
        }
        self.accepted = accepted;
        self.take_offloads()?;
        Ok(accepted)
    }

    vdpa_backend::queue_methods!(self => self.queues());

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        Dma::SetMap(&mut self.memory)
    }

    fn reset(&mut self) {
        self.accepted = Features::NONE;
        self.outlived = false;
        self.state.reset();
        self.queues().reset();
        if let Some(taps) = self.taps.upgrade()
            && let Err(errno) = taps.use_pairs(1).and_then(|()| taps.take(Features::NONE))
        {
            tracing::warn!(%errno, "the interface of a card cannot be reset");
        }
    }

    fn fail(&mut self) -> Result<()> {
        self.queues().fail()
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.queues().stats(index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        const RX: [&str; OWN_COUNTERS] = ["too_long", "filtered", "bad_buffers", "waits"];
        const TX: [&str; OWN_COUNTERS] = ["bad_header", "refused", "down", "waits"];
        if index.0 >= self.profile.queues {
            return Err(Errno::INVAL);
        }
        let stats = self.queues().stats(index);
        let group = self.profile().group_of(index);
        if group != GroupIndex(0) {
            return Ok(vec![("commands", stats.requests), ("refused", stats.errors)]);
        }
        let packets =
            [("packets", stats.requests - stats.errors.min(stats.requests)), ("bytes", stats.bytes)];
        let names = if index.0.is_multiple_of(2) { RX } else { TX };
        Ok(packets.into_iter().chain(names.into_iter().zip(self.queues().own_stats(index))).collect())
    }

    fn set_mac(&mut self, mac: [u8; MAC_BYTES]) -> Result<()> {
        self.state.set_mac(mac);
        self.queues().signal_config();
        Ok(())
    }

    fn set_link(&mut self, up: bool) -> Result<()> {
        let taps = self.taps.upgrade().ok_or(Errno::IO)?;
        taps.set_carrier(up)?;
        self.state.set_link(up);
        self.queues().signal_config();
        Ok(())
    }

    fn save_state(&self) -> Vec<u8> {
        self.state.save()
    }

    fn moved(&mut self) {
        // Switches have to learn where the guest is now. An administrator's "link down" has moved with it.
        self.state.announce();
        if let Some(taps) = self.taps.upgrade()
            && let Err(errno) = taps.set_carrier(self.state.is_link_up())
        {
            tracing::warn!(%errno, "the interface of a card has another state of its link");
        }
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        self.state.restore(state, self.pairs, self.outlived)?;
        self.take_offloads()
    }
}
