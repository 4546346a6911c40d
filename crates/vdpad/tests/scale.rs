//! Updates of many devices and many mappings at once.
//!
//! `just bench-scale` prints what each costs: `VDPA_TEST_ROUNDS` is the number of updates of each size.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;
#[expect(dead_code, reason = "the parts of another test")]
#[path = "support/updating.rs"]
mod updating;

use std::path::{Path, PathBuf};
use std::time::Duration;

use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::memory::Memory;
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{self, Devices, Image, Plan, Report, Strategy, Via};
use vdpa_core::types::Perm;
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk};
use robust::{RoleProcess, Vdpad, has_role, receive_line, send_line, variable};
use updating::DISKS;

/// Mappings of each device.
const MAPPINGS: &str = "TEST_MAPPINGS";
const STRATEGY: &str = "TEST_STRATEGY";
/// Updates to make.
const ROUNDS: &str = "TEST_ROUNDS";
const SECTION: &str = "test/wide";
const PAGE: u64 = 4096;
/// I/O virtual addresses of all mappings except the first, with holes between them.
const MORE: u64 = 0x10_0000_0000;

/// A program with many devices, which is updated several times and reports the duration of each update.
#[test]
fn wide() {
    if !has_role("wide") {
        return;
    }
    let strategy: Strategy = variable(STRATEGY).parse().unwrap();
    let (mut disks, made) = match update::restore::<VhostVdpaFd>().unwrap() {
        None => (set_up(), 0),
        Some(mut restored) => {
            let made: u64 = restored.sections.take(SECTION).unwrap().parse(1).unwrap();
            send_line(&format!("report {}", figures_of(&restored.report, strategy)));
            let disk =
                |(name, session)| (name, Disk { session, flying: std::collections::BTreeMap::default() });
            (restored.devices.into_iter().map(disk).collect(), made + 1)
        }
    };
    // Each device works, also after the last update of the others.
    disks.iter_mut().for_each(|(_, disk): &mut (String, Disk)| disk.check(made));
    if made == variable(ROUNDS).parse::<u64>().unwrap() {
        receive_line();
        return;
    }
    let devices: Devices<VhostVdpaFd> = disks.into_iter().map(|(name, disk)| (name, disk.session)).collect();
    let plan = Plan::new().strategy(strategy).section(Section::json(SECTION, 1, &made).unwrap());
    let prepared = plan.prepare(&devices, Via::Fork(Image::new("/proc/self/exe"))).unwrap();
    prepared.switch(devices, Sections::new()).map_err(|failed| failed.error).unwrap();
}

/// Durations of an update in ns: total, preparation, and requests to devices. One short line, since other processes write too.
fn figures_of(report: &Report, strategy: Strategy) -> String {
    let mappings: u64 = variable(MAPPINGS).parse().unwrap();
    assert_eq!(report.devices.len(), variable(DISKS).split(',').count());
    assert!(report.devices.iter().all(|d| (d.mappings, d.strategy) == (mappings, strategy)), "{report}");
    let requests: u64 = report.devices.iter().flat_map(|device| device.phases()).map(|(_, ns)| ns).sum();
    format!("{} {} {requests}", report.total, report.prepare)
}

fn set_up() -> Vec<(String, Disk)> {
    let mappings: u64 = variable(MAPPINGS).parse().unwrap();
    let size = mappings.max(1) * PAGE;
    let more = Memory::map("more", memfd::create(c"more", size, None).unwrap(), 0, size, false).unwrap();
    let disk = |(number, path): (usize, &str)| {
        let mut disk = Disk::start(Path::new(path), disk::MEMORY_MIN);
        let spec = |at: u64| RegionSpec {
            name: format!("more{at}"),
            backing: Backing::Memory(std::sync::Arc::clone(&more), at * PAGE),
            iova: MORE + at * 2 * PAGE,
            size: PAGE,
            perm: Perm::RW,
            populate: false,
        };
        disk.session.map((1..mappings).map(spec).collect()).unwrap();
        (format!("disk{number}"), disk)
    };
    variable(DISKS).split(',').enumerate().map(disk).collect()
}

