//! The workloads, and the goals for them.

use vdpa_bench::comparison::Goal;

/// Kind of the requests of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    RandomRead,
    RandomWrite,
    SequentialRead,
    /// Half reads, half writes, at random, with a flush after each 32 writes.
    Mixed,
}

/// Storage behind the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// A file in the page cache.
    File,
    /// None: requests are answered without being carried out.
    Null,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    Vdpad,
    Qemu,
    /// The smallest loop that serves the requests, in this program; see `floor`.
    Floor,
    /// The file without a device.
    Fio,
}

impl Target {
    pub(crate) const ALL: [Self; 4] = [Self::Vdpad, Self::Qemu, Self::Floor, Self::Fio];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Vdpad => "vdpad",
            Self::Qemu => "qemu",
            Self::Floor => "floor",
            Self::Fio => "fio",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) backend: Backend,
    /// Bytes of a request.
    pub(crate) block: usize,
    /// Requests in flight in each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    /// Server and client share a CPU.
    pub(crate) same_cpu: bool,
}

impl Workload {
    const fn new(name: &'static str, kind: Kind, block: usize, depth: usize) -> Self {
        Self { name, kind, backend: Backend::File, block, depth, queues: 1, same_cpu: false }
    }

    const fn same(self) -> Self {
        Self { same_cpu: true, ..self }
    }

    const fn null(self) -> Self {
        Self { backend: Backend::Null, ..self }
    }

    const fn two_queues(self) -> Self {
        Self { queues: 2, ..self }
    }

    /// Whether `target` supports this workload.
    pub(crate) fn suits(&self, target: Target) -> bool {
        match target {
            Target::Vdpad | Target::Qemu => true,
            // It supports reads, writes and one queue.
            Target::Floor => self.queues == 1 && self.kind != Kind::Mixed,
            // One job on one CPU: without a client there is no second CPU.
            Target::Fio => self.backend == Backend::File && self.queues == 1 && self.kind != Kind::Mixed,
        }
    }
}

const KIB4: usize = 4 << 10;

pub(crate) const WORKLOADS: [Workload; 15] = [
    Workload::new("randread-4k-qd1-same", Kind::RandomRead, KIB4, 1).same(),
    Workload::new("randread-4k-qd1-split", Kind::RandomRead, KIB4, 1),
    Workload::new("randread-4k-qd32", Kind::RandomRead, KIB4, 32),
    Workload::new("randread-4k-qd128", Kind::RandomRead, KIB4, 128),
    Workload::new("randread-4k-qd32-2q", Kind::RandomRead, KIB4, 32).two_queues(),
    Workload::new("randwrite-4k-qd1-same", Kind::RandomWrite, KIB4, 1).same(),
    Workload::new("randwrite-4k-qd1-split", Kind::RandomWrite, KIB4, 1),
    Workload::new("randwrite-4k-qd32", Kind::RandomWrite, KIB4, 32),
    Workload::new("randwrite-4k-qd128", Kind::RandomWrite, KIB4, 128),
    Workload::new("randwrite-4k-qd32-2q", Kind::RandomWrite, KIB4, 32).two_queues(),
    Workload::new("mixed-4k-qd32-flush", Kind::Mixed, KIB4, 32),
    Workload::new("seqread-64k-qd16", Kind::SequentialRead, 64 << 10, 16),
    Workload::new("seqread-1m-qd4", Kind::SequentialRead, 1 << 20, 4),
    Workload::new("null-4k-qd32", Kind::RandomRead, KIB4, 32).null(),
    Workload::new("null-4k-qd128", Kind::RandomRead, KIB4, 128).null(),
];

/// The figure of a measurement that a goal is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Figure {
    /// Requests per second.
    Iops,
    /// CPU time of the server per request, in ns.
    ServerCpu,
    /// Median latency, in us.
    P50,
}

impl Figure {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::ServerCpu => "server CPU per request",
            Self::P50 => "p50",
        }
    }
}

const fn goal(workload: &'static str, figure: Figure, against: Target, limit: f64) -> Goal {
    let at_least = matches!(figure, Figure::Iops);
    Goal { workload, figure: figure.name(), against: against.name(), limit, at_least }
}

pub(crate) const GOALS: [Goal; 10] = [
    goal("randread-4k-qd32", Figure::Iops, Target::Qemu, 2.2),
    goal("randread-4k-qd128", Figure::Iops, Target::Qemu, 2.2),
    goal("randread-4k-qd32", Figure::ServerCpu, Target::Floor, 1.15),
    goal("randread-4k-qd128", Figure::ServerCpu, Target::Floor, 1.15),
    goal("randread-4k-qd1-same", Figure::P50, Target::Qemu, 0.75),
    goal("randread-4k-qd1-split", Figure::P50, Target::Qemu, 0.65),
    goal("null-4k-qd32", Figure::ServerCpu, Target::Floor, 1.3),
    goal("randwrite-4k-qd32", Figure::Iops, Target::Qemu, 1.5),
    goal("seqread-64k-qd16", Figure::Iops, Target::Fio, 0.95),
    goal("seqread-1m-qd4", Figure::Iops, Target::Fio, 0.95),
];
