//! The crate `vhost` of rust-vmm as published: its own tests of a kernel's vhost-vdpa device, run on
//! vdpad's devices, and a request on a ring built by hand.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::driver::SplitDriver;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;
use vhost::vdpa::VhostVdpa as _;
use vhost::vhost_kern::VhostKernFeatures as _;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::{Error, VhostBackend as _, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use support::blk::TIMEOUT;
use support::daemon::{Daemon, pattern};

type Memory = GuestMemoryMmap<()>;
type Vdpa<'a> = VhostKernVdpa<&'a Memory>;

/// VHOST_BACKEND_F_SUSPEND, a bit number.
const SUSPEND: u64 = 4;
const QUEUES: u32 = 2;

fn memory() -> Memory {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn open<'a>(path: &Path, memory: &'a Memory) -> Vdpa<'a> {
    VhostKernVdpa::new(path.to_str().unwrap(), memory).unwrap()
}

/// Runs `test` on a device of each kind, with its number of queues.
fn on_both(test: impl Fn(&Path, u32)) {
    let daemon = Daemon::start();
    test(&daemon.add("s0", "sim-blk", &[]), 1);
    let disk = daemon.disk("disk", 1 << 20);
    test(&daemon.add_blk("d0", &disk, &[("queues", &QUEUES.to_string())]), QUEUES);
    daemon.assert_alive();
}

#[track_caller]
fn refused<T>(result: Result<T, Error>, errno: i32) {
    match result {
        Err(Error::IoctlError(error)) => assert_eq!(error.raw_os_error(), Some(errno)),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("succeeded, should be errno {errno}"),
    }
}

fn ring(size: u16) -> VringConfigData {
    VringConfigData {
        queue_max_size: size,
        queue_size: size,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    }
}

/// `test_vdpa_kern_ioctls`, in its order.
#[test]
fn its_own_test_of_the_requests() {
    on_both(|path, queues| {
        let memory = memory();
        let vdpa = open(path, &memory);
        let features = vdpa.get_features().unwrap();
        assert_ne!(features & 1 << 32, 0, "VERSION_1");
        vdpa.set_features(features).unwrap();
        vdpa.set_owner().unwrap();
        refused(vdpa.set_owner(), libc::EBUSY);

        vdpa.set_mem_table(&[]).unwrap_err();
        let host = memory.get_host_address(GuestAddress(0)).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: 0x10_0000,
            userspace_addr: host.expose_provenance() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        };
        vdpa.set_mem_table(&[region]).unwrap();

        assert_eq!(vdpa.get_device_id().unwrap(), 2);
        assert_eq!(vdpa.get_status().unwrap(), 0);
        vdpa.set_status(1).unwrap();
        assert_eq!(vdpa.get_status().unwrap(), 1);

        let mut config = vec![0; 8];
        vdpa.get_config(0, &mut config).unwrap();
        assert_ne!(config, [0; 8], "the capacity");
        vdpa.set_config(0, &config).unwrap();

        let event = EventFd::new(0).unwrap();
        let log = VhostUserDirtyLogRegion { mmap_size: 0x1000, mmap_offset: 0x10, mmap_handle: 1 };
        vdpa.set_log_base(0x4000, Some(log)).unwrap_err();
        refused(vdpa.set_log_base(0x4000, None), libc::ENOTTY);
        refused(vdpa.set_log_fd(event.as_raw_fd()), libc::ENOTTY);

        let max = vdpa.get_vring_num().unwrap();
        assert_eq!(max, if queues == 1 { 256 } else { 1024 });
        refused(vdpa.set_vring_num(0, max + 1), libc::EINVAL);
        vdpa.set_vring_num(0, 32).unwrap();
        vdpa.set_vring_addr(0, &ring(32)).unwrap();
        vdpa.set_vring_base(0, 1).unwrap();
        vdpa.set_vring_call(0, &event).unwrap();
        vdpa.set_vring_kick(0, &event).unwrap();
        vdpa.set_vring_err(0, &event).unwrap();
        vdpa.set_config_call(&event).unwrap();
        refused(vdpa.set_vring_num(queues as usize, 32), libc::ENOBUFS);

        let range = vdpa.get_iova_range().unwrap();
        assert_eq!((range.first, range.last), (0, u64::MAX));
        assert_eq!(vdpa.get_vqs_count().unwrap(), queues);
        assert_eq!((vdpa.get_group_num().unwrap(), vdpa.get_as_num().unwrap()), (1, 1));
        assert_eq!(vdpa.get_vring_group(0).unwrap(), 0);
        // Sends GET_VRING_GROUP by mistake, so it accepts every asid.
        vdpa.set_group_asid(0, 12345).unwrap();

        assert_ne!(vdpa.get_backend_features().unwrap() & 1 << SUSPEND, 0);
        vdpa.suspend().unwrap();
        assert_eq!(vdpa.get_vring_base(0).unwrap(), 1, "what was set");
        vdpa.set_vring_enable(0, true).unwrap();
        vdpa.set_vring_enable(0, false).unwrap();
    });
}

/// Sizes of the configuration space, which the crate's test does not check.
#[test]
fn configuration_has_bounds() {
    on_both(|path, _| {
        let memory = memory();
        let vdpa = open(path, &memory);
        let size = vdpa.get_config_size().unwrap();
        assert!(size >= 60, "the block configuration up to write-zeroes, not {size} bytes");
        let mut all = vec![0; size as usize];
        vdpa.get_config(0, &mut all).unwrap();
        let mut tail = vec![0; 4];
        vdpa.get_config(size - 4, &mut tail).unwrap();
        assert_eq!(tail, all[all.len() - 4..]);
        refused(vdpa.get_config(size - 3, &mut tail), libc::EINVAL);
        refused(vdpa.get_config(u32::MAX, &mut tail), libc::EINVAL);
        refused(vdpa.set_config(size - 3, &tail), libc::EINVAL);
    });
}

