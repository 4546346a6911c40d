//! From the interface to the driver: packets are read straight into the driver's buffers.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_backend::worker::{MemoryView, Popped, Queue, Queues};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::features::Features;
use vdpa_core::net::NetHeader;
use vdpa_core::net::card::{CardState, Parts};
use vdpa_core::ring::{BufferSlice, Chain, Fault, RingError};
use vdpa_core::types::Perm;
use vdpa_sys::tap;
use vdpa_sys::uring::{IoVec, MAX_IOVECS};

use super::card::{BUDGET, BUDGET_BYTES, Card, rx_counter};

const HEADER: usize = size_of::<NetHeader>();
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;
/// Bytes of a packet that the filter looks at.
const FILTERED: usize = 18;
/// Room for a packet, at first.
const EXPECTED: usize = 2048;
/// Most buffers of one packet.
const BUFFERS_MAX: usize = 256;

/// The state of a queue that packets are received in.
#[derive(Debug)]
pub(super) struct Receiver {
    /// A packet that the driver had too few buffers for, which waits until there are more. Nothing is read meanwhile.
    held: Option<Vec<u8>>,
    /// Bytes of room that are collected before a packet is read: as large as those that came last. What is longer is copied.
    expected: usize,
}

impl Default for Receiver {
    fn default() -> Self {
        Self { held: None, expected: EXPECTED }
    }
}

/// A buffer that was popped.
#[derive(Debug)]
struct Room {
    chain: Chain,
    /// Bytes.
    len: usize,
    /// Where it is in this process; `None` for memory that can only be copied.
    pieces: Option<Vec<IoVec>>,
}

/// Buffers that were popped and not used, in order.
#[derive(Debug, Default)]
struct Rooms {
    all: VecDeque<Room>,
    /// Bytes of all.
    len: usize,
}

impl Rooms {
    fn take_first(&mut self) -> Option<Room> {
        let room = self.all.pop_front()?;
        self.len -= room.len;
        Some(room)
    }
}

/// Why a pass has ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The driver has too few buffers.
    NoBuffers,
    /// The interface has no packet.
    NoPackets,
    /// The budget is used up.
    Budget,
    /// The interface, or memory, is gone.
    Stuck,
}

/// What became of a packet.
enum Placed {
    /// It has reached the driver, or was dropped.
    Done,
    /// There are too few buffers. The packet was copied.
    Waits(Vec<u8>),
}

/// One pass over a queue.
struct Pass<'a> {
    queues: &'a Queues,
    index: u16,
    queue: &'a mut Queue,
    view: &'a Arc<MemoryView>,
    features: Features,
    state: CardState,
    pair: u16,
    rooms: Rooms,
}

impl Card {
    /// Receives packets into one queue up to the budget; whether there may be more.
    pub(super) fn receive(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        pair: u16,
    ) -> Result<bool, RingError> {
        let view = queues.view(queue);
        let view = &view;
        if let Some(parts) = self.state.parts(pair) {
            finish_parts(queue, view, &mut self.chain, parts)?;
            self.state.note_parts(pair, None);
            queues.publish(queue)?;
        }
        if !queue.is_running() {
            return return_repeats(queues, queue, view, &mut self.chain);
        }
        let Some(tap) = self.tap(pair).filter(|_| pair < self.state.pairs()) else { return Ok(false) };
        queue.ring(view)?.disable_kick()?;
        let features = queue.setup().features;
        let (state, rooms) = (self.state.clone(), Rooms::default());
        let mut pass = Pass { queues, index, queue, view, features, state, pair, rooms };
        let end = self.receive_packets(&mut pass, pair, &tap);
        // Asked for before buffers are given back: a kick is for those that the driver adds.
        let waits = matches!(end, Ok(End::NoBuffers)) && !pass.rooms.all.is_empty();
        let added = waits && pass.queue.ring(view)?.enable_kick()?;
        pass.give_back()?;
        let Pass { queue, .. } = pass;
        queues.publish(queue)?;
        match end? {
            End::NoBuffers if waits => Ok(added),
            End::NoBuffers => queues.wait_for_kick(queue, view),
            End::NoPackets => Ok(self.arm(queues, index, pair, false)),
            End::Budget => Ok(true),
            End::Stuck => {
                queue.ring(view)?.enable_kick()?;
                Ok(false)
            }
        }
    }

