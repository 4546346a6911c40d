//! The result: rows, medians, ratios and goals.

use std::fmt::Write as _;

use serde::Serialize;
use vdpa_bench::comparison::{Ratio, goal_lines};
use vdpa_bench::rounds::median;

use crate::drive::{Sample, float};
use crate::plan::{Against, Figure, GOALS, Target, WORKLOADS, Workload};

/// One measurement: a server, a workload and a round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) workload: &'static str,
    pub(crate) server: &'static str,
    pub(crate) round: u32,
    /// What is counted: packets, KiB or round trips.
    pub(crate) unit: &'static str,
    /// How many of them per second.
    pub(crate) rate: f64,
    /// Latency of round trips; 0 for others.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// CPU time of the server for each of them.
    pub(crate) server_ns: f64,
    /// CPU time of the driver for each of them, and of the sockets that it uses.
    pub(crate) client_ns: f64,
    /// CPU time of the server, as a part of one CPU.
    pub(crate) server_cpu: f64,
    /// Packets that did not arrive, of those to the driver.
    pub(crate) lost: u64,
}

impl Row {
    pub(crate) fn new(workload: &Workload, target: Target, sample: &Sample, server_ns: u64) -> Self {
        let at = |quantile| float(sample.latency.value_at_quantile(quantile)) / 1e3;
        let count = sample.count.max(1.0);
        Self {
            workload: workload.name,
            server: target.name(),
            round: 0,
            unit: workload.unit(),
            rate: sample.count / sample.seconds.max(1e-9),
            p50_us: at(0.5),
            p99_us: at(0.99),
            server_ns: float(server_ns) / count,
            client_ns: float(sample.client_ns) / count,
            server_cpu: float(server_ns) / 1e9 / sample.seconds.max(1e-9),
            lost: sample.lost,
        }
    }

    const fn figure(&self, figure: Figure) -> f64 {
        match figure {
            Figure::Rate => self.rate,
            Figure::ServerCpu => self.server_ns,
        }
    }
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) servers: Vec<String>,
    pub(crate) left_out: Vec<String>,
    /// Load of the machine before the first and after the last measurement: the processes that ran or waited in the last minute.
    pub(crate) load: [f64; 2],
    pub(crate) medians: Vec<Row>,
    pub(crate) ratios: Vec<Ratio>,
    pub(crate) rows: Vec<Row>,
}

impl Outcome {
    /// Computes medians and ratios of the rows.
    pub(crate) fn summarise(&mut self) {
        let all = WORKLOADS.iter().flat_map(|workload| Target::ALL.map(|target| (workload.name, target)));
        self.medians = all.filter_map(|(workload, target)| self.median(workload, target)).collect();
        self.ratios = WORKLOADS
            .iter()
            .flat_map(|workload| Against::ALL.map(|against| (workload.name, against)))
            .flat_map(|(workload, against)| Figure::ALL.map(|figure| (workload, against, figure)))
            .filter_map(|(workload, against, figure)| self.ratio(workload, against, figure))
            .collect();
    }

    fn of(&self, workload: &str, target: Target) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| row.workload == workload && row.server == target.name())
    }

    fn median(&self, workload: &str, target: Target) -> Option<Row> {
        let all: Vec<&Row> = self.of(workload, target).collect();
        let of = |figure: fn(&Row) -> f64| median(all.iter().map(|row| figure(row)).collect());
        Some(Row {
            rate: of(|row| row.rate),
            p50_us: of(|row| row.p50_us),
            p99_us: of(|row| row.p99_us),
            server_ns: of(|row| row.server_ns),
            client_ns: of(|row| row.client_ns),
            server_cpu: of(|row| row.server_cpu),
            lost: all.iter().map(|row| row.lost).sum(),
            ..(*all.first()?).clone()
        })
    }

    /// The figure of whom vdpad is compared with, in one round.
    fn other(&self, workload: &str, against: Against, figure: Figure, round: u32) -> Option<f64> {
        let of =
            |target| self.of(workload, target).find(|row| row.round == round).map(|row| row.figure(figure));
        match against {
            Against::One(target) => of(target),
            Against::BetterPeer => {
                let peers = Target::ALL.into_iter().filter(|target| target.is_peer()).filter_map(of);
                peers.reduce(if figure == Figure::Rate { f64::max } else { f64::min })
            }
        }
    }

    fn ratio(&self, workload: &'static str, against: Against, figure: Figure) -> Option<Ratio> {
        let mut ratios = Vec::new();
        for ours in self.of(workload, Target::Vdpad) {
            let theirs = self.other(workload, against, figure, ours.round)?;
            ratios.push(ours.figure(figure) / theirs.max(1e-9));
        }
        Ratio::new(&GOALS, workload, figure.name(), against.name(), ratios)
    }

    /// The result as tables.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{:<15} {:<8} {:>11} {:<11} {:>7} {:>8} {:>8} {:>10} {:>10} {:>6} {:>6}\n",
            "medians",
            "server",
            "per second",
            "of",
            "Gbit/s",
            "p50 us",
            "p99 us",
            "server ns",
            "driver ns",
            "CPU",
            "lost"
        );
        for row in &self.medians {
            let workload = WORKLOADS.iter().find(|workload| workload.name == row.workload);
            let bytes = workload.map_or(0, |workload| if row.unit == "KiB" { 1024 } else { workload.packet });
            let _ = writeln!(
                text,
                "{:<15} {:<8} {:>11.0} {:<11} {:>7.2} {:>8.1} {:>8.1} {:>10.0} {:>10.0} {:>6.2} {:>6}",
                row.workload,
                row.server,
                row.rate,
                row.unit,
                row.rate * float(bytes as u64) * 8.0 / 1e9,
                row.p50_us,
                row.p99_us,
                row.server_ns,
                row.client_ns,
                row.server_cpu,
                row.lost
            );
        }
        let _ =
            writeln!(text, "\nload of the machine: {:.2} before, {:.2} after", self.load[0], self.load[1]);
        text += &goal_lines(&GOALS, &self.ratios, 40);
        for line in &self.left_out {
            let _ = writeln!(text, "NOT MEASURED: {line}");
        }
        text
    }
}
