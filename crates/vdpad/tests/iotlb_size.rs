//! IOTLBs with many entries: the limit, what a change costs by what is counted of it, and crashes.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::fs;
use std::path::Path;
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, Perm};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk};
use robust::{RoleProcess, Vdpad, has_role, receive_line, send_line, variable};

const PAGE: u64 = 4096;
/// Pages of [`Memory`].
const PAGES: u64 = 4096;
/// Where entries are made, apart from the memory of a [`Disk`].
const BASE: u64 = 0x100_0000_0000;
/// Bytes between two UPDATEs of all pages. Behind each there is room for single ones.
const STEP: u64 = 2 * PAGES * PAGE;

/// Memory of which every second page is left out of core dumps, so that each is a mapping (VMA) of its own: an UPDATE of all of
/// it makes an entry of each page.
struct Memory(SharedMap);

impl Memory {
    fn new() -> Self {
        let fd = memfd::create(c"pages", PAGES * PAGE, None).unwrap();
        let map = SharedMap::map(&fd, 0, usize::try_from(PAGES * PAGE).unwrap(), Prot::RW, false).unwrap();
        let page = usize::try_from(PAGE).unwrap();
        for offset in (0..map.len()).step_by(2 * page) {
            map.leave_out_of_dumps(offset, page).unwrap();
        }
        Self(map)
    }

    /// Maps so many pages at `iova`, each as an entry.
    fn map(&self, device: &VhostVdpaFd, iova: u64, pages: u64) -> Result<(), Errno> {
        device.dma_map(Asid(0), iova, pages * PAGE, self.0.addr() as u64, Perm::RW)
    }

    /// Makes so many entries, in one batch.
    fn fill(&self, device: &VhostVdpaFd, entries: u64) {
        device.batch_begin(Asid(0)).unwrap();
        let mut left = entries;
        for block in 0..entries.div_ceil(PAGES) {
            self.map(device, BASE + block * STEP, left.min(PAGES)).unwrap();
            left -= left.min(PAGES);
        }
        device.batch_end(Asid(0)).unwrap();
    }
}

fn open(path: &Path) -> VhostVdpaFd {
    let device = VhostVdpaFd::open(path).unwrap();
    device.set_owner().unwrap();
    let wanted = BackendFeatures::of(&[BackendFeatures::IOTLB_MSG_V2, BackendFeatures::IOTLB_BATCH]);
    device.set_backend_features(wanted).unwrap();
    device
}

/// As the limit of the kernel's table: EFAULT for the UPDATE that does not fit, of which nothing is mapped; what is removed makes
/// room. It is the device's, over crashes and upgrades of the daemon too.
#[test]
fn the_limit_is_that_of_the_device() {
    let vdpad = held::start(&[]);
    let memory = Memory::new();
    let image = vdpad.image("disk", 1 << 20);
    let blk = format!("path {} pin off", image.display());
    for (name, mgmtdev, attrs, limit) in [
        ("d0", "blk", format!("{blk} max_iotlb_entries 16"), 16),
        ("d1", "blk", "null 1M pin off".to_owned(), 2048),
        ("d2", "sim-blk", "max_iotlb_entries 3000".to_owned(), 3000),
        ("d3", "sim-blk", "max_iotlb_entries 3000 batch_mapping off".to_owned(), 3000),
    ] {
        let device = open(&vdpad.add(name, mgmtdev, &attrs));
        let check = |device: &VhostVdpaFd| {
            assert_eq!(vdpad.info(name).state.max_iotlb_entries, limit, "{name}");
            assert_eq!(memory.map(device, BASE, limit + 1), Err(Errno::FAULT), "{name}");
            assert_eq!(vdpad.info(name).state.mappings, 0, "{name}");
            assert_eq!(memory.map(device, BASE, limit), Ok(()), "{name}");
            let beyond = BASE + limit * PAGE;
            assert_eq!(memory.map(device, beyond, 1), Err(Errno::FAULT), "{name}");
            assert_eq!(device.dma_unmap(Asid(0), BASE, PAGE), Ok(()), "{name}");
            assert_eq!(memory.map(device, beyond, 1), Ok(()), "{name}");
            assert_eq!(memory.map(device, BASE, 1), Err(Errno::FAULT), "{name}");
            assert_eq!(device.dma_unmap(Asid(0), 0, u64::MAX), Ok(()), "{name}");
        };
        check(&device);
        let shown = vdpad.ctl(&format!("-s dev show {name}"));
        assert!(shown.stdout.contains(&format!("  mappings 0\n  max_iotlb_entries {limit}\n")), "{shown:?}");
        held::replace(&vdpad);
        check(&device);
        held::upgrade(&vdpad);
        check(&device);
        drop(device);
    }
}

