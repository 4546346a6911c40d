//! The result of `vdpactl bench update`, as JSON and as a table.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use serde::Serialize;
use vdpa_client::update::{Report, Strategy, Way};

use super::blackout::human;
use super::summary::Spread;
use super::wire::Pages;

/// The parameters of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Point {
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Its page size.
    pub pages: Pages,
    /// Way of the updates.
    pub way: Way,
    /// Strategy of the updates.
    pub strategy: Strategy,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", human(self.memory_bytes), self.pages, self.way, self.strategy)
    }
}

/// The updates of one point.
#[derive(Clone, Debug, Serialize)]
pub struct Cell {
    /// The parameters.
    #[serde(flatten)]
    pub point: Point,
    /// Updates that succeeded.
    pub updates: u64,
    /// From the start of the switch until the successor has the devices (`Report::total`), in ns.
    pub total_ns: Spread,
    /// Time from the client's last completion before the update to its first one after it, in ns.
    pub gap_ns: Spread,
    /// Median of each phase, in ns.
    pub phases_ns: BTreeMap<&'static str, u64>,
}

impl Cell {
    /// `updates` has for each update the client's gap in us and the report of the library.
    #[must_use]
    pub fn new(point: Point, updates: &[(u64, Report)]) -> Self {
        let mut phases: BTreeMap<&'static str, Vec<u64>> = BTreeMap::new();
        for (name, ns) in updates.iter().flat_map(|(_, report)| report.phases()) {
            phases.entry(name).or_default().push(ns);
        }
        Self {
            point,
            updates: updates.len() as u64,
            total_ns: Spread::of(updates.iter().map(|(_, report)| report.total)),
            gap_ns: Spread::of(updates.iter().map(|(us, _)| us.saturating_mul(1000))),
            phases_ns: phases.into_iter().map(|(name, times)| (name, Spread::of(times).median)).collect(),
        }
    }
}

/// A quotient of two medians of [`Cell::total_ns`].
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// The two medians.
    pub name: String,
    /// The quotient.
    pub value: f64,
}

/// A goal for the largest memory size that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// The figure, its parameters, and the limit.
    pub name: String,
    /// The limit.
    pub limit: f64,
    /// The value measured.
    pub value: f64,
    /// Whether the goal is reached.
    pub met: bool,
}

/// The result of `vdpactl bench update`.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Updates requested for each point.
    pub rounds: u32,
    /// One entry per memory size, page size, way and strategy.
    pub cells: Vec<Cell>,
    /// `reopen / live` for each memory size and way, and largest by smallest memory for each way and strategy.
    pub ratios: Vec<Ratio>,
    /// The goals.
    pub goals: Vec<Goal>,
    /// What could not be measured, with the reason.
    pub left_out: Vec<String>,
    /// Blocks compared with the backing file.
    pub blocks_verified: u64,
    /// Whether every update succeeded, no request was lost, corrupt or completed twice, and the pinned pages stayed the same.
    pub ok: bool,
    /// Everything that went wrong.
    pub problems: Vec<String>,
}

impl Outcome {
    /// Compares the cells.
    #[must_use]
    pub fn new(
        cells: Vec<Cell>,
        rounds: u32,
        blocks_verified: u64,
        left_out: Vec<String>,
        problems: Vec<String>,
    ) -> Self {
        let whole = cells.iter().all(|cell| cell.updates == u64::from(rounds));
        Self {
            rounds,
            ratios: ratios(&cells),
            goals: goals(&cells),
            left_out,
            blocks_verified,
            ok: whole && problems.is_empty() && !cells.is_empty(),
            problems,
            cells,
        }
    }

