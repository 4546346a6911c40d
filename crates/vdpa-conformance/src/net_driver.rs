//! [`NetDriver`]: a driver of a network device that receives what it sends.
//!
//! Three rings in one region, the control queue's in a region of its own when it has an address space of its own; both
//! are at the same addresses then.

use std::time::Duration;

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::blk_driver::{go, negotiate};
use crate::case::{Ctx, Stop, check, prepare};
use crate::device::{Device, WRITTEN};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::{IOVA, PATIENCE, Part, RING_PAGES, Ring, SILENCE};

/// The receive queue.
pub(crate) const RX: u16 = 0;
/// The transmit queue.
pub(crate) const TX: u16 = 1;
/// The control queue.
pub(crate) const CONTROL: u16 = 2;

/// Bytes of the header of a packet with VERSION_1.
pub(crate) const HEADER: usize = 12;
/// The address the device is given.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x56];
/// Bytes of an answer of the control queue that the device has not written.
pub(crate) const UNANSWERED: u8 = 0xee;

/// Entries of each ring.
const SIZE: u16 = 64;
/// Pages of a region: the rings, then buffers that are given away once.
const PAGES: u64 = 64;
/// The group of the control queue.
const CONTROL_GROUP: u32 = 1;

/// A ring with the region it is in.
#[derive(Debug)]
struct Queue {
    ring: Ring,
    /// Which of the driver's regions.
    region: usize,
    /// Next free descriptor.
    head: u16,
    /// Offsets of the buffers of the requests that are not completed, by head.
    buffers: Vec<(u16, usize)>,
}

/// A driver of a network device, set up and running. When it goes, the device has the address it had before.
#[derive(Debug)]
pub(crate) struct NetDriver {
    pub(crate) device: Device,
    features: Features,
    regions: Vec<Region>,
    /// Next free byte of each region.
    free: Vec<usize>,
    queues: [Queue; 3],
    mac_before: Vec<u8>,
}

impl NetDriver {
    /// Opens the device, becomes its owner, gives it the address [`MAC`], maps memory and starts all queues, with all
    /// features.
    pub(crate) fn start(ctx: &Ctx<'_>) -> Result<Self, Stop> {
        Self::with(ctx, ctx.probe().features, 0)
    }

    /// As [`start`](Self::start), with these features and the control queue in address space `asid`.
    pub(crate) fn with(ctx: &Ctx<'_>, features: Features, asid: u32) -> Result<Self, Stop> {
        let device = ctx.open_owned()?;
        let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
        prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
        let mac_before = prepare("VHOST_VDPA_GET_CONFIG", device.config(0, 6))?;
        let regions =
            (0..=usize::from(asid != 0)).map(|_| Region::new(PAGES)).collect::<Result<Vec<_>, _>>()?;
        let queue = |index: u16| {
            let at = usize::from(index) * usize::try_from(RING_PAGES * PAGE).unwrap_or(0);
            let region = if index == CONTROL { regions.len() - 1 } else { 0 };
            Ok(Queue { ring: Ring::new(index.into(), SIZE, at)?, region, head: 0, buffers: Vec::new() })
        };
        let queues = [queue(RX)?, queue(TX)?, queue(CONTROL)?];
        let free = vec![usize::try_from(3 * RING_PAGES * PAGE).unwrap_or(0); regions.len()];
        let driver = Self { device, features, regions, free, queues, mac_before };
        prepare("VHOST_VDPA_SET_CONFIG", driver.device.set_config(0, &MAC))?;
        driver.map_data()?;
        if asid != 0 {
            driver.map_control(asid)?;
            let moved = driver.device.set_vring(Request::SET_GROUP_ASID, CONTROL_GROUP, asid);
            prepare("VHOST_VDPA_SET_GROUP_ASID", moved)?;
        }
        driver.run()?;
        Ok(driver)
    }

    /// Negotiates and starts all queues from 0, as after a reset.
    fn run(&self) -> Result<(), Stop> {
        negotiate(&self.device, self.features)?;
        for queue in &self.queues {
            queue.ring.set_up(&self.device, 0)?;
        }
        go(&self.device)
    }

