//! Sessions carried over a real exec, against a device file that writes down every request.
//!
//! The device is an ordinary file: what it offers is its name, what was asked of it its contents. So both images
//! see the same device, and the whole sequence of an update can be compared with the one documented.

#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use vdpa_client::device::{Device, DeviceFile};
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::state::Section;
use vdpa_client::update::{self, Cause, Phase, Plan, Strategy};
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{
    Asid, GroupIndex, IotlbMsg, IovaRange, Perm, QueueIndex, Result, VringAddr, iotlb_type,
};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;

const Q0: QueueIndex = QueueIndex(0);

/// A device that notes requests in its file.
#[derive(Debug)]
struct Notes(File);

impl Notes {
    fn path(&self) -> std::path::PathBuf {
        use std::os::fd::AsRawFd;
        std::fs::read_link(format!("/proc/self/fd/{}", self.0.as_raw_fd())).unwrap()
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.path()).unwrap()
    }

    fn note(&self, line: &str) -> Result<()> {
        writeln!(&self.0, "{line}").unwrap();
        Ok(())
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        let _ = self.note("close");
    }
}

impl AsFd for Notes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl DeviceFile for Notes {
    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path).map_err(|_| Errno::NOENT)?;
        let device = Self(file);
        device.note("open")?;
        Ok(device)
    }

    fn from_fd(fd: OwnedFd) -> Self {
        Self(File::from(fd))
    }
}

impl VdpaOps for Notes {
    type Event = EventFd;

    fn device_id(&self) -> Result<u32> {
        Ok(2)
    }
    fn status(&self) -> Result<Status> {
        let text = self.text();
        let last = text.lines().rev().find_map(|l| l.strip_prefix("status "));
        Ok(Status(last.map_or(0, |s| s.parse().unwrap())))
    }
    fn set_status(&self, status: Status) -> Result<()> {
        self.note(&format!("status {}", status.0))
    }
    fn features(&self) -> Result<Features> {
        Ok(Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM, Features::BLK_FLUSH]))
    }
    fn set_features(&self, _: Features) -> Result<()> {
        self.note("features")
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
        Ok(1)
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
    fn config(&self, _: u32, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn set_config(&self, _: u32, _: &[u8]) -> Result<()> {
        Ok(())
    }
    fn set_config_call(&self, _: Option<&EventFd>) -> Result<()> {
        Ok(())
    }
    fn vring_num(&self) -> Result<u16> {
        Ok(256)
    }
    fn set_owner(&self) -> Result<()> {
        self.note("set_owner")
    }
    fn reset_owner(&self) -> Result<()> {
        Err(Errno::FAULT)
    }
    fn new_owner(&self) -> Result<()> {
        self.note("new_owner")
    }
    fn set_vring_num(&self, _: QueueIndex, _: u32) -> Result<()> {
        Ok(())
    }
    fn set_vring_addr(&self, _: QueueIndex, _: &VringAddr) -> Result<()> {
        Ok(())
    }
    fn set_vring_base(&self, _: QueueIndex, num: u32) -> Result<()> {
        self.note(&format!("base {num}"))
    }
    fn vring_base(&self, _: QueueIndex) -> Result<u32> {
        self.note("get_base")?;
        Ok(1)
    }
    fn set_vring_enable(&self, _: QueueIndex, _: bool) -> Result<()> {
        self.note("enable")
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
        self.note("suspend")
    }
    fn resume(&self) -> Result<()> {
        self.note("resume")
    }
    fn iotlb(&self, _: Asid, msg: &IotlbMsg) -> Result<()> {
        self.note(match msg.kind {
            iotlb_type::UPDATE => "update",
            iotlb_type::REMAP => "remap",
            iotlb_type::BATCH_BEGIN => "begin",
            iotlb_type::BATCH_END => "end",
            _ => "invalidate",
        })
    }
}

const BASE: BackendFeatures = BackendFeatures(0x10e);

fn offered(bits: &[vdpa_core::features::Bit]) -> BackendFeatures {
    BASE | BackendFeatures::of(bits)
}

fn session(path: &Path) -> vdpa_client::Session<Notes> {
    let mut session = Device::<Notes>::open(path).unwrap().negotiate(Features::NONE).unwrap();
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
    session.ops().note("--- update").unwrap();
    session
}

/// Both images of the program that the tests below run; the arguments of libtest stay, the variables say more.
#[test]
fn image() {
    let Some(path) = std::env::var_os("NOTES") else {
        // A test run that comes here plays no part: nobody has left it a device.
        assert!(update::restore::<Notes>().unwrap().is_none(), "a first start has nothing to restore");
        return;
    };
    let strategy: Strategy = std::env::var("STRATEGY").unwrap().parse().unwrap();
    let Some(mut restored) = update::restore::<Notes>().unwrap() else {
        let session = session(Path::new(&path));
        let plan =
            Plan::new("/proc/self/exe").strategy(strategy).section(Section::new("mine", 1, b"x".to_vec()));
        panic!("not replaced: {:?}", update::exec(session, plan).error);
    };
    let report = restored.report;
    assert_eq!(report.strategy, strategy);
    assert_eq!(report.mappings, 1);
    assert!(report.exec > 0 && report.total().as_secs() < 60, "{report:?}");
    assert_eq!(restored.sections.take("mine").unwrap().payload, b"x");
    restored.sections.ensure_consumed().unwrap();

    let session = &mut restored.session;
    let mut bytes = [0; 12];
    session.region("ram").unwrap().map().unwrap().read(0x8000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"guest memory");
    let queue = session.queue_mut(Q0).unwrap();
    assert_eq!(queue.in_flight(), 2);
    assert!(queue.kick().drain() > 0, "the kick of the old image is still there");
    complete_first(session);
    let queue = session.queue_mut(Q0).unwrap();
    assert_eq!(queue.reap().unwrap().unwrap().token, 11);
    assert_eq!(queue.reap().unwrap(), None);
    session.ops().note("--- served").unwrap();
    assert!(update::restore::<Notes>().is_err(), "the state was adopted already");
}

/// What a device does with the first request.
fn complete_first(session: &vdpa_client::Session<Notes>) {
    let layout = session.queue(Q0).unwrap().layout();
    let map = session.region("ram").unwrap().map().unwrap();
    let used = usize::try_from(layout.used).unwrap();
    map.write(used + 4, &[0; 8]).unwrap();
    map.store_u16(used + 2, 1).unwrap();
}

/// Runs both images and returns the requests from the update on.
fn run(strategy: Strategy, offered: BackendFeatures) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered.0));
    File::create(&path).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["image", "--exact", "--nocapture"])
        .env("NOTES", &path)
        .env("STRATEGY", strategy.name())
        // Left over from a parent that was updated: not meant for this process, and not in its way.
        .env(update::STATE_VARIABLE, "99")
        .env(update::PID_VARIABLE, "1")
        .output()
        .unwrap();
    let notes = std::fs::read_to_string(&path).unwrap();
    assert!(output.status.success(), "{}\n{notes}", String::from_utf8_lossy(&output.stderr));
    let (_, update) = notes.split_once("--- update\n").unwrap();
    let (update, _) = update.split_once("--- served\n").unwrap();
    update.lines().collect::<Vec<_>>().join(", ")
}

