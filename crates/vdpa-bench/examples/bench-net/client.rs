//! The driver of a card, the same code for every server: rings of vdpa-core in memory of this process, which a server of vhost-vdpa
//! or of vhost-user is told of.

use std::error::Error;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::net::NetHeader;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::{Completion, SplitDriver};
use vdpa_core::ring::split::area_sizes;
use vdpa_core::types::{Asid, Perm, QueueIndex, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{MapArea, Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Entries of each ring.
pub(crate) const RING: u16 = 1024;
/// Bytes of a receive buffer.
const ROOM: usize = 4096;
/// Bytes of a packet that its reader gets to see, with the virtio header.
pub(crate) const SEEN: usize = 80;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Time for an event.
const EVENT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to connect to a server.
#[derive(Clone, Debug)]
pub(crate) enum Address {
    /// A vhost-vdpa device file.
    Vdpa(PathBuf),
    /// A socket of a vhost-user server.
    User(PathBuf),
}

/// What the server is told by. Dropping it stops the rings.
#[expect(dead_code, reason = "held until the end, and not asked any more")]
enum Transport {
    Vdpa(VhostVdpaFd),
    User(Frontend),
}

/// The driver's side of a queue.
pub(crate) struct Queue {
    ring: SplitDriver<MapArea>,
    addr: VringAddr,
    kick: EventFd,
    call: EventFd,
}

/// A card in use.
pub(crate) struct Port {
    // Dropped first: the server then lets go of the memory.
    _transport: Transport,
    pub(crate) features: Features,
    /// Receive and transmit queue of each pair.
    pairs: Vec<[Queue; 2]>,
    /// Address of the first receive buffer.
    rooms: u64,
    pub(crate) memory: Memory,
}

/// Memory that the server has, at the same addresses. It is handed out once.
pub(crate) struct Memory {
    map: SharedMap,
    fd: OwnedFd,
    next: usize,
}

impl Memory {
    fn new(bytes: usize) -> Result<Self> {
        let fd = memfd::create(c"bench", bytes as u64, None)?;
        let map = SharedMap::map(&fd, 0, bytes, Prot::RW, true)?;
        Ok(Self { map, fd, next: 0 })
    }

    /// Takes a part, aligned to 64 bytes.
    pub(crate) fn take(&mut self, bytes: usize) -> Result<Buffer> {
        let at = self.next;
        self.next += bytes.next_multiple_of(64);
        if self.next > self.map.len() {
            return Err("the driver has too little memory".into());
        }
        Ok(Buffer { iova: (self.map.addr() + at) as u64, len: u32::try_from(bytes)? })
    }

    fn offset(&self, iova: u64) -> Result<usize> {
        Ok(usize::try_from(iova)? - self.map.addr())
    }

    pub(crate) fn write(&self, iova: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.map.write(self.offset(iova)?, bytes).map_err(|_| "the memory is gone")?)
    }

    fn read(&self, iova: u64, bytes: &mut [u8]) -> Result<()> {
        Ok(self.map.read(self.offset(iova)?, bytes).map_err(|_| "the memory is gone")?)
    }

    fn area(&mut self, bytes: usize) -> Result<(u64, MapArea)> {
        let part = self.take(bytes)?;
        Ok((part.iova, self.map.area(self.offset(part.iova)?, bytes).map_err(|_| "no such area")?))
    }
}

impl Queue {
    fn new(memory: &mut Memory, features: Features) -> Result<Self> {
        let sizes = area_sizes(RING, features.has(Features::RING_EVENT_IDX));
        let ((desc, desc_area), (avail, avail_area)) = (memory.area(sizes.desc)?, memory.area(sizes.avail)?);
        let (used, used_area) = memory.area(sizes.used)?;
        let mut ring = SplitDriver::new(RING, features, desc_area, avail_area, used_area)?;
        ring.disable_interrupts()?;
        let addr = VringAddr { desc, avail, used, ..VringAddr::default() };
        Ok(Self { ring, addr, kick: EventFd::new()?, call: EventFd::new()? })
    }

    /// Adds a request; `false` when the ring is full.
    pub(crate) fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<bool> {
        if usize::from(self.ring.free()) < readable.len() + writable.len() {
            return Ok(false);
        }
        self.ring.add(readable, writable, token)?;
        Ok(true)
    }

    /// Makes available what was added, and kicks if the server wants that.
    pub(crate) fn publish(&mut self) -> Result<()> {
        if self.ring.publish()? {
            self.kick.signal();
        }
        Ok(())
    }

    pub(crate) fn pop(&mut self) -> Result<Option<Completion>> {
        Ok(self.ring.pop_used()?)
    }

    pub(crate) const fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }
}