    /// The result as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:>6} {:<5} {:<10}{:<9}{:>7} | {:>32} | {:>10} | median of the longest phases, ms\n",
            "memory", "pages", "way", "strategy", "updates", "total ms: min / median / p99", "client gap"
        );
        for cell in &self.cells {
            let Point { memory_bytes, pages, way, strategy } = cell.point;
            let Spread { min, median, p99, .. } = cell.total_ns;
            let _ = writeln!(
                text,
                "{:>6} {pages:<5} {way:<10}{strategy:<9}{:>7} | {:>32} | {:>10} | {}",
                human(memory_bytes),
                cell.updates,
                [min, median, p99].map(millis).join(" / "),
                millis(cell.gap_ns.median),
                longest(&cell.phases_ns)
            );
        }
        text.push('\n');
        for ratio in &self.ratios {
            let _ = writeln!(text, "{:<52} {:>10.2}", ratio.name, ratio.value);
        }
        text.push('\n');
        for goal in &self.goals {
            let verdict = if goal.met { "reached" } else { "MISSED" };
            let _ = writeln!(text, "{:<52} {:>10.3}  {verdict}", goal.name, goal.value);
        }
        for left_out in &self.left_out {
            let _ = writeln!(text, "NOT MEASURED: {left_out}");
        }
        let _ = writeln!(text, "{} blocks verified in the backing file", self.blocks_verified);
        for problem in &self.problems {
            let _ = writeln!(text, "PROBLEM: {problem}");
        }
        text
    }
}

/// The three longest phases.
fn longest(phases: &BTreeMap<&'static str, u64>) -> String {
    let mut phases: Vec<_> = phases.iter().filter(|&(_, &ns)| ns > 0).collect();
    phases.sort_by_key(|&(_, &ns)| std::cmp::Reverse(ns));
    let text = phases.iter().take(3).map(|(name, ns)| format!("{name} {}", millis(**ns)));
    text.collect::<Vec<_>>().join("  ")
}

/// Milliseconds with three digits.
fn millis(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000, ns / 1000 % 1000)
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of some seconds")]
const fn float(ns: u64) -> f64 {
    ns as f64
}

fn median(cells: &[Cell], point: Point) -> Option<f64> {
    let cell = cells.iter().find(|cell| cell.point == point && cell.updates > 0)?;
    Some(float(cell.total_ns.median.max(1)))
}

/// Smallest and largest memory with these pages.
fn extremes(cells: &[Cell], pages: Pages) -> Option<(u64, u64)> {
    let sizes = || cells.iter().filter(|c| c.point.pages == pages).map(|c| c.point.memory_bytes);
    Some((sizes().min()?, sizes().max()?))
}

fn ratios(cells: &[Cell]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for live in cells.iter().filter(|c| c.point.strategy == Strategy::Live) {
        let point = Point { strategy: Strategy::Reopen, ..live.point };
        if let (Some(reopen), Some(live)) = (median(cells, point), median(cells, live.point)) {
            let Point { memory_bytes, pages, way, .. } = point;
            let name = format!("reopen / live, {} of {pages} pages, {way}", human(memory_bytes));
            ratios.push(Ratio { name, value: reopen / live });
        }
    }
    for cell in cells {
        let point = cell.point;
        let Some((least, most)) = extremes(cells, point.pages) else { continue };
        if point.memory_bytes != most || least == most {
            continue;
        }
        let small = median(cells, Point { memory_bytes: least, ..point });
        if let (Some(large), Some(small)) = (median(cells, point), small) {
            let Point { pages, way, strategy, .. } = point;
            let name = format!("{} / {} of {pages} pages, {way} {strategy}", human(most), human(least));
            ratios.push(Ratio { name, value: large / small });
        }
    }
    ratios
}

