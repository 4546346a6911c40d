//! One connection of TCP as the driver's end: as much of it as a link without losses needs, and a return to what was not acknowledged
//! where something was lost all the same. The data is zeros.

use std::time::Duration;

use vdpa_core::ring::Buffer;
use vdpa_sys::clock::monotonic_ns;

use crate::client::{Port, Result};
use crate::drive::float;
use crate::packets::{BLOCKS, Heard, SCALE, Segment, flag};
use crate::plan::Target;

/// The first of the guest's ports: each connection has another one, because the host remembers those that have ended.
const PORT: u16 = 10_000;
const PORTS: u64 = 20_000;
/// Bytes of headers of a segment, with the virtio header.
const HEADERS: usize = 128;
/// Packets in the ring.
const SLOTS: usize = 256;
/// Most bytes of data in one packet.
const DATA: usize = 65_480;
/// Bytes of the zeros that segments take their data from.
const ZEROS: usize = 4 << 20;
/// Most bytes that are not acknowledged, in the place of a congestion window: what one link without delay needs, and less than the
/// buffers of the sockets behind passt, which loses what it has no room for.
const IN_FLIGHT: u32 = 1 << 20;
/// Bytes that the driver is ready to take.
const WINDOW: u32 = 4 << 20;
/// Acknowledgements of the same byte after which everything behind it is sent again, as every TCP does (RFC 5681): one lost segment
/// would cost [`RETRY_NS`] otherwise.
const REPEATED: u32 = 3;
/// Time without an acknowledgement after which everything is sent again.
const RETRY_NS: u64 = 200_000_000;
const WAIT: Duration = Duration::from_millis(20);

/// A connection to a port of the host.
pub(crate) struct Stream {
    from: u16,
    to: u16,
    /// Bytes of data of one packet, and of a segment where the server cuts it.
    chunk: usize,
    mss: u16,
    cut: bool,
    /// The next byte to send, the first that is not acknowledged, and the first that the other side has no room for.
    next: u32,
    unacknowledged: u32,
    limit: u32,
    scale: u8,
    /// Acknowledgements of the same byte so far, and where the repetition ends that they have caused.
    repeated: u32,
    recovery: u32,
    /// The next byte that is expected, and what has arrived behind it.
    expected: u32,
    beyond: [Option<(u32, u32)>; BLOCKS],
    /// Whether the driver sends data.
    sends: bool,
    /// Segments of the other side that have not been acknowledged.
    owes: bool,
    headers: Vec<Buffer>,
    /// Headers that are not in the ring.
    free: Vec<usize>,
    zeros: u64,
    at: usize,
    progress_ns: u64,
    received: u64,
}

impl Stream {
    /// Connects.
    pub(crate) fn connect(port: &mut Port, to: u16, target: Target) -> Result<Self> {
        let mss = target.mss();
        let cut = port.features.has(vdpa_core::features::Features::NET_HOST_TSO4);
        let chunk = if cut { DATA / usize::from(mss) * usize::from(mss) } else { mss.into() };
        let mut headers = Vec::new();
        // A guest without offloads has each packet in one piece, and passt takes no others.
        let piece = if cut { HEADERS } else { HEADERS + chunk };
        for _ in 0..SLOTS {
            headers.push(port.memory.take(piece)?);
        }
        let free = (0..headers.len()).collect();
        let zeros = port.memory.take(ZEROS + DATA)?.iova;
        // Some number that differs from those of connections before.
        #[expect(clippy::cast_possible_truncation, reason = "any number will do")]
        let first = monotonic_ns() as u32;
        let from = PORT + u16::try_from(monotonic_ns() / 1_000_000 % PORTS)?;
        let mut this = Self {
            from,
            to,
            chunk,
            mss,
            cut,
            next: first.wrapping_add(1),
            unacknowledged: first,
            limit: first,
            scale: 0,
            repeated: 0,
            recovery: first,
            expected: 0,
            beyond: [None; BLOCKS],
            sends: to == crate::host::STREAM_SINK,
            owes: false,
            headers,
            free,
            zeros,
            at: 0,
            progress_ns: monotonic_ns(),
            received: 0,
        };
        let first_packet = this.segment(first, flag::SYN, 0).headers(mss);
        let packet = port.memory.take(first_packet.len())?;
        port.memory.write(packet.iova, &first_packet)?;
        for _ in 0..250 {
            transmit_only(port, packet)?;
            port.wait(false, WAIT)?;
            let mut answer = None;
            port.receive(|packet| {
                answer = answer.or(Heard::parse(packet).filter(|heard| heard.to == from));
                Ok(())
            })?;
            let Some(heard) = answer.filter(|heard| heard.flags & flag::SYN != 0) else { continue };
            this.scale = heard.scale;
            this.expected = heard.sequence.wrapping_add(1);
            this.unacknowledged = heard.acknowledged;
            this.limit = heard.acknowledged.wrapping_add(heard.window.into());
            let bytes = this.segment(this.next, flag::ACK, 0).headers(mss);
            port.memory.write(packet.iova, &bytes)?;
            // Data may come at once, which only `run` takes.
            transmit_only(port, Buffer { len: u32::try_from(bytes.len())?, ..packet })?;
            return Ok(this);
        }
        Err(format!("port {to} of the host does not answer").into())
    }

