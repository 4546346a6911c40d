//! `just bench-iotlb`: what a map and an unmap cost, by the number of mappings that there are.
//!
//! One device for each number. Each round maps and unmaps on all of them, each round beginning with another one. What is mapped
//! and unmapped is one page of a memfd, at addresses that are scattered among the mappings there are.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vdpa_bench::process::PrivateDaemon;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::Client;
use vdpa_core::features::BackendFeatures;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::types::{Asid, Perm};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const PAGE: u64 = 4096;
const ASID: Asid = Asid(0);
/// Pages of memory. Every second one is left out of core dumps, so that each is a mapping (VMA) of its own and becomes an entry
/// of its own: one UPDATE of all of them makes as many entries.
const PAGES: u64 = 4096;
/// Bytes between two such UPDATEs. Behind each there is room for the changes that are measured.
const STEP: u64 = 2 * PAGES * PAGE;

/// Measures changes of an IOTLB over the device file, while the mappings of other requests stay.
#[derive(Debug, Parser)]
struct Options {
    /// The daemon
    #[arg(long, value_name = "PATH")]
    vdpad: PathBuf,
    /// Mappings that each device has, one device for each number
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1000,10000,100000,1000000")]
    entries: Vec<u64>,
    /// How often
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Maps and unmaps of each device in a round
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=4000))]
    changes: u32,
    /// Attributes of the devices, which are of the kind blk
    #[arg(long, value_name = "TEXT", default_value = "null 1M pin off")]
    attributes: String,
    /// Without a holder: no change is written to a journal
    #[arg(long)]
    no_holder: bool,
}

/// What was measured of one device: us of one change, by round.
#[derive(Debug, Default)]
struct Figures {
    /// A map or an unmap outside of a batch: the median of a round, the mean, and the longest.
    single: Vec<f64>,
    single_mean: Vec<f64>,
    longest: Vec<f64>,
    /// One of a batch.
    batched: Vec<f64>,
    /// The end of the batch.
    end: Vec<f64>,
}

struct Subject {
    device: VhostVdpaFd,
    entries: u64,
    random: u64,
    figures: Figures,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench-iotlb: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let directory = TempDir::new()?;
    let args: &[&str] = if options.no_holder { &[] } else { &["--holder"] };
    let daemon = PrivateDaemon::start_with(&options.vdpad, directory.path(), Front::Fuse, "warn", args)?;
    let client = Client::new(daemon.socket())?;
    let memory = memory()?;
    let mut subjects = Vec::new();
    for (number, &entries) in options.entries.iter().enumerate() {
        let begin = Instant::now();
        subjects.push(Subject::new(options, &client, &memory, number, entries)?);
        writeln!(out, "{entries} mappings made in {:.1} s", begin.elapsed().as_secs_f64())?;
    }
    let count = subjects.len();
    for round in 0..options.rounds as usize {
        for turn in 0..count {
            let subject = subjects.get_mut((round + turn) % count).ok_or("no device")?;
            subject.measure(options.changes, memory.addr() as u64)?;
        }
    }
    writeln!(
        out,
        "us per change, medians of {} rounds of {} maps and {} unmaps; in brackets beside the first device",
        options.rounds, options.changes, options.changes
    )?;
    writeln!(out, "| mappings | one change | on average | longest | one of a batch | end of the batch |")?;
    writeln!(out, "|---|---|---|---|---|---|")?;
    let first = subjects.first().map(Subject::medians).ok_or("no device")?;
    for subject in &subjects {
        write!(out, "| {} ", subject.entries)?;
        for (value, first) in subject.medians().into_iter().zip(first) {
            write!(out, "| {value:.1} ({:.2}) ", value / first)?;
        }
        writeln!(out, "|")?;
    }
    let total: u64 = options.entries.iter().sum();
    let kib = resident(client.daemon()?.pid)?;
    writeln!(out, "memory of the daemon: {} MiB, {} bytes per mapping", kib >> 10, (kib << 10) / total)?;
    if !options.no_holder {
        let begin = Instant::now();
        let pid = client.daemon()?.pid.cast_signed();
        kill_process(Pid::from_raw(pid).ok_or("no process")?, Signal::KILL)?;
        // Answered by the next daemon.
        subjects.iter().try_for_each(|subject| subject.device.status().map(drop))?;
        let seconds = begin.elapsed().as_secs_f64();
        writeln!(out, "after a crash with {total} mappings every device answers in {seconds:.2} s")?;
        let restored = client.devices()?.iter().map(|device| device.state.mappings).sum::<u64>();
        writeln!(out, "mappings then: {restored}")?;
    }
    Ok(())
}

