//! [`Card`]: the queue handler of a network card.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_backend::worker::{Popped, Queue, QueueHandler, Queues};
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::features::Features;
use vdpa_core::net::card::{COMMAND_MAX, CardState};
use vdpa_core::net::{Ack, NetHeader, transmit};
use vdpa_core::ring::{Chain, RingError};
use vdpa_core::types::Result;
use vdpa_sys::uring::{IoVec, Op, OwnedBuf};

use super::receive::Receiver;
use super::taps::Taps;

/// Packets of one queue before others are served.
pub(super) const BUDGET: usize = 64;
/// Bytes after which a pass ends.
pub(super) const BUDGET_BYTES: usize = 512 << 10;
/// Commands of one pass.
const COMMANDS: usize = 16;
/// Bytes of the longest packet with its header.
pub(super) const PACKET_MAX: usize = {
    assert!(transmit::FRAME_MAX < 1 << 20);
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let frame = transmit::FRAME_MAX as usize;
    size_of::<NetHeader>() + frame
};

/// Counters of a queue that packets are received in, beside requests, bytes and errors: what [`Queues::count_own`] is given.
pub(super) mod rx_counter {
    /// Packets that no buffer, or all that one packet may have, were large enough for.
    pub(in super::super) const TOO_LONG: usize = 0;
    /// Packets that the driver did not want.
    pub(in super::super) const FILTERED: usize = 1;
    /// Buffers that are none.
    pub(in super::super) const BAD_BUFFERS: usize = 2;
    /// Times that a packet had to wait for buffers.
    pub(in super::super) const WAITS: usize = 3;
}

/// Counters of a queue that packets are sent by.
pub(super) mod tx_counter {
    /// Packets with a header that says what cannot be.
    pub(in super::super) const BAD_HEADER: usize = 0;
    /// Packets that the kernel has refused.
    pub(in super::super) const REFUSED: usize = 1;
    /// Packets that were sent while the link or the interface was down.
    pub(in super::super) const DOWN: usize = 2;
    /// Times that the interface could take no more.
    pub(in super::super) const WAITS: usize = 3;
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
    Unused,
}

/// The queue handler of a network card.
pub(super) struct Card {
    /// `None` once the interface was removed.
    pub(super) taps: Option<Arc<Taps>>,
    pub(super) state: CardState,
    pairs: u16,
    pub(super) receivers: Vec<Receiver>,
    /// By pair: whether a poll waits until the queue of the interface can be read, and until it can be written to.
    armed: Vec<[bool; 2]>,
    pub(super) chain: Chain,
    pub(super) iovecs: Vec<IoVec>,
    /// A packet, or a part of one, on its way to or from memory that can only be copied.
    pub(super) own: Box<[u8]>,
}

impl Card {
    pub(super) fn new(taps: Arc<Taps>, state: CardState, pairs: u16) -> Self {
        Self {
            taps: Some(taps),
            state,
            pairs,
            receivers: (0..pairs).map(|_| Receiver::default()).collect(),
            armed: vec![[false; 2]; pairs.into()],
            chain: Chain::new(),
            iovecs: Vec::new(),
            own: vec![0; PACKET_MAX].into(),
        }
    }

    const fn role(&self, index: u16, features: Features) -> Role {
        let (pair, control) = (index / 2, if features.has(Features::NET_MQ) { 2 * self.pairs } else { 2 });
        match index {
            _ if index == control && features.has(Features::NET_CTRL_VQ) => Role::Control,
            _ if index >= control => Role::Unused,
            _ if index.is_multiple_of(2) => Role::Receive(pair),
            _ => Role::Transmit(pair),
        }
    }

    /// The interface's queue of a pair.
    pub(super) fn tap(&self, pair: u16) -> Option<Arc<OwnedFd>> {
        self.taps.as_ref()?.queue(pair).cloned()
    }

    fn serve_queue(&mut self, queues: &mut Queues, index: u16, queue: &mut Queue) -> Result<bool, RingError> {
        match self.role(index, queue.setup().features) {
            Role::Receive(pair) => self.receive(queues, index, queue, pair),
            Role::Transmit(pair) => self.transmit(queues, index, queue, pair),
            Role::Control => self.control(queues, index, queue),
            Role::Unused => Ok(false),
        }
    }

