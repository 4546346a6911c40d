//! A device whose device file is an ordinary file. The file's name is the backend features it offers, in hexadecimal; the
//! file's contents are the requests it has received. Several processes can therefore share one device, and a test can compare
//! all requests of an update with the documented sequence.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]
#![expect(unreachable_pub, reason = "shared by tests, each of which is a crate")]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use vdpa_client::device::{Device, DeviceFile};
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{
    Asid, GroupIndex, IotlbMsg, IovaRange, Perm, QueueIndex, Result, VringAddr, iotlb_type,
};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::uapi::report::UpdateReport;

pub const Q0: QueueIndex = QueueIndex(0);

/// A device that records each request in its file.
#[derive(Debug)]
pub struct RecordingDevice(File);

impl RecordingDevice {
    /// Accesses the device file at `path` without recording an open or a close.
    pub fn at(path: &Path) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self(OpenOptions::new().append(true).open(path).unwrap()))
    }

    fn path(&self) -> std::path::PathBuf {
        use std::os::fd::AsRawFd;
        std::fs::read_link(format!("/proc/self/fd/{}", self.0.as_raw_fd())).unwrap()
    }

    pub fn text(&self) -> String {
        std::fs::read_to_string(self.path()).unwrap()
    }

    /// Makes the next request of this name fail, once.
    pub fn fail_next(&self, request: &str) {
        std::fs::write(self.path().with_extension("fail"), request).unwrap();
    }

    fn may_fail(&self, request: &str) -> Result<()> {
        // A test that wants a request to block writes the request's name to this file, and removes the file to unblock it.
        let stall = self.path().with_extension("stall");
        while std::fs::read_to_string(&stall).is_ok_and(|name| name == request) {
            std::thread::yield_now();
        }
        let order = self.path().with_extension("fail");
        if std::fs::read_to_string(&order).is_ok_and(|name| name == format!("{request} stops")) {
            std::fs::remove_file(&order).unwrap();
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP).unwrap();
            // The signal may be delivered to another thread, which stops this one only a moment later.
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        if std::fs::read_to_string(&order).is_ok_and(|name| name == request) {
            std::fs::remove_file(order).unwrap();
            self.record(&format!("{request} fails"))?;
            return Err(Errno::IO);
        }
        Ok(())
    }

    pub fn record(&self, line: &str) -> Result<()> {
        writeln!(&self.0, "{line}").unwrap();
        Ok(())
    }
}

impl Drop for RecordingDevice {
    fn drop(&mut self) {
        let _ = self.record("close");
    }
}

impl DeviceFile for RecordingDevice {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path).map_err(|_| Errno::NOENT)?;
        let device = Self(file);
        device.record("open")?;
        Ok(device)
    }

    fn from_fd(fd: OwnedFd) -> Result<Self> {
        Ok(Self(File::from(fd)))
    }

    /// Writes outcome and reason as one line to a file of their own, since device files of the kernel have no such request.
    fn report_update(&self, report: &UpdateReport) -> Result<()> {
        let reports = self.path().with_extension("reports");
        let mut reports = OpenOptions::new().append(true).create(true).open(reports).unwrap();
        writeln!(reports, "{} {}", report.outcome, report.reason()).unwrap();
        Ok(())
    }
}

impl VdpaOps for RecordingDevice {
    type Event = EventFd;

