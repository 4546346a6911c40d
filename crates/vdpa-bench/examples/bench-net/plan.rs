//! The workloads, and the goals for them.

use vdpa_bench::comparison::Goal;

/// What a workload does. Directions are the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Packets of UDP from the driver to a socket.
    Send,
    /// Packets of UDP from a socket to the driver.
    Receive,
    /// One stream of TCP from the driver to a socket.
    StreamOut,
    /// One stream of TCP from a socket to the driver.
    StreamIn,
    /// One packet at a time to a socket, and back.
    PingPong,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Vdpad,
    /// DPDK's testpmd between a vhost port and a TAP port.
    Testpmd,
    /// passt, which has sockets in place of an interface.
    Passt,
    /// The smallest loop between rings and a TAP interface, in this program; see `floor`.
    Floor,
}

impl Target {
    pub(crate) const ALL: [Self; 4] = [Self::Vdpad, Self::Testpmd, Self::Passt, Self::Floor];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vdpad => "vdpad",
            Self::Testpmd => "testpmd",
            Self::Passt => "passt",
            Self::Floor => "floor",
        }
    }

    /// Whether it is a program of others that ours is compared with.
    pub(crate) const fn is_peer(self) -> bool {
        matches!(self, Self::Testpmd | Self::Passt)
    }

    /// Bytes of data of the largest packet of TCP that it takes without cutting it.
    pub(crate) const fn mss(self) -> u16 {
        // passt tells its guests to use an MTU of 65,520.
        if matches!(self, Self::Passt) { 65_480 } else { 1460 }
    }

    /// Whether the driver may leave checksums and segments to it. testpmd hands packets on as they are, and its TAP port takes
    /// neither.
    pub(crate) const fn has_offloads(self) -> bool {
        matches!(self, Self::Vdpad | Self::Floor)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// Bytes of a packet of UDP, from its Ethernet header on.
    pub(crate) packet: usize,
    pub(crate) pairs: u16,
}

impl Workload {
    const fn new(name: &'static str, kind: Kind, packet: usize, pairs: u16) -> Self {
        Self { name, kind, packet, pairs }
    }

    /// Whether `target` supports this workload.
    pub(crate) const fn suits(&self, target: Target) -> bool {
        // passt has one pair.
        !(matches!(target, Target::Passt) && self.pairs > 1)
    }

    /// What the rate counts, in the plural.
    pub(crate) const fn unit(&self) -> &'static str {
        match self.kind {
            Kind::Send | Kind::Receive => "packets",
            Kind::StreamOut | Kind::StreamIn => "KiB",
            Kind::PingPong => "round trips",
        }
    }
}

/// A packet of 1,500 bytes of IP.
const LARGE: usize = 1514;

pub(crate) const WORKLOADS: [Workload; 11] = [
    Workload::new("send-64", Kind::Send, 64, 1),
    Workload::new("send-64-4", Kind::Send, 64, 4),
    Workload::new("send-1500", Kind::Send, LARGE, 1),
    Workload::new("send-1500-4", Kind::Send, LARGE, 4),
    Workload::new("receive-64", Kind::Receive, 64, 1),
    Workload::new("receive-64-4", Kind::Receive, 64, 4),
    Workload::new("receive-1500", Kind::Receive, LARGE, 1),
    Workload::new("receive-1500-4", Kind::Receive, LARGE, 4),
    Workload::new("stream-out", Kind::StreamOut, 0, 1),
    Workload::new("stream-in", Kind::StreamIn, 0, 1),
    Workload::new("ping-pong", Kind::PingPong, 64, 1),
];

/// The figure of a measurement that a goal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    /// Packets, KiB or round trips per second.
    Rate,
    /// CPU time of the server for each.
    ServerCpu,
}

impl Figure {
    pub(crate) const ALL: [Self; 2] = [Self::Rate, Self::ServerCpu];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::ServerCpu => "server CPU",
        }
    }
}

/// Whom vdpad's figure is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Against {
    One(Target),
    /// The peer with the better figure.
    BetterPeer,
}

impl Against {
    pub(crate) const ALL: [Self; 4] =
        [Self::One(Target::Testpmd), Self::One(Target::Passt), Self::BetterPeer, Self::One(Target::Floor)];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::One(target) => target.name(),
            Self::BetterPeer => "better peer",
        }
    }
}

const fn goal(workload: &'static str, figure: Figure, against: Against, limit: f64) -> Goal {
    let at_least = matches!(figure, Figure::Rate);
    Goal { workload, figure: figure.name(), against: against.name(), limit, at_least }
}

const FLOOR: Against = Against::One(Target::Floor);

pub(crate) const GOALS: [Goal; 14] = [
    goal("stream-out", Figure::Rate, Against::BetterPeer, 1.3),
    goal("stream-out", Figure::ServerCpu, Against::BetterPeer, 0.7),
    goal("stream-in", Figure::Rate, Against::BetterPeer, 1.3),
    goal("stream-in", Figure::ServerCpu, Against::BetterPeer, 0.7),
    goal("send-64", Figure::Rate, Against::BetterPeer, 1.0),
    goal("send-64", Figure::ServerCpu, Against::BetterPeer, 0.6),
    goal("receive-64", Figure::Rate, Against::BetterPeer, 1.0),
    goal("receive-64", Figure::ServerCpu, Against::BetterPeer, 0.6),
    goal("send-64", Figure::ServerCpu, FLOOR, 1.25),
    goal("receive-64", Figure::ServerCpu, FLOOR, 1.25),
    goal("send-1500", Figure::ServerCpu, FLOOR, 1.25),
    goal("receive-1500", Figure::ServerCpu, FLOOR, 1.25),
    goal("stream-out", Figure::ServerCpu, FLOOR, 1.25),
    goal("stream-in", Figure::ServerCpu, FLOOR, 1.25),
];
