//! What the driver does in each workload.

use std::net::UdpSocket;
use std::time::Duration;

use hdrhistogram::Histogram;
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_sys::clock::monotonic_ns;

use crate::client::{Address, Port, RING, Result};
use crate::cpu;
use crate::host::{self, ECHO, FLOW, Flow, SINK};
use crate::packets::{udp, udp_to};
use crate::plan::{Kind, Target, Workload};
use crate::tcp::Stream;

/// The first port of the guest that packets come from.
const GUEST_FLOW: u16 = 7000;
/// Most packets of a flow that are on their way to the driver: fewer than the queue of an interface holds.
const WINDOW: usize = 256;
/// Packets that a socket sends by one call.
const BURST: usize = 32;
/// After this time without a packet those on their way are lost.
const LOST_AFTER: Duration = Duration::from_millis(20);
/// Bytes before the data of a packet of UDP.
const UDP_HEADERS: usize = 42;

/// Result of one measurement.
#[derive(Debug)]
pub(crate) struct Sample {
    /// Packets, KiB or round trips.
    pub(crate) count: f64,
    pub(crate) seconds: f64,
    /// Latency in ns, of round trips.
    pub(crate) latency: Histogram<u64>,
    /// CPU time of this thread in ns.
    pub(crate) client_ns: u64,
    /// Packets that did not arrive, of those that come one after the other.
    pub(crate) lost: u64,
}

/// A load that goes on until it is dropped.
pub(crate) enum Load {
    Send(Sending),
    Receive(Receiving),
    Stream(Box<Stream>),
    PingPong(PingPong),
}

/// Connects and begins a workload.
pub(crate) fn begin(address: &Address, workload: &Workload, target: Target) -> Result<(Port, Load)> {
    let base = [Features::VERSION_1, Features::RING_EVENT_IDX, Features::NET_MRG_RXBUF];
    let mut wanted = Features::of(&base);
    if workload.pairs > 1 {
        wanted = wanted.with(Features::NET_MQ);
    }
    let stream = matches!(workload.kind, Kind::StreamIn | Kind::StreamOut);
    if stream && target.has_offloads() {
        wanted = wanted
            | Features::of(&[
                Features::NET_CSUM,
                Features::NET_HOST_TSO4,
                Features::NET_GUEST_CSUM,
                Features::NET_GUEST_TSO4,
            ]);
    }
    let mut port = Port::connect(address, wanted, workload.pairs)?;
    let load = match workload.kind {
        Kind::Send => Load::Send(Sending::new(&mut port, workload.packet)?),
        Kind::Receive => Load::Receive(Receiving::new(&mut port, workload.packet)?),
        Kind::StreamOut => Load::Stream(Box::new(Stream::connect(&mut port, host::STREAM_SINK, target)?)),
        Kind::StreamIn => Load::Stream(Box::new(Stream::connect(&mut port, host::STREAM_SOURCE, target)?)),
        Kind::PingPong => Load::PingPong(PingPong::new(&mut port, workload.packet)?),
    };
    Ok((port, load))
}

impl Load {
    /// Runs for `length`.
    pub(crate) fn run(&mut self, port: &mut Port, length: Duration) -> Result<Sample> {
        let mut latency = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        let client_before = cpu::this_thread_ns();
        let begin = monotonic_ns();
        let end = begin + u64::try_from(length.as_nanos())?;
        let mut lost = 0;
        let count = match self {
            Self::Send(load) => load.run(port, end)?,
            Self::Receive(load) => load.run(port, end, &mut lost)?,
            Self::Stream(stream) => stream.run(port, end)? / 1024.0,
            Self::PingPong(load) => load.run(port, end, &mut latency)?,
        };
        let seconds = seconds(monotonic_ns() - begin);
        Ok(Sample { count, seconds, latency, client_ns: cpu::this_thread_ns() - client_before, lost })
    }
}

/// All packets that the transmit rings hold, again and again.
pub(crate) struct Sending {
    packets: Vec<Vec<Buffer>>,
    /// Packets that are not in a ring, by pair.
    free: Vec<Vec<usize>>,
}

impl Sending {
    fn new(port: &mut Port, len: usize) -> Result<Self> {
        let mut this = Self { packets: Vec::new(), free: Vec::new() };
        for flow in (GUEST_FLOW..).take(port.pairs()) {
            let bytes = udp(flow, SINK, len);
            let mut all = Vec::new();
            for _ in 0..RING {
                let buffer = port.memory.take(bytes.len())?;
                port.memory.write(buffer.iova, &bytes)?;
                all.push(buffer);
            }
            this.free.push((0..all.len()).collect());
            this.packets.push(all);
        }
        Ok(this)
    }

