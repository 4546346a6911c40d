//! `vdpactl demo`: what an update costs, and that nothing is lost.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use vdpa_client::update::{Strategy, Way};
use vdpa_sys::clock::monotonic_ns;

use super::chart;
use super::play::{Load, Play};
use super::stage::{self, StageError};
use super::summary::{Notes, Summary};
use super::wire::{Pages, Totals, chain};

/// Shows what an update of a running client costs with each strategy, and that nothing is lost.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Updates with each strategy by each way
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub updates: u32,
    /// Strategies, in this order [default: all that the device can do]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub strategy: Vec<Strategy>,
    /// Ways, in this order: exec, fork, hand-over
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "exec")]
    pub way: Vec<Way>,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queue_depth: u16,
    /// Milliseconds of load before and after each update
    #[arg(long, value_name = "MS", default_value_t = 150)]
    pub interval: u64,
    /// Seed of the load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Draw completions over time into this file
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// What it runs on
    #[command(flatten)]
    pub stage: stage::Options,
}

/// Gives the demo and prints what it found out, as JSON if `json`. Exit status 1 if anything was lost or failed.
#[must_use]
pub fn main(options: &Options, json: bool) -> ExitCode {
    let summary = match run(options) {
        Ok(summary) => summary,
        Err(e) => {
            eprintln!("vdpactl: demo: {}", chain(&e));
            return ExitCode::FAILURE;
        }
    };
    let text =
        if json { serde_json::to_string(&summary).unwrap_or_default() + "\n" } else { summary.table() };
    let written = io::stdout().write_all(text.as_bytes());
    if summary.ok && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(options: &Options) -> Result<Summary, StageError> {
    let load = Load { queue_depth: options.queue_depth, seed: options.seed, pages: Pages::Small };
    let mut play = Play::set(&options.stage, load)?;
    let strategies = play.strategies(&options.strategy);
    let bar = progress((options.way.len() * strategies.len()) as u64 * u64::from(options.updates));
    let mut notes = Vec::new();
    play.go()?;
    for &way in &options.way {
        for &strategy in &strategies {
            bar.set_message(format!("{way} {strategy}"));
            notes.push(updates(&mut play, (way, strategy), options, &bar)?);
        }
    }
    play.finish()?;
    bar.finish_and_clear();
    if let Some(file) = &options.chart {
        let counts = play.timeline().counts(monotonic_ns());
        if let Err(e) = chart::draw(file, &counts, &play.marks) {
            play.problems.push(format!("cannot draw {}: {e}", file.display()));
        }
    }
    let whole = notes.iter().all(|n| n.updates.len() as u64 == u64::from(options.updates));
    Ok(Summary {
        memory_bytes: play.memory(),
        page_size: load.pages.bytes(),
        strategies: notes.iter().map(Into::into).collect(),
        blocks_verified: play.blocks_verified,
        ok: play.totals.clean() && play.problems.is_empty() && whole && !notes.is_empty(),
        problems: std::mem::take(&mut play.problems),
    })
}

/// All updates by one way with one strategy.
fn updates(
    play: &mut Play,
    (way, strategy): (Way, Strategy),
    options: &Options,
    bar: &ProgressBar,
) -> Result<Notes, StageError> {
    let mut notes = Notes {
        strategy,
        way,
        updates: Vec::new(),
        pinned_pages: (play.pinned()?, 0),
        totals: (play.totals.clone(), Totals::default()),
        wrong_blocks: 0,
    };
    for _ in 0..options.updates {
        play.let_run(options.interval)?;
        if let Some(updated) = play.update(way, strategy)? {
            notes.updates.push((updated.blackout_us, updated.report));
        }
        play.let_run(options.interval)?;
        notes.wrong_blocks += play.quiesce()?;
        play.go()?;
        bar.inc(1);
    }
    notes.pinned_pages.1 = play.pinned()?;
    notes.totals.1 = play.totals.clone();
    Ok(notes)
}

/// A bar on terminals, and nothing elsewhere.
pub(super) fn progress(updates: u64) -> ProgressBar {
    let bar = ProgressBar::new(updates);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} [{wide_bar}] {pos}/{len} updates {elapsed}") {
        bar.set_style(style);
    }
    bar
}
