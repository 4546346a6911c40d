//! A network device that receives what it sends: what the kernel's network simulator does with its queues
//! (uapi-spec 6.2, `vdpasim_net_work`).
//!
//! Written over [`End`], a queue as this logic sees it, so that it needs no thread.
//!
//! What drivers that follow the rules cannot see differs: a chain that breaks the rules of rings (a loop, an index out
//! of range) stops its queue until it is started anew, where `vringh` skips it; and an answer that cannot be written has
//! the length 0, where the kernel's has an error number's.

mod stats;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::{FromBytes, IntoBytes};

pub use self::stats::Stats;
use super::{
    Ack, ControlHeader, LINK_UP, MAC_BYTES, NetConfig, class, header_len, is_multicast, mac as mac_command,
};
use crate::errno::Errno;
use crate::features::Features;
use crate::ring::{BufferSlice, Chain, Fault, Memory, RingError};

/// The receive queue.
pub const RX: u16 = 0;
/// The transmit queue.
pub const TX: u16 = 1;
/// The control queue.
pub const CONTROL: u16 = 2;
/// All of them.
pub const QUEUES: u16 = 3;

/// What such a device can offer: ANY_LAYOUT, VERSION_1, ACCESS_PLATFORM, MTU, MAC, STATUS, CTRL_VQ, CTRL_MAC_ADDR.
pub const FEATURES: Features = Features(0x3_0883_0028);

/// Bytes of a packet that are looped back; the rest is cut off.
const PACKET_MAX: usize = 4096;

/// After a delivery, a pass with more packets than this ends, and another one is scheduled.
const PASS: usize = 4;

/// Packets or commands that no pass exceeds. The kernel has no such limit: a driver that keeps sending what the
/// filter rejects keeps its pass going. Here it would keep a command of the control side waiting.
const PASS_MAX: usize = 256;

/// Whether the driver is told of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tell {
    /// If it wants to be.
    Wanted,
    /// Whether it wants to be or not.
    Always,
}

/// One queue with the memory its addresses are in.
pub trait End {
    /// The memory.
    type Memory: Memory;

    /// Its translation.
    fn memory(&self) -> &Self::Memory;

    /// Features in force.
    fn features(&self) -> Features;

    /// Takes the next chain; `false` when there is none.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`](crate::ring::split::SplitQueue::pop).
    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError>;

    /// Completes a chain with `len` bytes written, and shows it to the driver.
    fn complete(&mut self, head: u16, len: usize, tell: Tell);
}

/// What the control side of the device and its worker share.
#[derive(Debug, Default)]
pub struct Shared {
    config: Mutex<NetConfig>,
    /// What was done so far.
    pub stats: Stats,
}

impl Shared {
    /// What a device that is described by `config` begins with.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        Self { config: Mutex::new(config), stats: Stats::default() }
    }

    /// Configuration space, which the driver may write, also by the control queue. Held for the time of a copy only.
    pub fn config(&self) -> MutexGuard<'_, NetConfig> {
        // Bytes without invariants: what a panic left is as good as anything the driver may have written.
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies configuration space from `offset` into `out`; what is beyond its end stays as it is. Whatever the driver
    /// wrote, the link is up.
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

    /// The driver writes configuration space; what is beyond its end is ignored.
    pub fn write_config(&self, offset: u32, data: &[u8]) {
        let mut config = self.config();
        let part = usize::try_from(offset).ok().and_then(|from| config.as_mut_bytes().get_mut(from..));
        if let Some(part) = part.and_then(|rest| rest.get_mut(..data.len())) {
            part.copy_from_slice(data);
        }
    }
}

