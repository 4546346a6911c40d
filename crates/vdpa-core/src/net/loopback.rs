//! A network device that receives what it sends: what the kernel's network simulator does with its queues
//! (uapi-spec 6.2, `vdpasim_net_work`).
//!
//! The logic is written over the trait [`LoopbackQueue`] and needs no thread of its own.
//!
//! Two differences from the kernel are visible only to drivers that break the rules. A malformed chain (a loop, an index
//! out of range) stops its queue until the queue is started again, where `vringh` skips the chain. A response that cannot
//! be written is completed with length 0, where the kernel uses an error number as the length.

mod stats;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromBytes, IntoBytes};

use self::stats::Delivery;
pub use self::stats::{STATS_WORDS, Stats, StatsMemory};
use super::{
    Ack, ControlHeader, LINK_UP, MAC_BYTES, NetConfig, class, header_len, is_multicast, mac as mac_command,
};
use crate::crash_points::{CrashPoint, reach};
use crate::errno::Errno;
use crate::features::Features;
use crate::ring::{BufferSlice, Chain, Fault, Memory, RingError};

/// The receive queue.
pub const RX: u16 = 0;
/// The transmit queue.
pub const TX: u16 = 1;
/// The control queue.
pub const CONTROL: u16 = 2;
/// Number of queues.
pub const QUEUES: u16 = 3;

/// What such a device can offer: ANY_LAYOUT, VERSION_1, ACCESS_PLATFORM, MTU, MAC, STATUS, CTRL_VQ, CTRL_MAC_ADDR.
pub const FEATURES: Features = Features(0x3_0883_0028);

/// Largest packet that is looped back, in bytes; longer packets are truncated.
const PACKET_MAX: usize = 4096;

/// Packets per pass after which a delivery ends the pass; the caller then schedules another pass.
const PASS: usize = 4;

/// Upper limit of packets or commands per pass. The kernel has no such limit: a driver that keeps sending packets
/// which the filter rejects never lets the pass end. Here that would delay the commands of the control side.
const PASS_MAX: usize = 256;

/// When a completion signals the call event of its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// Only if the driver has not suppressed notifications for it (virtio 1.2 section 2.7.7).
    IfEnabled,
    /// Always, even where the driver has suppressed it.
    Always,
}

/// A running queue together with the memory that its addresses refer to. Called by the thread that serves the device.
pub trait LoopbackQueue {
    /// Client memory by I/O virtual address.
    type Memory: Memory;

    /// Client memory through the translation table of this queue.
    fn memory(&self) -> &Self::Memory;

    /// Negotiated features.
    fn features(&self) -> Features;

    /// Pops the next available chain; `false` when there is none.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`](crate::ring::split::SplitQueue::pop).
    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError>;

    /// Whether the chain with this head was popped by a process that has died, and is to be popped again. Not where a ring ends with its
    /// process.
    fn is_repeated(&mut self, _head: u16) -> bool {
        false
    }

    /// Puts the chain with this head into the used ring with `len` bytes written, publishes it, and signals the call event
    /// as `notify` says. Does not block; errors of the ring are ignored.
    fn complete(&mut self, head: u16, len: usize, notify: Notify);
}

/// State of a device that its control side and its worker share.
#[derive(Debug, Default)]
pub struct Shared {
    config: Mutex<NetConfig>,
    /// Statistics.
    pub stats: Stats,
}