/// `test_vdpa_kern_dma`: heap memory with an odd length.
#[test]
fn its_own_test_of_mapping() {
    on_both(|path, _| {
        let memory = memory();
        let mut vdpa = open(path, &memory);
        vdpa.set_features(vdpa.get_features().unwrap()).unwrap();
        let offered = vdpa.get_backend_features().unwrap();
        vdpa.set_backend_features(offered).unwrap();
        assert_eq!(vdpa.get_backend_features_acked(), offered);
        vdpa.set_owner().unwrap();
        vdpa.dma_map(0xffff_0000, 0xffff, std::ptr::null(), false).unwrap_err();
        let heap = vec![0_u8; 0xffff];
        vdpa.dma_map(0xffff_0000, 0xffff, heap.as_ptr(), false).unwrap();
        vdpa.dma_unmap(0xffff_0000, 0xffff).unwrap();
        vdpa.dma_map(0xffff_0000, 0xffff, heap.as_ptr(), true).unwrap();
        vdpa.dma_unmap(0, u64::MAX).unwrap();
    });
}

/// Waits for a notification. The crate's events cannot be polled without their numbers.
fn wait(call: &EventFd) {
    let deadline = Instant::now() + TIMEOUT;
    while call.read().is_err() {
        assert!(Instant::now() < deadline, "no notification");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A read and a write on a ring built by hand, with SUSPEND and RESUME in between.
#[test]
fn requests_on_a_ring_built_by_hand() {
    on_both(|path, _| {
        const IOVA: u64 = 0x8000_0000;
        let memory = memory();
        let file = File::options().read(true).write(true).open(path).unwrap();
        // The crate has no RESUME.
        let other = VhostVdpaFd::from_fd(file.try_clone().unwrap().into());
        let mut vdpa = VhostKernVdpa::with(file, &memory, 0);
        vdpa.set_backend_features(vdpa.get_backend_features().unwrap()).unwrap();
        vdpa.set_owner().unwrap();
        let features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM, Features::BLK_FLUSH]);
        for status in [1, 3] {
            vdpa.set_status(status).unwrap();
        }
        vdpa.set_features(features.0).unwrap();
        vdpa.set_status(0xb).unwrap();

        let fd = memfd::create(c"ring", 0x1_0000, None).unwrap();
        let map = SharedMap::map(&fd, 0, 0x1_0000, Prot::RW, false).unwrap();
        vdpa.dma_map(IOVA, 0x1_0000, std::ptr::with_exposed_provenance(map.addr()), false).unwrap();
        let area = |offset, len| map.area(offset, len).unwrap();
        let mut driver = SplitDriver::new(
            32,
            features,
            area(0x1000, 16 * 32),
            area(0x3000, 6 + 2 * 32),
            area(0x2000, 6 + 8 * 32),
        )
        .unwrap();
        let (kick, call) = (EventFd::new(0).unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        vdpa.set_vring_num(0, 32).unwrap();
        let mut config = ring(32);
        config.desc_table_addr += IOVA;
        config.used_ring_addr += IOVA;
        config.avail_ring_addr += IOVA;
        vdpa.set_vring_addr(0, &config).unwrap();
        vdpa.set_vring_base(0, 0).unwrap();
        vdpa.set_vring_kick(0, &kick).unwrap();
        vdpa.set_vring_call(0, &call).unwrap();
        vdpa.set_vring_enable(0, true).unwrap();
        vdpa.set_status(0xf).unwrap();

        let mut request = |kind, suspended: bool| {
            map.write(0x4000, &RequestHeader { kind, ioprio: 0, sector: 8 }.encode()).unwrap();
            map.write(0x4020, &[0xff]).unwrap();
            let buffer = |offset, len| Buffer { iova: IOVA + offset, len };
            let (header, data, status) = (buffer(0x4000, 16), buffer(0x5000, 4096), buffer(0x4020, 1));
            if kind == kind::OUT {
                driver.add(&[header, data], &[status], 1).unwrap();
            } else {
                driver.add(&[header], &[data, status], 1).unwrap();
            }
            if suspended {
                vdpa.suspend().unwrap();
            }
            // A device that is busy-polling has disabled kicks.
            if driver.publish().unwrap() {
                kick.write(1).unwrap();
            }
            if suspended {
                let base = vdpa.get_vring_base(0).unwrap();
                assert_eq!(base, 1, "one request was served before SUSPEND");
                assert_eq!(driver.pop_used().unwrap(), None);
                other.resume().unwrap();
            }
            wait(&call);
            assert_eq!(driver.pop_used().unwrap().map(|completion| completion.token), Some(1));
            let mut status = [0];
            map.read(0x4020, &mut status).unwrap();
            assert_eq!(status, [0]);
        };
        let bytes = pattern(1 << 40, 4096);
        map.write(0x5000, &bytes).unwrap();
        request(kind::OUT, false);
        map.write(0x5000, &[0; 4096]).unwrap();
        request(kind::IN, true);
        let mut found = vec![0; 4096];
        map.read(0x5000, &mut found).unwrap();
        assert_eq!(found, bytes);
        vdpa.suspend().unwrap();
        assert_eq!(vdpa.get_vring_base(0).unwrap(), 2);
    });
}