/// What the worker of a device knows; one per device.
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
    /// The worker of the device with which it shares `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, packet: Box::new([0; PACKET_MAX]), chain: Chain::new(), rx_chain: Chain::new() }
    }

    /// Serves the control queue (`vdpasim_handle_cvq`); whether there may be more.
    pub fn control(&mut self, queue: &mut impl End) -> bool {
        let stats = &self.shared.stats;
        // The answer to a command of an unknown class is that to the command before it in this pass.
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
            queue.complete(self.chain.head, written, Tell::Always);
        }
        true
    }

    /// Commands of the class MAC. A part of an address is stored before it is found to be too short.
    fn set_mac(&self, command: u8, memory: &impl Memory, body: BufferSlice<'_>) -> Ack {
        if command != mac_command::ADDR_SET {
            return Ack::Err;
        }
        match pull(memory, body, &mut self.shared.config().mac) {
            Ok(MAC_BYTES) => Ack::Ok,
            _ => Ack::Err,
        }
    }

    /// Moves packets from the transmit to the receive queue; whether another pass is scheduled.
    pub fn loop_back(&mut self, tx: &mut impl End, rx: &mut impl End) -> bool {
        let stats = &self.shared.stats;
        let header = header_len(tx.features());
        for taken in 1..=PASS_MAX {
            match tx.pop(&mut self.chain) {
                Ok(false) => return false,
                Ok(true) if self.chain.writable.is_empty() => {}
                // Whatever has buffers for the device to write is no packet; it is never completed.
                Ok(true) | Err(_) => {
                    stats.tx_errors.add(1);
                    return false;
                }
            }
            let sent = pull(tx.memory(), self.chain.readable(), &mut self.packet[..]).unwrap_or(0);
            if sent == 0 {
                stats.tx_errors.add(1);
                tx.complete(self.chain.head, 0, Tell::Wanted);
                continue;
            }
            stats.tx_packets.add(1);
            stats.tx_bytes.add(sent);
            let packet = self.packet.get(..sent).unwrap_or_default();
            if !accepts(packet, header, &self.shared.config().mac) {
                stats.rx_drops.add(1);
                tx.complete(self.chain.head, 0, Tell::Wanted);
                continue;
            }
            let room = rx.pop(&mut self.rx_chain);
            if room != Ok(true) || !self.rx_chain.readable.is_empty() {
                stats.rx_overruns.add(1);
                tx.complete(self.chain.head, 0, Tell::Wanted);
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
            tx.complete(self.chain.head, 0, Tell::Wanted);
            rx.complete(self.rx_chain.head, received, Tell::Wanted);
            if taken > PASS {
                return true;
            }
        }
        true
    }
}

/// Whether a packet with a header of `header` bytes is for the address `mac` (`receive_filter`).
fn accepts(packet: &[u8], header: usize, mac: &[u8; MAC_BYTES]) -> bool {
    let destination = packet.get(header..).and_then(|frame| frame.first_chunk::<MAC_BYTES>());
    destination.is_some_and(|to| is_multicast(*to) || same_text(to, mac))
}

/// Compares as `strncmp` does: what follows a common NUL does not count. So an address that begins with 00 is that
/// of every destination that begins with 00.
fn same_text(a: &[u8; MAC_BYTES], b: &[u8; MAC_BYTES]) -> bool {
    let end = a.iter().position(|byte| *byte == 0).map_or(MAC_BYTES, |nul| nul + 1);
    a.iter().zip(b).take(end).all(|(a, b)| a == b)
}

/// Copies out of client memory as much as there is and as fits; how much that was (`vringh_iov_pull_iotlb`). On a
/// fault `out` may have changed in part.
fn pull(memory: &impl Memory, from: BufferSlice<'_>, out: &mut [u8]) -> Result<usize, Fault> {
    let count = usize::try_from(from.len()).unwrap_or(usize::MAX).min(out.len());
    from.read(memory, out.get_mut(..count).unwrap_or_default())?;
    Ok(count)
}

/// Copies into client memory as much as there is room for; how much that was (`vringh_iov_push_iotlb`).
fn push(memory: &impl Memory, to: BufferSlice<'_>, data: &[u8]) -> Result<usize, Fault> {
    let count = usize::try_from(to.len()).unwrap_or(usize::MAX).min(data.len());
    to.write(memory, data.get(..count).unwrap_or_default())?;
    Ok(count)
}

#[cfg(test)]
mod tests;
