//! Clients that replace themselves by exec, with a real daemon.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vdpa_client::Session;
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::memory::Memory;
use vdpa_client::state::{self, Section, Sections};
use vdpa_client::update::{self, Devices, Failed, Image, Phase, Plan, Strategy, UpdateError, Via};
use vdpa_control::api::DevState;
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::Perm;
use vdpa_sys::exec::set_close_on_exec;
use vdpa_sys::memfd;
use vdpa_sys::uapi::report::UpdateReport;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk, Flight, Q0, SLOTS};
use robust::{RoleProcess, Vdpad, has_role, receive_line, send_line, variable};

/// Guest memory of the client.
const MEMORY: u64 = 64 << 20;
/// Blocks that keep their data from before the first update until after the last.
const OLD_BLOCKS: std::ops::Range<u64> = 200..232;
const BLOCKS: u64 = OLD_BLOCKS.end - OLD_BLOCKS.start;
/// Updates in a row.
const UPDATES: u64 = 2;
/// Name and version of the client's section of saved state.
const SECTION: (&str, u32) = ("test/disk", 1);

/// The saved state of a client: number of updates, and requests in flight by slot.
type Saved = (u64, Vec<(u64, Flight)>);

fn text(error: &dyn std::error::Error) -> String {
    vdpa_core::error::chain(error)
}

/// A client that updates itself with requests in flight, and checks that each is answered once and correctly.
#[test]
fn tenant() {
    if !has_role("tenant") {
        return;
    }
    let strategy: Strategy = variable("STRATEGY").parse().unwrap();
    let (mut disk, made) = match update::restore::<VhostVdpaFd>().unwrap_or_else(|e| panic!("{}", text(&e))) {
        None => (first_start(), 0),
        Some(restored) => {
            let (session, mut sections, report) = restored.into_one().unwrap();
            assert_eq!(report.device("disk0").unwrap().strategy, strategy);
            let section = sections.take(SECTION.0).unwrap();
            sections.ensure_consumed().unwrap();
            let (made, flying): Saved = section.parse(SECTION.1).unwrap();
            let disk = again(Disk { session, flying: BTreeMap::from_iter(flying) }, made);
            report.report_to_server("disk0", &disk.session).unwrap();
            (disk, made + 1)
        }
    };
    send_line("ready");
    receive_line();
    if made == UPDATES {
        send_line("end");
        return;
    }
    // Writes in the lower half of the slots, reads in the upper; requests that the device has not seen are in flight too.
    let seed = 100 + made;
    for slot in 0..SLOTS / 2 {
        disk.submit(slot, (kind::OUT, 2 + slot, seed));
        disk.submit(SLOTS / 2 + slot, (kind::IN, OLD_BLOCKS.start + slot % BLOCKS, 1));
        if slot == 8 {
            disk.kick();
        }
    }
    if strategy == Strategy::Live {
        // This device is not stopped, so it can complete them while no image of this program runs.
        disk.kick();
    }
    let Disk { session, flying } = disk;
    assert_eq!(u64::from(session.queue(Q0).unwrap().in_flight()), SLOTS);
    let saved: Saved = (made, flying.into_iter().collect());
    let section = Section::json(SECTION.0, SECTION.1, &saved).unwrap();
    let failed = exec(session, "/proc/self/exe".as_ref(), Plan::new().strategy(strategy).section(section));
    panic!("not replaced: {}", text(&failed.error));
}

/// Execs `image`, which only returns when that fails.
fn exec(session: Session<VhostVdpaFd>, image: &Path, plan: Plan) -> Failed<VhostVdpaFd> {
    let devices = Devices::one("disk0", session);
    match plan.prepare(&devices, Via::Exec(Image::new(image))) {
        Ok(prepared) => *prepared.switch(devices, Sections::new()).unwrap_err(),
        Err(error) => Failed { error, devices, lost: Vec::new() },
    }
}

fn first_start() -> Disk {
    let mut disk = Disk::start(Path::new(&variable("DEVICE")), disk::pinnable(MEMORY));
    for block in OLD_BLOCKS {
        disk.one((kind::OUT, block, 1));
    }
    disk
}

