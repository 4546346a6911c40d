//! `vdpactl bench io`: rate and latency of verified random requests.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;
use vdpa_core::host::PAGE_SIZE;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::engine::{Engine, LoadError};
use super::fixture::{self, Fixture, FixtureError, errno};
use super::journal::Journal;
use super::output;
use super::timeline::Timeline;
use super::wire::{ClientConfig, Pages, Totals};

/// Default size of guest memory: larger than a last-level cache.
const MEMORY: u64 = 256 << 20;
/// Longest wait for completions, after which deadlines are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Measures a device under verified random requests.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Device file to measure; the disk is overwritten unless --read 100 [default: a private daemon with a disk]
    #[arg(long, value_name = "FILE")]
    pub device: Option<PathBuf>,
    /// Seconds to measure
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: u32,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub queue_depth: u16,
    /// Reads among 100 requests; the others are writes
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(..=100))]
    pub read: u8,
    /// Seed of the load
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// The fixture that it runs on
    #[command(flatten)]
    pub fixture: fixture::Options,
}

/// The result of `vdpactl bench io`.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Requests per second.
    pub iops: f64,
    /// Time from submission to completion, in us.
    pub latency_us: Latency,
    /// Duration of the measurement.
    pub seconds: f64,
    /// Requests in flight.
    pub queue_depth: u16,
    /// Counters.
    #[serde(flatten)]
    pub totals: Totals,
    /// Whether every request was completed once and correctly.
    pub ok: bool,
}

/// Percentiles in us.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

/// Measures and prints the result, as JSON if `json`. Exit status 1 if a request was lost, corrupt or failed.
#[must_use]
pub fn main(options: &Options, json: bool) -> ExitCode {
    output::finish("bench", run(options), json, Outcome::text, |outcome| outcome.ok)
}

fn run(options: &Options) -> Result<Outcome, FixtureError> {
    let mut fixture_options = options.fixture.clone();
    fixture_options.memory.get_or_insert(MEMORY);
    let memory = fixture_options.memory.unwrap_or(MEMORY);
    // Kept until the end, because dropping it stops the daemon.
    let fixture = match options.device {
        Some(_) => None,
        None => Some(Fixture::start(&fixture_options)?),
    };
    let device = options.device.clone().or_else(|| fixture.as_ref().map(|fixture| fixture.device.clone()));
    let (journal, _journal_fd) = Journal::create(fixture_options.disk / PAGE_SIZE, PAGE_SIZE, options.seed)
        .map_err(LoadError::from)?;
    let (timeline, _timeline_fd) = Timeline::create(monotonic_ns()).map_err(errno("create the timeline"))?;
    let config = ClientConfig {
        device: device.unwrap_or_default(),
        memory,
        pages: Pages::Small,
        queue_depth: options.queue_depth,
        block_size: 4096,
        read_percent: options.read,
        deadline_ms: 10_000,
        seed: options.seed,
        journal_fd: -1,
        timeline_fd: -1,
        progress_ms: 100,
        directory: PathBuf::new(),
    };
    let mut engine = Engine::<VhostVdpaFd>::new(&config, journal, timeline)?;
    Ok(measure(&mut engine, options)?)
}

fn measure(engine: &mut Engine<VhostVdpaFd>, options: &Options) -> Result<Outcome, LoadError> {
    let length = Duration::from_secs(options.seconds.into());
    let deadline = Duration::from_secs(10);
    engine.measure_latency();
    let begin = Instant::now();
    while begin.elapsed() < length {
        engine.issue()?;
        complete_or_wait(engine, deadline)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let answered = engine.totals().requests;
    let drain_begin = Instant::now();
    while engine.in_flight() > 0 && drain_begin.elapsed() < deadline + POLL_INTERVAL {
        complete_or_wait(engine, deadline)?;
    }
    let totals = engine.totals().clone();
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let iops = answered as f64 / seconds;
    let ok = totals.clean() && engine.in_flight() == 0;
    Ok(Outcome {
        iops,
        latency_us: Latency::of(engine.latency()),
        seconds,
        queue_depth: options.queue_depth,
        totals,
        ok,
    })
}

/// Takes completions, or waits for some.
fn complete_or_wait(engine: &mut Engine<VhostVdpaFd>, deadline: Duration) -> Result<(), LoadError> {
    if engine.reap()? == 0 && !engine.arm()? {
        let _signalled = engine.queue()?.call().wait(Some(POLL_INTERVAL));
        engine.check_deadline(deadline);
    }
    Ok(())
}

impl Latency {
    fn of(histogram: Option<&Histogram<u64>>) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
        let at = |quantile| histogram.map_or(0.0, |h| h.value_at_quantile(quantile) as f64 / 1000.0);
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: at(1.0) }
    }
}

impl Outcome {
    fn text(&self) -> String {
        let Latency { p50, p99, p999, max } = self.latency_us;
        let Totals { requests, lost, corrupt, duplicate, errors, .. } = &self.totals;
        format!(
            "{:.0} requests/s at queue depth {} over {:.1} s\n\
             latency us: p50 {p50:.1}  p99 {p99:.1}  p99.9 {p999:.1}  max {max:.1}\n\
             {requests} requests, {lost} lost, {corrupt} corrupt, {duplicate} duplicate, {errors} failed\n",
            self.iops, self.queue_depth, self.seconds
        )
    }
}
