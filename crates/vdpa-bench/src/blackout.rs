//! `vdpactl bench update`: for how long no driver is there, by memory size, pages, way and strategy.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::ProgressBar;
use vdpa_client::update::{Report, Strategy, Way};

use super::blackout_result::{Cell, Outcome, Point};
use super::chart;
use super::demo::progress;
use super::hugepages::Reserved;
use super::play::{Load, Play};
use super::stage::{self, StageError, free_memory};
use super::wire::{Pages, chain};

const GIB: u64 = 1 << 30;
/// Memory that is left to everything else, beside the tenant's.
const SPARE: u64 = GIB;

/// Measures how long no driver is there in an update.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Sizes of guest memory [default: 1G,4G,16G as far as they fit into free memory]
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',', value_parser = stage::size, conflicts_with = "memory")]
    pub sizes: Vec<u64>,
    /// Pages of guest memory: 4k, 2m (hugetlb; taken from the kernel's pool, which grows meanwhile if that is allowed)
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "4k")]
    pub pages: Vec<Pages>,
    /// Ways: exec, fork, hand-over [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub way: Vec<Way>,
    /// Strategies [default: all that the device can do]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub strategy: Vec<Strategy>,
    /// Updates for each figure; one by each way with each strategy in turn
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(5..))]
    pub rounds: u32,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queue_depth: u16,
    /// Milliseconds of load before and after each update
    #[arg(long, value_name = "MS", default_value_t = 150)]
    pub interval: u64,
    /// Fail when a goal is missed
    #[arg(long)]
    pub strict: bool,
    /// Draw the medians into this file
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// What it runs on
    #[command(flatten)]
    pub stage: stage::Options,
}

/// Measures and prints, as JSON if `json`. Exit status 1 if an update failed or anything was lost, and with
/// [`Options::strict`] if a goal was missed.
#[must_use]
pub fn main(options: &Options, json: bool) -> ExitCode {
    let outcome = match run(options) {
        Ok(outcome) => outcome,
        Err(e) => {
            eprintln!("vdpactl: bench: {}", chain(&e));
            return ExitCode::FAILURE;
        }
    };
    let text =
        if json { serde_json::to_string(&outcome).unwrap_or_default() + "\n" } else { outcome.table() };
    let written = io::stdout().write_all(text.as_bytes());
    let good = outcome.ok && (!options.strict || outcome.goals.iter().all(|goal| goal.met));
    if good && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(options: &Options) -> Result<Outcome, StageError> {
    let mut left_out = Vec::new();
    let mut cells = Vec::new();
    let mut problems = Vec::new();
    let mut blocks_verified = 0;
    for &pages in &options.pages {
        for size in sizes(options, pages, &mut left_out)? {
            // Kept until the tenant has ended.
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
            let mut play = set(options, size, pages)?;
            cells.append(&mut measure(&mut play, options, pages)?);
            problems.append(&mut play.problems);
            if !play.totals.clean() {
                problems.push(format!("{} of {pages} pages: {:?}", human(size), play.totals));
            }
            blocks_verified += play.blocks_verified;
        }
    }
    if let Some(file) = &options.chart
        && let Err(e) = chart::draw_medians(file, &cells)
    {
        problems.push(format!("cannot draw {}: {e}", file.display()));
    }
    Ok(Outcome::new(cells, options.rounds, blocks_verified, left_out, problems))
}

fn set(options: &Options, size: u64, pages: Pages) -> Result<Play, StageError> {
    let stage = stage::Options { memory: Some(size), ..options.stage.clone() };
    Play::set(&stage, Load { queue_depth: options.queue_depth, seed: 1, pages })
}

/// Those asked for, or the usual ones that fit.
fn sizes(options: &Options, pages: Pages, left_out: &mut Vec<String>) -> Result<Vec<u64>, StageError> {
    if !options.sizes.is_empty() {
        return Ok(options.sizes.clone());
    }
    let free = free_memory()?.unwrap_or(u64::MAX);
    let (fit, not): (Vec<u64>, Vec<u64>) =
        [GIB, 4 * GIB, 16 * GIB].into_iter().partition(|size| size.saturating_add(SPARE) <= free);
    for size in not {
        let free = human(free);
        leave_out(left_out, format!("{} of {pages} pages: only {free} of memory are free", human(size)));
    }
    Ok(fit)
}

fn leave_out(left_out: &mut Vec<String>, what: String) {
    eprintln!("vdpactl: bench: NOT MEASURED: {what}");
    left_out.push(what);
}

/// All updates with one memory, by each way with each strategy in turn, so that what disturbs hits all alike.
fn measure(play: &mut Play, options: &Options, pages: Pages) -> Result<Vec<Cell>, StageError> {
    let ways = if options.way.is_empty() { &Way::ALL[..] } else { &options.way };
    let strategies = play.strategies(&options.strategy);
    let mut points = Vec::new();
    for &way in ways {
        for &strategy in &strategies {
            points.push((Point { memory_bytes: play.memory(), pages, way, strategy }, Vec::new()));
        }
    }
    let bar = progress(points.len() as u64 * u64::from(options.rounds));
    let pinned = play.pinned()?;
    play.go()?;
    for _ in 0..options.rounds {
        for (point, updates) in &mut points {
            bar.set_message(point.to_string());
            updates.extend(update(play, point, options.interval)?);
            bar.inc(1);
        }
        tidy(play, pinned, &bar)?;
    }
    play.finish()?;
    bar.finish_and_clear();
    Ok(points.iter().map(|(point, updates)| Cell::new(*point, updates)).collect())
}

/// One update under load.
fn update(play: &mut Play, point: &Point, interval: u64) -> Result<Option<(u64, Report)>, StageError> {
    play.let_run(interval)?;
    let updated = play.update(point.way, point.strategy)?;
    play.let_run(interval)?;
    Ok(updated.map(|u| (u.blackout_us, u.report)))
}

/// Checks after each round that everything written is there and the pinned pages are as before.
fn tidy(play: &mut Play, pinned: u64, bar: &ProgressBar) -> Result<(), StageError> {
    bar.set_message("verifying");
    play.quiesce()?;
    let now = play.pinned()?;
    if now != pinned {
        play.problems.push(format!("{now} pages are pinned; before the updates it were {pinned}"));
    }
    play.go()
}

/// Bytes as people say them.
pub(super) fn human(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let fit = units.iter().find(|(shift, _)| bytes >> shift > 0);
    fit.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}