/// In the new image: every request in flight completes once, and all data is as before.
fn again(mut disk: Disk, made: u64) -> Disk {
    // Requests that were published without a kick.
    disk.kick();
    let slots = disk.settle();
    assert_eq!(slots.len() as u64, SLOTS, "{slots:?}");
    assert_eq!(slots.iter().collect::<BTreeSet<_>>().len() as u64, SLOTS, "{slots:?}");
    for slot in 0..SLOTS / 2 {
        disk.one((kind::IN, 2 + slot, 100 + made));
    }
    for block in OLD_BLOCKS {
        disk.one((kind::IN, block, 1));
    }
    assert!(disk.reap().is_empty() && disk.session.queue(Q0).unwrap().in_flight() == 0);
    disk
}

fn start(part: &str, device: &Path, strategy: Strategy, packed: bool) -> RoleProcess {
    let mut variables = vec![("DEVICE", device.to_str().unwrap()), ("STRATEGY", strategy.name())];
    if packed {
        variables.push((disk::PACKED, "1"));
    }
    RoleProcess::start(part, &variables)
}

/// Lines of the log about new owners.
fn owners(vdpad: &Vdpad, what: &str) -> usize {
    vdpad.log().lines().filter(|line| line.contains(what)).count()
}

/// Updates a client twice and compares the state of the device before and after.
fn updated(mgmtdev: &str, strategy: Strategy) {
    updated_over(mgmtdev, strategy, false);
}

fn updated_over(mgmtdev: &str, strategy: Strategy, packed: bool) {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let device = vdpad.add_any("disk0", mgmtdev);
    let mut client = start("tenant", &device, strategy, packed);
    client.receive("ready");
    let before = vdpad.info("disk0").state;
    let held = vdpad.resources();
    let pid = client.pid().as_raw_nonzero().get().unsigned_abs();
    assert_eq!(before.owner.as_ref().unwrap().pid, pid);
    assert_eq!((before.pinned_pages > 0, before.mappings), (mgmtdev == "blk", 1), "{before:?}");
    for update in 1..=UPDATES {
        client.send("update");
        client.receive("ready");
        let after = vdpad.info("disk0").state;
        same_but_counters(&before, &after);
        // Every request was served once.
        let requests = BLOCKS + update * (SLOTS + SLOTS / 2 + BLOCKS);
        let counted = &after.queues[0];
        assert_eq!(
            (counted.requests, counted.bytes, counted.errors),
            (requests, requests * u64::from(disk::DATA), 0)
        );
        let (set, changed) = (owners(&vdpad, "owner set"), owners(&vdpad, "owner changed"));
        let updates = usize::try_from(update).unwrap();
        if strategy == Strategy::Reopen {
            assert_eq!((set, changed), (1 + updates, 0), "{}", vdpad.log());
        } else {
            assert_eq!((set, changed), (1, updates), "{}", vdpad.log());
        }
        shown(&vdpad, &after, strategy, update);
        // No resource of the old image is kept.
        let now = robust::eventually("descriptors and threads are as before", || {
            Some(vdpad.resources()).filter(|now| {
                without_sockets(&now.fds) == without_sockets(&held.fds) && now.threads == held.threads
            })
        });
        assert_eq!((now.memfds, now.registered, now.threads), (held.memfds, held.registered, held.threads));
    }
    client.send("end");
    client.receive("end");
    assert!(client.end().success());
    vdpad.is_released("disk0");
    if mgmtdev == "blk" {
        in_the_file(&vdpad.dir().join("disk0.img"));
    }
}

/// The update as `vdpactl` shows it.
fn shown(vdpad: &Vdpad, state: &DevState, strategy: Strategy, updates: u64) {
    let update = vdpad.client().update("disk0").unwrap();
    assert_eq!(update.owner, state.owner);
    let changes = if strategy == Strategy::Reopen { 0 } else { updates };
    assert_eq!((update.owner_changes, update.owner_changed.is_some()), (changes, changes > 0));
    assert_eq!((update.updates, update.rolled_back), (updates, 0));
    let last = update.last.unwrap();
    assert_eq!(
        (last.way.as_str(), last.strategy.as_str(), last.outcome.as_str()),
        ("exec", strategy.name(), "done")
    );
    assert_eq!(
        (last.predecessor, last.successor),
        (last.successor, last.predecessor),
        "an exec keeps the pid"
    );
    let sum: u64 = last.phases_ns.iter().map(|(_, ns)| ns).sum();
    assert!(sum > 0 && sum <= last.total_ns && (last.mappings, last.queues) == (1, 1), "{last:?}");
    let text = vdpad.ctl("update show disk0").stdout;
    let pid = state.owner.as_ref().unwrap().pid;
    assert!(text.starts_with(&format!("disk0: owner pid {pid} comm ")), "{text}");
    assert!(
        text.contains(&format!(" way exec strategy {strategy} done pid {pid} mappings 1 queues 1\n")),
        "{text}"
    );
    assert!(text.contains("  total ") && text.contains(" transfer "), "{text}");
    let json: serde_json::Value = serde_json::from_str(&vdpad.ctl("-j update show").stdout).unwrap();
    assert_eq!(json["update"]["disk0"]["last"]["total_ns"], last.total_ns, "{json}");
}