impl Shared {
    /// The initial state of a device with this configuration space.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        Self { config: Mutex::new(config), stats: Stats::default() }
    }

    /// As [`new`](Self::new), with counters in this memory.
    #[must_use]
    pub fn with_stats(self, memory: &StatsMemory) -> Self {
        Self { stats: Stats::new(memory), ..self }
    }

    /// Configuration space, which the driver may change directly or through the control queue. The lock may block, but
    /// callers hold it only while they copy.
    pub fn config(&self) -> MutexGuard<'_, NetConfig> {
        // Configuration space has no invariants, since the driver may write any bytes. So a poisoned lock is harmless.
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies configuration space from `offset` into `out`, unless the range passes its end; `out` is unchanged then. The
    /// link status always reads as up, whatever the driver wrote.
    pub fn read_config(&self, offset: u32, out: &mut [u8]) {
        let mut config = self.config();
        config.status = LINK_UP.into();
        let part = usize::try_from(offset).ok().and_then(|from| config.as_bytes().get(from..));
        if let Some(part) = part.and_then(|rest| rest.get(..out.len())) {
            out.copy_from_slice(part);
        }
    }

    /// What a driver has set, by configuration space or by the control queue, for
    /// [`Parent::save_state`](crate::parent::Parent::save_state).
    #[must_use]
    pub fn save_state(&self) -> Vec<u8> {
        self.config().as_bytes().to_vec()
    }

    /// Sets what [`save_state`](Self::save_state) gave.
    ///
    /// # Errors
    /// `EINVAL` for another number of bytes; nothing has changed then.
    pub fn restore_state(&self, state: &[u8]) -> Result<(), Errno> {
        *self.config() = NetConfig::read_from_bytes(state).map_err(|_| Errno::INVAL)?;
        Ok(())
    }

    /// Stores a write of the driver to configuration space. A write that passes its end is ignored.
    pub fn write_config(&self, offset: u32, data: &[u8]) {
        let mut config = self.config();
        let part = usize::try_from(offset).ok().and_then(|from| config.as_mut_bytes().get_mut(from..));
        if let Some(part) = part.and_then(|rest| rest.get_mut(..data.len())) {
            part.copy_from_slice(data);
        }
    }
}

/// State of the worker of one device.
pub struct Loopback {
    shared: Arc<Shared>,
    packet: Box<[u8; PACKET_MAX]>,
    chain: Chain,
    rx_chain: Chain,
}

impl fmt::Debug for Loopback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loopback").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl Loopback {
    /// A worker that shares `shared` with the control side of its device.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, packet: Box::new([0; PACKET_MAX]), chain: Chain::new(), rx_chain: Chain::new() }
    }

    /// Processes commands of the control queue (`vdpasim_handle_cvq`); returns whether more may be available.
    pub fn control(&mut self, queue: &mut impl LoopbackQueue) -> bool {
        let stats = &self.shared.stats;
        // As in the kernel, a command of an unknown class gets the status of the previous command of this pass.
        let mut status = Ack::Err;
        for _ in 0..PASS_MAX {
            if !queue.pop(&mut self.chain).unwrap_or(false) {
                return false;
            }
            stats.cvq_requests.add(1);
            let mut header = ControlHeader::default();
            let all = self.chain.readable();
            let Some((head, body)) = all.split_at(size_of::<ControlHeader>() as u64) else {
                stats.cvq_errors.add(1);
                return false;
            };
            if pull(queue.memory(), head, header.as_mut_bytes()) != Ok(size_of::<ControlHeader>()) {
                stats.cvq_errors.add(1);
                return false;
            }
            if header.class == class::MAC {
                status = self.set_mac(header.command, queue.memory(), body);
            }
            match status {
                Ack::Ok => stats.cvq_successes.add(1),
                Ack::Err => stats.cvq_errors.add(1),
            }
            let written = push(queue.memory(), self.chain.writable(), &[status.byte()]).unwrap_or(0);
            queue.complete(self.chain.head, written, Notify::Always);
        }
        true
    }

    /// Handles commands of the class MAC. As in the kernel, the bytes of a truncated address are stored before the command
    /// fails.
    fn set_mac(&self, command: u8, memory: &impl Memory, body: BufferSlice<'_>) -> Ack {
        if command != mac_command::ADDR_SET {
            return Ack::Err;
        }
        match pull(memory, body, &mut self.shared.config().mac) {
            Ok(MAC_BYTES) => Ack::Ok,
            _ => Ack::Err,
        }
    }

    /// Moves packets from the transmit to the receive queue (`vdpasim_net_work`); returns whether to schedule another pass.
    pub fn loop_back(&mut self, tx: &mut impl LoopbackQueue, rx: &mut impl LoopbackQueue) -> bool {
        self.finish_delivery(tx, rx);
        let stats = &self.shared.stats;
        let header = header_len(tx.features());
        for taken in 1..=PASS_MAX {
            match tx.pop(&mut self.chain) {
                Ok(false) => return false,
                Ok(true) if self.chain.writable.is_empty() => {}
                // A chain with device-writable buffers is no packet; like the kernel, this never completes it.
                Ok(true) | Err(_) => {
                    stats.tx_errors.add(1);
                    return false;
                }
            }
            let sent = pull(tx.memory(), self.chain.readable(), &mut self.packet[..]).unwrap_or(0);
            if sent == 0 {
                stats.tx_errors.add(1);
                tx.complete(self.chain.head, 0, Notify::IfEnabled);
                continue;
            }
            stats.tx_packets.add(1);
            stats.tx_bytes.add(sent);
            let packet = self.packet.get(..sent).unwrap_or_default();
            if !accepts(packet, header, &self.shared.config().mac) {
                stats.rx_drops.add(1);
                tx.complete(self.chain.head, 0, Notify::IfEnabled);
                continue;
            }
            let room = rx.pop(&mut self.rx_chain);
            if room != Ok(true) || !self.rx_chain.readable.is_empty() {
                stats.rx_overruns.add(1);
                tx.complete(self.chain.head, 0, Notify::IfEnabled);
                return false;
            }
            let received = push(rx.memory(), self.rx_chain.writable(), packet).unwrap_or(0);
            if received == 0 {
                // Neither chain is completed until the device is reset.
                stats.rx_errors.add(1);
                return false;
            }
            stats.rx_packets.add(1);
            stats.rx_bytes.add(received);
            reach(CrashPoint::PacketCopied);
            // A packet has at most 4096 bytes.
            let len = u16::try_from(received).unwrap_or(u16::MAX);
            stats.delivery.set(Some(Delivery { tx: self.chain.head, rx: self.rx_chain.head, len }));
            tx.complete(self.chain.head, 0, Notify::IfEnabled);
            reach(CrashPoint::PacketHalfDone);
            rx.complete(self.rx_chain.head, received, Notify::IfEnabled);
            stats.delivery.set(None);
            if taken > PASS {
                return true;
            }
        }
        true
    }
}

