//! `vdpactl demo`: the downtime of updates, and a proof that nothing is lost.

use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use vdpa_client::update::{Strategy, Way};
use vdpa_sys::clock::monotonic_ns;

use super::chart;
use super::fixture::{self, FixtureError};
use super::output;
use super::scenario::{Load, LoadOptions, Scenario};
use super::summary::{StrategyRun, Summary};
use super::wire::{Pages, Totals};

/// Shows the downtime of updates of a running client with each strategy, and that nothing is lost.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Updates with each strategy by each way
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub updates: u32,
    /// Strategies, in this order [default: all that the device supports]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub strategy: Vec<Strategy>,
    /// Ways, in this order: exec, fork, hand-over
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = "exec")]
    pub way: Vec<Way>,
    /// The load
    #[command(flatten)]
    pub load: LoadOptions,
    /// Seed of the load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Draw completions over time into this file
    #[arg(long, value_name = "FILE.svg")]
    pub chart: Option<PathBuf>,
    /// The fixture that it runs on
    #[command(flatten)]
    pub fixture: fixture::Options,
}

/// Runs the demo and prints the result, as JSON if `json`. Exit status 1 if anything was lost or failed.
#[must_use]
pub fn main(options: &Options, json: bool) -> ExitCode {
    output::finish("demo", run(options), json, Summary::table, |summary| summary.ok)
}

fn run(options: &Options) -> Result<Summary, FixtureError> {
    let load = Load { queue_depth: options.load.queue_depth, seed: options.seed, pages: Pages::Small };
    let mut scenario = Scenario::start(&options.fixture, load)?;
    let strategies = scenario.strategies(&options.strategy);
    let bar = progress((options.way.len() * strategies.len()) as u64 * u64::from(options.updates));
    let mut runs = Vec::new();
    scenario.start_load()?;
    for &way in &options.way {
        for &strategy in &strategies {
            bar.set_message(format!("{way} {strategy}"));
            runs.push(updates(&mut scenario, (way, strategy), options, &bar)?);
        }
    }
    scenario.finish()?;
    bar.finish_and_clear();
    if let Some(file) = &options.chart {
        let counts = scenario.timeline().counts(monotonic_ns());
        if let Err(e) = chart::draw(file, &counts, &scenario.marks) {
            scenario.problems.push(format!("cannot draw {}: {e}", file.display()));
        }
    }
    let whole = runs.iter().all(|n| n.updates.len() as u64 == u64::from(options.updates));
    Ok(Summary {
        memory_bytes: scenario.memory(),
        page_size: load.pages.bytes(),
        strategies: runs.iter().map(Into::into).collect(),
        blocks_verified: scenario.blocks_verified,
        ok: scenario.totals.clean() && scenario.problems.is_empty() && whole && !runs.is_empty(),
        problems: std::mem::take(&mut scenario.problems),
    })
}

/// All updates by one way with one strategy.
fn updates(
    scenario: &mut Scenario,
    (way, strategy): (Way, Strategy),
    options: &Options,
    bar: &ProgressBar,
) -> Result<StrategyRun, FixtureError> {
    let mut runs = StrategyRun {
        strategy,
        way,
        updates: Vec::new(),
        pinned_pages: (scenario.pinned()?, 0),
        totals: (scenario.totals.clone(), Totals::default()),
        wrong_blocks: 0,
    };
    for _ in 0..options.updates {
        scenario.run_for(options.load.interval)?;
        if let Some(updated) = scenario.update(way, strategy)? {
            runs.updates.push((updated.blackout_us, updated.report));
        }
        scenario.run_for(options.load.interval)?;
        runs.wrong_blocks += scenario.quiesce()?;
        scenario.start_load()?;
        bar.inc(1);
    }
    runs.pinned_pages.1 = scenario.pinned()?;
    runs.totals.1 = scenario.totals.clone();
    Ok(runs)
}

/// A progress bar on standard error, which is hidden unless that is a terminal.
pub(super) fn progress(updates: u64) -> ProgressBar {
    let bar = ProgressBar::new(updates);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} [{wide_bar}] {pos}/{len} updates {elapsed}") {
        bar.set_style(style);
    }
    bar
}
