//! The result of a demo, as JSON and as a table.

use std::fmt::Write as _;

use serde::Serialize;
use vdpa_client::update::{Report, Strategy, Way};

use super::wire::Totals;

/// The result of `vdpactl demo`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Page size, in bytes.
    pub page_size: u64,
    /// One entry per way and strategy, in the order in which they ran.
    pub strategies: Vec<StrategySummary>,
    /// Blocks compared with the backing file, over all comparisons.
    pub blocks_verified: u64,
    /// Whether every update succeeded and no request was lost, corrupt or completed twice.
    pub ok: bool,
    /// Everything that went wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// The updates with one strategy.
#[derive(Clone, Debug, Serialize)]
pub struct StrategySummary {
    /// The strategy.
    pub name: Strategy,
    /// Way of the updates.
    pub way: Way,
    /// Updates that succeeded.
    pub updates: u64,
    /// Time from the last completion before an update to the first one after it, in us.
    pub blackout_us: Spread,
    /// Median of each phase, in us.
    pub phases_us: serde_json::Map<String, serde_json::Value>,
    /// Pages of 4096 bytes pinned before the first update.
    pub pinned_pages_before: u64,
    /// Pages of 4096 bytes pinned after the last update.
    pub pinned_pages_after: u64,
    /// Requests completed during the updates with this strategy.
    pub requests: u64,
    /// Requests that were never completed.
    pub lost: u64,
    /// Blocks that were read wrong, or are wrong in the backing file.
    pub corrupt: u64,
    /// Completions of requests that were completed before.
    pub duplicate: u64,
}

/// Minimum, percentiles and maximum of some durations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// Shortest.
    pub min: u64,
    /// Half were not longer.
    pub median: u64,
    /// 99 of 100 were not longer.
    pub p99: u64,
    /// Longest.
    pub max: u64,
}

impl Spread {
    /// The spread of `times`; all fields are 0 for no times.
    #[must_use]
    pub fn of(times: impl IntoIterator<Item = u64>) -> Self {
        let mut times: Vec<u64> = times.into_iter().collect();
        times.sort_unstable();
        // Nearest rank: the smallest value that `percent` of the values do not exceed.
        let rank = |percent: usize| {
            let at = (times.len() * percent).div_ceil(100).saturating_sub(1);
            times.get(at).copied().unwrap_or(0)
        };
        Self { min: rank(0), median: rank(50), p99: rank(99), max: rank(100) }
    }
}

/// Measurements of the updates with one strategy.
#[derive(Clone, Debug)]
pub struct StrategyRun {
    /// The strategy.
    pub strategy: Strategy,
    /// Way of the updates.
    pub way: Way,
    /// For each update the blackout in us, and the report of the library.
    pub updates: Vec<(u64, Report)>,
    /// Pages pinned before and after the updates.
    pub pinned_pages: (u64, u64),
    /// Counters before and after the updates.
    pub totals: (Totals, Totals),
    /// Wrong blocks in the backing file.
    pub wrong_blocks: u64,
}

impl From<&StrategyRun> for StrategySummary {
    fn from(run: &StrategyRun) -> Self {
        let mut phases = serde_json::Map::new();
        for (at, (name, _)) in Report::new(Way::Exec).phases().iter().enumerate() {
            let times = run.updates.iter().filter_map(|(_, r)| Some(r.phases().get(at)?.1 / 1000));
            phases.insert((*name).to_owned(), Spread::of(times).median.into());
        }
        let (before, after) = &run.totals;
        let grown = |count: fn(&Totals) -> u64| count(after).saturating_sub(count(before));
        Self {
            name: run.strategy,
            way: run.way,
            updates: run.updates.len() as u64,
            blackout_us: Spread::of(run.updates.iter().map(|(us, _)| *us)),
            phases_us: phases,
            pinned_pages_before: run.pinned_pages.0,
            pinned_pages_after: run.pinned_pages.1,
            requests: grown(|t| t.requests),
            lost: grown(|t| t.lost),
            corrupt: grown(|t| t.corrupt) + grown(|t| t.errors) + run.wrong_blocks,
            duplicate: grown(|t| t.duplicate),
        }
    }
}