/// Memory of a process, in KiB.
fn resident(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// Memory of which each page is a mapping of its own.
fn memory() -> Result<SharedMap> {
    let size = PAGES * PAGE;
    let fd = memfd::create(c"bench-iotlb", size, None)?;
    let map = SharedMap::map(&fd, 0, usize::try_from(size)?, Prot::RW, false)?;
    let page = usize::try_from(PAGE)?;
    for offset in (0..map.len()).step_by(2 * page) {
        map.leave_out_of_dumps(offset, page)?;
    }
    Ok(map)
}

impl Subject {
    /// A device with so many mappings.
    fn new(
        options: &Options,
        client: &Client,
        memory: &SharedMap,
        number: usize,
        entries: u64,
    ) -> Result<Self> {
        let mut attrs = Attrs::new();
        attrs.insert("max_iotlb_entries", "1048576")?;
        let mut words = options.attributes.split_whitespace();
        while let (Some(name), Some(value)) = (words.next(), words.next()) {
            attrs.insert(name, value)?;
        }
        let name = format!("disk{number}");
        client.add(&AddRequest { name: name.clone(), mgmtdev: "blk".into(), attrs })?;
        let device = VhostVdpaFd::open(client.device(&name)?.path)?;
        device.set_owner()?;
        let offered = device.backend_features()?;
        let wanted = BackendFeatures::of(&[BackendFeatures::IOTLB_MSG_V2, BackendFeatures::IOTLB_BATCH]);
        device.set_backend_features(BackendFeatures(offered.0 & wanted.0))?;
        device.batch_begin(ASID)?;
        let mut left = entries;
        for block in 0.. {
            let pages = left.min(PAGES);
            if pages == 0 {
                break;
            }
            device.dma_map(ASID, block * STEP, pages * PAGE, memory.addr() as u64, Perm::RW)?;
            left -= pages;
        }
        device.batch_end(ASID)?;
        Ok(Self { device, entries, random: 1, figures: Figures::default() })
    }

    /// Maps and unmaps, one by one and in batches.
    fn measure(&mut self, changes: u32, uaddr: u64) -> Result<()> {
        let places: Vec<u64> = (0..u64::from(changes)).map(|change| self.place(change)).collect();
        let mut single = Vec::new();
        let mut timed = |change: &dyn Fn(&VhostVdpaFd, u64) -> vdpa_core::types::Result<()>, at| {
            let begin = Instant::now();
            let done = change(&self.device, at);
            single.push(begin.elapsed());
            done
        };
        let map = |device: &VhostVdpaFd, at| device.dma_map(ASID, at, PAGE, uaddr, Perm::RW);
        let unmap = |device: &VhostVdpaFd, at| device.dma_unmap(ASID, at, PAGE);
        for &at in &places {
            timed(&map, at)?;
        }
        for &at in &places {
            timed(&unmap, at)?;
        }
        let sum: Duration = single.iter().sum();
        self.figures.single_mean.push(us(sum) / f64::from(2 * changes));
        self.figures.longest.extend(single.iter().max().copied().map(us));
        self.figures.single.push(median(single.iter().copied().map(us).collect()));
        let (mut batched, mut ends) = (Duration::ZERO, Duration::ZERO);
        for change in [&map as &dyn Fn(&VhostVdpaFd, u64) -> vdpa_core::types::Result<()>, &unmap] {
            self.device.batch_begin(ASID)?;
            let begin = Instant::now();
            places.iter().try_for_each(|&at| change(&self.device, at))?;
            batched += begin.elapsed();
            let begin = Instant::now();
            self.device.batch_end(ASID)?;
            ends += begin.elapsed();
        }
        self.figures.batched.push(us(batched) / f64::from(2 * changes));
        self.figures.end.push(us(ends) / 2.0);
        Ok(())
    }

    /// An address at which nothing is mapped, another one for each change of a round.
    fn place(&mut self, change: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let blocks = self.entries.div_ceil(PAGES).max(1);
        (self.random >> 33) % blocks * STEP + (PAGES + change) * PAGE
    }

    fn medians(&self) -> [f64; 5] {
        let Figures { single, single_mean, longest, batched, end } = &self.figures;
        [single, single_mean, longest, batched, end].map(|values| median(values.clone()))
    }
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