mod heavy {
    use super::*;

    /// Changes that are counted.
    const CHANGES: u64 = 100;

    /// These take long without optimisation, and longer beside others.
    fn start() -> Vdpad {
        Vdpad::start_with(Duration::from_secs(280), &["--holder", "--front", "fuse"])
    }

    /// What the daemon has done for [`CHANGES`] maps and as many unmaps.
    #[derive(Debug)]
    struct Work {
        /// Bytes that the journal has grown by.
        journal: u64,
        /// Page faults of the daemon: memory that it touches for the first time.
        faults: u64,
        /// System calls of the daemon; `None` where strace(1) is missing.
        calls: Option<u64>,
        /// Mappings (VMAs) of the daemon.
        vmas: usize,
    }

    fn daemon(vdpad: &Vdpad) -> u32 {
        held::daemon(vdpad).pid
    }

    /// Generation and bytes of the only journal of a device.
    fn journal(pid: u32) -> (u64, u64) {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let path = fds
            .map(|fd| fd.unwrap().path())
            .find(|fd| fs::read_link(fd).is_ok_and(|name| name.to_string_lossy().contains("vdpa-device")));
        let file = fs::File::open(path.unwrap()).unwrap();
        let word = |at: u64| {
            let mut bytes = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, at).unwrap();
            u64::from_le_bytes(bytes)
        };
        let segment = word(16);
        (word(segment + 8), word(segment + 24))
    }

    /// Minor page faults of a process.
    fn faults(pid: u32) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().nth(7).unwrap().parse().unwrap()
    }

    fn change(device: &VhostVdpaFd, memory: &Memory, entries: u64) {
        let blocks = entries.div_ceil(PAGES);
        let place = |change: u64| BASE + (change * 7919 % blocks) * STEP + (PAGES + change) * PAGE;
        (0..CHANGES).for_each(|i| memory.map(device, place(i), 1).unwrap());
        (0..CHANGES).for_each(|i| device.dma_unmap(Asid(0), place(i), PAGE).unwrap());
    }

    /// System calls of all threads of a process while `work` runs.
    fn calls(pid: u32, work: impl FnOnce()) -> Option<u64> {
        let out = tempfile::NamedTempFile::new().unwrap();
        let mut strace = std::process::Command::new("strace")
            .args(["-q", "-f", "-c", "-U", "calls,name", "-o"])
            .arg(out.path())
            .args(["-p", &pid.to_string()])
            .spawn()
            .ok()?;
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).unwrap();
            tracer.trim() != "0"
        };
        robust::eventually("the daemon is traced", || traced().then_some(()));
        // All of its threads, one after the other.
        std::thread::sleep(Duration::from_millis(200));
        work();
        let strace_pid = rustix::process::Pid::from_child(&strace);
        rustix::process::kill_process(strace_pid, rustix::process::Signal::INT).unwrap();
        strace.wait().unwrap();
        let text = fs::read_to_string(out.path()).unwrap();
        let counts = text.lines().filter_map(|line| {
            let (count, name) = line.trim().split_once(' ')?;
            (name.trim() != "total").then(|| count.parse::<u64>().ok())?
        });
        Some(counts.sum())
    }

    fn work(vdpad: &Vdpad, device: &VhostVdpaFd, memory: &Memory, entries: u64) -> Work {
        let pid = daemon(vdpad);
        // Buffers have grown, and pages are there.
        change(device, memory, entries);
        let (journal, faults) = loop {
            let before = (journal(pid), faults(pid));
            change(device, memory, entries);
            let after = (journal(pid), faults(pid));
            if before.0.0 == after.0.0 {
                break (after.0.1 - before.0.1, after.1 - before.1);
            }
            // A checkpoint, which every so many changes need one.
        };
        let calls = calls(pid, || change(device, memory, entries));
        let vmas = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
        Work { journal, faults, calls, vmas }
    }

    /// What is counted is the same for few entries and for a million: bytes of the journal, system calls, pages touched, mappings of
    /// the daemon. (Nodes and ranges copied are counted by the tests of `vdpa_core::iotlb` and of `ClientMemory`.) I/O goes on.
    fn changes_cost_the_same(mgmtdev: &str) {
        const MANY: u64 = 1_000_000;
        let vdpad = start();
        let path = match mgmtdev {
            "blk" => vdpad.add_blk("d0", 64 << 20, "pin off max_iotlb_entries 1048576"),
            other => vdpad.add("d0", other, "max_iotlb_entries 1048576"),
        };
        let memory = Memory::new();
        let few = {
            let device = open(&path);
            memory.fill(&device, 1000);
            work(&vdpad, &device, &memory, 1000)
        };
        let mut disk = Disk::start(&path, disk::MEMORY_MIN);
        let device = disk.session.ops();
        memory.fill(device, MANY);
        assert_eq!(vdpad.info("d0").state.mappings, MANY + 1);
        let many = work(&vdpad, device, &memory, MANY);
        println!("{mgmtdev}: {few:?} of 1,000, {many:?} of {MANY}");
        assert!(many.journal <= few.journal + few.journal / 10 && many.journal <= 2 * CHANGES * 512);
        // Not a thousandth of what a copy of the entries would be: 100 bytes each, 200 times.
        assert!(many.faults <= few.faults + 2000, "{many:?}, {few:?}");
        match (few.calls, many.calls) {
            (Some(few), Some(many)) => assert!(many <= few + few / 5, "{many} system calls, {few} before"),
            _ => skipped("strace is missing: the daemon's system calls are not counted"),
        }
        assert!(few.vmas < 500 && many.vmas < 500, "{many:?}, {few:?}");
        disk.check(1);
        drop(disk);
        vdpad.is_released("d0");
    }

    fn skipped(reason: &str) {
        use std::io::Write as _;
        let line = format!("SKIPPED: {reason}\n");
        eprint!("{line}");
        if let Some(path) = std::env::var_os("VDPA_SKIP_LOG") {
            let mut log = fs::File::options().create(true).append(true).open(path).unwrap();
            log.write_all(line.as_bytes()).unwrap();
        }
    }

    #[test]
    fn a_million_mappings_of_blk() {
        changes_cost_the_same("blk");
    }

    #[test]
    fn a_million_mappings_of_sim_blk() {
        changes_cost_the_same("sim-blk");
    }

    const DEVICE: &str = "TEST_DEVICE";

    /// A client with 100,000 mappings, until it is killed.
    #[test]
    fn client() {
        if !has_role("heavy::client") {
            return;
        }
        let mut disk = Disk::start(Path::new(&variable(DEVICE)), disk::MEMORY_MIN);
        Memory::new().fill(disk.session.ops(), 100_000);
        disk.check(1);
        send_line("mapped");
        receive_line();
    }

    #[test]
    fn a_client_that_is_killed_with_100_000_mappings() {
        let vdpad = start();
        let path = vdpad.add_blk("d0", 64 << 20, "memlock unlimited max_iotlb_entries 200000");
        for round in 1..3 {
            let mut client = RoleProcess::start("heavy::client", &[(DEVICE, path.to_str().unwrap())]);
            client.receive("mapped");
            if round == 2 {
                // With the daemon that has restored them.
                held::replace(&vdpad);
            }
            assert_eq!(vdpad.info("d0").state.mappings, 100_001);
            client.kill();
            vdpad.is_released("d0");
            let pid = daemon(&vdpad);
            let memory = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
            assert!(!memory.contains("memfd:pages"), "memory of the client is mapped: {memory}");
            Disk::start(&path, disk::MEMORY_MIN).check(round);
            vdpad.is_released("d0");
        }
    }

    /// The daemon dies, and is replaced, under a client with 100,000 mappings; then the client goes.
    #[test]
    fn a_daemon_that_dies_with_100_000_mappings() {
        const ENTRIES: u64 = 100_000;
        let vdpad = start();
        for pin in ["on", "off"] {
            let attrs = format!("pin {pin} memlock unlimited max_iotlb_entries 200000");
            let path = vdpad.add_blk("d0", 64 << 20, &attrs);
            let memory = Memory::new();
            let mut disk = Disk::start(&path, disk::MEMORY_MIN);
            memory.fill(disk.session.ops(), ENTRIES);
            let before = vdpad.info("d0").state;
            assert_eq!(before.mappings, ENTRIES + 1);
            for round in 1..3 {
                disk.check(round);
                if round == 1 {
                    held::replace(&vdpad);
                } else {
                    held::upgrade(&vdpad);
                }
                let now = vdpad.info("d0").state;
                assert_eq!((now.mappings, now.pinned_pages), (before.mappings, before.pinned_pages));
                disk.check(round + 10);
                // Each is there: it is refused once more.
                let device = disk.session.ops();
                for block in [0, 11, 24] {
                    assert_eq!(memory.map(device, BASE + block * STEP, 1), Err(Errno::FAULT));
                }
                let place = BASE + 3 * STEP + 17 * PAGE;
                device.dma_unmap(Asid(0), place, PAGE).unwrap();
                memory.map(device, place, 1).unwrap();
            }
            let pid = daemon(&vdpad);
            let vmas = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
            assert!(vmas < 500, "{vmas} mappings of the daemon");
            drop(disk);
            vdpad.is_released("d0");
            vdpad.ctl("dev del d0").succeeds();
        }
    }
}