impl Summary {
    /// The median blackout of `reopen` divided by that of `live`, by one way.
    #[must_use]
    pub fn reopen_per_live(&self, way: Way) -> Option<f64> {
        let median = |name| {
            let found = self.strategies.iter().find(|s| s.name == name && s.way == way)?;
            (found.updates > 0).then_some(found.blackout_us.median.max(1))
        };
        let (reopen, live) = (median(Strategy::Reopen)?, median(Strategy::Live)?);
        #[expect(clippy::cast_precision_loss, reason = "microseconds, far below 2^53")]
        let ratio = reopen as f64 / live as f64;
        Some(ratio)
    }

    /// The result as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "{:<10}{:<9}{:>8} | {:>40} | {:>21} | {:>10} {:>5} {:>8} {:>10}",
            "way",
            "strategy",
            "updates",
            "blackout ms: min / median / p99 / max",
            "pages pinned",
            "requests",
            "lost",
            "corrupt",
            "duplicate"
        );
        for s in &self.strategies {
            let b = s.blackout_us;
            let blackout = [b.min, b.median, b.p99, b.max].map(millis).join(" / ");
            let pinned = format!("{} > {}", s.pinned_pages_before, s.pinned_pages_after);
            let _ = writeln!(
                text,
                "{:<10}{:<9}{:>8} | {blackout:>40} | {pinned:>21} | {:>10} {:>5} {:>8} {:>10}",
                s.way, s.name, s.updates, s.requests, s.lost, s.corrupt, s.duplicate
            );
        }
        let _ = writeln!(text, "\nmedian of each phase, ms:");
        for s in &self.strategies {
            let phases =
                s.phases_us.iter().map(|(name, us)| format!("{name} {}", millis(us.as_u64().unwrap_or(0))));
            let _ = writeln!(text, "{:<10}{:<9}{}", s.way, s.name, phases.collect::<Vec<_>>().join("  "));
        }
        for way in Way::ALL {
            if let Some(ratio) = self.reopen_per_live(way) {
                let _ = writeln!(text, "\nreopen / live by {way}: {ratio:.1}");
            }
        }
        let _ = writeln!(text, "{} blocks verified in the backing file", self.blocks_verified);
        for problem in &self.problems {
            let _ = writeln!(text, "PROBLEM: {problem}");
        }
        text
    }
}

fn millis(us: u64) -> String {
    format!("{}.{:02}", us / 1000, us % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_measured_values() {
        assert_eq!(Spread::of([]), Spread::default());
        assert_eq!(Spread::of([7]), Spread { min: 7, median: 7, p99: 7, max: 7 });
        assert_eq!(Spread::of((1..=100).rev()), Spread { min: 1, median: 50, p99: 99, max: 100 });
        assert_eq!(Spread::of([3, 1]), Spread { min: 1, median: 1, p99: 3, max: 3 });
    }

    #[test]
    fn only_changes_during_the_updates_count() {
        let before = Totals { requests: 10, corrupt: 1, ..Totals::default() };
        let after = Totals { requests: 50, corrupt: 1, lost: 2, ..before.clone() };
        let report = Report { transfer: 5_000_000, ..Report::new(Way::Exec) };
        let run = StrategyRun {
            strategy: Strategy::Live,
            way: Way::Fork,
            updates: vec![(1234, report)],
            pinned_pages: (8, 8),
            totals: (before, after),
            wrong_blocks: 3,
        };
        let summary = StrategySummary::from(&run);
        assert_eq!((summary.requests, summary.lost, summary.corrupt), (40, 2, 3));
        assert_eq!(summary.phases_us.get("transfer"), Some(&5000.into()));
        let all = Summary {
            memory_bytes: 1,
            page_size: 4096,
            strategies: vec![summary],
            blocks_verified: 5,
            ok: false,
            problems: vec!["x".to_owned()],
        };
        assert!(all.reopen_per_live(Way::Fork).is_none());
        assert!(all.table().contains("1.23 / 1.23 / 1.23 / 1.23") && all.table().contains("PROBLEM: x"));
    }
}