    const fn segment(&self, sequence: u32, flags: u8, data: usize) -> Segment {
        #[expect(clippy::cast_possible_truncation, reason = "scaled to 16 bits")]
        let window = if flags & flag::SYN != 0 { u16::MAX } else { (WINDOW >> SCALE) as u16 };
        let cut = if self.cut { Some(self.mss) } else { None };
        Segment {
            from: self.from,
            to: self.to,
            sequence,
            acknowledged: self.expected,
            flags,
            window,
            data,
            blocks: self.beyond,
            cut,
        }
    }

    /// Goes on until `end`. How many bytes have arrived.
    pub(crate) fn run(&mut self, port: &mut Port, end: u64) -> Result<f64> {
        let (sent, received) = (self.unacknowledged, self.received);
        let mut bytes = 0;
        let mut before = sent;
        self.progress_ns = monotonic_ns();
        loop {
            let now = monotonic_ns();
            if now >= end {
                break;
            }
            let got = port.receive(|packet| self.hear(packet, now))?;
            bytes += u64::from(self.unacknowledged.wrapping_sub(before));
            before = self.unacknowledged;
            while let Some(done) = port.transmit_queue(0)?.pop()? {
                self.free.extend(usize::try_from(done.token).ok().filter(|slot| *slot < self.headers.len()));
            }
            if now - self.progress_ns > RETRY_NS {
                self.next = self.unacknowledged;
                self.progress_ns = now;
            }
            let added = self.send(port)?;
            if got == 0 && !added {
                port.wait(self.free.is_empty(), WAIT)?;
            }
        }
        Ok(float(if self.sends { bytes } else { self.received - received }))
    }

    /// Takes a packet of the other side.
    fn hear(&mut self, packet: &[u8], now: u64) -> Result<()> {
        let Some(heard) = Heard::parse(packet).filter(|heard| heard.to == self.from) else { return Ok(()) };
        if heard.flags & (flag::RST | flag::FIN) != 0 {
            return Err("the host has ended the connection".into());
        }
        let acknowledged = heard.acknowledged.wrapping_sub(self.unacknowledged);
        let sent = self.next.wrapping_sub(self.unacknowledged);
        let limit = heard.acknowledged.wrapping_add(u32::from(heard.window) << self.scale);
        if acknowledged > 0 && acknowledged < 1 << 30 {
            self.unacknowledged = heard.acknowledged;
            self.progress_ns = now;
            self.repeated = 0;
            if acknowledged > sent {
                // It was sent before everything was to be sent again.
                self.next = heard.acknowledged;
            }
        } else if acknowledged == 0
            && sent > 0
            && heard.data == 0
            && limit == self.limit
            && !before(self.unacknowledged, self.recovery)
        {
            self.repeated += 1;
            if self.repeated == REPEATED {
                (self.repeated, self.recovery) = (0, self.next);
                self.next = self.unacknowledged;
            }
        }
        if acknowledged < 1 << 30 {
            self.limit = limit;
        }
        if heard.data > 0 {
            self.owes = true;
            self.arrive(heard.sequence, heard.sequence.wrapping_add(heard.data), now);
        }
        Ok(())
    }