impl Port {
    /// Connects, with these features as far as the server has them, and `pairs` pairs of queues.
    pub(crate) fn connect(address: &Address, wanted: Features, pairs: u16) -> Result<Self> {
        let rooms = usize::from(RING) * ROOM * usize::from(pairs);
        let mut memory = Memory::new(rooms + (32 << 20))?;
        let mut port = match address {
            Address::Vdpa(path) => Self::vdpa(path, wanted, pairs, &mut memory)?,
            Address::User(path) => Self::user(path, wanted, pairs, &mut memory)?,
        };
        let first = memory.take(rooms)?.iova;
        let mut this = Self { _transport: port.0, features: port.1, pairs: Vec::new(), rooms: first, memory };
        let control = port.2.len() > 2 * usize::from(pairs);
        let mut control = if control { port.2.pop() } else { None };
        while let [_, _, ..] = port.2[..] {
            let tail = port.2.split_off(2);
            let pair: [Queue; 2] = std::mem::replace(&mut port.2, tail).try_into().map_err(|_| "no pair")?;
            this.pairs.push(pair);
        }
        for pair in 0..pairs {
            for room in 0..RING {
                this.offer(pair, u64::from(pair) * u64::from(RING) + u64::from(room))?;
            }
            this.receive_queue(pair)?.publish()?;
        }
        if let Some(control) = &mut control {
            this.use_pairs(control, pairs)?;
        }
        Ok(this)
    }

