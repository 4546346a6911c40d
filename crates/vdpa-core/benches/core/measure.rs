//! Runs the contenders of a table in turn.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

pub(crate) struct Settings {
    /// Number of rounds; every contender runs once per round.
    pub(crate) rounds: u64,
    /// Milliseconds that a contender runs in a round, without its setup.
    pub(crate) millis: u64,
}

/// One of the implementations that a table compares.
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// Does the work the given number of times. Returns the time taken, without preparation.
    pub(crate) run: Box<dyn FnMut(u64) -> Duration>,
}

impl Contender {
    pub(crate) fn new(name: &'static str, run: impl FnMut(u64) -> Duration + 'static) -> Self {
        Self { name, run: Box::new(run) }
    }
}

/// Creates the contenders of a table just before they run.
pub(crate) type Make = Box<dyn FnOnce() -> Vec<Contender>>;

pub(crate) struct Table {
    name: String,
    /// Nanoseconds of each round, in order; the first contender is ours.
    rows: Vec<(&'static str, Vec<f64>)>,
}

/// Parts of a round. The figure of a round is the median of its parts, so a part that another process interrupts does
/// not affect it.
const SLICES: u32 = 25;

/// Runs a table.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
pub(crate) fn run(name: &str, mut contenders: Vec<Contender>, settings: &Settings) -> Table {
    let target = Duration::from_millis(settings.millis) / SLICES;
    let times: Vec<u64> = contenders.iter_mut().map(|contender| calibrate(contender, target)).collect();
    let mut rows: Vec<_> = contenders.iter().map(|contender| (contender.name, Vec::new())).collect();
    let count = contenders.len();
    for round in 0..settings.rounds {
        for position in 0..count {
            // The order rotates, so that no contender always runs with the caches that the same other one has filled.
            let at = (usize::try_from(round).unwrap() + position) % count;
            let slice = |_| (contenders[at].run)(times[at]).as_nanos() as f64 / times[at] as f64;
            let slices: Vec<f64> = (0..SLICES).map(slice).collect();
            rows[at].1.push(median(&slices));
        }
    }
    Table { name: name.to_owned(), rows }
}

/// Returns how often a contender does its work in `target`. This also warms it up.
fn calibrate(contender: &mut Contender, target: Duration) -> u64 {
    let mut times = 256;
    loop {
        let taken = (contender.run)(times);
        if taken * 4 >= target {
            let ratio = target.as_secs_f64() / taken.as_secs_f64();
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                clippy::cast_precision_loss,
                reason = "a positive count"
            )]
            return ((times as f64 * ratio) as u64).max(256);
        }
        times *= 2;
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<44} {:>9} {:>9} {:>9} {:>8}", self.name, "median ns", "least", "most", "to ours")?;
        let ours = median(&self.rows[0].1);
        for (name, rounds) in &self.rows {
            let (least, most) = rounds.iter().fold((f64::MAX, 0f64), |(l, m), &v| (l.min(v), m.max(v)));
            let median = median(rounds);
            writeln!(f, "  {name:<42} {median:>9.2} {least:>9.2} {most:>9.2} {:>7.2}x", median / ours)?;
        }
        Ok(())
    }
}

/// One row per table, contender and round, and the medians with their ratios.
pub(crate) fn json(tables: &[Table], settings: &Settings) -> Value {
    let rows = tables.iter().flat_map(|table| {
        table.rows.iter().flat_map(move |(name, rounds)| {
            rounds.iter().enumerate().map(
                move |(round, ns)| json!({ "table": table.name, "contender": name, "round": round, "ns": ns }),
            )
        })
    });
    let medians = tables.iter().flat_map(|table| {
        let ours = median(&table.rows[0].1);
        table.rows.iter().map(move |(name, rounds)| {
            let ns = median(rounds);
            json!({ "table": table.name, "contender": name, "ns": ns, "to_ours": ns / ours })
        })
    });
    json!({
        "rounds": settings.rounds,
        "millis": settings.millis,
        "medians": medians.collect::<Vec<_>>(),
        "rows": rows.collect::<Vec<_>>(),
    })
}
