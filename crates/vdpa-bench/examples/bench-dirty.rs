//! `just bench-dirty`: what dirty tracking costs, and how long a report takes.
//!
//! 1. IOPS of 4 KiB reads at a fixed depth, with tracking never started, started and stopped again, on, and on with a report every 10 ms.
//!    The ways take turns, so that each pair of neighbours is comparable on a machine that others use. The median ratio is told.
//! 2. `VDPA_DIRTY_GET` over a guest of 1 TiB at 4 KiB pages, by how many pages are dirty. Beside it: the same bitmap as plain bytes in this
//!    process, looked through byte by byte and copied.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use tempfile::TempDir;
use vdpa_bench::process::PrivateDaemon;
use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::Client;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::dirty::DirtyRange;
use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, IovaRange, Perm, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const PAGE: u64 = 4096;
const IOVA: u64 = 0;
const MEMORY: u64 = 64 << 20;
const TIB: u64 = 1 << 40;
const RING: u16 = 256;
/// Behind the ring: headers and status bytes, then data.
const FRAMES: u64 = 0x2_0000;
const DATA: u64 = 0x10_0000;
const DISK: u64 = 256 << 20;

/// Measures dirty tracking of vdpad.
#[derive(Debug, Parser)]
struct Options {
    /// The daemon
    #[arg(long, value_name = "PATH")]
    vdpad: PathBuf,
    /// Requests in flight
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "32,128")]
    depth: Vec<u16>,
    /// Measurements of each way
    #[arg(long, default_value_t = 30)]
    rounds: u32,
    /// Length of one measurement, in ms
    #[arg(long, default_value_t = 300)]
    millis: u64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench-dirty: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let dir = TempDir::new()?;
    let daemon = PrivateDaemon::start(&options.vdpad, dir.path(), Front::Fuse)?;
    let control = Client::new(daemon.socket())?;
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![7; usize::try_from(DISK)?])?;
    let add = |name: &str, mgmtdev: &str, attrs: &[(&str, &str)]| -> Result<PathBuf> {
        let mut all = Attrs::new();
        for (name, value) in attrs {
            all.insert(*name, *value)?;
        }
        control.add(&AddRequest { name: name.into(), mgmtdev: mgmtdev.into(), attrs: all })?;
        Ok(control.device(name)?.path)
    };
    let path = disk.to_str().ok_or("the name of a temporary file")?;
    let blk = add("blk", "blk", &[("path", path)])?;
    let sim = add("sim", "sim-blk", &[])?;
    for &depth in &options.depth {
        cost(options, &blk, depth)?;
    }
    reports(options, &sim)
}

/// A driver of 4 KiB reads.
struct Reader {
    session: Session<VhostVdpaFd>,
    next: u64,
    state: u64,
}

impl Reader {
    fn start(path: &std::path::Path, memory: u64, depth: u16) -> Result<Self> {
        let device = Device::<VhostVdpaFd>::open(path)?;
        let mut session = device.negotiate(Features::of(&[Features::RING_EVENT_IDX]))?;
        session.map_memfd("memory", memfd::create(c"bench", memory, None)?, IOVA, memory, Perm::RW)?;
        session.add_queue(QueueIndex(0), RING, "memory", 0)?;
        let map = session.region("memory").and_then(|region| region.map()).ok_or("no memory")?;
        for slot in 0..u64::from(depth) {
            let header = RequestHeader { kind: kind::IN, ioprio: 0, sector: slot * 8 };
            map.write(usize::try_from(FRAMES + slot * 64)?, &header.encode())?;
        }
        session.start()?;
        Ok(Self { session, next: 0, state: 0x9e37_79b9_7f4a_7c15 })
    }

    fn random(&mut self, end: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % end
    }

    /// Reads into a page.
    fn submit(&mut self, slot: u64, page: u64, len: u32) -> Result<()> {
        let at = IOVA + FRAMES + slot * 64;
        let (header, status) = (Buffer { iova: at, len: 16 }, Buffer { iova: at + 32, len: 1 });
        let data = Buffer { iova: IOVA + DATA + page * PAGE, len };
        self.next += 1;
        Ok(self.session.queue_mut(QueueIndex(0))?.submit(&[header], &[data, status], slot)?)
    }

    /// Requests per second at this depth; `each` is called every 10 ms.
    fn iops(
        &mut self,
        depth: u16,
        time: Duration,
        each: &mut dyn FnMut(&VhostVdpaFd) -> Result<()>,
    ) -> Result<f64> {
        const EACH: Duration = Duration::from_millis(10);
        let pages = (MEMORY - DATA) / PAGE;
        for slot in 0..u64::from(depth) {
            let page = self.random(pages);
            self.submit(slot, page, 4096)?;
        }
        self.session.queue_mut(QueueIndex(0))?.notify()?;
        let begin = Instant::now();
        let (mut done, mut next) = (0_u32, EACH);
        let mut in_flight = u32::from(depth);
        while in_flight > 0 {
            let mut found = false;
            let ended = begin.elapsed() >= time;
            while let Some(completion) = self.session.queue_mut(QueueIndex(0))?.reap()? {
                found = true;
                (done, in_flight) = (done + 1, in_flight - 1);
                if !ended {
                    let page = self.random(pages);
                    self.submit(completion.token, page, 4096)?;
                    in_flight += 1;
                }
            }
            let queue = self.session.queue_mut(QueueIndex(0))?;
            if found {
                queue.notify()?;
            } else {
                queue.wait(Some(Duration::from_secs(10)))?;
            }
            if begin.elapsed() >= next {
                each(self.session.ops())?;
                next = begin.elapsed() + EACH;
            }
        }
        Ok(f64::from(done) / begin.elapsed().as_secs_f64())
    }
}