    /// Has the queue of a pair served when its interface can be read, or written to; whether it is to be served at once, because that is
    /// not possible.
    pub(super) fn arm(&mut self, queues: &mut Queues, index: u16, pair: u16, writable: bool) -> bool {
        let Some(fd) = self.tap(pair) else { return false };
        let Some(armed) = self.armed.get_mut(usize::from(pair)) else { return false };
        let Some(armed) = armed.get_mut(usize::from(writable)) else { return false };
        if !*armed {
            let slot = u32::from(pair) * 2 + u32::from(writable);
            match queues.submit(Op::PollOnce { fd, writable }, slot) {
                Ok(()) => *armed = true,
                Err(error) => {
                    queues.log_error(index, &error);
                    return true;
                }
            }
        }
        false
    }

    fn control(&mut self, queues: &mut Queues, index: u16, queue: &mut Queue) -> Result<bool, RingError> {
        let view = queues.view(queue);
        let features = queue.setup().features;
        for _ in 0..COMMANDS {
            let mut chain = std::mem::take(&mut self.chain);
            let popped = queue.ring(&view)?.pop(view.snapshot(), &mut chain);
            self.chain = chain;
            let popped = popped?;
            if popped == Popped::None {
                queues.publish(queue)?;
                return queues.wait_for_kick(queue, &view);
            }
            let bytes = self.chain.readable();
            let len = usize::try_from(bytes.len()).unwrap_or(usize::MAX);
            let mut ack = Ack::Err;
            if len <= COMMAND_MAX && popped == Popped::Request {
                let command = self.own.get_mut(..len).unwrap_or_default();
                if let Err(fault) = bytes.read(view.snapshot(), command) {
                    queue.ring(&view)?.abandon(&self.chain)?;
                    return Err(fault.into());
                }
                if let Some(taps) = &self.taps {
                    let before = self.state.pairs();
                    ack = self.state.execute(command, features, self.pairs, &mut &**taps);
                    let after = self.state.pairs();
                    for pair in before.min(after)..before.max(after) {
                        // Packets may have come for pairs that are used from now on.
                        if let Some(receive) = queues.get_mut(pair * 2) {
                            receive.set_pending(true);
                        }
                    }
                    // As those that wait at the queues of the interface which the driver gives up: the kernel drops them.
                    let given_up = self.receivers.iter_mut().skip(after.into());
                    given_up.for_each(|receiver| *receiver = Receiver::default());
                }
            }
            reach(CrashPoint::CommandDone);
            let answered = self.chain.writable().write(view.snapshot(), &[ack.byte()]);
            let written = u32::from(answered == Ok(true));
            queue.ring(&view)?.push_used(self.chain.head, written)?;
            queues.count_request(index, len as u64, ack == Ack::Err);
        }
        queues.publish(queue)?;
        Ok(true)
    }
}

impl QueueHandler for Card {
    fn retry_on_map_change(&self) -> bool {
        true
    }

    fn serve(&mut self, queues: &mut Queues) {
        queues.serve_each(|queues, index, queue| self.serve_queue(queues, index, queue));
    }

    fn complete(&mut self, queues: &mut Queues, slot: u32, result: Result<u32>, _buffer: Option<OwnedBuf>) {
        let (pair, writable) = (slot / 2, slot % 2 == 1);
        let Ok(pair) = u16::try_from(pair) else { return };
        if let Some(armed) =
            self.armed.get_mut(usize::from(pair)).and_then(|armed| armed.get_mut(usize::from(writable)))
        {
            *armed = false;
        }
        if result.is_ok()
            && let Some(queue) = queues.get_mut(pair * 2 + u16::from(writable))
        {
            queue.set_pending(true);
        }
    }

    fn reset(&mut self) {
        self.receivers.iter_mut().for_each(|receiver| *receiver = Receiver::default());
    }

    fn hand_over(&mut self) {
        // The polls were cancelled.
        self.armed.fill([false; 2]);
    }

    fn is_at_rest(&self) -> bool {
        self.armed.iter().all(|armed| *armed == [false; 2])
    }

    fn fail(&mut self) {
        self.taps = None;
    }
}