    /// Takes the bytes from `first` to the one before `behind`. What lies before the next byte was received already.
    fn arrive(&mut self, mut first: u32, mut behind: u32, now: u64) {
        // One with what it touches of the rest.
        for known in &mut self.beyond {
            if let Some((one, end)) = *known
                && !before(behind, one)
                && !before(end, first)
            {
                first = if before(one, first) { one } else { first };
                behind = if before(behind, end) { end } else { behind };
                *known = None;
            }
        }
        if before(self.expected, first) {
            // Without a place for it, it comes again.
            if let Some(place) = self.beyond.iter_mut().find(|place| place.is_none()) {
                *place = Some((first, behind));
            }
        } else if before(self.expected, behind) {
            self.received += u64::from(behind.wrapping_sub(self.expected));
            self.expected = behind;
            self.progress_ns = now;
        }
    }

    /// Sends what the other side has room for, or an acknowledgement. Whether it has sent anything.
    fn send(&mut self, port: &mut Port) -> Result<bool> {
        let mut added = false;
        while self.sends {
            let flight = self.next.wrapping_sub(self.unacknowledged);
            let window = if before(self.next, self.limit) { self.limit.wrapping_sub(self.next) } else { 0 };
            let room = window.min(IN_FLIGHT.saturating_sub(flight));
            let waits = flight > 0;
            // A small rest of the window is used when nothing is on its way that would open it.
            if room == 0 || (room as usize) < self.chunk && waits {
                break;
            }
            let len = self.chunk.min(room as usize);
            let Some(slot) = self.free.pop() else { break };
            let headers = self.segment(self.next, flag::ACK | flag::PSH, len).headers(self.mss);
            let data = Buffer { iova: self.zeros + self.at as u64, len: u32::try_from(len)? };
            self.at = (self.at + len) % ZEROS;
            self.add(port, slot, &headers, Some(data))?;
            self.next = self.next.wrapping_add(u32::try_from(len)?);
            (self.owes, added) = (false, true);
        }
        if std::mem::take(&mut self.owes)
            && let Some(slot) = self.free.pop()
        {
            let headers = self.segment(self.next, flag::ACK, 0).headers(self.mss);
            self.add(port, slot, &headers, None)?;
            added = true;
        }
        if added {
            port.transmit_queue(0)?.publish()?;
        }
        Ok(added)
    }

    fn add(&self, port: &mut Port, slot: usize, headers: &[u8], data: Option<Buffer>) -> Result<()> {
        let at = *self.headers.get(slot).ok_or("a completion of nothing")?;
        port.memory.write(at.iova, headers)?;
        let first = Buffer { len: u32::try_from(headers.len())?, ..at };
        let all = match data {
            Some(data) if !self.cut => [Some(Buffer { len: first.len + data.len, ..at }), None],
            data => [Some(first), data],
        };
        let parts: Vec<Buffer> = all.into_iter().flatten().collect();
        port.transmit_queue(0)?.add(&parts, &[], slot as u64)?;
        Ok(())
    }
}

/// Whether the number `one` comes before `other`.
const fn before(one: u32, other: u32) -> bool {
    other.wrapping_sub(one).wrapping_sub(1) < 1 << 31
}

/// Sends one packet without looking at what comes meanwhile.
fn transmit_only(port: &mut Port, packet: Buffer) -> Result<()> {
    let queue = port.transmit_queue(0)?;
    while queue.pop()?.is_some() {}
    queue.add(&[packet], &[], u64::MAX)?;
    queue.publish()
}