#[test]
fn reports_of_updates_are_the_owners_and_checked() {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let device = vdpad.add_any("disk0", "blk");
    let none = vdpad.ctl("update show").stdout;
    assert_eq!(none, "disk0: no owner\n  owner_changes 0 updates 0 rolled_back 0\n");
    let file = VhostVdpaFd::open(&device).unwrap();
    let report = UpdateReport::default();
    assert_eq!(file.report_update(&report), Err(Errno::PERM), "it has no owner");
    file.set_owner().unwrap();
    assert_eq!(file.report_update(&UpdateReport { strategy: 9, ..report }), Err(Errno::INVAL));
    assert_eq!(file.report_update(&report), Ok(()));
    let update = vdpad.client().update("disk0").unwrap();
    assert_eq!((update.updates, update.last.unwrap().way.as_str()), (1, "exec"));
    drop(file);
    vdpad.is_released("disk0");
    assert!(vdpad.ctl("update show").stdout.contains("no owner\n  owner_changes 0 updates 1 "));
    assert!(vdpad.ctl("update show disk1").stderr.starts_with("Error: vdpa: device not found.\n"));
}

/// Connections of the control socket come and go.
fn without_sockets(fds: &BTreeMap<String, usize>) -> Vec<(&String, &usize)> {
    fds.iter().filter(|(kind, _)| *kind != "socket:").collect()
}

fn same_but_counters(before: &DevState, after: &DevState) {
    let plain = |state: &DevState| {
        let mut state = state.clone();
        state.queues.iter_mut().for_each(|queue| (queue.requests, queue.bytes) = (0, 0));
        // The pid is the same; the name is that of the new program.
        state.owner.iter_mut().for_each(|owner| (owner.since, owner.comm) = (0, String::new()));
        state
    };
    assert_eq!(plain(before), plain(after));
}

/// Checks the backing file.
fn in_the_file(image: &Path) {
    let bytes = fs::read(image).unwrap();
    let block =
        |block: u64| &bytes[usize::try_from(block).unwrap() * disk::DATA as usize..][..disk::DATA as usize];
    for number in OLD_BLOCKS {
        assert!(block(number) == disk::pattern(number, 1), "block {number}");
    }
    for number in 2..2 + SLOTS / 2 {
        assert!(block(number) == disk::pattern(number, 100 + UPDATES - 1), "block {number}");
    }
}

/// A client whose update fails before the exec: it must continue unaffected.
#[test]
fn staying() {
    if !has_role("staying") {
        return;
    }
    let strategy: Strategy = variable("STRATEGY").parse().unwrap();
    let mut disk = first_start();
    let images = [
        ("missing", Phase::Prepare),
        ("closed", Phase::Prepare),
        ("directory", Phase::Prepare),
        ("junk", Phase::Transfer),
    ];
    for (seed, (image, phase)) in (10..).zip(images) {
        (0..SLOTS / 2).for_each(|slot| disk.submit(slot, (kind::OUT, 2 + slot, seed)));
        disk.kick();
        let path = PathBuf::from(variable("IMAGES")).join(image);
        let Disk { session, flying } = disk;
        let mut failed = exec(session, &path, Plan::new().strategy(strategy));
        send_line(&format!("{image} {}", text(&failed.error)));
        assert_eq!(failed.error.phase, phase, "{}", text(&failed.error));
        disk = Disk { session: failed.devices.take("disk0").unwrap(), flying };
        assert_eq!(disk.settle().len() as u64, SLOTS / 2);
        (0..SLOTS / 2).for_each(|slot| disk.one((kind::IN, 2 + slot, seed)));
        let status = disk.session.ops().status().unwrap();
        assert!(status.contains(Status::DRIVER_OK) && !status.contains(Status::NEEDS_RESET), "{status}");
        receive_line();
    }
}

