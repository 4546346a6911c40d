//! `just bench-remap`: how long it takes to put other memory behind addresses that are mapped, as shadow rings do.
//!
//! Three ways, which take turns in every round, so that neighbours are comparable on a machine that others use: one REMAP; INVALIDATE and
//! UPDATE in a batch; INVALIDATE and UPDATE alone, between which the addresses are unmapped. Each to the shadow memory and back. A queue
//! runs, whose ring is in what is moved.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tempfile::TempDir;
use vdpa_bench::process::PrivateDaemon;
use vdpa_client::device::Device;
use vdpa_client::vring::GuestRing;
use vdpa_control::Front;
use vdpa_control::api::{AddRequest, Attrs};
use vdpa_control::client::Client;
use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

const IOVA: u64 = 0x10_0000;
const SPACE: Asid = Asid(0);
const WAYS: [&str; 3] = ["REMAP", "batch of INVALIDATE and UPDATE", "INVALIDATE, UPDATE"];

/// Measures REMAP to other memory.
#[derive(Debug, Parser)]
struct Options {
    /// The daemon
    #[arg(long, value_name = "PATH")]
    vdpad: PathBuf,
    /// Bytes of what is moved
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "16384,1048576,1073741824")]
    size: Vec<u64>,
    /// Other mappings of the device
    #[arg(long, default_value_t = 16)]
    mappings: u64,
    /// Measurements of each way
    #[arg(long, default_value_t = 200)]
    rounds: u32,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench-remap: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let dir = TempDir::new()?;
    let daemon = PrivateDaemon::start(&options.vdpad, dir.path(), Front::Fuse)?;
    let control = Client::new(daemon.socket())?;
    let mut attrs = Attrs::new();
    attrs.insert("verify_remap", "off")?;
    control.add(&AddRequest { name: "sim".into(), mgmtdev: "sim-blk".into(), attrs })?;
    let path = control.device("sim")?.path;
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "sim-blk, {} other mappings, {} rounds: us, median (worst)",
        options.mappings, options.rounds
    )?;
    for &size in &options.size {
        let mut times = measure(options, &path, size)?;
        for (way, times) in WAYS.iter().zip(&mut times) {
            times.sort_by(f64::total_cmp);
            let at = |index: usize| times.get(index).copied().unwrap_or(f64::NAN);
            let (median, worst) = (at(times.len() / 2), at(times.len().saturating_sub(1)));
            writeln!(out, "  {:>6} KiB  {way:<32} {median:>9.1} ({worst:.1})", size >> 10)?;
        }
    }
    Ok(())
}

fn map(size: u64) -> Result<SharedMap> {
    let fd = memfd::create(c"bench", size, None)?;
    Ok(SharedMap::map(fd, 0, usize::try_from(size)?, Prot::RW, false)?)
}

/// The times of each way in us, of one move each.
fn measure(options: &Options, path: &std::path::Path, size: u64) -> Result<[Vec<f64>; 3]> {
    let mut session = Device::<VhostVdpaFd>::open(path)?.negotiate(Features::NONE)?;
    let memories = [map(size)?, map(size)?];
    let first = memories.first().ok_or("no memory")?;
    session.ops().dma_map(SPACE, IOVA, size, first.addr() as u64, Perm::RW)?;
    for number in 0..options.mappings {
        let fd = memfd::create(c"bench", 1 << 20, None)?;
        session.map_memfd(&format!("{number}"), fd, (number + 64) << 30, 1 << 20, Perm::RW)?;
    }
    // A ring that the device has resolved: nothing is in it.
    let ring = GuestRing { size: 64, desc: IOVA, driver: IOVA + 0x1000, device: IOVA + 0x2000 };
    let (kick, call) = (EventFd::new()?, EventFd::new()?);
    let ops = session.ops();
    ops.set_vring_num(QueueIndex(0), 64)?;
    let addr = vdpa_core::types::VringAddr {
        desc: ring.desc,
        avail: ring.driver,
        used: ring.device,
        ..Default::default()
    };
    ops.set_vring_addr(QueueIndex(0), &addr)?;
    ops.set_vring_kick(QueueIndex(0), Some(&kick))?;
    ops.set_vring_call(QueueIndex(0), Some(&call))?;
    ops.set_vring_enable(QueueIndex(0), true)?;
    session.start()?;
    let ops = session.ops();
    let mut times: [Vec<f64>; 3] = Default::default();
    let mut side = 0;
    for round in 0..=options.rounds {
        for step in 0..3 {
            let way = (step + usize::try_from(round)?) % 3;
            side = 1 - side;
            let uaddr = memories.get(side).ok_or("no memory")?.addr() as u64;
            // The ring is resolved when it is looked at.
            kick.signal();
            let begin = Instant::now();
            match way {
                0 => ops.dma_remap(SPACE, IOVA, size, uaddr)?,
                1 => {
                    ops.batch_begin(SPACE)?;
                    ops.dma_unmap(SPACE, IOVA, size)?;
                    ops.dma_map(SPACE, IOVA, size, uaddr, Perm::RW)?;
                    ops.batch_end(SPACE)?;
                }
                _ => {
                    ops.dma_unmap(SPACE, IOVA, size)?;
                    ops.dma_map(SPACE, IOVA, size, uaddr, Perm::RW)?;
                }
            }
            let time = begin.elapsed().as_secs_f64() * 1e6;
            // The first round warms up.
            if let Some(times) = times.get_mut(way).filter(|_| round > 0) {
                times.push(time);
            }
        }
    }
    Ok(times)
}
