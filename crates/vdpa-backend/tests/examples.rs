//! The examples of this crate, run as their readers run them: driven by clients that know nothing of them, and checked
//! by the conformance suite.
//!
//! Needs /dev/fuse and the right to mount, and fails without.
#![expect(unsafe_code, reason = "virtio-driver takes the buffers of its requests as pointers")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "../../vdpad/tests/support/programs.rs"]
mod programs;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use vdpa_client::device::Device;
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;
use virtio_driver::{VhostVdpa, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

/// A running example.
struct Example {
    child: Child,
    /// Of its device file.
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Example {
    /// Builds the example, if that was not done, and starts it.
    fn start(name: &str) -> Self {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--locked", "--package", "vdpa-backend", "--example", name])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(status.success());
        // target/debug/deps/examples-HASH: a debug build, as the command above makes.
        let test = std::env::current_exe().unwrap();
        let program = test.ancestors().nth(3).unwrap().join("debug/examples").join(name);
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("timeout")
            .args(["--signal=TERM", "--kill-after=5", "60"])
            .arg(program)
            .arg(dir.path().join("dev"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, path: line.trim_end().into(), _dir: dir }
    }

    /// Stops it as a service manager does; its mount is gone afterwards.
    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        assert!(!self.path.exists());
    }

    /// Runs the suite; every difference from the kernel's devices must be in the expectation file.
    fn conforms(&self, expectations: &str) {
        let expect = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vdpa-conformance/expect");
        let output = Command::new(programs::program("vdpa-conform"))
            .arg(&self.path)
            .arg("--expect")
            .arg(expect.join("fuse.txt"))
            .arg("--expect")
            .arg(expect.join(expectations))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let passed = text.lines().filter(|line| line.starts_with("passed")).count();
        assert!(passed > 90, "{passed} cases passed:\n{text}");
    }
}

#[test]
fn the_ram_disk_serves_an_unmodified_driver_and_conforms() {
    const BLOCK: usize = 4096;
    let example = Example::start("ram_disk");
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let vdpa = VhostVdpa::with_path(example.path.to_str().unwrap(), features.bits()).unwrap();
    let mut transport: Box<VirtioBlkTransport> = Box::new(vdpa);
    let mut rings: Vec<VirtioBlkQueue<'static, usize>> =
        VirtioBlkQueue::setup_queues(transport.as_mut(), 1, 256).unwrap();
    let mut ring = rings.remove(0);
    ring.set_used_notif_enabled(true);
    let fd = memfd::create(c"data", 1 << 20, None).unwrap();
    let map = SharedMap::map(&fd, 0, 1 << 20, Prot::RW, false).unwrap();
    transport.map_mem_region(map.addr(), map.len(), fd.as_raw_fd(), 0).unwrap();
    let notifier = transport.get_submission_notifier(0);
    let completed = transport.get_completion_fd(0);

    // 64 blocks are written from the first half of the memory, with all requests in flight at once, and read into the
    // second half.
    let count = 64;
    let at = |index: usize| std::ptr::with_exposed_provenance_mut::<u8>(map.addr() + index * BLOCK);
    for index in 0..count {
        map.write(index * BLOCK, &[u8::try_from(index).unwrap() + 1; BLOCK]).unwrap();
    }
    for write in [true, false] {
        for index in 0..count {
            let offset = (index * BLOCK) as u64;
            if write {
                // SAFETY: the block lies in the mapping, which outlives the request, and nobody refers to it meanwhile.
                unsafe { ring.write_raw(offset, at(index), BLOCK, index) }.unwrap();
            } else {
                // SAFETY: as for the write.
                unsafe { ring.read_raw(offset, at(count + index), BLOCK, index) }.unwrap();
            }
        }
        notifier.notify().unwrap();
        let mut done = BTreeSet::new();
        while done.len() < count {
            for completion in ring.completions() {
                assert_eq!(completion.ret, 0);
                assert!(done.insert(completion.context), "{} is answered twice", completion.context);
            }
            if done.len() < count {
                let time = Timespec { tv_sec: 10, tv_nsec: 0 };
                let ready =
                    poll(&mut [PollFd::from_borrowed_fd(completed.as_fd(), PollFlags::IN)], Some(&time));
                assert_eq!(ready, Ok(1), "no completion within 10 s: {done:?}");
                completed.read().unwrap();
            }
        }
    }
    let mut block = [0; BLOCK];
    for index in 0..count {
        map.read((count + index) * BLOCK, &mut block).unwrap();
        assert_eq!(block, [u8::try_from(index).unwrap() + 1; BLOCK], "block {index}");
    }
    // SAFETY: as above; the place is beyond the end of the disk.
    unsafe { ring.read_raw(64 << 20, at(0), BLOCK, 0) }.unwrap();
    notifier.notify().unwrap();
    completed.read().unwrap();
    assert!(ring.completions().all(|completion| completion.ret != 0), "a read beyond the end fails");
    drop((ring, transport));

    example.conforms("example-ram-disk.txt");
    example.stop();
}

#[test]
fn the_entropy_source_answers_with_random_bytes_and_conforms() {
    const QUEUE: QueueIndex = QueueIndex(0);
    let example = Example::start("rng");
    let device = Device::<VhostVdpaFd>::open(&example.path).unwrap();
    let mut session = device.negotiate(Features::NONE).unwrap();
    assert_eq!(session.device_id(), 4);
    session
        .map_memfd("dma", memfd::create(c"dma", 1 << 16, None).unwrap(), 0x10_0000, 1 << 16, Perm::RW)
        .unwrap();
    session.add_queue(QUEUE, 8, "dma", 0).unwrap();
    session.start().unwrap();

    let mut seen = BTreeSet::new();
    for (round, len) in [16, 64, 256, 1000].into_iter().enumerate() {
        let queue = session.queue_mut(QUEUE).unwrap();
        queue.submit(&[], &[Buffer { iova: 0x10_4000, len }], round as u64).unwrap();
        queue.notify().unwrap();
        let done = loop {
            if let Some(done) = queue.reap().unwrap() {
                break done;
            }
            assert!(queue.wait(Some(Duration::from_secs(10))).unwrap(), "no answer within 10 s");
        };
        assert_eq!((done.token, done.len), (round as u64, len.min(256)));
        let mut bytes = [0; 256];
        session.region("dma").unwrap().map().unwrap().read(0x4000, &mut bytes).unwrap();
        // Of 16 random bytes, the same ones twice, or zeros, do not occur.
        assert!(seen.insert(bytes[..16].to_vec()) && bytes[..16] != [0; 16]);
    }
    drop(session);

    example.conforms("example-rng.txt");
    example.stop();
}

#[test]
fn a_device_takes_at_most_150_lines() {
    for name in ["ram_disk.rs", "rng.rs"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
        let lines = std::fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 150, "{name} has {lines} lines");
    }
}