    fn receive_packets(
        &mut self,
        pass: &mut Pass<'_>,
        pair: u16,
        tap: &Arc<OwnedFd>,
    ) -> Result<End, RingError> {
        let mut bytes = 0;
        for _ in 0..BUDGET {
            let Some(receiver) = self.receivers.get_mut(usize::from(pair)) else { return Ok(End::Stuck) };
            let held = receiver.held.take();
            let expected = held.as_ref().map_or(receiver.expected, Vec::len);
            let collected = pass.collect(expected);
            if pass.rooms.all.is_empty() {
                receiver.held = held;
                return Ok(if collected? { End::Stuck } else { End::NoBuffers });
            }
            // A buffer that is out of reach comes first the next time.
            let (direct, len) = match &held {
                Some(packet) => {
                    let own = self.own.get_mut(..packet.len()).unwrap_or_default();
                    own.copy_from_slice(packet);
                    (0, packet.len())
                }
                None => {
                    let direct = pass.direct(&mut self.iovecs);
                    match tap::read(tap, &mut self.iovecs, pass.view.memory(), &mut self.own) {
                        Ok(len) => (direct, len),
                        Err(Errno::AGAIN) => return Ok(End::NoPackets),
                        Err(errno) => {
                            pass.queues.log_error(
                                pass.index,
                                &format_args!("the interface cannot be read: {errno}"),
                            );
                            return Ok(End::Stuck);
                        }
                    }
                }
            };
            let rest = self.own.get(..len.saturating_sub(direct)).unwrap_or_default();
            let expected = len.max(expected - expected / 16).max(EXPECTED);
            if held.is_none() && !self.state.is_promiscuous() {
                let mut start = [0; HEADER + FILTERED];
                let there = pass.start(direct.min(len), rest, &mut start);
                if !self.state.accepts(there.get(HEADER..).unwrap_or_default(), pass.features) {
                    pass.queues.count_own(pass.index, rx_counter::FILTERED, 1);
                    continue;
                }
            }
            reach(CrashPoint::PacketRead);
            let placed = pass.place(direct.min(len), rest)?;
            receiver.expected = expected;
            if let Placed::Waits(packet) = placed {
                receiver.held = Some(packet);
                pass.queues.count_own(pass.index, rx_counter::WAITS, u64::from(held.is_none()));
                return Ok(End::NoBuffers);
            }
            bytes += len;
            if bytes >= BUDGET_BYTES {
                break;
            }
        }
        Ok(End::Budget)
    }
}

