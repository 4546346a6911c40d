//! [`NetDriver`]: a driver of a network device, which loops packets back or is a card for packets of others.
//!
//! The driver's three rings are in one region. If the control queue has its own address space, its ring is in a region of its
//! own; both regions are then mapped at the same I/O virtual addresses.

use std::time::Duration;

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::blk_driver::{negotiate, set_driver_ok};
use crate::case::{Ctx, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::{IOVA, QUIET_TIME, RING_PAGES, Ring, Segment, TIMEOUT};

/// The receive queue.
pub(crate) const RX: u16 = 0;
/// The transmit queue.
pub(crate) const TX: u16 = 1;
/// The control queue.
pub(crate) const CONTROL: u16 = 2;

/// Bytes of a packet's header with VERSION_1.
pub(crate) const HEADER: usize = 12;
/// The MAC address that the driver sets.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x56];
/// The first byte of a writable buffer before the device writes it; the control queue never answers with it.
pub(crate) const UNWRITTEN: u8 = 0xee;

/// Entries of each ring.
const SIZE: u16 = 64;
/// Pages of a region: the rings, then buffers, each of which is used once.
const PAGES: u64 = 64;
/// Virtqueue group of the control queue.
const CONTROL_GROUP: u32 = 1;

/// A ring and the region that contains it.
#[derive(Debug)]
struct Queue {
    ring: Ring,
    /// Index of the region in [`NetDriver::regions`].
    region: usize,
    /// Next free descriptor.
    head: u16,
    /// The requests in flight: head, and offset of the buffer.
    buffers: Vec<(u16, usize)>,
}

/// A driver of a network device, set up and running. Dropping it resets the device, and restores the MAC address that it had set.
#[derive(Debug)]
pub(crate) struct NetDriver {
    pub(crate) device: Device,
    features: Features,
    regions: Vec<Region>,
    /// Offset of the first free byte of each region.
    free: Vec<usize>,
    queues: [Queue; 3],
    /// The address before the driver has set its own, if it has.
    mac_before: Option<Vec<u8>>,
}

impl NetDriver {
    /// Opens the device, becomes its owner, sets its MAC address to [`MAC`], maps memory and starts all queues, with all
    /// features.
    pub(crate) fn start(ctx: &Ctx<'_>) -> Result<Self, Stop> {
        Self::start_with(ctx, ctx.probe().features, 0)
    }

    /// As [`start`](Self::start), with these features and the control queue in address space `asid`.
    pub(crate) fn start_with(ctx: &Ctx<'_>, features: Features, asid: u32) -> Result<Self, Stop> {
        let device = ctx.open_owned()?;
        let mac_before = prepare("VHOST_VDPA_GET_CONFIG", device.config(0, 6))?;
        prepare("VHOST_VDPA_SET_CONFIG", device.set_config(0, &MAC))?;
        Self::run_on(device, features, asid, CONTROL, Some(mac_before))
    }

    /// As [`start_with`](Self::start_with), for a card with packets of others: its address stays as it is, and the control queue is where
    /// these features put it (virtio 1.3 section 5.1.2). Of several pairs the first one is used.
    pub(crate) fn start_card(ctx: &Ctx<'_>, features: Features) -> Result<Self, Stop> {
        let device = ctx.open_owned()?;
        let control = if features.has(Features::NET_MQ) { 2 * max_pairs(&device)? } else { CONTROL };
        Self::run_on(device, features, 0, control, None)
    }

    fn run_on(
        device: Device,
        features: Features,
        asid: u32,
        control: u16,
        mac_before: Option<Vec<u8>>,
    ) -> Result<Self, Stop> {
        let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
        prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
        let regions =
            (0..=usize::from(asid != 0)).map(|_| Region::new(PAGES)).collect::<Result<Vec<_>, _>>()?;
        let queue = |index: u16| {
            let at = usize::from(index) * usize::try_from(RING_PAGES * PAGE).unwrap_or(0);
            let region = if index == CONTROL { regions.len() - 1 } else { 0 };
            let on_device = if index == CONTROL { control } else { index };
            Ok(Queue { ring: Ring::new(on_device.into(), SIZE, at)?, region, head: 0, buffers: Vec::new() })
        };
        let queues = [queue(RX)?, queue(TX)?, queue(CONTROL)?];
        let free = vec![usize::try_from(3 * RING_PAGES * PAGE).unwrap_or(0); regions.len()];
        let driver = Self { device, features, regions, free, queues, mac_before };
        driver.map_data()?;
        if asid != 0 {
            driver.map_control(asid)?;
            let moved = driver.device.set_vring(Request::SET_GROUP_ASID, CONTROL_GROUP, asid);
            prepare("VHOST_VDPA_SET_GROUP_ASID", moved)?;
        }
        driver.run()?;
        Ok(driver)
    }

    /// Negotiates features and starts all queues at vring base 0, as after a reset.
    fn run(&self) -> Result<(), Stop> {
        negotiate(&self.device, self.features)?;
        for queue in &self.queues {
            queue.ring.set_up(&self.device, 0)?;
        }
        set_driver_ok(&self.device)
    }

    fn update(&self, region: usize, asid: u32) -> Result<usize, vdpa_core::Errno> {
        let Some(region) = self.regions.get(region) else { return Err(vdpa_core::Errno::INVAL) };
        let (size, uaddr) = (region.size(), region.uaddr());
        let update = IotlbMsg { iova: IOVA, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
        self.device.message(asid, update)
    }

    /// Maps the memory of the data queues, which is also that of the control queue unless it has its own.
    pub(crate) fn map_data(&self) -> Result<(), Stop> {
        check("UPDATE of the rings' memory", self.update(0, 0), Ok(MESSAGE_SIZE))
    }

    /// Maps the control queue's own memory.
    pub(crate) fn map_control(&self, asid: u32) -> Result<(), Stop> {
        check("UPDATE of the control queue's memory", self.update(1, asid), Ok(MESSAGE_SIZE))
    }

    /// Removes all mappings of an address space.
    pub(crate) fn unmap(&self, asid: u32) -> Result<(), Stop> {
        let everything = IotlbMsg { kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
        check("INVALIDATE of everything", self.device.message(asid, everything), Ok(MESSAGE_SIZE))
    }

    fn queue_parts(&mut self, queue: u16) -> Result<(&mut Queue, &Region, &mut usize, &Device), Stop> {
        let missing = || Stop::Failed(format!("set-up: the driver has no queue {queue}"));
        let queue = self.queues.get_mut(usize::from(queue)).ok_or_else(missing)?;
        let region = self.regions.get(queue.region).ok_or_else(missing)?;
        let free = self.free.get_mut(queue.region).ok_or_else(missing)?;
        Ok((queue, region, free, &self.device))
    }

    /// Makes a request available, without a kick. It has a segment with the bytes `readable` and a writable segment of
    /// `writable` bytes; an empty segment is left out.
    pub(crate) fn add_request(&mut self, queue: u16, readable: &[u8], writable: u32) -> Result<(), Stop> {
        let (queue, region, free, _) = self.queue_parts(queue)?;
        let mut take = |len: usize| {
            let at = *free;
            *free += len.next_multiple_of(64);
            at
        };
        let mut segments = Vec::new();
        if !readable.is_empty() {
            let at = take(readable.len());
            region.write(at, readable)?;
            segments.push(Segment::readable(at, u32::try_from(readable.len()).unwrap_or(u32::MAX)));
        }
        let at = take(usize::try_from(writable).unwrap_or(0));
        if writable > 0 {
            region.write(at, &[UNWRITTEN])?;
            segments.push(Segment::writable(at, writable));
        }
        Self::submit(queue, region, &segments, at)
    }

    /// Makes a receive buffer available whose addresses are not mapped.
    pub(crate) fn add_unmapped_receive_buffer(&mut self, len: u32) -> Result<(), Stop> {
        let (queue, region, _, _) = self.queue_parts(RX)?;
        // After the end of the region.
        let at = usize::try_from(region.size()).unwrap_or(0);
        Self::submit(queue, region, &[Segment::writable(at, len)], at)
    }

    fn submit(queue: &mut Queue, region: &Region, segments: &[Segment], at: usize) -> Result<(), Stop> {
        let head = queue.head;
        queue.buffers.push((head, at));
        queue.ring.submit(region, head, segments)?;
        queue.head = (head + u16::try_from(segments.len()).unwrap_or(0)) % SIZE;
        Ok(())
    }

    /// Kicks a queue.
    pub(crate) fn kick(&mut self, queue: u16) -> Result<(), Stop> {
        let (queue, _, _, device) = self.queue_parts(queue)?;
        queue.ring.kick(device);
        Ok(())
    }

    /// Makes a receive buffer available, without a kick, since the device ignores kicks of this queue.
    pub(crate) fn add_receive_buffer(&mut self, len: u32) -> Result<(), Stop> {
        self.add_request(RX, &[], len)
    }

    /// Submits a packet that includes its header, and kicks.
    pub(crate) fn send(&mut self, packet: &[u8]) -> Result<(), Stop> {
        self.add_request(TX, packet, 0)?;
        self.kick(TX)
    }

    /// Sends a packet and expects its completion.
    pub(crate) fn transmit(&mut self, packet: &[u8]) -> Result<(), Stop> {
        self.send(packet)?;
        self.expect_sent()
    }

    /// Waits for the completion of a packet that was sent. Its length must be 0, since the device writes nothing.
    pub(crate) fn expect_sent(&mut self) -> Result<(), Stop> {
        let (len, _) = self.expect_completion(TX)?;
        check("length of the completion of a packet sent", len, 0)
    }

    /// Waits for the next received packet and returns it. Fails if there is none in time.
    pub(crate) fn receive(&mut self) -> Result<Vec<u8>, Stop> {
        let (len, at) = self.expect_completion(RX)?;
        self.bytes(RX, at, len)
    }

    /// Sends a packet and expects to receive the same bytes.
    pub(crate) fn expect_loopback(&mut self, what: &str, packet: &[u8]) -> Result<(), Stop> {
        self.add_receive_buffer(2048)?;
        self.transmit(packet)?;
        check(what, self.receive()?, packet.to_vec())
    }

    /// Sends a packet and expects to receive nothing, although a receive buffer is available.
    pub(crate) fn expect_dropped(&mut self, what: &str, packet: &[u8]) -> Result<(), Stop> {
        self.transmit(packet)?;
        self.expect_no_completion(RX, what)
    }

    /// Sends a command on the control queue and returns its ack byte.
    pub(crate) fn command(&mut self, command: &[u8]) -> Result<u8, Stop> {
        self.add_request(CONTROL, command, 1)?;
        self.kick(CONTROL)?;
        self.next_ack()
    }

    /// Waits for the next completion of a queue and returns its length. Fails if there is none in time.
    pub(crate) fn completed_len(&mut self, queue: u16) -> Result<u32, Stop> {
        Ok(self.expect_completion(queue)?.0)
    }

    /// Waits for the next completion of the control queue and returns its ack byte. Fails if there is none in time.
    pub(crate) fn next_ack(&mut self) -> Result<u8, Stop> {
        let (len, at) = self.expect_completion(CONTROL)?;
        check("length of the answer to a command", len, 1)?;
        Ok(self.bytes(CONTROL, at, 1)?.into_iter().next().unwrap_or(UNWRITTEN))
    }

    /// Fails if a request of the queue completes within [`QUIET_TIME`].
    pub(crate) fn expect_no_completion(&mut self, queue: u16, what: &str) -> Result<(), Stop> {
        match self.completion(queue, QUIET_TIME)? {
            None => Ok(()),
            Some(_) => Err(Stop::Failed(format!("{what}: queue {queue} completed something"))),
        }
    }

    /// Reads the counter of the queue's call eventfd, which resets it to 0.
    pub(crate) fn read_call_counter(&mut self, queue: u16) -> Result<u64, Stop> {
        Ok(self.queue_parts(queue)?.0.ring.read_call_counter())
    }

    /// Waits for a call. Fails if the device does not call in time.
    pub(crate) fn expect_call(&mut self, queue: u16, what: &str) -> Result<(), Stop> {
        let called = self.queue_parts(queue)?.0.ring.wait_call(TIMEOUT);
        if called { Ok(()) } else { Err(Stop::Failed(format!("{what}: queue {queue} did not call"))) }
    }

    /// Tells the device whether the driver wants calls for completions.
    pub(crate) fn enable_calls(&mut self, queue: u16, enable: bool) -> Result<(), Stop> {
        let (queue, region, _, _) = self.queue_parts(queue)?;
        queue.ring.enable_calls(region, enable)
    }

    /// Reads the vring bases of all queues.
    pub(crate) fn bases(&self) -> Result<[u32; 3], Stop> {
        let base = |queue: u16| {
            prepare("VHOST_GET_VRING_BASE", self.device.vring(Request::GET_VRING_BASE, queue.into(), 0))
        };
        Ok([base(RX)?, base(TX)?, base(CONTROL)?])
    }

    fn expect_completion(&mut self, queue: u16) -> Result<(u32, usize), Stop> {
        let timed_out =
            || Stop::Failed(format!("queue {queue} completed nothing in {} s", TIMEOUT.as_secs()));
        self.completion(queue, TIMEOUT)?.ok_or_else(timed_out)
    }

    /// Waits for the next completion. Returns its length and the offset of its buffer.
    fn completion(&mut self, queue: u16, timeout: Duration) -> Result<Option<(u32, usize)>, Stop> {
        let (queue, region, _, _) = self.queue_parts(queue)?;
        let Some((head, len)) = queue.ring.completion(region, timeout)? else { return Ok(None) };
        let not_in_flight = || Stop::Failed(format!("request {head} was completed, which is not in flight"));
        let index = queue.buffers.iter().position(|(id, _)| *id == head).ok_or_else(not_in_flight)?;
        Ok(Some((len, queue.buffers.remove(index).1)))
    }

    fn bytes(&mut self, queue: u16, at: usize, len: u32) -> Result<Vec<u8>, Stop> {
        let (_, region, _, _) = self.queue_parts(queue)?;
        (at..)
            .take(usize::try_from(len).unwrap_or(0))
            .map(|at| region.read::<1>(at).map(|[byte]| byte))
            .collect()
    }
}

impl Drop for NetDriver {
    fn drop(&mut self) {
        let _ = self.device.set_status(Status::RESET);
        if let Some(mac) = &self.mac_before {
            let _ = self.device.set_config(0, mac);
        }
    }
}

/// Pairs of queues that the device has, by its configuration space.
pub(crate) fn max_pairs(device: &Device) -> Result<u16, Stop> {
    let bytes = prepare("VHOST_VDPA_GET_CONFIG of max_virtqueue_pairs", device.config(8, 2))?;
    Ok(bytes.try_into().map_or(0, u16::from_le_bytes))
}

/// A packet to `destination` with `len` bytes after the destination address.
pub(crate) fn packet(destination: [u8; 6], len: usize) -> Vec<u8> {
    packet_with(HEADER, destination, len)
}

/// As [`packet`], with a virtio header of `header` bytes.
pub(crate) fn packet_with(header: usize, destination: [u8; 6], len: usize) -> Vec<u8> {
    let mut packet = vec![0; header];
    packet.extend_from_slice(&destination);
    packet.extend((1..=251_u8).cycle().take(len));
    packet
}
