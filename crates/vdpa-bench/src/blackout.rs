//! `vdpactl bench update`: downtime of updates by memory size, page size, way and strategy.

use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::ProgressBar;
use vdpa_client::update::{Report, Strategy, Way};

use super::blackout_result::{Cell, Outcome, Point};
use super::chart;
use super::demo::progress;
use super::fixture::{self, FixtureError, free_memory};
use super::hugepages::Reserved;
use super::output;
use super::scenario::{Load, LoadOptions, Scenario};
use super::wire::Pages;

const GIB: u64 = 1 << 30;
/// Free memory that is left beside the client's guest memory, in bytes.
const SPARE: u64 = GIB;

/// Measures the downtime of updates: how long no process drives the device.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Sizes of guest memory [default: 1G,4G,16G as far as they fit into free memory]
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',', value_parser = fixture::size, conflicts_with = "memory")]
    pub sizes: Vec<u64>,
    /// Page sizes of guest memory: 4k, 2m (hugetlb, from the kernel's pool, which is enlarged meanwhile if that is permitted)
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "4k")]
    pub pages: Vec<Pages>,
    /// Ways: exec, fork, hand-over [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub way: Vec<Way>,
    /// Strategies [default: all that the device supports]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub strategy: Vec<Strategy>,
    /// Updates for each figure; each round has one by each way with each strategy
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(5..))]
    pub rounds: u32,
    /// The load
    #[command(flatten)]
    pub load: LoadOptions,
    /// Exit with 1 when a goal is missed
    #[arg(long)]
    pub strict: bool,
    /// Draw the medians into this file
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// The fixture that it runs on
    #[command(flatten)]
    pub fixture: fixture::Options,
}

/// Measures and prints the result, as JSON if `json`. Exit status 1 if an update failed or anything was lost, and with
/// [`Options::strict`] if a goal was missed.
#[must_use]
pub fn main(options: &Options, json: bool) -> ExitCode {
    output::finish("bench", run(options), json, Outcome::table, |outcome| {
        outcome.ok && (!options.strict || outcome.goals.iter().all(|goal| goal.met))
    })
}

fn run(options: &Options) -> Result<Outcome, FixtureError> {
    let mut left_out = Vec::new();
    let mut cells = Vec::new();
    let mut problems = Vec::new();
    let mut blocks_verified = 0;
    for &pages in &options.pages {
        for size in sizes(options, pages, &mut left_out)? {
            // Kept until the client has exited.
            let _reserved = match pages {
                Pages::Small => None,
                Pages::Huge => match Reserved::new(size) {
                    Ok(reserved) => Some(reserved),
                    Err(reason) => {
                        leave_out(&mut left_out, format!("{} of {pages} pages: {reason}", human(size)));
                        continue;
                    }
                },
            };
            let mut scenario = start(options, size, pages)?;
            cells.append(&mut measure(&mut scenario, options, pages)?);
            problems.append(&mut scenario.problems);
            if !scenario.totals.clean() {
                problems.push(format!("{} of {pages} pages: {:?}", human(size), scenario.totals));
            }
            blocks_verified += scenario.blocks_verified;
        }
    }
    if let Some(file) = &options.chart
        && let Err(e) = chart::draw_medians(file, &cells)
    {
        problems.push(format!("cannot draw {}: {e}", file.display()));
    }
    Ok(Outcome::new(cells, options.rounds, blocks_verified, left_out, problems))
}

fn start(options: &Options, size: u64, pages: Pages) -> Result<Scenario, FixtureError> {
    let fixture = fixture::Options { memory: Some(size), ..options.fixture.clone() };
    Scenario::start(&fixture, Load { queue_depth: options.load.queue_depth, seed: 1, pages })
}

/// The sizes requested, or those of the default that fit into free memory.
fn sizes(options: &Options, pages: Pages, left_out: &mut Vec<String>) -> Result<Vec<u64>, FixtureError> {
    if !options.sizes.is_empty() {
        return Ok(options.sizes.clone());
    }
    let free = free_memory()?.unwrap_or(u64::MAX);
    let (fit, too_large): (Vec<u64>, Vec<u64>) =
        [GIB, 4 * GIB, 16 * GIB].into_iter().partition(|size| size.saturating_add(SPARE) <= free);
    for size in too_large {
        let free = human(free);
        leave_out(left_out, format!("{} of {pages} pages: only {free} of memory are free", human(size)));
    }
    Ok(fit)
}

fn leave_out(left_out: &mut Vec<String>, what: String) {
    eprintln!("vdpactl: bench: NOT MEASURED: {what}");
    left_out.push(what);
}

/// All updates with one memory size. Each round has one update by each way with each strategy, so that a disturbance affects
/// all of them alike.
fn measure(scenario: &mut Scenario, options: &Options, pages: Pages) -> Result<Vec<Cell>, FixtureError> {
    let ways = if options.way.is_empty() { &Way::ALL[..] } else { &options.way };
    let strategies = scenario.strategies(&options.strategy);
    let mut points = Vec::new();
    for &way in ways {
        for &strategy in &strategies {
            points.push((Point { memory_bytes: scenario.memory(), pages, way, strategy }, Vec::new()));
        }
    }
    let bar = progress(points.len() as u64 * u64::from(options.rounds));
    let pinned = scenario.pinned()?;
    scenario.start_load()?;
    for _ in 0..options.rounds {
        for (point, updates) in &mut points {
            bar.set_message(point.to_string());
            updates.extend(update(scenario, point, options.load.interval)?);
            bar.inc(1);
        }
        check_round(scenario, pinned, &bar)?;
    }
    scenario.finish()?;
    bar.finish_and_clear();
    Ok(points.iter().map(|(point, updates)| Cell::new(*point, updates)).collect())
}

/// One update under load.
fn update(
    scenario: &mut Scenario,
    point: &Point,
    interval: u64,
) -> Result<Option<(u64, Report)>, FixtureError> {
    scenario.run_for(interval)?;
    let updated = scenario.update(point.way, point.strategy)?;
    scenario.run_for(interval)?;
    Ok(updated.map(|u| (u.blackout_us, u.report)))
}

/// Verifies the disk after a round, and that the number of pinned pages is as before.
fn check_round(scenario: &mut Scenario, pinned: u64, bar: &ProgressBar) -> Result<(), FixtureError> {
    bar.set_message("verifying");
    scenario.quiesce()?;
    let now = scenario.pinned()?;
    if now != pinned {
        scenario.problems.push(format!("{now} pages are pinned; before the updates it were {pinned}"));
    }
    scenario.start_load()
}

/// Formats a number of bytes with a binary unit.
pub(super) fn human(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let fit = units.iter().find(|(shift, _)| bytes >> shift > 0);
    fit.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}