impl Pass<'_> {
    /// Whether a packet may be in several buffers.
    const fn merges(&self) -> bool {
        self.features.has(Features::NET_MRG_RXBUF)
    }

    /// Pops buffers until they have room for `bytes`, as far as there are any. Whether it has ended at one that is out of reach.
    fn collect(&mut self, bytes: usize) -> Result<bool, RingError> {
        while self.rooms.all.is_empty()
            || self.merges() && self.rooms.len < bytes && self.rooms.all.len() < BUFFERS_MAX
        {
            match self.pop()? {
                Some(true) => {}
                Some(false) => return Ok(true),
                None => return Ok(false),
            }
        }
        Ok(false)
    }

    /// Pops one buffer: `Some(false)` for one that is not usable now, `None` where there is none.
    fn pop(&mut self) -> Result<Option<bool>, RingError> {
        let mut chain = Chain::new();
        let popped = self.queue.ring(self.view)?.pop(self.view.snapshot(), &mut chain)?;
        let len = usize::try_from(chain.writable().len()).unwrap_or(usize::MAX);
        match popped {
            Popped::None => return Ok(None),
            Popped::Request if len >= HEADER && chain.readable.is_empty() => {}
            _ if !self.rooms.all.is_empty() => {
                // It is answered when those before it are.
                self.queue.ring(self.view)?.abandon(&chain)?;
                return Ok(None);
            }
            _ => {
                if popped == Popped::Poison {
                    self.queues.count_poison(self.index);
                }
                self.queues.count_own(self.index, rx_counter::BAD_BUFFERS, 1);
                self.queues.count_request(self.index, 0, true);
                self.queue.ring(self.view)?.push_used(chain.head, 0)?;
                return Ok(Some(true));
            }
        }
        match self.view.pieces(chain.writable(), Perm::WO) {
            Ok(pieces) => {
                self.rooms.len += len;
                self.rooms.all.push_back(Room { chain, len, pieces });
                Ok(Some(true))
            }
            Err(fault) => {
                self.queue.ring(self.view)?.abandon(&chain)?;
                self.queues.log_error(self.index, &fault);
                Ok(Some(false))
            }
        }
    }

    /// Lists the addresses of the buffers up to the first that can only be copied. Returns their bytes.
    fn direct(&self, iovecs: &mut Vec<IoVec>) -> usize {
        iovecs.clear();
        let mut len = 0;
        for room in &self.rooms.all {
            let Some(pieces) = &room.pieces else { break };
            if iovecs.len() + pieces.len() >= MAX_IOVECS {
                break;
            }
            iovecs.extend_from_slice(pieces);
            len += room.len;
        }
        len
    }

    /// Copies the start of a packet, `direct` bytes of which are in the buffers, and `rest` is behind them.
    fn start<'a>(&self, direct: usize, rest: &[u8], start: &'a mut [u8]) -> &'a [u8] {
        let len = start.len().min(direct + rest.len());
        let (there, copied) = start.get_mut(..len).unwrap_or_default().split_at_mut(direct.min(len));
        let mut to = there;
        for room in &self.rooms.all {
            let (now, later) = to.split_at_mut(room.len.min(to.len()));
            // Of memory that has gone meanwhile the filter sees zeros.
            let _ = room.chain.writable().read(self.view.snapshot(), now);
            to = later;
            if to.is_empty() {
                break;
            }
        }
        let rest = rest.get(..copied.len()).unwrap_or_default();
        copied.copy_from_slice(rest);
        start.get(..len).unwrap_or_default()
    }

    /// Gives a packet to the driver, `direct` bytes of which are in the first buffers. The `rest` is copied.
    fn place(&mut self, direct: usize, rest: &[u8]) -> Result<Placed, RingError> {
        let len = direct + rest.len();
        while self.rooms.len < len {
            if !self.merges() || self.rooms.all.len() >= BUFFERS_MAX {
                self.queues.count_own(self.index, rx_counter::TOO_LONG, 1);
                return Ok(Placed::Done);
            }
            if self.queue.ring(self.view)?.pops_alone() {
                // Processes may have died of this buffer, so no other one is popped beside it: it goes back without the packet.
                let packet = self.copy(direct, rest);
                while let Some(room) = self.rooms.take_first() {
                    self.queue.ring(self.view)?.push_used(room.chain.head, 0)?;
                }
                return Ok(Placed::Waits(packet));
            }
            match self.pop() {
                Ok(Some(true)) => {}
                Ok(_) => return Ok(Placed::Waits(self.copy(direct, rest))),
                Err(error) => return Err(error),
            }
        }
        if let Err(fault) = self.copy_rest(direct, rest) {
            // Memory that could be translated a moment ago: the translation of this pass does not change, so it has ended with its owner.
            self.queues.log_error(self.index, &fault);
            self.queues.count_own(self.index, rx_counter::TOO_LONG, 1);
            return Ok(Placed::Done);
        }
        self.finish(len)
    }

    /// All of a packet.
    fn copy(&self, direct: usize, rest: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; direct + rest.len()];
        self.start(direct, rest, &mut packet);
        packet
    }

    /// Copies what is not in the buffers yet.
    fn copy_rest(&self, direct: usize, mut rest: &[u8]) -> Result<(), Fault> {
        let mut skip = direct;
        for room in &self.rooms.all {
            if rest.is_empty() {
                break;
            }
            let here = skip.min(room.len);
            skip -= here;
            let Some((_, to)) = room.chain.writable().split_at(here as u64) else { continue };
            let (now, later) = rest.split_at(rest.len().min(room.len - here));
            to.write(self.view.snapshot(), now)?;
            rest = later;
        }
        Ok(())
    }

    /// Completes the buffers of a packet of `len` bytes that is in them.
    fn finish(&mut self, len: usize) -> Result<Placed, RingError> {
        let mut ends = Vec::with_capacity(1);
        let mut left = len;
        for room in &self.rooms.all {
            let here = left.min(room.len);
            left -= here;
            ends.push(here);
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.rooms.all.front() {
            let count = u16::try_from(ends.len()).unwrap_or(u16::MAX).to_le_bytes();
            // An error is one of memory that has gone with its owner.
            let _ = write_at(first.chain.writable(), NUM_BUFFERS, &count, self.view);
            if !self.features.has(Features::NET_GUEST_CSUM) {
                // The kernel says that it has checked a checksum, whoever asks.
                let _ = write_at(first.chain.writable(), 0, &[0], self.view);
            }
        }
        let several = ends.len() > 1;
        if several {
            self.note_parts(&ends)?;
        }
        for here in ends {
            let Some(room) = self.rooms.take_first() else { break };
            let written = u32::try_from(here).unwrap_or(u32::MAX);
            self.queue.ring(self.view)?.push_used(room.chain.head, written)?;
            if several {
                reach(CrashPoint::PacketHalfDone);
            }
        }
        if several {
            self.state.note_parts(self.pair, None);
        }
        let bytes = len.saturating_sub(HEADER) as u64;
        self.queues.count_request(self.index, bytes, false);
        Ok(Placed::Done)
    }

    /// Notes that a packet is being given to the driver in buffers that are filled so far. In order it is given as a whole anyway.
    fn note_parts(&mut self, ends: &[usize]) -> Result<(), RingError> {
        if !self.features.has(Features::IN_ORDER) {
            let in_flight = self.queue.ring(self.view)?.in_flight();
            let buffers = u16::try_from(ends.len()).unwrap_or(u16::MAX);
            let last = ends.last().and_then(|last| u32::try_from(*last).ok()).unwrap_or(0);
            self.state.note_parts(self.pair, Some(Parts { in_flight, buffers, last }));
        }
        Ok(())
    }

    /// Returns the buffers that were not used to the ring.
    fn give_back(&mut self) -> Result<(), RingError> {
        while let Some(room) = self.rooms.all.pop_back() {
            self.queue.ring(self.view)?.abandon(&room.chain)?;
        }
        self.rooms.len = 0;
        Ok(())
    }
}

