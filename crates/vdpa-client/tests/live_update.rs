//! Updates by a real exec, with a device file that records every request.

#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/recording.rs"]
mod recording;

use std::fs::File;
use std::path::Path;
use std::process::Command;

use vdpa_client::device::DeviceFile;
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::memory::Memory;
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{self, Cause, Devices, Image, Phase, Plan, Strategy, Via, Way};
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::Perm;
use vdpa_sys::memfd;

use recording::{Q0, RecordingDevice, complete_first, offered, session};

/// The program that the tests below run, as previous and as new image. The arguments select this test in both; environment
/// variables tell which of the two it is.
#[test]
fn image() {
    let Some(path) = std::env::var_os("DEVICE_FILE") else {
        // An ordinary run of this test, in which there is no device to take over.
        assert!(
            update::restore::<RecordingDevice>().unwrap().is_none(),
            "a first start has nothing to restore"
        );
        return;
    };
    let strategy: Strategy = std::env::var("STRATEGY").unwrap().parse().unwrap();
    let Some(incoming) = update::incoming::<RecordingDevice>().unwrap() else {
        let devices = Devices::one("disk0", session(Path::new(&path)));
        let mine = Section::new("mine", 1, b"x".to_vec());
        let plan = Plan::new().strategy(strategy).section(mine).late_section("late", 2, false);
        let plan = plan.descriptor("file", File::open("/dev/zero").unwrap());
        let prepared = plan.prepare(&devices, Via::Exec(Image::new("/proc/self/exe"))).unwrap();
        assert_eq!(prepared.strategy("disk0"), Some(strategy));
        let late = Section::new("late", 2, b"y".to_vec());
        panic!(
            "not replaced: {:?}",
            prepared.switch(devices, Sections::from_iter([late])).unwrap_err().error
        );
    };
    let mut incoming = incoming.understands(&[("mine", 1..=1), ("late", 1..=2)]).unwrap();
    assert_eq!(incoming.devices().collect::<Vec<_>>(), [("disk0", strategy)]);
    assert_eq!(incoming.sections().take("mine").unwrap().payload, b"x");
    let mut restored = incoming.take_over().unwrap();
    let report = &restored.report;
    let device = report.device("disk0").unwrap();
    assert_eq!((report.way, device.strategy), (Way::Exec, strategy));
    assert_eq!((device.mappings, device.queues), (1, 1));
    assert!(report.transfer > 0 && report.total().as_secs() < 60, "{report:?}");
    assert_eq!(restored.sections.take("late").unwrap().payload, b"y");
    restored.sections.ensure_consumed().unwrap();
    let zero = File::from(restored.descriptors.remove("file").unwrap());
    assert_eq!(std::io::Read::read(&mut &zero, &mut [1; 8]).unwrap(), 8);

    let session = restored.devices.get_mut("disk0").unwrap();
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
    session.ops().record("--- served").unwrap();
    assert!(update::restore::<RecordingDevice>().is_err(), "the state was adopted already");
}

/// Runs both images and returns the requests since the update began.
fn run(strategy: Strategy, offered: BackendFeatures) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered.0));
    File::create(&path).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["image", "--exact", "--nocapture"])
        .env("DEVICE_FILE", &path)
        .env("STRATEGY", strategy.name())
        // Variables inherited from a parent that was updated. They are not meant for this process, which must ignore them.
        .env(update::STATE_VARIABLE, "99")
        .env(update::PID_VARIABLE, "1")
        .output()
        .unwrap();
    let log = std::fs::read_to_string(&path).unwrap();
    assert!(output.status.success(), "{}\n{log}", String::from_utf8_lossy(&output.stderr));
    // An exec keeps the open file, so the new image need not request again what the device is.
    assert_eq!(std::fs::read_to_string(path.with_extension("asked")).unwrap(), "device_id\n");
    let (_, update) = log.split_once("--- update\n").unwrap();
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