#[test]
fn live_is_one_request() {
    assert_eq!(run(Strategy::Live, offered(&[BackendFeatures::NEW_OWNER])), "new_owner");
}

#[test]
fn resume_suspends_and_remaps() {
    use BackendFeatures as B;
    let with = [B::NEW_OWNER, B::SUSPEND, B::RESUME];
    assert_eq!(run(Strategy::Resume, offered(&with)), "suspend, new_owner, resume");
    let remap = offered(&with).with(B::IOTLB_REMAP);
    assert_eq!(run(Strategy::Resume, remap), "suspend, new_owner, begin, remap, end, resume");
}

#[test]
fn reset_sets_the_vrings_up_again() {
    use BackendFeatures as B;
    let with = offered(&[B::NEW_OWNER, B::SUSPEND, B::IOTLB_REMAP]);
    let handshake = "status 0, status 1, status 3, features, status 11";
    let rest = "base 1, enable, begin, remap, end, status 15";
    let all = format!("suspend, get_base, status 0, new_owner, {handshake}, {rest}");
    assert_eq!(run(Strategy::Reset, with), all);
    let forgetful = offered(&[B::NEW_OWNER, B::SUSPEND]).without(B::IOTLB_PERSIST);
    assert!(run(Strategy::Reset, forgetful).ends_with("enable, begin, end, status 15"));
}

#[test]
fn reopen_does_everything_again() {
    let handshake = "status 0, status 1, status 3, features, status 11";
    let rest = "begin, update, end, base 1, enable, status 15";
    let all = format!("suspend, get_base, close, open, set_owner, {handshake}, {rest}");
    assert_eq!(run(Strategy::Reopen, offered(&[BackendFeatures::SUSPEND])), all);
}