    fn vdpa(
        path: &Path,
        wanted: Features,
        pairs: u16,
        memory: &mut Memory,
    ) -> Result<(Transport, Features, Vec<Queue>)> {
        let device = VhostVdpaFd::open(path)?;
        device.set_owner()?;
        device.set_backend_features(BackendFeatures(device.backend_features()?.0 & 0x6))?;
        let offered = device.features()?;
        let wanted = wanted.with(Features::ACCESS_PLATFORM);
        let wanted = if pairs > 1 { wanted.with(Features::NET_CTRL_VQ) } else { wanted };
        let features = wanted & offered;
        device.set_status(Status::ACKNOWLEDGE | Status::DRIVER)?;
        device.set_features(features)?;
        device.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK)?;
        let (addr, len) = (memory.map.addr() as u64, memory.map.len() as u64);
        device.dma_map(Asid(0), addr, len, addr, Perm::RW)?;
        let mut queues = Vec::new();
        // With several pairs, the control queue comes behind them.
        for index in 0..2 * pairs + u16::from(pairs > 1) {
            let queue = Queue::new(memory, features)?;
            let index = QueueIndex(index);
            device.set_vring_num(index, RING.into())?;
            device.set_vring_base(index, 0)?;
            device.set_vring_addr(index, &queue.addr)?;
            device.set_vring_kick(index, Some(&queue.kick))?;
            device.set_vring_call(index, Some(&queue.call))?;
            device.set_vring_enable(index, true)?;
            queues.push(queue);
        }
        device.set_status(Status(0xf))?;
        Ok((Transport::Vdpa(device), features, queues))
    }

    fn user(
        path: &Path,
        wanted: Features,
        pairs: u16,
        memory: &mut Memory,
    ) -> Result<(Transport, Features, Vec<Queue>)> {
        let mut server = Frontend::connect(path, u64::from(2 * pairs))?;
        server.set_owner()?;
        let offered = server.get_features()?;
        if offered & PROTOCOL_FEATURES == 0 {
            return Err("a server without protocol features".into());
        }
        let features = wanted & Features(offered);
        server.set_features(features.0 | PROTOCOL_FEATURES)?;
        let protocol = server.get_protocol_features()?;
        server.set_protocol_features(protocol & VhostUserProtocolFeatures::MQ)?;
        let (addr, len) = (memory.map.addr() as u64, memory.map.len() as u64);
        server.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: addr,
            memory_size: len,
            userspace_addr: addr,
            mmap_offset: 0,
            mmap_handle: memory.fd.as_raw_fd(),
        }])?;
        let mut queues = Vec::new();
        for index in 0..usize::from(2 * pairs) {
            let queue = Queue::new(memory, features)?;
            server.set_vring_num(index, RING)?;
            server.set_vring_base(index, 0)?;
            server.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: RING,
                    queue_size: RING,
                    flags: 0,
                    desc_table_addr: queue.addr.desc,
                    used_ring_addr: queue.addr.used,
                    avail_ring_addr: queue.addr.avail,
                    log_addr: None,
                },
            )?;
            server.set_vring_call(index, &event(&queue.call)?)?;
            server.set_vring_kick(index, &event(&queue.kick)?)?;
            queues.push(queue);
        }
        for index in 0..queues.len() {
            server.set_vring_enable(index, true)?;
        }
        Ok((Transport::User(server), features, queues))
    }

    /// The command with which a driver begins to use several pairs.
    fn use_pairs(&mut self, control: &mut Queue, pairs: u16) -> Result<()> {
        const MQ: [u8; 2] = [4, 0];
        let (command, answer) = (self.memory.take(4)?, self.memory.take(1)?);
        self.memory.write(command.iova, &[MQ, pairs.to_le_bytes()].concat())?;
        self.memory.write(answer.iova, &[0xff])?;
        control.add(&[command], &[answer], 0)?;
        control.publish()?;
        let begin = std::time::Instant::now();
        while control.pop()?.is_none() {
            if begin.elapsed() > EVENT_TIMEOUT {
                return Err("no answer of the control queue".into());
            }
            std::thread::yield_now();
        }
        let mut ack = [0xff];
        self.memory.read(answer.iova, &mut ack)?;
        if ack == [0] { Ok(()) } else { Err(format!("{pairs} pairs are refused").into()) }
    }

    pub(crate) const fn pairs(&self) -> usize {
        self.pairs.len()
    }

    fn receive_queue(&mut self, pair: u16) -> Result<&mut Queue> {
        Ok(self.pairs.get_mut(usize::from(pair)).map(|[rx, _]| rx).ok_or("no such pair")?)
    }

    pub(crate) fn transmit_queue(&mut self, pair: usize) -> Result<&mut Queue> {
        Ok(self.pairs.get_mut(pair).map(|[_, tx]| tx).ok_or("no such pair")?)
    }

    fn offer(&mut self, pair: u16, room: u64) -> Result<()> {
        let buffer = Buffer { iova: self.rooms + room * ROOM as u64, len: u32::try_from(ROOM)? };
        self.receive_queue(pair)?.add(&[], &[buffer], room)?;
        Ok(())
    }

    /// Calls `packet` with the start of each packet that has come, from its virtio header on, and gives its buffers back. How many
    /// there were.
    pub(crate) fn receive(&mut self, mut packet: impl FnMut(&[u8]) -> Result<()>) -> Result<usize> {
        let mut count = 0;
        for pair in 0..u16::try_from(self.pairs.len())? {
            let before = count;
            // The buffers of a packet that belong to the one before.
            let mut more = 0;
            while let Some(done) = self.receive_queue(pair)?.pop()? {
                if more == 0 {
                    let mut start = [0; SEEN];
                    self.memory.read(self.rooms + done.token * ROOM as u64, &mut start)?;
                    more = u16::from_le_bytes([start[10], start[11]]).max(1);
                    let len = usize::try_from(done.len)?.min(SEEN);
                    packet(start.get(..len).unwrap_or_default())?;
                    count += 1;
                }
                more -= 1;
                self.offer(pair, done.token)?;
            }
            if count > before {
                self.receive_queue(pair)?.publish()?;
            }
        }
        Ok(count)
    }

    /// Waits until there are completions: of transmit queues too, if `transmit` says so. `false` if there are none in time.
    pub(crate) fn wait(&mut self, transmit: bool, limit: Duration) -> Result<bool> {
        let directions = if transmit { 2 } else { 1 };
        let mut ready = false;
        for queue in self.pairs.iter_mut().flat_map(|pair| &mut pair[..directions]) {
            ready |= queue.ring.enable_interrupts()?;
        }
        if !ready {
            let queues = self.pairs.iter().flat_map(|pair| &pair[..directions]);
            let mut fds: Vec<_> = queues.map(|queue| PollFd::new(&queue.call, PollFlags::IN)).collect();
            ready = poll(&mut fds, Some(&Timespec::try_from(limit)?))? > 0;
        }
        for queue in self.pairs.iter_mut().flat_map(|pair| &mut pair[..directions]) {
            let _ = queue.call.drain();
            queue.ring.disable_interrupts()?;
        }
        Ok(ready)
    }
}

/// The same event as the crate `vhost` knows it.
fn event(event: &EventFd) -> Result<vmm_sys_util::eventfd::EventFd> {
    let fd = event.as_fd().try_clone_to_owned()?.into_raw_fd();
    // SAFETY: an open eventfd, which nobody else closes.
    Ok(unsafe { vmm_sys_util::eventfd::EventFd::from_raw_fd(fd) })
}

/// Bytes of the virtio header.
pub(crate) const HEADER: usize = size_of::<NetHeader>();