/// Makes execve fail (`ENOEXEC`: the file is no program), checks that everything was undone, and returns the requests.
fn fail(strategy: Strategy, bits: &[vdpa_core::features::Bit]) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(bits).0));
    File::create(&path).unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, "\u{1}no program").unwrap();
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o755)).unwrap();
    let devices = Devices::one("disk0", session(&path));
    let prepared = Plan::new().strategy(strategy).prepare(&devices, Via::Exec(Image::new(&image))).unwrap();
    let failed = prepared.switch(devices, Sections::new()).unwrap_err();
    assert_eq!(failed.error.phase, Phase::Transfer, "{:?}", failed.error);
    assert!(failed.error.source.to_string().contains("execve"), "{:?}", failed.error);
    let mut devices = failed.devices;
    let mut session = devices.take("disk0").unwrap();
    let log = std::fs::read_to_string(&path).unwrap();
    let (_, update) = log.split_once("--- update\n").unwrap();

    complete_first(&session);
    assert_eq!(session.queue_mut(Q0).unwrap().reap().unwrap().unwrap().token, 11);
    let flags = rustix::io::fcntl_getfd(session.ops().fd()).unwrap();
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
    let log = fail(Strategy::Reopen, &[B::SUSPEND]);
    assert!(log.starts_with("suspend, get_base, close, open, set_owner"), "{log}");
    assert!(log.ends_with("update, end, base 1, enable, status 15"), "{log}");
}

#[test]
fn what_cannot_work_is_refused_before_the_device_is_touched() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(&[BackendFeatures::NEW_OWNER]).0));
    File::create(&path).unwrap();
    let refused = |devices: &Devices<RecordingDevice>, plan: Plan, image: &str| {
        let error = plan.prepare(devices, Via::Exec(Image::new(image))).unwrap_err();
        assert_eq!(error.phase, Phase::Prepare);
        error.source
    };
    let mut devices = Devices::one("disk0", session(&path));
    let cause = refused(&devices, Plan::new(), "/does/not/exist");
    assert!(cause.to_string().contains("/does/not/exist"), "{cause}");
    let cause = refused(&devices, Plan::new(), "/etc/passwd");
    assert!(matches!(cause, Cause::Image { .. }), "{cause}");
    let cause = refused(&devices, Plan::new().strategy(Strategy::Resume), "/bin/true");
    assert!(cause.to_string().contains("SUSPEND (bit 4)"), "{cause}");
    let cause = refused(&devices, Plan::new().strategy_of("disk1", Strategy::Live), "/bin/true");
    assert_eq!(cause.to_string(), "a strategy is given for device \"disk1\"; there are: disk0");
    let old = directory.path().join(format!("{:x}", offered(&[]).0));
    File::create(&old).unwrap();
    let others = Devices::one("old", session(&old));
    for strategy in [Strategy::Live, Strategy::Resume, Strategy::Reset] {
        let cause = refused(&others, Plan::new().strategy(strategy), "/bin/true");
        let text =
            format!("strategy {strategy} needs backend feature NEW_OWNER (bit 9), which the device does not");
        assert!(cause.to_string().starts_with(&text), "{cause}");
    }
    let text = RecordingDevice::at(&old).text();
    assert!(text.ends_with("--- update\n"), "{text}");
    let cause = refused(&devices, Plan::new().strategy(Strategy::Reopen), "/bin/true");
    assert!(matches!(cause, Cause::InFlight { in_flight: 2 }), "{cause}");
    let section = |name| Section::new(name, 1, vec![]);
    let cause = refused(&devices, Plan::new().section(section("vdpa/session")), "/bin/true");
    assert!(matches!(cause, Cause::State(_)), "{cause}");
    let twice = Plan::new().section(section("mine")).late_section("mine", 1, true);
    let cause = refused(&devices, twice, "/bin/true");
    assert_eq!(cause.to_string(), "there are two of section \"mine\"; names must be unique in an update");
    let zero = || File::open("/dev/zero").unwrap();
    let twice = Plan::new().descriptor("file", zero()).descriptor("file", zero());
    assert!(matches!(refused(&devices, twice, "/bin/true"), Cause::DuplicateName { what: "descriptor", .. }));

    let spec = RegionSpec {
        name: "heap".to_owned(),
        backing: Backing::Memory(Memory::anonymous("heap", 4096).unwrap(), 0),
        iova: 0x4000_0000,
        size: 4096,
        perm: Perm::RO,
        populate: false,
    };
    devices.get_mut("disk0").unwrap().map(vec![spec]).unwrap();
    let cause = refused(&devices, Plan::new(), "/bin/true");
    assert!(cause.to_string().contains("\"heap\"") && cause.to_string().contains("memfd"), "{cause}");
    let log = devices.get("disk0").unwrap().ops().text();
    assert!(log.ends_with("--- update\nbegin\nupdate\nend\n"), "{log}");
}

