//! The floor: the smallest server between rings and a TAP interface, as a measure of what the kernel allows.
//!
//! It trusts its client, which is the same program: it checks no index, no length and no header. Like the other servers it is a
//! process of its own, and it serves one client.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use vdpa_core::features::Features;
use vdpa_sys::tap::{self, Open, offload};

use crate::client::Result;
use crate::host::INTERFACE;
use crate::trusting::{Memory, Message, Ring};

/// The last bit is VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = Features::of(&[
    Features::VERSION_1,
    Features::RING_EVENT_IDX,
    Features::NET_MRG_RXBUF,
    Features::NET_MQ,
    Features::NET_CSUM,
    Features::NET_HOST_TSO4,
    Features::NET_GUEST_CSUM,
    Features::NET_GUEST_TSO4,
])
.0 | 1 << 30;
/// Packets before the client is told of them.
const BATCH: usize = 64;
/// Bytes of the largest packet with its header.
const PACKET: usize = 12 + 65_550;
/// Buffers of a packet.
const PARTS: usize = 20;

#[derive(Default)]
struct Queue {
    ring: Ring,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
}

struct Session {
    stream: UnixStream,
    memory: Memory,
    features: u64,
    queues: Vec<Queue>,
}

/// Makes the interface and serves one client, with `pairs` pairs of queues.
pub(crate) fn serve(socket: &Path, pairs: usize) -> Result<()> {
    let mut taps = vec![tap::open(INTERFACE, Open { multi_queue: pairs > 1, create: true })?];
    while taps.len() < pairs {
        taps.push(tap::open_more(INTERFACE)?);
    }
    let (stream, _) = UnixListener::bind(socket)?.accept()?;
    let queues = (0..2 * pairs).map(|_| Queue::default()).collect();
    let mut session = Session { stream, memory: Memory::default(), features: 0, queues };
    while session.queues.iter().any(|queue| queue.kick.is_none() || queue.call.is_none()) {
        if !session.message()? {
            return Ok(());
        }
    }
    let has = |bit| Features(session.features).has(bit);
    let taken = [(Features::NET_GUEST_CSUM, offload::CSUM), (Features::NET_GUEST_TSO4, offload::TSO4)];
    let taken = taken.into_iter().filter(|(bit, _)| has(*bit)).fold(0, |all, (_, one)| all | one);
    tap::set_offloads(taps.first().ok_or("no interface")?, taken)?;
    session.run(&taps)
}

impl Session {
    /// Handles one message; `false` when the client has disconnected.
    fn message(&mut self) -> Result<bool> {
        let Some(mut message) = Message::receive(&mut self.stream)? else { return Ok(false) };
        let mut value = None;
        let (request, first) = (message.request, message.word(0));
        let queue = self.queues.get_mut(usize::try_from(first & 0xff)?);
        match (request, queue) {
            (1, _) => value = Some(FEATURES),
            (2, _) => self.features = first,
            // MQ.
            (15, _) => value = Some(1),
            // Number and padding, then guest address, size, address in the client and offset of the only region.
            (5, _) => {
                let fd = message.fd().ok_or("memory without a descriptor")?;
                self.memory.add(&fd, message.word(4), message.word(2), message.word(3))?;
            }
            (8, Some(queue)) => queue.ring.size = usize::try_from(first >> 32)?,
            (9, Some(queue)) => {
                queue.ring.set_areas([1, 3, 2].map(|at| self.memory.local(message.word(at))));
            }
            (12, Some(queue)) => queue.kick = message.fd(),
            (13, Some(queue)) => queue.call = message.fd(),
            _ => {}
        }
        message.answer(&mut self.stream, value)?;
        Ok(true)
    }

