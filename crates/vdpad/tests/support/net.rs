//! [`Net`]: a driver of a network device for tests, with the control queue in an address space of its own or not.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::net::Ack;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::{Completion, SplitDriver};
use vdpa_core::ring::split::area_sizes;
use vdpa_core::types::{Asid, GroupIndex, Perm, QueueIndex, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{MapArea, Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

pub(crate) const RX: u16 = 0;
pub(crate) const TX: u16 = 1;
pub(crate) const CONTROL: u16 = 2;

/// All features of the simulator.
pub(crate) const FEATURES: Features = Features(0x3_0883_0028);
/// Bytes of the packet header with `VERSION_1`.
pub(crate) const HEADER: usize = 12;
/// Longest time for anything.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for an event that must not happen.
const SILENCE: Duration = Duration::from_millis(100);
/// Entries of each ring.
const SIZE: u16 = 64;
/// I/O virtual address of the data queues' memory, and of the control queue's in an address space of its own.
pub(crate) const IOVA: u64 = 0x1_0000_0000;
/// Bytes of each of the two.
pub(crate) const MEMORY: u64 = 1 << 20;
const RUNNING: Status = Status(0xf);

/// Memory in one address space; buffers are allocated behind the rings and never freed.
pub(crate) struct Space {
    pub(crate) map: SharedMap,
    pub(crate) asid: Asid,
    pub(crate) iova: u64,
    next: u64,
}

impl Space {
    pub(crate) fn new(asid: Asid, iova: u64) -> Self {
        let fd = memfd::create(c"net", MEMORY, None).unwrap();
        let map = SharedMap::map(fd, 0, usize::try_from(MEMORY).unwrap(), Prot::RW, false).unwrap();
        Self { map, asid, iova, next: 0 }
    }

    /// Allocates bytes as a buffer.
    pub(crate) fn allocate(&mut self, len: usize) -> Buffer {
        let iova = self.iova + self.next;
        self.next += (len as u64).next_multiple_of(64);
        assert!(self.next <= MEMORY, "a test needs more memory");
        Buffer { iova, len: u32::try_from(len).unwrap() }
    }

    pub(crate) fn holding(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.allocate(bytes.len());
        self.write(buffer, bytes);
        buffer
    }

    pub(crate) fn read(&self, buffer: Buffer, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.map.read(self.offset(buffer), &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn write(&self, buffer: Buffer, bytes: &[u8]) {
        self.map.write(self.offset(buffer), bytes).unwrap();
    }

    fn offset(&self, buffer: Buffer) -> usize {
        usize::try_from(buffer.iova - self.iova).unwrap()
    }

    fn area(&mut self, len: usize) -> (u64, MapArea) {
        let buffer = self.allocate(len);
        (buffer.iova, self.map.area(self.offset(buffer), len).unwrap())
    }
}

/// The driver's state of a queue.
pub(crate) struct Queue {
    index: QueueIndex,
    pub(crate) ring: SplitDriver<MapArea>,
    addr: VringAddr,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// Receive buffers by token.
    rooms: Vec<Buffer>,
}

impl Queue {
    pub(crate) fn new(index: u16, space: &mut Space, features: Features) -> Self {
        let sizes = area_sizes(SIZE, false);
        let ((desc, desc_area), (avail, avail_area)) = (space.area(sizes.desc), space.area(sizes.avail));
        let (used, used_area) = space.area(sizes.used);
        Self {
            index: QueueIndex(index),
            ring: SplitDriver::new(SIZE, features, desc_area, avail_area, used_area).unwrap(),
            addr: VringAddr { desc, avail, used, ..VringAddr::default() },
            kick: EventFd::new().unwrap(),
            call: EventFd::new().unwrap(),
            rooms: Vec::new(),
        }
    }

    /// Sets up the queue in the device, to start at `base`.
    pub(crate) fn set_up(&self, device: &VhostVdpaFd, base: u32) {
        device.set_vring_num(self.index, SIZE.into()).unwrap();
        device.set_vring_base(self.index, base).unwrap();
        device.set_vring_addr(self.index, &self.addr).unwrap();
        device.set_vring_kick(self.index, Some(&self.kick)).unwrap();
        device.set_vring_call(self.index, Some(&self.call)).unwrap();
        device.set_vring_enable(self.index, true).unwrap();
    }

    /// Makes a request available and kicks.
    pub(crate) fn submit(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) {
        self.ring.add(readable, writable, token).unwrap();
        self.ring.publish().unwrap();
        self.kick.signal();
    }

    /// The next completion, which must come.
    #[track_caller]
    pub(crate) fn completion(&mut self) -> Completion {
        let Some(completion) = self.wait(TIMEOUT) else { panic!("queue {} completes nothing", self.index) };
        completion
    }

    /// Asserts that nothing completes.
    #[track_caller]
    pub(crate) fn stays_silent(&mut self) {
        assert_eq!(self.wait(SILENCE), None, "queue {}", self.index);
    }

    fn wait(&mut self, timeout: Duration) -> Option<Completion> {
        loop {
            if let Some(completion) = self.ring.pop_used().unwrap() {
                return Some(completion);
            }
            let _ = self.call.drain();
            if !self.ring.enable_interrupts().unwrap() && !self.call.wait(Some(timeout)) {
                return self.ring.pop_used().unwrap();
            }
        }
    }
}

/// A device with all its queues running.
pub(crate) struct Net {
    pub(crate) device: VhostVdpaFd,
    pub(crate) data: Space,
    pub(crate) control: Space,
    pub(crate) queues: [Queue; 3],
    features: Features,
    /// Memory of [`begin_command`](Self::begin_command).
    reused: Option<(Buffer, Buffer)>,
}

impl Net {
    /// All features, one address space.
    pub(crate) fn start(path: &Path) -> Self {
        Self::with(path, FEATURES, Asid(0), all_backend_features())
    }

    /// The control queue in the address space `control`, at the addresses the data queues have in theirs if it is
    /// another one.
    pub(crate) fn with(path: &Path, features: Features, control: Asid, backend: BackendFeatures) -> Self {
        let device = VhostVdpaFd::open(path).unwrap();
        device.set_owner().unwrap();
        device.set_backend_features(backend).unwrap();
        let mut data = Space::new(Asid(0), IOVA);
        let iova = if control == Asid(0) { IOVA + MEMORY } else { IOVA };
        let mut control = Space::new(control, iova);
        let queues = [
            Queue::new(RX, &mut data, features),
            Queue::new(TX, &mut data, features),
            Queue::new(CONTROL, &mut control, features),
        ];
        let net = Self { device, data, control, queues, features, reused: None };
        for space in [&net.data, &net.control] {
            net.map(space);
        }
        net.negotiate();
        net.run([0; 3]);
        net
    }

    pub(crate) fn map(&self, space: &Space) {
        let uaddr = space.map.addr() as u64;
        self.device.dma_map(space.asid, space.iova, MEMORY, uaddr, Perm::RW).unwrap();
    }

    pub(crate) fn unmap(&self, space: &Space) {
        self.device.dma_unmap(space.asid, space.iova, MEMORY).unwrap();
    }

    pub(crate) fn remap(&self, space: &Space) {
        let uaddr = space.map.addr() as u64;
        self.device.dma_remap(space.asid, space.iova, MEMORY, uaddr).unwrap();
    }

    /// From reset to FEATURES_OK.
    pub(crate) fn negotiate(&self) {
        self.device.set_status(Status::ACKNOWLEDGE | Status::DRIVER).unwrap();
        self.device.set_features(self.features).unwrap();
        self.device.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).unwrap();
    }

    /// From FEATURES_OK to DRIVER_OK; the queues continue at `bases`.
    pub(crate) fn run(&self, bases: [u32; 3]) {
        self.device.set_group_asid(GroupIndex(1), self.control.asid).unwrap();
        for (queue, base) in self.queues.iter().zip(bases) {
            queue.set_up(&self.device, base);
        }
        self.device.set_status(RUNNING).unwrap();
        assert_eq!(self.device.status(), Ok(RUNNING));
    }

    pub(crate) fn bases(&self) -> [u32; 3] {
        [RX, TX, CONTROL].map(|index| self.device.vring_base(QueueIndex(index)).unwrap())
    }

    pub(crate) fn descriptor(&self) -> OwnedFd {
        self.device.as_fd().try_clone_to_owned().unwrap()
    }

    pub(crate) fn queue(&mut self, index: u16) -> &mut Queue {
        &mut self.queues[usize::from(index)]
    }

    /// Offers a receive buffer of `len` bytes, without a kick.
    pub(crate) fn offer(&mut self, len: usize) {
        let buffer = self.data.allocate(len);
        let rx = &mut self.queues[usize::from(RX)];
        rx.ring.add(&[], &[buffer], rx.rooms.len() as u64).unwrap();
        rx.rooms.push(buffer);
        rx.ring.publish().unwrap();
    }

    /// Sends a packet, header included.
    pub(crate) fn send(&mut self, packet: &[u8]) {
        let buffer = self.data.holding(packet);
        self.queue(TX).submit(&[buffer], &[], 0);
    }

    /// Sends a packet and waits until the device is done with it.
    #[track_caller]
    pub(crate) fn transmit(&mut self, packet: &[u8]) {
        self.send(packet);
        assert_eq!(self.queue(TX).completion().len, 0);
    }

    /// The next packet received, which must come.
    #[track_caller]
    pub(crate) fn receive(&mut self) -> Vec<u8> {
        let completion = self.queue(RX).completion();
        let buffer = self.queues[usize::from(RX)].rooms[usize::try_from(completion.token).unwrap()];
        self.data.read(buffer, completion.len)
    }

    /// Asserts that a packet comes back.
    #[track_caller]
    pub(crate) fn loops(&mut self, packet: &[u8]) {
        self.offer(2048);
        self.transmit(packet);
        assert_eq!(self.receive(), packet);
    }

    /// Makes a control command, of at most 8 bytes, in memory that is used again by the next one. None may be in flight.
    pub(crate) fn begin_command(&mut self, bytes: &[u8]) {
        let (command, answer) =
            *self.reused.get_or_insert_with(|| (self.control.allocate(8), self.control.allocate(1)));
        self.control.write(command, bytes);
        self.control.write(answer, &[0xee]);
        let command = Buffer { len: u32::try_from(bytes.len()).unwrap(), ..command };
        self.queue(CONTROL).submit(&[command], &[answer], 0);
    }

    /// The answer to it; `None` when there is none in time.
    pub(crate) fn end_command(&mut self) -> Option<Ack> {
        self.queue(CONTROL).wait(TIMEOUT)?;
        let (_, answer) = self.reused?;
        Ack::from_byte(self.control.read(answer, 1)[0])
    }

    /// A control command.
    #[track_caller]
    pub(crate) fn command(&mut self, bytes: &[u8]) -> Ack {
        let (command, answer) = (self.control.holding(bytes), self.control.holding(&[0xee]));
        self.queue(CONTROL).submit(&[command], &[answer], 0);
        assert_eq!(self.queue(CONTROL).completion().len, 1);
        Ack::from_byte(self.control.read(answer, 1)[0]).unwrap()
    }
}

/// Backend features of the simulator, including live update.
pub(crate) fn all_backend_features() -> BackendFeatures {
    BackendFeatures(0x77e)
}

/// A packet to `to` with `payload` bytes after its destination.
pub(crate) fn packet(to: [u8; 6], payload: usize) -> Vec<u8> {
    let payload = (0..payload).map(|at| at.to_le_bytes()[0] ^ 0x5a);
    [0; HEADER].into_iter().chain(to).chain(payload).collect()
}