/// Updates `paths` with this many mappings each, `rounds` times.
fn reports(
    paths: &[PathBuf],
    mappings: u64,
    strategy: Strategy,
    rounds: u64,
    look: impl FnOnce(),
) -> Vec<[u64; 3]> {
    let disks: Vec<&str> = paths.iter().map(|path| path.to_str().unwrap()).collect();
    let mut program = RoleProcess::start(
        "wide",
        &[
            (DISKS, &disks.join(",")),
            (MAPPINGS, &mappings.to_string()),
            (STRATEGY, strategy.name()),
            (ROUNDS, &rounds.to_string()),
        ],
    );
    let number = |word: &str| word.parse().unwrap();
    let report = |line: String| line.split(' ').map(number).collect::<Vec<u64>>().try_into().unwrap();
    let reports = (0..rounds).map(|_| report(program.receive("report"))).collect();
    look();
    program.send("end");
    program.end_of_all();
    reports
}

fn add(vdpad: &Vdpad, mgmtdev: &str, attrs: &str, count: usize) -> Vec<PathBuf> {
    let add = |number| {
        let name = format!("{mgmtdev}{number}");
        if mgmtdev == "blk" {
            vdpad.add_blk(&name, 16 << 20, attrs)
        } else {
            vdpad.add(&name, mgmtdev, attrs)
        }
    };
    (0..count).map(add).collect()
}

/// One update of `count` devices with `mappings` each.
fn works(mgmtdev: &str, attrs: &str, count: usize, mappings: u64, strategies: &[Strategy]) {
    let vdpad = Vdpad::start(Duration::from_secs(110));
    let paths = add(&vdpad, mgmtdev, attrs, count);
    for &strategy in strategies {
        let look = || {
            for number in 0..count {
                let state = vdpad.info(&format!("{mgmtdev}{number}")).state;
                assert_eq!(state.mappings, mappings, "{state:?}");
                assert!(
                    state.queues[0].running && !state.suspended && state.queues[0].errors == 0,
                    "{state:?}"
                );
            }
        };
        let [[total, ..]] = reports(&paths, mappings, strategy, 1, look)[..] else { panic!("one update") };
        println!("{count} {mgmtdev}, {mappings} mappings each, {strategy}: {} us", total / 1000);
        (0..count).for_each(|number| vdpad.is_released(&format!("{mgmtdev}{number}")));
    }
}

#[test]
fn sixty_four_devices_that_want_remap() {
    works("sim-blk", "", 64, 16, &[Strategy::Resume, Strategy::Reset, Strategy::Reopen]);
}

#[test]
fn sixty_four_devices_that_do_not() {
    works("blk", "pin off", 64, 16, &Strategy::ALL);
}

#[test]
fn a_device_with_a_thousand_mappings() {
    works("sim-blk", "", 1, 1024, &[Strategy::Resume, Strategy::Reset, Strategy::Reopen]);
    works("blk", "pin off", 1, 1024, &Strategy::ALL);
}

/// Prints what devices and mappings cost. Two sizes and one update each, unless more rounds are asked for.
#[test]
fn figures() {
    let rounds: u64 = std::env::var("VDPA_TEST_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    let vdpad = Vdpad::start(Duration::from_secs(if rounds > 1 { 600 } else { 110 }));
    let devices = [add(&vdpad, "sim-blk", "", 64), add(&vdpad, "blk", "pin off", 64)];
    let sizes: &[(usize, u64)] = if rounds > 1 {
        &[
            (1, 1),
            (4, 1),
            (16, 1),
            (64, 1),
            (1, 16),
            (4, 16),
            (16, 16),
            (64, 16),
            (1, 4),
            (1, 64),
            (1, 256),
            (1, 1024),
        ]
    } else {
        &[(1, 1), (4, 4)]
    };
    println!("medians of {rounds}, us: no driver is there (total), and of that in requests to devices");
    println!("device   strategy  devices  mappings  prepare    total  requests  per device  per mapping");
    for (paths, strategies) in devices.iter().zip([&Strategy::ALL[1..], &Strategy::ALL[..]]) {
        for &strategy in strategies {
            for &(count, mappings) in sizes {
                let reports = reports(&paths[..count], mappings, strategy, rounds, || ());
                assert_eq!(reports.len() as u64, rounds);
                let median = |of: usize| {
                    let mut all: Vec<u64> = reports.iter().map(|report| report[of]).collect();
                    all.sort_unstable();
                    all[all.len() / 2] as f64 / 1000.0
                };
                let (total, prepare, requests) = (median(0), median(1), median(2));
                let name = if strategies.len() == 4 { "blk" } else { "sim-blk" };
                println!(
                    "{name:8} {strategy:9} {count:7}  {mappings:8}  {:7.0}  {total:7.0}  {requests:8.0}  {:10.1}  {:11.2}",
                    prepare,
                    total / count as f64,
                    total / (count as u64 * mappings) as f64,
                );
            }
        }
    }
}