fn fails_and_stays(mgmtdev: &str, strategies: &[Strategy]) {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let device = vdpad.add_any("disk0", mgmtdev);
    let images = vdpad.dir().join("images");
    fs::create_dir_all(images.join("directory")).unwrap();
    for (name, mode) in [("closed", 0o644), ("junk", 0o755)] {
        fs::write(images.join(name), "\u{1}no program").unwrap();
        fs::set_permissions(images.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut rolled_back = 0;
    for &strategy in strategies {
        let variables = [
            ("DEVICE", device.to_str().unwrap()),
            ("STRATEGY", strategy.name()),
            ("IMAGES", images.to_str().unwrap()),
        ];
        let mut client = RoleProcess::start("staying", &variables);
        let mut before = None;
        let unusable = |name: &str, why: &str| {
            let path = images.join(name);
            format!("update failed in phase prepare: the new image {} cannot be run: {why}", path.display())
        };
        for (image, error) in [
            ("missing", unusable("missing", "No such file or directory (os error 2)")),
            ("closed", unusable("closed", "Permission denied (os error 13)")),
            ("directory", unusable("directory", "it is not a regular file")),
            (
                "junk",
                "update failed in phase transfer: cannot execve the new image: Exec format error (ENOEXEC)"
                    .into(),
            ),
        ] {
            assert_eq!(client.receive(image), error, "{strategy}");
            let state = vdpad.info("disk0").state;
            assert_eq!(state.owner.as_ref().unwrap().pid, client.pid().as_raw_nonzero().get().unsigned_abs());
            let held = (state.pinned_pages, state.mappings, state.suspended);
            assert_eq!(*before.get_or_insert(held), held, "{strategy}, {image}");
            let update = vdpad.client().update("disk0").unwrap();
            rolled_back += u64::from(image == "junk");
            assert_eq!((update.updates, update.rolled_back), (0, rolled_back));
            if let Some(last) = update.last {
                assert_eq!(last.outcome, "rolled back");
                assert!(
                    last.reason.starts_with("update failed in phase transfer: cannot execve"),
                    "{last:?}"
                );
            }
            client.send("go on");
        }
        assert!(client.end().success());
        vdpad.is_released("disk0");
    }
}

/// A program with a saved state that it cannot restore.
#[test]
fn restoring() {
    if !has_role("restoring") {
        return;
    }
    let error: UpdateError = update::restore::<VhostVdpaFd>().unwrap_err();
    assert_eq!(error.phase, Phase::Load);
    send_line(&format!("refused {}", text(&error)));
}

/// The error of a program that inherits `value` as the descriptor number of its state.
fn refusal(value: &str) -> String {
    let mut client = RoleProcess::start("restoring", &[(update::STATE_VARIABLE, value)]);
    let said = client.receive("refused");
    assert!(client.end().success());
    let said = said.strip_prefix("update failed in phase load: ").unwrap();
    said.replace(&format!("descriptor {value}"), "descriptor N")
}

#[test]
fn state_that_cannot_be_read_is_named() {
    let inherited = |fd: &dyn AsFd| {
        set_close_on_exec(fd.as_fd(), false).unwrap();
        refusal(&fd.as_fd().as_raw_fd().to_string())
    };
    assert_eq!(refusal("seven"), "VDPA_LIVE_STATE is \"seven\", not the number of a descriptor");
    assert_eq!(
        refusal("777"),
        "descriptor N, named by VDPA_LIVE_STATE, was not inherited: Bad file descriptor (EBADF)"
    );
    let file = fs::File::open("/proc/self/exe").unwrap();
    let (reading, _writing) = std::io::pipe().unwrap();
    assert_eq!(inherited(&reading), "descriptor N, named by VDPA_LIVE_STATE, is not a memfd");
    // A file of a tmpfs has seals too.
    let said = inherited(&file);
    assert!(said.ends_with("is not a memfd") || said.ends_with("is not sealed"), "{said}");
    let open = memfd::create(c"open", 100, None).unwrap();
    assert_eq!(inherited(&open), "the memfd with the saved state (descriptor N) is not sealed");
    let write_only = {
        let sealed = memfd::sealed(c"sealed", b"unreadable").unwrap();
        let path = format!("/proc/self/fd/{}", sealed.as_raw_fd());
        // A sealed file cannot be opened for writing only; O_PATH gives neither reading nor seals.
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
    };
    assert_eq!(inherited(&write_only), "descriptor N, named by VDPA_LIVE_STATE, is not a memfd");

    let sealed = |bytes: &[u8]| inherited(&memfd::sealed(c"state", bytes).unwrap());
    assert_eq!(sealed(b"short"), "saved state has 5 bytes, fewer than the 24 of its header");
    let said = sealed(&[b'x'; 64]);
    assert!(said.starts_with("this is not saved state: it begins with [78, 78,"), "{said}");
    let mut state = state::encode(&Sections::default()).unwrap();
    assert_eq!(sealed(&state), "saved state has no section \"vdpa/update\"");
    state[8] = 99;
    assert_eq!(sealed(&state), "saved state has format version 99; this program reads versions 1 to 1");
}

/// A client with private memory.
#[test]
fn private() {
    if !has_role("private") {
        return;
    }
    let mut disk = first_start();
    let spec = RegionSpec {
        name: "heap".into(),
        backing: Backing::Memory(Memory::anonymous("heap", 4096).unwrap(), 0),
        iova: 0x1000,
        size: 4096,
        perm: Perm::RO,
        populate: false,
    };
    disk.session.map(vec![spec]).unwrap();
    let strategy: Strategy = variable("STRATEGY").parse().unwrap();
    let Disk { session, flying } = disk;
    let mut failed = exec(session, "/proc/self/exe".as_ref(), Plan::new().strategy(strategy));
    send_line(&format!("refused {}", text(&failed.error)));
    Disk { session: failed.devices.take("disk0").unwrap(), flying }.check(5);
}

#[test]
fn private_memory_is_refused_by_its_name() {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let device = vdpad.add_any("disk0", "blk");
    for strategy in [Strategy::Live, Strategy::Resume, Strategy::Reset, Strategy::Reopen] {
        let mut client = start("private", &device, strategy, false);
        assert_eq!(
            client.receive("refused"),
            "update failed in phase prepare of device disk0: region \"heap\" is private memory, which ends with this \
             program: map it shared from a memfd, a hugetlb memfd or a file (Backing::Object, Memory::map, Memory::from_mapping)"
        );
        assert!(client.end().success());
    }
}

#[test]
fn live_is_not_for_a_device_that_uses_addresses() {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let mut disk = Disk::start(&vdpad.add_any("disk0", "sim-blk"), disk::MEMORY_MIN);
    let mut failed = exec(disk.session, "/proc/self/exe".as_ref(), Plan::new().strategy(Strategy::Live));
    assert_eq!(
        text(&failed.error),
        "update failed in phase prepare of device disk0: strategy live needs a device without backend feature IOTLB_REMAP (bit \
         10): this one uses addresses of its owner, so it has to be suspended while they change; use resume"
    );
    disk = Disk { session: failed.devices.take("disk0").unwrap(), flying: BTreeMap::new() };
    disk.check(5);
}

mod heavy {
    use super::*;

    #[test]
    fn blk_is_updated_live() {
        updated("blk", Strategy::Live);
    }

    #[test]
    fn blk_is_updated_by_resume() {
        updated("blk", Strategy::Resume);
    }

    #[test]
    fn blk_is_updated_by_reset() {
        updated("blk", Strategy::Reset);
    }

    #[test]
    fn blk_is_updated_by_reopen() {
        updated("blk", Strategy::Reopen);
    }

    #[test]
    fn blk_with_packed_rings_is_updated_live() {
        updated_over("blk", Strategy::Live, true);
    }

    #[test]
    fn blk_with_packed_rings_is_updated_by_resume() {
        updated_over("blk", Strategy::Resume, true);
    }

    #[test]
    fn blk_with_packed_rings_is_updated_by_reset() {
        updated_over("blk", Strategy::Reset, true);
    }

    #[test]
    fn blk_with_packed_rings_is_updated_by_reopen() {
        updated_over("blk", Strategy::Reopen, true);
    }

    #[test]
    fn sim_blk_is_updated_by_resume() {
        updated("sim-blk", Strategy::Resume);
    }

    #[test]
    fn sim_blk_is_updated_by_reset() {
        updated("sim-blk", Strategy::Reset);
    }

    #[test]
    fn sim_blk_is_updated_by_reopen() {
        updated("sim-blk", Strategy::Reopen);
    }

    #[test]
    fn a_client_of_blk_stays_when_its_update_fails() {
        fails_and_stays("blk", &Strategy::ALL);
    }

    #[test]
    fn a_client_of_sim_blk_stays_when_its_update_fails() {
        fails_and_stays("sim-blk", &[Strategy::Resume, Strategy::Reset, Strategy::Reopen]);
    }
}