/// The goals. They are set for 16 GiB of 4 KiB pages, and applied to the largest memory size that was measured.
fn goals(cells: &[Cell]) -> Vec<Goal> {
    let pages = Pages::Small;
    let Some((least, most)) = extremes(cells, pages) else { return Vec::new() };
    let at = |memory_bytes, way, strategy| median(cells, Point { memory_bytes, pages, way, strategy });
    let mut goals = Vec::new();
    let mut below = |name: String, limit: f64, value: Option<f64>| {
        let goal = |value| Goal { name: format!("{name} <= {limit}"), limit, value, met: value <= limit };
        goals.extend(value.map(goal));
    };
    let size = human(most);
    let ms = |ns: f64| ns / 1e6;
    below(format!("live by exec, {size}, ms"), 1.0, at(most, Way::Exec, Strategy::Live).map(ms));
    below(format!("live by hand-over, {size}, ms"), 0.2, at(most, Way::HandOver, Strategy::Live).map(ms));
    for way in Way::ALL {
        let (small, large) = (at(least, way, Strategy::Live), at(most, way, Strategy::Live));
        let quotient = small.zip(large).filter(|_| least != most).map(|(small, large)| large / small);
        below(format!("live by {way}, {size} / {}", human(least)), 1.5, quotient);
    }
    for way in Way::ALL {
        let both = at(most, way, Strategy::Reopen).zip(at(most, way, Strategy::Live));
        goals.extend(both.map(|(reopen, live)| {
            let (limit, value) = (500.0, reopen / live);
            let name = format!("reopen / live by {way}, {size} >= {limit}");
            Goal { name, limit, value, met: value >= limit }
        }));
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(memory_bytes: u64, way: Way, strategy: Strategy, us: u64) -> Cell {
        let report = Report { total: us * 1000, transfer: us * 900, ..Report::new(way) };
        let point = Point { memory_bytes, pages: Pages::Small, way, strategy };
        Cell::new(point, &[(us + 5, report.clone()), (us + 5, report)])
    }

    fn goal<'a>(outcome: &'a Outcome, name: &str) -> &'a Goal {
        outcome.goals.iter().find(|goal| goal.name == name).unwrap()
    }

    #[test]
    fn goals_are_reached_or_missed_at_the_largest_memory() {
        let cells = vec![
            cell(1 << 30, Way::Exec, Strategy::Live, 400),
            cell(16 << 30, Way::Exec, Strategy::Live, 700),
            cell(16 << 30, Way::Exec, Strategy::Reopen, 700_000),
            cell(16 << 30, Way::HandOver, Strategy::Live, 250),
            cell(16 << 30, Way::HandOver, Strategy::Reopen, 100_000),
        ];
        let outcome = Outcome::new(cells, 2, 7, Vec::new(), Vec::new());
        assert!(outcome.ok);
        assert!(goal(&outcome, "live by exec, 16G, ms <= 1").met);
        assert!(!goal(&outcome, "live by hand-over, 16G, ms <= 0.2").met);
        let independent = goal(&outcome, "live by exec, 16G / 1G <= 1.5");
        assert!(!independent.met && (independent.value - 1.75).abs() < 1e-9, "{independent:?}");
        assert!(goal(&outcome, "reopen / live by exec, 16G >= 500").met);
        assert!(!goal(&outcome, "reopen / live by hand-over, 16G >= 500").met);
        assert_eq!(outcome.goals.len(), 5, "{:?}", outcome.goals);
        let table = outcome.table();
        assert!(table.contains("0.700 / 0.700 / 0.700") && table.contains("MISSED"), "{table}");
        assert!(table.contains("transfer 0.630"), "{table}");
    }

    #[test]
    fn a_missing_update_is_no_success() {
        let cells = || vec![cell(1 << 30, Way::Fork, Strategy::Live, 100)];
        assert!(!Outcome::new(cells(), 3, 0, Vec::new(), Vec::new()).ok);
        assert!(!Outcome::new(Vec::new(), 2, 0, Vec::new(), Vec::new()).ok);
        assert!(!Outcome::new(cells(), 2, 0, Vec::new(), vec!["lost".to_owned()]).ok);
        let empty = Cell::new(cells().remove(0).point, &[]);
        assert!(Outcome::new(vec![empty], 2, 0, Vec::new(), Vec::new()).goals.is_empty());
    }
}
