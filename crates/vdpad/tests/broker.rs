//! A daemon that serves a device of another one on: the files of both speak the same interface, so that the one behind stands for the
//! kernel's. Needs /dev/fuse and the right to mount.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::features::Status;
use vdpa_core::ops::{VdpaOps as _, read_all_config};
use vdpa_core::types::{Asid, Perm};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{PrivateMap, Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use held::{is_busy, replace, start, upgrade};
use robust::disk::{Disk, MEMORY_MIN};
use robust::{Vdpad, eventually};

/// How long a test may take.
const LIFE: Duration = Duration::from_secs(60);

/// A daemon with the disk `disk0`, and the path of its file.
fn behind() -> (Vdpad, PathBuf) {
    let vdpad = Vdpad::start(LIFE);
    let path = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited packed on");
    (vdpad, path)
}

/// Serves the device at `path` on as `disk1`; returns its file.
fn serve_on(broker: &Vdpad, path: &Path, attrs: &str) -> PathBuf {
    broker.add("disk1", "vhost-vdpa", &format!("path {} memlock unlimited {attrs}", path.display()))
}

/// The process that has the device behind `disk1` open.
fn keeper(broker: &Vdpad) -> Pid {
    let begin = "keeper\0--device\0disk1\0";
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |pid: &i32| {
        let read = |name| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let log = std::fs::read_link(format!("/proc/{pid}/fd/2")).unwrap_or_default();
        String::from_utf8_lossy(&read("cmdline")).contains(begin) && log == broker.dir().join("log")
    };
    Pid::from_raw(pids.find(ours).unwrap()).unwrap()
}

#[test]
fn what_the_device_offers_passes_through() {
    let (behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let bare = VhostVdpaFd::open(&path).unwrap();
    let offered = (
        bare.device_id(),
        bare.features(),
        bare.vqs_count(),
        bare.vring_num(),
        bare.group_num(),
        bare.as_num(),
        bare.config_size(),
        bare.iova_range(),
        bare.backend_features(),
        read_all_config(&bare),
    );
    drop(bare);
    let served = VhostVdpaFd::open(serve_on(&broker, &path, "")).unwrap();
    let mut backend = served.backend_features();
    if let Ok(word) = &mut backend {
        // The pages that somebody else's device writes are not known, and its state cannot be read as a whole.
        use vdpa_core::features::BackendFeatures;
        for own in [BackendFeatures::DIRTY_LOG, BackendFeatures::DEVICE_STATE] {
            assert!(!word.has(own));
            *word = word.with(own);
        }
    }
    let same = (
        served.device_id(),
        served.features(),
        served.vqs_count(),
        served.vring_num(),
        served.group_num(),
        served.as_num(),
        served.config_size(),
        served.iova_range(),
        backend,
        read_all_config(&served),
    );
    assert_eq!(same, offered);
    assert!(is_busy(&path), "it is open as long as it is served");
    assert!(is_busy(&broker.info("disk1").path), "one client at a time");
    assert_eq!(behind.info("disk0").state.owner.unwrap().comm, "vdpad-keeper");
}

#[test]
fn the_data_path_does_not_pass_the_daemon() {
    let (behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let mut disk = Disk::start(&serve_on(&broker, &path, ""), MEMORY_MIN);
    disk.check(1);
    // Neither of them runs: kicks, data and interrupts go between the driver and the device behind.
    let keeper = keeper(&broker);
    broker.stop();
    kill_process(keeper, Signal::STOP).unwrap();
    (2..20).for_each(|seed| disk.check(seed));
    kill_process(keeper, Signal::CONT).unwrap();
    broker.signal(Signal::CONT);
    assert_eq!(disk.session.ops().status().unwrap().0, 0xf);
    drop(disk);
    broker.is_released("disk1");
    let state = eventually("nothing is left", || {
        Some(behind.info("disk0").state).filter(|state| state.mappings == 0)
    });
    assert_eq!((state.status, state.pinned_pages), (Status::RESET, 0));
}

#[test]
fn the_device_runs_on_without_the_daemon() {
    for (name, end) in [("crash", replace as fn(&Vdpad)), ("upgrade", upgrade)] {
        let (behind, path) = behind();
        let broker = start(&[]);
        let served = serve_on(&broker, &path, "");
        let mut disk = Disk::start(&served, MEMORY_MIN);
        disk.check(1);
        let before = behind.info("disk0").state;
        let process = keeper(&broker);
        for round in 2..6 {
            (0..8).for_each(|slot| disk.submit(slot, (kind::OUT, 10 + slot, round)));
            disk.kick();
            end(&broker);
            assert_eq!(disk.settle().len(), 8, "{name}");
            (0..8).for_each(|slot| disk.submit(slot, (kind::IN, 10 + slot, round)));
            disk.kick();
            assert_eq!(disk.settle().len(), 8, "{name}");
        }
        let after = behind.info("disk0").state;
        assert_eq!(keeper(&broker), process, "{name}");
        assert_eq!(
            (before.status, before.mappings, before.pinned_pages),
            (after.status, after.mappings, after.pinned_pages)
        );
        assert!(!broker.log().contains("was about to change"), "{name}: nothing was mapped again");
        // The control path is back too.
        let ops = disk.session.ops();
        ops.suspend().unwrap();
        ops.resume().unwrap();
        disk.check(7);
        drop(disk);
        broker.is_released("disk1");
        Disk::start(&served, MEMORY_MIN).check(8);
        broker.is_released("disk1");
        broker.ctl("dev del disk1").succeeds();
        eventually("the device behind is closed", || (!behind.info("disk0").state.open).then_some(()));
    }
}

#[test]
fn a_device_that_is_taken_away_does_no_io() {
    let (behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let mut disk = Disk::start(&serve_on(&broker, &path, ""), MEMORY_MIN);
    disk.check(1);
    broker.ctl("dev del disk1 --force").succeeds();
    assert!(!is_busy(&path), "it is closed when the command returns");
    let status = disk.session.ops().status().unwrap();
    assert!(status.contains(Status::NEEDS_RESET), "the client is told: {status:?}");
    assert_eq!(behind.info("disk0").state.mappings, 0);
    disk.session.ops().set_status(Status::RESET).unwrap();
    drop(disk);
}

#[test]
fn a_device_whose_keeper_has_ended_needs_a_reset() {
    let (_behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let disk = Disk::start(&serve_on(&broker, &path, ""), MEMORY_MIN);
    kill_process(keeper(&broker), Signal::KILL).unwrap();
    eventually("the device behind is closed", || (!is_busy(&path)).then_some(()));
    assert!(disk.session.ops().status().unwrap().contains(Status::NEEDS_RESET));
    assert_eq!(disk.session.ops().set_status(Status::RESET), Err(Errno::NODEV));
    drop(disk);
    broker.ctl("dev del disk1").succeeds();
    Disk::start(&serve_on(&broker, &path, ""), MEMORY_MIN).check(1);
}

/// More of them than one packet to the keeper has.
#[test]
fn many_mappings_come_and_go_at_once() {
    const COUNT: u64 = 200;
    const PAGE: u64 = 4096;
    let (behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let memory = memfd::create(c"pages", COUNT * PAGE, None).unwrap();
    let map = SharedMap::map(&memory, 0, usize::try_from(COUNT * PAGE).unwrap(), Prot::RW, false).unwrap();
    let device = VhostVdpaFd::open(serve_on(&broker, &path, "")).unwrap();
    device.set_owner().unwrap();
    device.set_backend_features(device.backend_features().unwrap()).unwrap();
    let mappings = || behind.info("disk0").state.mappings;
    device.batch_begin(Asid(0)).unwrap();
    for page in 0..COUNT {
        // With holes between them, so that they stay apart.
        let address = map.addr() as u64 + page * PAGE;
        device.dma_map(Asid(0), page * 2 * PAGE, PAGE, address, Perm::RW).unwrap();
    }
    assert_eq!(mappings(), 0, "the batch has not ended");
    device.batch_end(Asid(0)).unwrap();
    assert_eq!(mappings(), COUNT);
    device.dma_unmap(Asid(0), 0, 100 * 2 * PAGE).unwrap();
    assert_eq!(mappings(), COUNT - 100);
    drop(device);
    broker.is_released("disk1");
    assert_eq!(mappings(), 0);
}

#[test]
fn private_memory_is_refused_unless_it_may_be_left_out() {
    let (_behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let private = SharedMap::from(PrivateMap::new(8192).unwrap());
    let update = |device: &VhostVdpaFd| {
        device.set_owner().unwrap();
        device.dma_map(Asid(0), 0x1000, 8192, private.addr() as u64, Perm::RW)
    };
    assert_eq!(update(&VhostVdpaFd::open(serve_on(&broker, &path, "")).unwrap()), Err(Errno::FAULT));
    let log = broker.log();
    assert!(
        log.contains("are private memory, which this device cannot map; map a file or a memfd as shared"),
        "{log}"
    );
    broker.is_released("disk1");
    broker.ctl("dev del disk1").succeeds();
    assert_eq!(update(&VhostVdpaFd::open(serve_on(&broker, &path, "private_memory skip")).unwrap()), Ok(()));
}

#[test]
fn what_cannot_be_served_on_is_refused() {
    let (behind, path) = behind();
    let broker = Vdpad::start(LIFE);
    let refused = |attrs: &str, texts: &[&str]| {
        let output = broker.ctl(&format!("dev add name disk1 mgmtdev vhost-vdpa {attrs}"));
        assert_ne!(output.code, Some(0), "{attrs}");
        assert!(texts.iter().all(|text| output.stderr.contains(text)), "{attrs}: {}", output.stderr);
    };
    refused("", &["path is not the absolute path of a file"]);
    refused("path /nonexistent", &["/nonexistent: no such device", "module vhost_vdpa"]);
    refused("path /dev/null", &["/dev/null is no vhost-vdpa device"]);
    let at = format!("path {}", path.display());
    refused(
        &format!("{at} private_memory copy"),
        &["private_memory is \"copy\"", "\"refuse\" or \"skip\" is right"],
    );
    refused(&format!("{at} handover open"), &["cannot be opened by a successor"]);
    refused(&format!("{at} colour red"), &["vhost-vdpa has no attribute \"colour\""]);
    let open = VhostVdpaFd::open(&path).unwrap();
    refused(&at, &["the device is open already", "Another process has it open"]);
    drop(open);
    behind.is_released("disk0");
    serve_on(&broker, &path, "");
}