/// A failed execve (`ENOEXEC`: the file is no program) with everything undone.
fn fail(strategy: Strategy, bits: &[vdpa_core::features::Bit]) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(bits).0));
    File::create(&path).unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, "\u{1}no program").unwrap();
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o755)).unwrap();
    let failed = update::exec(session(&path), Plan::new(&image).strategy(strategy));
    assert_eq!(failed.error.phase, Phase::Exec, "{:?}", failed.error);
    let mut session = failed.session.unwrap();
    let notes = std::fs::read_to_string(&path).unwrap();
    let (_, update) = notes.split_once("--- update\n").unwrap();

    complete_first(&session);
    assert_eq!(session.queue_mut(Q0).unwrap().reap().unwrap().unwrap().token, 11);
    let flags = rustix::io::fcntl_getfd(session.ops()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "close-on-exec is back");
    assert_eq!(session.status().unwrap(), Status(15));
    update.lines().collect::<Vec<_>>().join(", ")
}

#[test]
fn a_failed_exec_is_undone() {
    use BackendFeatures as B;
    assert_eq!(fail(Strategy::Live, &[B::NEW_OWNER]), "");
    assert_eq!(fail(Strategy::Resume, &[B::NEW_OWNER, B::SUSPEND, B::RESUME]), "suspend, resume");
    let handshake = "status 0, status 1, status 3, features, status 11";
    let reset = format!("suspend, get_base, status 0, {handshake}, base 1, enable, status 15");
    assert_eq!(fail(Strategy::Reset, &[B::NEW_OWNER, B::SUSPEND]), reset);
    let notes = fail(Strategy::Reopen, &[B::SUSPEND]);
    assert!(notes.starts_with("suspend, get_base, close, open, set_owner"), "{notes}");
    assert!(notes.ends_with("update, end, base 1, enable, status 15"), "{notes}");
}

#[test]
fn what_cannot_work_is_refused_before_the_device_is_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(&[BackendFeatures::NEW_OWNER]).0));
    File::create(&path).unwrap();
    let refused = |session, plan| {
        let failed = update::exec(session, plan);
        assert_eq!(failed.error.phase, Phase::Check);
        (failed.error.source, failed.session.unwrap())
    };
    let (cause, session) = refused(session(&path), Plan::new("/does/not/exist"));
    assert!(cause.to_string().contains("/does/not/exist"), "{cause}");
    let (cause, session) = refused(session, Plan::new("/etc/passwd"));
    assert!(matches!(cause, Cause::Image { .. }), "{cause}");
    let (cause, session) = refused(session, Plan::new("/bin/true").strategy(Strategy::Resume));
    assert!(cause.to_string().contains("SUSPEND (bit 4)"), "{cause}");
    let old = directory.path().join(format!("{:x}", offered(&[]).0));
    File::create(&old).unwrap();
    for strategy in [Strategy::Live, Strategy::Resume, Strategy::Reset] {
        let (cause, old) = refused(self::session(&old), Plan::new("/bin/true").strategy(strategy));
        let text =
            format!("strategy {strategy} needs backend feature NEW_OWNER (bit 9), which the device does not");
        assert!(cause.to_string().starts_with(&text), "{cause}");
        assert!(old.ops().text().ends_with("--- update\n"), "{}", old.ops().text());
    }
    let (cause, session) = refused(session, Plan::new("/bin/true").strategy(Strategy::Reopen));
    assert!(matches!(cause, Cause::InFlight { in_flight: 2 }), "{cause}");
    let (cause, mut session) =
        refused(session, Plan::new("/bin/true").section(Section::new("vdpa/session", 1, vec![])));
    assert!(matches!(cause, Cause::State(_)), "{cause}");

    let spec = RegionSpec {
        name: "heap".to_owned(),
        backing: Backing::Caller(0x7000_0000),
        iova: 0x4000_0000,
        size: 4096,
        perm: Perm::RO,
        populate: false,
    };
    session.map(vec![spec]).unwrap();
    let (cause, session) = refused(session, Plan::new("/bin/true"));
    assert!(cause.to_string().contains("\"heap\"") && cause.to_string().contains("memfd"), "{cause}");
    let notes = session.ops().text();
    assert!(notes.ends_with("--- update\nbegin\nupdate\nend\n"), "{notes}");
}