#[test]
fn a_session_that_changes_after_prepare_is_prepared_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(&[BackendFeatures::NEW_OWNER]).0));
    File::create(&path).unwrap();
    let mut devices = Devices::one("disk0", session(&path));
    let prepare = |devices: &Devices<RecordingDevice>, plan: Plan| {
        plan.prepare(devices, Via::Exec(Image::new("/bin/true"))).unwrap()
    };
    let prepared = prepare(&devices, Plan::new());
    let more = memfd::create(c"more", 4096, None).unwrap();
    devices.get_mut("disk0").unwrap().map_memfd("more", more, 0x4000_0000, 4096, Perm::RW).unwrap();
    let failed = prepared.switch(devices, Sections::new()).unwrap_err();
    assert!(failed.error.to_string().ends_with("prepare of device disk0"), "{}", failed.error);
    assert!(failed.error.source.to_string().contains("was set up differently"), "{:?}", failed.error);

    let prepared = prepare(&failed.devices, Plan::new().late_section("cpu", 3, false));
    let failed = prepared.switch(failed.devices, Sections::new()).unwrap_err();
    assert_eq!(failed.error.source.to_string(), "section \"cpu\" was announced and not given");
    let prepared = prepare(&failed.devices, Plan::new());
    let late = Section::new("cpu", 3, Vec::new());
    let failed = prepared.switch(failed.devices, Sections::from_iter([late])).unwrap_err();
    assert!(failed.error.source.to_string().contains("was not announced"), "{:?}", failed.error);
    let text = failed.devices.get("disk0").unwrap().ops().text();
    assert!(text.ends_with("--- update\nbegin\nupdate\nend\n"), "{text}");
}

#[test]
fn a_deadline_that_is_over_keeps_the_program_here() {
    use BackendFeatures as B;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(&[B::NEW_OWNER, B::SUSPEND, B::RESUME]).0));
    File::create(&path).unwrap();
    let devices = Devices::one("disk0", session(&path));
    let plan = Plan::new().strategy(Strategy::Resume).deadline(std::time::Duration::ZERO);
    let prepared = plan.prepare(&devices, Via::Exec(Image::new("/bin/true"))).unwrap();
    let failed = prepared.switch(devices, Sections::new()).unwrap_err();
    assert!(matches!(failed.error.source, Cause::Deadline), "{:?}", failed.error);
    let text = failed.devices.get("disk0").unwrap().ops().text();
    assert!(text.ends_with("--- update\nsuspend\nresume\n"), "{text}");
}