fn write_at(to: BufferSlice<'_>, offset: u64, data: &[u8], view: &MemoryView) -> Result<(), Fault> {
    let Some((_, to)) = to.split_at(offset) else { return Ok(()) };
    to.write(view.snapshot(), data).map(drop)
}

/// A process that was killed has given some buffers of a packet to the driver. The others, which are filled too, are the first to be
/// repeated. A driver that got only some would take the next packet for the rest of this one.
#[cold]
fn finish_parts(
    queue: &mut Queue,
    view: &Arc<MemoryView>,
    chain: &mut Chain,
    parts: Parts,
) -> Result<(), RingError> {
    let left = parts.left(queue.ring(view)?.in_flight());
    for number in 1..=left {
        if queue.ring(view)?.pop_along(view.snapshot(), chain)? == Popped::None {
            break;
        }
        let full = u32::try_from(chain.writable().len()).unwrap_or(u32::MAX);
        let written = if number == left { parts.last.min(full) } else { full };
        queue.ring(view)?.push_used(chain.head, written)?;
    }
    Ok(())
}

/// The queue is being stopped, and buffers that a process has taken which has died are still in it: they are returned empty.
fn return_repeats(
    queues: &Queues,
    queue: &mut Queue,
    view: &Arc<MemoryView>,
    chain: &mut Chain,
) -> Result<bool, RingError> {
    while queue.ring(view)?.pop(view.snapshot(), chain)? != Popped::None {
        queue.ring(view)?.push_used(chain.head, 0)?;
    }
    queues.publish(queue)?;
    Ok(false)
}