    fn run(&mut self, port: &mut Port, end: u64) -> Result<f64> {
        let before = host::udp_arrived()?;
        while monotonic_ns() < end {
            let mut done = 0;
            for (pair, (free, packets)) in self.free.iter_mut().zip(&self.packets).enumerate() {
                let queue = port.transmit_queue(pair)?;
                while let Some(sent) = queue.pop()? {
                    free.push(usize::try_from(sent.token)?);
                    done += 1;
                }
                if free.is_empty() {
                    continue;
                }
                for at in free.drain(..) {
                    let packet = packets.get(at).ok_or("a completion of nothing")?;
                    queue.add(&[*packet], &[], at as u64)?;
                }
                queue.publish()?;
            }
            port.receive(|_| Ok(()))?;
            if done == 0 {
                port.wait(true, LOST_AFTER)?;
            }
        }
        Ok(float(host::udp_arrived()? - before))
    }
}

/// A flow of packets to each pair.
pub(crate) struct Receiving {
    flows: Vec<Flow>,
    /// Packets on their way, by flow.
    flying: Vec<usize>,
}

impl Receiving {
    fn new(port: &mut Port, len: usize) -> Result<Self> {
        let mut flows = Vec::new();
        for pair in 0..u16::try_from(port.pairs())? {
            let socket = Flow::bind(FLOW + pair)?;
            ask(port, pair, &socket, len)?;
            flows.push(Flow::answer(socket, len - UDP_HEADERS, BURST)?);
        }
        let flying = vec![0; flows.len()];
        Ok(Self { flows, flying })
    }

    fn run(&mut self, port: &mut Port, end: u64, lost: &mut u64) -> Result<f64> {
        let mut count = 0;
        loop {
            for (flow, flying) in self.flows.iter().zip(&mut self.flying) {
                if *flying + BURST <= WINDOW {
                    *flying += flow.send();
                }
            }
            let flying = &mut self.flying;
            let got = port.receive(|packet| {
                let flow = udp_to(packet).and_then(|to| to.checked_sub(GUEST_FLOW)).map(usize::from);
                if let Some(flying) = flow.and_then(|flow| flying.get_mut(flow)) {
                    *flying = flying.saturating_sub(1);
                    count += 1;
                }
                Ok(())
            })?;
            if monotonic_ns() >= end {
                return Ok(float(count));
            }
            let full = self.flying.iter().all(|flying| flying + BURST > WINDOW);
            if got == 0 && full && !port.wait(false, LOST_AFTER)? {
                *lost += self.flying.iter().map(|flying| *flying as u64).sum::<u64>();
                self.flying.fill(0);
            }
        }
    }
}

/// Has the host know whom to send to: sends a packet of the flow until it has arrived.
fn ask(port: &mut Port, pair: u16, socket: &UdpSocket, len: usize) -> Result<()> {
    let bytes = udp(GUEST_FLOW + pair, FLOW + pair, len);
    let packet = port.memory.take(bytes.len())?;
    port.memory.write(packet.iova, &bytes)?;
    for _ in 0..250 {
        transmit(port, usize::from(pair), packet)?;
        if socket.peek(&mut [0]).is_ok() {
            return Ok(());
        }
    }
    Err(format!("no packet of pair {pair} has arrived").into())
}

/// Sends one packet, and waits until the server has it.
fn transmit(port: &mut Port, pair: usize, packet: Buffer) -> Result<()> {
    let queue = port.transmit_queue(pair)?;
    queue.add(&[packet], &[], 0)?;
    queue.publish()?;
    for _ in 0..500 {
        let queue = port.transmit_queue(pair)?;
        while queue.pop()?.is_some() {}
        if queue.in_flight() == 0 {
            return Ok(());
        }
        port.wait(true, LOST_AFTER)?;
        port.receive(|_| Ok(()))?;
    }
    Err("the server takes no packets".into())
}

/// A packet to a socket that sends it back.
pub(crate) struct PingPong {
    packet: Buffer,
}

impl PingPong {
    fn new(port: &mut Port, len: usize) -> Result<Self> {
        let bytes = udp(GUEST_FLOW, ECHO, len);
        let packet = port.memory.take(bytes.len())?;
        port.memory.write(packet.iova, &bytes)?;
        Ok(Self { packet })
    }

    fn run(&self, port: &mut Port, end: u64, latency: &mut Histogram<u64>) -> Result<f64> {
        let mut count = 0;
        let mut silent = 0;
        while monotonic_ns() < end || count == 0 {
            let begun = monotonic_ns();
            let queue = port.transmit_queue(0)?;
            while queue.pop()?.is_some() {}
            queue.add(&[self.packet], &[], 0)?;
            queue.publish()?;
            let mut back = false;
            let mut waited = true;
            while !back && waited {
                port.receive(|packet| {
                    back |= udp_to(packet) == Some(GUEST_FLOW);
                    Ok(())
                })?;
                waited = back || port.wait(false, LOST_AFTER)?;
            }
            if back {
                latency.saturating_record(monotonic_ns() - begun);
                count += 1;
            } else {
                silent += 1;
                if silent > 250 {
                    return Err("no packet comes back".into());
                }
            }
        }
        Ok(float(count))
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub(crate) const fn float(count: u64) -> f64 {
    count as f64
}

const fn seconds(ns: u64) -> f64 {
    float(ns) / 1e9
}