impl Loopback {
    /// The device was reset: nothing is being delivered.
    pub fn reset(&mut self) {
        self.shared.stats.delivery.set(None);
    }

    /// Goes on where a process has died between the answers to the two chains of a packet. If the first one was not given, the whole
    /// packet is repeated.
    fn finish_delivery(&mut self, tx: &mut impl LoopbackQueue, rx: &mut impl LoopbackQueue) {
        let Some(delivery) = self.shared.stats.delivery.get() else { return };
        while !tx.is_repeated(delivery.tx) && rx.is_repeated(delivery.rx) {
            // Chains before it are those that are never completed.
            if rx.pop(&mut self.rx_chain) != Ok(true) {
                break;
            }
            if self.rx_chain.head == delivery.rx {
                rx.complete(delivery.rx, delivery.len.into(), Notify::IfEnabled);
            }
        }
        self.shared.stats.delivery.set(None);
    }
}

/// Whether a packet with a header of `header` bytes is addressed to `mac` or to a group (`receive_filter`).
fn accepts(packet: &[u8], header: usize, mac: &[u8; MAC_BYTES]) -> bool {
    let destination = packet.get(header..).and_then(|frame| frame.first_chunk::<MAC_BYTES>());
    destination.is_some_and(|to| is_multicast(*to) || strncmp_equal(to, mac))
}

/// Compares as the kernel's `strncmp` does, which stops at a common NUL. So an address that begins with 00 matches every
/// destination that begins with 00.
fn strncmp_equal(a: &[u8; MAC_BYTES], b: &[u8; MAC_BYTES]) -> bool {
    let end = a.iter().position(|byte| *byte == 0).map_or(MAC_BYTES, |nul| nul + 1);
    a.iter().zip(b).take(end).all(|(a, b)| a == b)
}

/// Copies from client memory as many bytes as both sides have, and returns their number (`vringh_iov_pull_iotlb`). After a
/// fault `out` may be partly overwritten.
fn pull(memory: &impl Memory, from: BufferSlice<'_>, out: &mut [u8]) -> Result<usize, Fault> {
    let count = usize::try_from(from.len()).unwrap_or(usize::MAX).min(out.len());
    from.read(memory, out.get_mut(..count).unwrap_or_default())?;
    Ok(count)
}

/// Copies into client memory as many bytes as both sides have, and returns their number (`vringh_iov_push_iotlb`).
fn push(memory: &impl Memory, to: BufferSlice<'_>, data: &[u8]) -> Result<usize, Fault> {
    let count = usize::try_from(to.len()).unwrap_or(usize::MAX).min(data.len());
    to.write(memory, data.get(..count).unwrap_or_default())?;
    Ok(count)
}

#[cfg(test)]
mod tests;