/// The second of two devices refuses SUSPEND after the first one was stopped: what the caller gets.
#[test]
fn devices_that_are_stopped_already_continue_when_the_next_one_fails() {
    use BackendFeatures as B;
    let bits = [B::NEW_OWNER, B::SUSPEND, B::RESUME];
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let paths = directories.each_ref().map(|d| d.path().join(format!("{:x}", offered(&bits).0)));
    let mut devices = Devices::new();
    for (name, path) in ["first", "second"].into_iter().zip(&paths) {
        File::create(path).unwrap();
        devices.push(name, session(path));
    }
    devices.get("second").unwrap().ops().fail_next("suspend");
    let plan = Plan::new().strategy_of("first", Strategy::Reset).strategy_of("second", Strategy::Resume);
    let prepared = plan.prepare(&devices, Via::Exec(Image::new("/bin/true"))).unwrap();
    let failed = prepared.switch(devices, Sections::new()).unwrap_err();
    assert_eq!(failed.error.to_string(), "update failed in phase suspend of device second");
    assert!(failed.lost.is_empty());
    assert_eq!(failed.devices.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["first", "second"]);
    let tail = |name: &str| {
        let text = failed.devices.get(name).unwrap().ops().text();
        text.split_once("--- update\n").unwrap().1.lines().collect::<Vec<_>>().join(", ")
    };
    assert_eq!(tail("second"), "suspend fails, resume");
    let handshake = "status 0, status 1, status 3, features, status 11";
    assert_eq!(tail("first"), format!("suspend, get_base, status 0, {handshake}, base 1, enable, status 15"));
}

/// The device is suspended, but GET_VRING_BASE fails. A device with RESUME continues. One without is lost, and the error says
/// so.
#[test]
fn a_device_that_cannot_be_brought_back_is_not_given_back() {
    use BackendFeatures as B;
    for (bits, back) in
        [(&[B::NEW_OWNER, B::SUSPEND, B::RESUME][..], true), (&[B::NEW_OWNER, B::SUSPEND], false)]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(format!("{:x}", offered(bits).0));
        File::create(&path).unwrap();
        let devices = Devices::one("disk0", session(&path));
        devices.get("disk0").unwrap().ops().fail_next("get_base");
        let plan = Plan::new().strategy(Strategy::Reset);
        let prepared = plan.prepare(&devices, Via::Exec(Image::new("/bin/true"))).unwrap();
        let failed = prepared.switch(devices, Sections::new()).unwrap_err();
        assert_eq!(failed.error.to_string(), "update failed in phase suspend of device disk0");
        assert_eq!((failed.devices.len(), failed.lost.len()), if back { (1, 0) } else { (0, 1) });
        if let Some(lost) = failed.lost.first() {
            assert_eq!(lost.to_string(), "update failed in phase resume of device disk0");
        }
        let text = RecordingDevice::at(&path).text();
        let end = if back { "suspend\nget_base fails\nresume\n" } else { "suspend\nget_base fails\nclose\n" };
        assert!(text.ends_with(end), "{text}");
    }
}

/// Both images of a program whose memory object was truncated to less than what is mapped of it.
#[test]
fn image_that_cannot_restore() {
    let Some(path) = std::env::var_os("SHRINKING_DEVICE_FILE") else {
        assert!(
            update::restore::<RecordingDevice>().unwrap().is_none(),
            "a first start has nothing to restore"
        );
        return;
    };
    if std::env::var_os(update::STATE_VARIABLE).is_none() {
        let devices = Devices::one("disk0", session(Path::new(&path)));
        let prepared = Plan::new().prepare(&devices, Via::Exec(Image::new("/proc/self/exe"))).unwrap();
        let ram = devices.get("disk0").unwrap().region("ram").unwrap().object().unwrap().try_clone_to_owned();
        rustix::fs::ftruncate(ram.unwrap(), 4096).unwrap();
        panic!("not replaced: {:?}", prepared.switch(devices, Sections::new()).unwrap_err().error);
    }
    let error = update::incoming::<RecordingDevice>().unwrap_err();
    assert_eq!(error.phase, Phase::Load);
    assert!(
        error
            .source
            .to_string()
            .contains("has 65536 bytes from byte 0 of its memory object on, which has only 4096"),
        "{error:?}"
    );
    let open = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let open: Vec<_> =
        open.filter(|file| file.as_os_str() == path || file.starts_with("/memfd:ram")).collect();
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn an_image_that_cannot_restore_leaves_no_device_open() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(format!("{:x}", offered(&[BackendFeatures::NEW_OWNER]).0));
    File::create(&path).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["image_that_cannot_restore", "--exact", "--nocapture"])
        .env("SHRINKING_DEVICE_FILE", &path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