    fn device_id(&self) -> Result<u32> {
        let asked = self.path().with_extension("asked");
        let mut asked = OpenOptions::new().append(true).create(true).open(asked).unwrap();
        asked.write_all(b"device_id\n").unwrap();
        Ok(2)
    }
    fn status(&self) -> Result<Status> {
        let text = self.text();
        let last = text.lines().rev().find_map(|l| l.strip_prefix("status "));
        Ok(Status(last.map_or(0, |s| s.parse().unwrap())))
    }
    fn set_status(&self, status: Status) -> Result<()> {
        self.may_fail("status")?;
        self.record(&format!("status {}", status.0))
    }
    fn features(&self) -> Result<Features> {
        Ok(Features::of(&[
            Features::VERSION_1,
            Features::ACCESS_PLATFORM,
            Features::BLK_FLUSH,
            Features::BLK_CONFIG_WCE,
        ]))
    }
    fn set_features(&self, _: Features) -> Result<()> {
        self.record("features")
    }
    fn backend_features(&self) -> Result<BackendFeatures> {
        let path = self.path();
        let name = path.file_name().unwrap().to_str().unwrap();
        Ok(BackendFeatures(u64::from_str_radix(name, 16).unwrap()))
    }
    fn set_backend_features(&self, _: BackendFeatures) -> Result<()> {
        Ok(())
    }
    fn vqs_count(&self) -> Result<u32> {
        Ok(2)
    }
    fn group_num(&self) -> Result<u32> {
        Ok(1)
    }
    fn as_num(&self) -> Result<u32> {
        Ok(1)
    }
    fn iova_range(&self) -> Result<IovaRange> {
        Ok(IovaRange::ALL)
    }
    fn config_size(&self) -> Result<u32> {
        Ok(0)
    }
    /// Reads the byte that was last written to this offset since the last reset, or 1 if there is none.
    fn config(&self, offset: u32, out: &mut [u8]) -> Result<()> {
        let text = self.text();
        let written = text.lines().rev().take_while(|line| *line != "status 0");
        let mut values = written.filter_map(|line| line.strip_prefix(&format!("config {offset}: ")));
        out.fill(values.next().map_or(1, |value| value.parse().unwrap()));
        Ok(())
    }
    fn set_config(&self, offset: u32, data: &[u8]) -> Result<()> {
        data.iter().try_for_each(|byte| self.record(&format!("config {offset}: {byte}")))
    }
    fn set_config_call(&self, _: Option<&EventFd>) -> Result<()> {
        Ok(())
    }
    fn vring_num(&self) -> Result<u16> {
        Ok(256)
    }
    fn set_owner(&self) -> Result<()> {
        self.record("set_owner")
    }
    fn reset_owner(&self) -> Result<()> {
        Err(Errno::FAULT)
    }
    fn new_owner(&self) -> Result<()> {
        self.may_fail("new_owner")?;
        self.record("new_owner")
    }
    fn set_vring_num(&self, _: QueueIndex, _: u32) -> Result<()> {
        Ok(())
    }
    fn set_vring_addr(&self, _: QueueIndex, _: &VringAddr) -> Result<()> {
        Ok(())
    }
    fn set_vring_base(&self, _: QueueIndex, num: u32) -> Result<()> {
        self.record(&format!("base {num}"))
    }
    fn vring_base(&self, _: QueueIndex) -> Result<u32> {
        self.may_fail("get_base")?;
        self.record("get_base")?;
        Ok(1)
    }
    fn set_vring_enable(&self, _: QueueIndex, _: bool) -> Result<()> {
        self.record("enable")
    }
    fn set_vring_kick(&self, _: QueueIndex, _: Option<&EventFd>) -> Result<()> {
        Ok(())
    }
    fn set_vring_call(&self, _: QueueIndex, _: Option<&EventFd>) -> Result<()> {
        Ok(())
    }
    fn set_vring_err(&self, _: QueueIndex, _: Option<&EventFd>) -> Result<()> {
        Ok(())
    }
    fn vring_group(&self, _: QueueIndex) -> Result<GroupIndex> {
        Ok(GroupIndex(0))
    }
    fn set_group_asid(&self, _: GroupIndex, _: Asid) -> Result<()> {
        Ok(())
    }
    fn vring_size(&self, _: QueueIndex) -> Result<u32> {
        Ok(256)
    }
    fn suspend(&self) -> Result<()> {
        self.may_fail("suspend")?;
        self.record("suspend")
    }
    fn resume(&self) -> Result<()> {
        self.may_fail("resume")?;
        self.record("resume")
    }
    fn iotlb(&self, _: Asid, msg: &IotlbMsg) -> Result<()> {
        self.record(match msg.kind {
            iotlb_type::UPDATE => "update",
            iotlb_type::REMAP => "remap",
            iotlb_type::BATCH_BEGIN => "begin",
            iotlb_type::BATCH_END => "end",
            _ => "invalidate",
        })
    }
}

pub const BASE: BackendFeatures = BackendFeatures(0x10e);

pub fn offered(bits: &[vdpa_core::features::Bit]) -> BackendFeatures {
    BASE | BackendFeatures::of(bits)
}

pub fn negotiated(path: &Path) -> vdpa_client::Session<RecordingDevice> {
    Device::<RecordingDevice>::open(path).unwrap().negotiate(Features::NONE).unwrap()
}

pub fn session(path: &Path) -> vdpa_client::Session<RecordingDevice> {
    started(negotiated(path))
}

/// Starts a negotiated device and submits two requests to it.
pub fn started(mut session: vdpa_client::Session<RecordingDevice>) -> vdpa_client::Session<RecordingDevice> {
    let ram = memfd::create(c"ram", 1 << 16, None).unwrap();
    session.map_memfd("ram", ram, 0x10_0000, 1 << 16, Perm::RW).unwrap();
    session.add_queue(Q0, 8, "ram", 0).unwrap();
    session.start().unwrap();
    let queue = session.queue_mut(Q0).unwrap();
    for token in [11, 22] {
        queue.submit(&[Buffer { iova: 0x10_8000, len: 16 }], &[], token).unwrap();
    }
    queue.notify().unwrap();
    session.region("ram").unwrap().map().unwrap().write(0x8000, b"guest memory").unwrap();
    session.ops().record("--- update").unwrap();
    session
}

/// Completes the first request in the used ring, as a device does.
pub fn complete_first(session: &vdpa_client::Session<RecordingDevice>) {
    let layout = session.queue(Q0).unwrap().layout();
    let map = session.region("ram").unwrap().map().unwrap();
    let used = usize::try_from(layout.used).unwrap();
    map.write(used + 4, &[0; 8]).unwrap();
    map.store_u16(used + 2, 1).unwrap();
}