fn all(size: u64) -> Result<DirtyRange> {
    Ok(DirtyRange { asid: Asid(0), range: IovaRange::from_size(IOVA, size).ok_or("an empty range")? })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What tracking costs requests.
fn cost(options: &Options, device: &std::path::Path, depth: u16) -> Result<()> {
    const WAYS: [&str; 4] = ["never started", "stopped", "on", "on, a report every 10 ms"];
    let time = Duration::from_millis(options.millis);
    let mut iops: [Vec<f64>; 4] = Default::default();
    let mut ratios: [Vec<f64>; 4] = Default::default();
    let mut bitmap = vec![0_u64; usize::try_from(MEMORY / PAGE / 64)?];
    for round in 0..=options.rounds {
        // Each in a session of its own, since tracking that was started cannot be "never started" again; the order turns.
        let mut now = [0.0; 4];
        for step in 0..4 {
            let way = (step + usize::try_from(round)?) % 4;
            let mut reader = Reader::start(device, MEMORY, depth)?;
            let tracked = all(MEMORY)?;
            if way > 0 {
                reader.session.ops().dirty_start(PAGE, &[tracked])?;
            }
            if way == 1 {
                reader.session.ops().dirty_stop()?;
            }
            let mut nothing = |_: &VhostVdpaFd| Ok(());
            let mut report = |device: &VhostVdpaFd| {
                bitmap.fill(0);
                Ok(device.dirty_get(tracked, PAGE, false, &mut bitmap)?)
            };
            let each: &mut dyn FnMut(&VhostVdpaFd) -> Result<()> =
                if way == 3 { &mut report } else { &mut nothing };
            // Caches are warm after a while.
            reader.iops(depth, time / 4, each)?;
            if let Some(place) = now.get_mut(way) {
                *place = reader.iops(depth, time, each)?;
            }
        }
        // The first round warms the daemon up.
        if round > 0 {
            for (way, value) in now.into_iter().enumerate() {
                if let (Some(all), Some(ratio)) = (iops.get_mut(way), ratios.get_mut(way)) {
                    all.push(value);
                    ratio.push(value / now[0]);
                }
            }
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "blk, 4 KiB reads, depth {depth}, {} rounds: IOPS, ratio to \"never started\"",
        options.rounds
    )?;
    for ((name, iops), ratios) in WAYS.iter().zip(&mut iops).zip(&mut ratios) {
        let (rate, ratio) = (median(iops), median(ratios));
        writeln!(out, "  {name:<26} {rate:>9.0}  {ratio:.3}")?;
    }
    Ok(())
}

/// How long reports over 1 TiB take.
fn reports(options: &Options, device: &std::path::Path) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut reader = Reader::start(device, TIB, 64)?;
    let tracked = all(TIB)?;
    reader.session.ops().dirty_start(PAGE, &[tracked])?;
    let words = usize::try_from(TIB / PAGE / 64)?;
    // Written once, so that its pages are there.
    let mut bitmap = vec![1_u64; words];
    bitmap.fill(0);
    let mut plain = vec![0_u8; words * 8];
    plain.fill(1);
    plain.fill(0);
    let mut copy = vec![0_u8; words * 8];
    copy.fill(1);
    writeln!(out, "1 TiB at 4 KiB pages, a bitmap of 32 MiB: ms, median of {} rounds", options.rounds)?;
    writeln!(out, "  {:>12} {:>10} {:>16}", "dirty pages", "GET", "plain byte scan")?;
    for dirty in [0, 64, 256, 1024, 4096] {
        let (mut gets, mut scans) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let pages = make_dirty(&mut reader, dirty)?;
            let begin = Instant::now();
            reader.session.ops().dirty_get(tracked, PAGE, false, &mut bitmap)?;
            gets.push(begin.elapsed().as_secs_f64() * 1e3);
            let found: u64 = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
            // The pages of the ring, of headers and status bytes are dirty too.
            if found < dirty || found > dirty + 8 {
                return Err(format!("{found} pages reported, {dirty} written").into());
            }
            bitmap.fill(0);
            for page in pages {
                if let Some(byte) = plain.get_mut(usize::try_from(page / 8)?) {
                    *byte |= 1 << (page % 8);
                }
            }
            let begin = Instant::now();
            scan(&mut plain, &mut copy);
            scans.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        writeln!(out, "  {dirty:>12} {:>10.3} {:>16.3}", median(&mut gets), median(&mut scans))?;
    }
    Ok(())
}

/// Has the device write `count` pages at random, each another one; their numbers.
fn make_dirty(reader: &mut Reader, count: u64) -> Result<Vec<u64>> {
    let stride = (TIB - DATA) / PAGE / count.max(1);
    let mut pages = Vec::new();
    for number in 0..count {
        let page = number * stride + reader.random(stride);
        pages.push(DATA / PAGE + page);
        reader.submit(number % 64, page, 512)?;
        if number % 64 == 63 || number + 1 == count {
            let queue = reader.session.queue_mut(QueueIndex(0))?;
            queue.notify()?;
            let mut left = number % 64 + 1;
            while left > 0 {
                while queue.reap()?.is_some() {
                    left -= 1;
                }
                if left > 0 {
                    queue.wait(Some(Duration::from_secs(10)))?;
                }
            }
        }
    }
    Ok(pages)
}

/// Looks at each byte; copies and clears it if it is not 0.
#[inline(never)]
fn scan(bits: &mut [u8], copy: &mut [u8]) {
    for (from, to) in bits.iter_mut().zip(copy) {
        if *from != 0 {
            *to |= *from;
            *from = 0;
        }
    }
}