    fn update(&self, region: usize, asid: u32) -> Result<usize, vdpa_core::Errno> {
        let Some(region) = self.regions.get(region) else { return Err(vdpa_core::Errno::INVAL) };
        let (size, uaddr) = (region.size(), region.uaddr());
        let update = IotlbMsg { iova: IOVA, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
        self.device.message(asid, update)
    }

    /// Maps the memory of the data queues, and of the control queue unless that has its own.
    pub(crate) fn map_data(&self) -> Result<(), Stop> {
        check("UPDATE of the rings' memory", self.update(0, 0), Ok(WRITTEN))
    }

    /// Maps the control queue's own memory.
    pub(crate) fn map_control(&self, asid: u32) -> Result<(), Stop> {
        check("UPDATE of the control queue's memory", self.update(1, asid), Ok(WRITTEN))
    }

    /// Takes all mappings of an address space away.
    pub(crate) fn unmap(&self, asid: u32) -> Result<(), Stop> {
        let everything = IotlbMsg { kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
        check("INVALIDATE of everything", self.device.message(asid, everything), Ok(WRITTEN))
    }

    fn parts(&mut self, queue: u16) -> Result<(&mut Queue, &Region, &mut usize, &Device), Stop> {
        let missing = || Stop::Failed(format!("set-up: the driver has no queue {queue}"));
        let queue = self.queues.get_mut(usize::from(queue)).ok_or_else(missing)?;
        let region = self.regions.get(queue.region).ok_or_else(missing)?;
        let free = self.free.get_mut(queue.region).ok_or_else(missing)?;
        Ok((queue, region, free, &self.device))
    }

    /// Makes a request available, without a kick: `readable` bytes, then room for as many as `writable` says. Empty
    /// parts are left out.
    pub(crate) fn put(&mut self, queue: u16, readable: &[u8], writable: u32) -> Result<(), Stop> {
        let (queue, region, free, _) = self.parts(queue)?;
        let mut take = |len: usize| {
            let at = *free;
            *free += len.next_multiple_of(64);
            at
        };
        let mut parts = Vec::new();
        if !readable.is_empty() {
            let at = take(readable.len());
            region.write(at, readable)?;
            parts.push(Part::readable(at, u32::try_from(readable.len()).unwrap_or(u32::MAX)));
        }
        let at = take(usize::try_from(writable).unwrap_or(0));
        if writable > 0 {
            region.write(at, &[UNANSWERED])?;
            parts.push(Part::writable(at, writable));
        }
        Self::submit(queue, region, &parts, at)
    }

    /// Makes a receive buffer available that is not mapped.
    pub(crate) fn offer_unmapped(&mut self, len: u32) -> Result<(), Stop> {
        let (queue, region, _, _) = self.parts(RX)?;
        // Behind the region.
        let at = usize::try_from(region.size()).unwrap_or(0);
        Self::submit(queue, region, &[Part::writable(at, len)], at)
    }

    fn submit(queue: &mut Queue, region: &Region, parts: &[Part], at: usize) -> Result<(), Stop> {
        let head = queue.head;
        queue.buffers.push((head, at));
        queue.ring.submit(region, head, parts)?;
        queue.head = (head + u16::try_from(parts.len()).unwrap_or(0)) % SIZE;
        Ok(())
    }

    /// Kicks a queue.
    pub(crate) fn kick(&mut self, queue: u16) -> Result<(), Stop> {
        let (queue, _, _, device) = self.parts(queue)?;
        queue.ring.kick(device);
        Ok(())
    }

    /// Offers a receive buffer; no kick, which the device would ignore.
    pub(crate) fn offer(&mut self, len: u32) -> Result<(), Stop> {
        self.put(RX, &[], len)
    }

    /// Sends a packet, header included.
    pub(crate) fn send(&mut self, packet: &[u8]) -> Result<(), Stop> {
        self.put(TX, packet, 0)?;
        self.kick(TX)
    }

    /// Sends a packet; it must be completed, with the length 0 as nothing was written.
    pub(crate) fn transmit(&mut self, packet: &[u8]) -> Result<(), Stop> {
        self.send(packet)?;
        self.transmitted()
    }

    /// The next packet sent must be completed.
    pub(crate) fn transmitted(&mut self) -> Result<(), Stop> {
        let (len, _) = self.completed(TX)?;
        check("length of the completion of a packet sent", len, 0)
    }

    /// The next packet, which must come.
    pub(crate) fn receive(&mut self) -> Result<Vec<u8>, Stop> {
        let (len, at) = self.completed(RX)?;
        self.bytes(RX, at, len)
    }

    /// A packet that is sent comes back as it is.
    pub(crate) fn loops(&mut self, what: &str, packet: &[u8]) -> Result<(), Stop> {
        self.offer(2048)?;
        self.transmit(packet)?;
        check(what, self.receive()?, packet.to_vec())
    }

    /// A packet that is sent goes no further, though there is a buffer for it.
    pub(crate) fn drops(&mut self, what: &str, packet: &[u8]) -> Result<(), Stop> {
        self.transmit(packet)?;
        self.stays_silent(RX, what)
    }

    /// Gives a command to the control queue; returns the byte of the answer.
    pub(crate) fn command(&mut self, command: &[u8]) -> Result<u8, Stop> {
        self.put(CONTROL, command, 1)?;
        self.kick(CONTROL)?;
        self.answer()
    }

    /// The next answer of the control queue, which must come.
    pub(crate) fn answer(&mut self) -> Result<u8, Stop> {
        let (len, at) = self.completed(CONTROL)?;
        check("length of the answer to a command", len, 1)?;
        Ok(self.bytes(CONTROL, at, 1)?.into_iter().next().unwrap_or(UNANSWERED))
    }

    /// Nothing completes on a queue.
    pub(crate) fn stays_silent(&mut self, queue: u16, what: &str) -> Result<(), Stop> {
        match self.completion(queue, SILENCE)? {
            None => Ok(()),
            Some(_) => Err(Stop::Failed(format!("{what}: queue {queue} completed something"))),
        }
    }

    /// How often the device has called since this was asked last.
    pub(crate) fn calls(&mut self, queue: u16) -> Result<u64, Stop> {
        Ok(self.parts(queue)?.0.ring.call_count())
    }

    /// The device must call.
    pub(crate) fn called(&mut self, queue: u16, what: &str) -> Result<(), Stop> {
        let called = self.parts(queue)?.0.ring.wait_call(PATIENCE);
        if called { Ok(()) } else { Err(Stop::Failed(format!("{what}: queue {queue} did not call"))) }
    }

    /// Wants to be called for completions, or not.
    pub(crate) fn want_calls(&mut self, queue: u16, want: bool) -> Result<(), Stop> {
        let (queue, region, _, _) = self.parts(queue)?;
        queue.ring.want_calls(region, want)
    }

    /// Indices of all queues.
    pub(crate) fn bases(&self) -> Result<[u32; 3], Stop> {
        let base = |queue: u16| {
            prepare("VHOST_GET_VRING_BASE", self.device.vring(Request::GET_VRING_BASE, queue.into(), 0))
        };
        Ok([base(RX)?, base(TX)?, base(CONTROL)?])
    }

    fn completed(&mut self, queue: u16) -> Result<(u32, usize), Stop> {
        let late = || Stop::Failed(format!("queue {queue} completed nothing in {} s", PATIENCE.as_secs()));
        self.completion(queue, PATIENCE)?.ok_or_else(late)
    }

    /// The next completion: its length, and where its buffer is.
    fn completion(&mut self, queue: u16, patience: Duration) -> Result<Option<(u32, usize)>, Stop> {
        let (queue, region, _, _) = self.parts(queue)?;
        let Some((head, len)) = queue.ring.completion(region, patience)? else { return Ok(None) };
        let strange = || Stop::Failed(format!("request {head} was completed, which is not in flight"));
        let place = queue.buffers.iter().position(|(id, _)| *id == head).ok_or_else(strange)?;
        Ok(Some((len, queue.buffers.remove(place).1)))
    }

    fn bytes(&mut self, queue: u16, at: usize, len: u32) -> Result<Vec<u8>, Stop> {
        let (_, region, _, _) = self.parts(queue)?;
        (at..)
            .take(usize::try_from(len).unwrap_or(0))
            .map(|at| region.read::<1>(at).map(|[byte]| byte))
            .collect()
    }
}

impl Drop for NetDriver {
    fn drop(&mut self) {
        let _ = self.device.set_status(Status::RESET);
        let _ = self.device.set_config(0, &self.mac_before);
    }
}

/// A packet to `destination` of `len` bytes behind the address.
pub(crate) fn packet(destination: [u8; 6], len: usize) -> Vec<u8> {
    packet_with(HEADER, destination, len)
}

/// As [`packet`], with a header of `header` bytes.
pub(crate) fn packet_with(header: usize, destination: [u8; 6], len: usize) -> Vec<u8> {
    let mut packet = vec![0; header];
    packet.extend_from_slice(&destination);
    packet.extend((1..=251_u8).cycle().take(len));
    packet
}
