//! The result: rows, medians, ratios and goals.

use std::fmt::Write as _;

use serde::Serialize;
use vdpa_bench::comparison::{Ratio, goal_lines};
use vdpa_bench::rounds::median;

use crate::client::Sample;
use crate::plan::{Figure, GOALS, Target, Workload};

/// One measurement: a server, a workload and a round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) workload: &'static str,
    pub(crate) server: &'static str,
    pub(crate) round: u32,
    pub(crate) iops: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// CPU time of the server per request.
    pub(crate) server_ns: f64,
    /// CPU time of the client per request; 0 without a client.
    pub(crate) client_ns: f64,
}

impl Row {
    #[expect(clippy::cast_precision_loss, reason = "counts and times far below 2^52")]
    pub(crate) fn new(workload: &Workload, target: Target, sample: &Sample, server_ns: u64) -> Self {
        let at = |quantile| sample.latency.value_at_quantile(quantile) as f64 / 1e3;
        let requests = (sample.requests as f64).max(1.0);
        Self {
            workload: workload.name,
            server: target.name(),
            round: 0,
            iops: sample.requests as f64 / sample.seconds.max(1e-9),
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            server_ns: server_ns as f64 / requests,
            client_ns: sample.client_ns as f64 / requests,
        }
    }

    pub(crate) fn fio(workload: &'static str, iops: f64, latency_us: [f64; 3], server_ns: f64) -> Self {
        let [p50_us, p99_us, p999_us] = latency_us;
        let server = Target::Fio.name();
        Self { workload, server, round: 0, iops, p50_us, p99_us, p999_us, server_ns, client_ns: 0.0 }
    }

    pub(crate) fn figure(&self, figure: Figure) -> f64 {
        match figure {
            Figure::Iops => self.iops,
            Figure::ServerCpu => self.server_ns,
            Figure::P50 => self.p50_us,
        }
    }
}

/// The result of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
    pub(crate) file_bytes: u64,
    pub(crate) servers: Vec<String>,
    pub(crate) left_out: Vec<String>,
    /// Blocks that were read and are correct, with `--verify`.
    pub(crate) verified: u64,
    pub(crate) medians: Vec<Row>,
    pub(crate) ratios: Vec<Ratio>,
    pub(crate) rows: Vec<Row>,
}

impl Outcome {
    /// Computes medians and ratios of the rows.
    pub(crate) fn summarise(&mut self) {
        let mut seen: Vec<(&str, &str)> = Vec::new();
        for row in &self.rows {
            if !seen.contains(&(row.workload, row.server)) {
                seen.push((row.workload, row.server));
            }
        }
        self.medians = seen.iter().filter_map(|&(workload, server)| self.median(workload, server)).collect();
        self.ratios = seen
            .iter()
            .filter(|(_, server)| *server != Target::Vdpad.name())
            .flat_map(|&(workload, server)| {
                [Figure::Iops, Figure::ServerCpu, Figure::P50].map(|figure| (workload, server, figure))
            })
            .filter_map(|(workload, server, figure)| self.ratio(workload, server, figure))
            .collect();
    }

    fn of<'a>(&'a self, workload: &'a str, server: &'a str) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.workload == workload && row.server == server)
    }

    fn median(&self, workload: &str, server: &str) -> Option<Row> {
        let all: Vec<&Row> = self.of(workload, server).collect();
        let of = |figure: fn(&Row) -> f64| median(all.iter().map(|row| figure(row)).collect());
        Some(Row {
            iops: of(|row| row.iops),
            p50_us: of(|row| row.p50_us),
            p99_us: of(|row| row.p99_us),
            p999_us: of(|row| row.p999_us),
            server_ns: of(|row| row.server_ns),
            client_ns: of(|row| row.client_ns),
            ..(*all.first()?).clone()
        })
    }

    fn ratio(&self, workload: &'static str, against: &'static str, figure: Figure) -> Option<Ratio> {
        let mut ratios = Vec::new();
        for ours in self.of(workload, Target::Vdpad.name()) {
            let theirs = self.of(workload, against).find(|row| row.round == ours.round)?;
            ratios.push(ours.figure(figure) / theirs.figure(figure).max(1e-9));
        }
        Ratio::new(&GOALS, workload, figure.name(), against, ratios)
    }

    /// The result as tables.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:<25} {:<6} {:>10} {:>9} {:>9} {:>9} {:>10} {:>10} {:>6}",
            "medians", "server", "IOPS", "p50 us", "p99 us", "p99.9 us", "server ns", "client ns", "IOPS x"
        );
        for row in &self.medians {
            let ours = self.medians.iter().find(|r| r.workload == row.workload && r.server == "vdpad");
            let ratio = ours.map_or(0.0, |ours| ours.iops / row.iops.max(1e-9));
            let _ = writeln!(
                text,
                "{:<25} {:<6} {:>10.0} {:>9.1} {:>9.1} {:>9.1} {:>10.0} {:>10.0} {:>6.2}",
                row.workload,
                row.server,
                row.iops,
                row.p50_us,
                row.p99_us,
                row.p999_us,
                row.server_ns,
                row.client_ns,
                ratio
            );
        }
        if self.verified > 0 {
            let _ = writeln!(text, "\n{} blocks read, all as they were written", self.verified);
        } else {
            text += &goal_lines(&GOALS, &self.ratios, 58);
        }
        for line in &self.left_out {
            let _ = writeln!(text, "NOT MEASURED: {line}");
        }
        text
    }
}
