//! From the driver to the interface.

use std::sync::Arc;

use vdpa_backend::worker::{MemoryView, Popped, Queue, Queues};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::net::{NetHeader, transmit};
use vdpa_core::ring::{Fault, RingError};
use vdpa_core::types::{Perm, Result};
use vdpa_sys::tap;
use vdpa_sys::uring::MAX_IOVECS;
use zerocopy::IntoBytes;

use super::card::{BUDGET, BUDGET_BYTES, Card, tx_counter};

/// What became of a packet.
enum Sent {
    /// It is at the interface, with this many bytes.
    Bytes(u64),
    /// It was dropped, for the reason that this counter has.
    Dropped(usize),
    /// The interface takes no more.
    Full,
}

impl Card {
    /// Sends packets of one queue up to the budget; whether there may be more.
    pub(super) fn transmit(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        pair: u16,
    ) -> Result<bool, RingError> {
        let view = queues.view(queue);
        queue.ring(&view)?.disable_kick()?;
        let mut bytes = 0;
        for _ in 0..BUDGET {
            let popped = queue.ring(&view)?.pop(view.snapshot(), &mut self.chain)?;
            let sent = match popped {
                Popped::None => {
                    queues.publish(queue)?;
                    return queues.wait_for_kick(queue, &view);
                }
                Popped::Poison => {
                    queues.count_poison(index);
                    Ok(Sent::Dropped(tx_counter::BAD_HEADER))
                }
                Popped::Request => self.send(queues, index, queue, pair, &view),
            };
            match sent {
                Ok(Sent::Bytes(sent)) => {
                    bytes += usize::try_from(sent).unwrap_or(0);
                    queues.count_request(index, sent, false);
                }
                Ok(Sent::Dropped(reason)) => {
                    queues.count_request(index, 0, true);
                    queues.count_own(index, reason, 1);
                }
                Ok(Sent::Full) => {
                    queue.ring(&view)?.abandon(&self.chain)?;
                    queues.count_own(index, tx_counter::WAITS, 1);
                    queues.publish(queue)?;
                    return Ok(self.arm(queues, index, pair, true));
                }
                Err(fault) => {
                    // The packet stays in the ring until its memory is mapped.
                    let ring = queue.ring(&view)?;
                    ring.abandon(&self.chain)?;
                    ring.enable_kick()?;
                    return Err(fault.into());
                }
            }
            reach(CrashPoint::PacketSent);
            queue.ring(&view)?.push_used(self.chain.head, 0)?;
            if bytes >= BUDGET_BYTES {
                break;
            }
        }
        queues.publish(queue)?;
        Ok(true)
    }

    /// Sends the packet of the chain.
    fn send(
        &mut self,
        queues: &Queues,
        index: u16,
        queue: &Queue,
        pair: u16,
        view: &Arc<MemoryView>,
    ) -> Result<Sent, Fault> {
        const HEADER: u64 = size_of::<NetHeader>() as u64;
        let features = queue.setup().features;
        let Some((head, frame)) =
            self.chain.readable().split_at(HEADER).filter(|_| self.chain.writable.is_empty())
        else {
            return Ok(Sent::Dropped(tx_counter::BAD_HEADER));
        };
        let mut header = NetHeader::default();
        head.read(view.snapshot(), header.as_mut_bytes())?;
        let header = match transmit::check(header, frame.len(), features) {
            Ok(header) => header,
            Err(refused) => {
                queues.log_error(index, &refused);
                return Ok(Sent::Dropped(tx_counter::BAD_HEADER));
            }
        };
        // What is left in the queues of pairs that are not used any more is sent by the first one.
        let pair = if pair < self.state.pairs() { pair } else { 0 };
        let (Some(tap), true) = (self.tap(pair), self.state.is_link_up()) else {
            return Ok(Sent::Dropped(tx_counter::DOWN));
        };
        self.iovecs.clear();
        let mut copied = 0;
        match view.piece(frame, Perm::RO) {
            Some(piece) => self.iovecs.push(piece),
            None => match view.pieces(frame, Perm::RO)?.filter(|pieces| pieces.len() < MAX_IOVECS) {
                Some(pieces) => self.iovecs.extend(pieces),
                None => {
                    let len = usize::try_from(frame.len()).unwrap_or(usize::MAX);
                    let to = self.own.get_mut(size_of::<NetHeader>()..).and_then(|own| own.get_mut(..len));
                    frame.read(view.snapshot(), to.unwrap_or_default())?;
                    copied = len;
                }
            },
        }
        let written = if copied > 0 {
            let (to, _) = self.own.split_at_mut(size_of::<NetHeader>() + copied);
            to.get_mut(..size_of::<NetHeader>()).unwrap_or_default().copy_from_slice(header.as_bytes());
            tap::write(&*tap, to, &mut self.iovecs, view.memory())
        } else {
            tap::write(&*tap, header.as_bytes(), &mut self.iovecs, view.memory())
        };
        Ok(match written {
            Ok(()) => Sent::Bytes(frame.len()),
            Err(Errno::AGAIN) => Sent::Full,
            Err(Errno::IO) => Sent::Dropped(tx_counter::DOWN),
            Err(errno) => {
                queues.log_error(index, &format_args!("the interface refuses a packet: {errno}"));
                Sent::Dropped(tx_counter::REFUSED)
            }
        })
    }
}