    /// Serves the rings until the client has disconnected.
    fn run(&mut self, taps: &[OwnedFd]) -> Result<()> {
        let Self { stream, memory, features, queues } = self;
        stream.set_nonblocking(true)?;
        let merges = Features(*features).has(Features::NET_MRG_RXBUF);
        let mut spare = vec![0; PACKET];
        // By pair: there is no packet to receive; there is no room for packets.
        let mut empty = vec![true; taps.len()];
        loop {
            let mut busy = false;
            for ((queues, tap), empty) in queues.chunks_mut(2).zip(taps).zip(&mut empty) {
                let [receive, transmit] = queues else { continue };
                busy |= send(transmit, memory, tap)?;
                let (more, none) = take(receive, memory, tap, merges, &mut spare)?;
                busy |= more;
                *empty = none;
            }
            if busy {
                continue;
            }
            // Kicks of receive queues are of no interest while there is no packet.
            let mut fds = vec![PollFd::new(&*stream, PollFlags::IN)];
            let mut ready = false;
            for ((queues, tap), empty) in queues.chunks(2).zip(taps).zip(&empty) {
                let [receive, transmit] = queues else { continue };
                ready |= !transmit.ring.enable_kick();
                fds.extend(transmit.kick.iter().map(|kick| PollFd::new(kick, PollFlags::IN)));
                if *empty {
                    fds.push(PollFd::new(tap, PollFlags::IN));
                } else {
                    ready |= !receive.ring.enable_kick();
                    fds.extend(receive.kick.iter().map(|kick| PollFd::new(kick, PollFlags::IN)));
                }
            }
            if ready {
                continue;
            }
            poll(&mut fds, None)?;
            if fds.first().is_some_and(|fd| !fd.revents().is_empty()) {
                match message_left(stream)? {
                    true => {}
                    false => return Ok(()),
                }
            }
            for kick in queues.iter().filter_map(|queue| queue.kick.as_ref()) {
                let _ = rustix::io::read(kick, &mut [0; 8]);
            }
        }
    }
}

/// Whether the client is still there. What it says now, as that queues are enabled, changes nothing.
fn message_left(stream: &mut UnixStream) -> Result<bool> {
    match std::io::Read::read(stream, &mut [0; 64]) {
        Ok(0) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Sends a batch; whether there was any packet.
fn send(queue: &mut Queue, memory: &Memory, tap: &OwnedFd) -> Result<bool> {
    let call = queue.call.as_ref().ok_or("no call eventfd")?;
    let mut count = 0;
    while count < BATCH
        && let Some(head) = queue.ring.pop()
    {
        let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PARTS];
        let used = gather(&queue.ring, memory, head, &mut parts)?;
        // SAFETY: the parts are in mappings of this session, and the kernel only reads them.
        unsafe { libc::writev(tap.as_raw_fd(), parts.as_ptr(), used) };
        queue.ring.complete(head, 0);
        count += 1;
    }
    queue.ring.publish(call)?;
    Ok(count > 0)
}

/// Lists the parts of a chain.
fn gather(ring: &Ring, memory: &Memory, head: usize, parts: &mut [libc::iovec]) -> Result<libc::c_int> {
    let mut next = Some(head);
    let mut used = 0;
    for part in parts {
        let Some(index) = next else { break };
        let (addr, len, follows) = ring.descriptor(index);
        part.iov_base = std::ptr::with_exposed_provenance_mut(memory.local(addr));
        part.iov_len = usize::try_from(len)?;
        next = follows;
        used += 1;
    }
    Ok(used)
}

/// Receives a batch; whether there may be more, and whether the interface has no packet.
fn take(
    queue: &mut Queue,
    memory: &Memory,
    tap: &OwnedFd,
    merges: bool,
    spare: &mut [u8],
) -> Result<(bool, bool)> {
    let call = queue.call.as_ref().ok_or("no call eventfd")?;
    let mut count = 0;
    let mut empty = false;
    while count < BATCH {
        let mut heads = [0; PARTS];
        let mut parts = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PARTS + 1];
        let mut taken = 0;
        // Room for the largest packet, where it may be in several buffers; what is not needed is given back.
        for (head, part) in heads.iter_mut().zip(&mut parts).take(if merges { PARTS - 3 } else { 1 }) {
            let Some(next) = queue.ring.pop() else { break };
            *head = next;
            gather(&queue.ring, memory, next, std::slice::from_mut(part))?;
            taken += 1;
        }
        if taken == 0 {
            break;
        }
        if let Some(last) = parts.get_mut(taken) {
            last.iov_base = spare.as_mut_ptr().cast();
            last.iov_len = spare.len();
        }
        // SAFETY: the parts are in mappings of this session, which the client does not use before they are given back, and `spare`
        // is borrowed.
        let got = unsafe { libc::readv(tap.as_raw_fd(), parts.as_ptr(), libc::c_int::try_from(taken + 1)?) };
        let mut left = usize::try_from(got).unwrap_or(0);
        let mut used = 0_u16;
        let first = parts.first().map_or(0, |part| part.iov_base.expose_provenance());
        for (head, part) in heads.iter().zip(&parts).take(taken) {
            if left == 0 {
                queue.ring.unpop();
                continue;
            }
            let here = left.min(part.iov_len);
            left -= here;
            used += 1;
            queue.ring.complete(*head, u32::try_from(here)?);
        }
        if used == 0 {
            empty = true;
            break;
        }
        Ring::write(first + 10, used);
        count += 1;
    }
    queue.ring.publish(call)?;
    Ok((count == BATCH, empty))
}
