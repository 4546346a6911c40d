//! Invalid requests to vdpad and vdpactl: exact messages and exit status.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::fs;
use std::path::Path;
use std::time::Duration;

use vdpa_client::Error;
use vdpa_client::device::Device;
use vdpa_core::Errno;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk};
use robust::{Vdpad, run};

const LIMIT: Duration = Duration::from_secs(60);
const NO_DEVICE: &str = "Error: vdpa: device not found.\nkernel answers: No such device\n\
                         \"vdpactl dev show\" lists the devices that exist.";

/// Opens a device, which must fail.
fn refused(path: &Path) -> Errno {
    match Device::<VhostVdpaFd>::open(path) {
        Err(Error::Open { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

/// A command, and the end of its output.
type Case = (String, String);

/// An error as vdpactl prints it; without a hint there is no third line.
fn refusal(message: &str, errno: &str, hint: &str) -> String {
    format!("Error: vdpa: {message}.\nkernel answers: {errno}\n{hint}")
}

fn bad_names(dir: &str) -> Vec<Case> {
    let good = format!("path {dir}/good.img");
    vec![
        (
            format!("dev add name disk0 mgmtdev blk {good}"),
            refusal(
                "device disk0 exists already",
                "File exists",
                "Choose another name, or delete it first with \"vdpactl dev del\".",
            ),
        ),
        (
            format!("dev add name d1 mgmtdev nosuch {good}"),
            refusal(
                "Fail to find the specified management device",
                "No such device",
                "\"vdpactl mgmtdev show\" lists the management devices that exist.",
            ),
        ),
        (
            "dev add name a/b mgmtdev sim-blk".into(),
            refusal(
                "\"a/b\" is no device name",
                "Invalid argument",
                "1 to 255 visible ASCII characters without a slash, not beginning with a dot, are right.",
            ),
        ),
        ("dev show d1".into(), NO_DEVICE.into()),
        ("dev config show d1".into(), NO_DEVICE.into()),
        ("dev del d1".into(), NO_DEVICE.into()),
    ]
}

/// For each `path`: the message without its end, the text of the errno, the hint.
fn bad_files(dir: &str) -> Vec<Case> {
    let table = [
        (
            "/missing.img",
            format!("cannot open {dir}/missing.img: No such file or directory (os error 2)"),
            "No such file or directory",
            "Create it first, for example with \"truncate -s 1G FILE\".",
        ),
        (
            "/small.img",
            format!("{dir}/small.img has 511 bytes, a disk needs at least 512"),
            "Invalid argument",
            "Make it larger, for example with \"truncate -s 1G FILE\".",
        ),
        (
            "",
            format!("cannot open {dir}: Is a directory (os error 21)"),
            "Is a directory",
            "Give a regular file or a block device.",
        ),
        (
            " readonly",
            format!("{dir} is neither a file nor a block device"),
            "Invalid argument",
            "Give a regular file or a block device.",
        ),
        (
            "/good.img/below",
            format!("cannot open {dir}/good.img/below: Not a directory (os error 20)"),
            "Not a directory",
            "The daemon must be able to open it.",
        ),
        (
            "/disk0.img",
            format!("{dir}/disk0.img is in use by another device of this daemon"),
            "Device or resource busy",
            "A disk has one writer, or readers only (readonly on), or writers that all share it (shared on).",
        ),
    ];
    let case = |(path, message, errno, hint): (&str, String, &str, &str)| {
        (format!("dev add name d1 mgmtdev blk path {dir}{path}"), refusal(&message, errno, hint))
    };
    table.into_iter().map(case).collect()
}

fn bad_attributes(dir: &str) -> Vec<Case> {
    let invalid = "Invalid argument";
    let table = [
        (
            "colour blue",
            "blk has no attribute \"colour\"",
            "Operation not supported",
            "It has: path FILE; passed on|off; null SIZE; format raw; readonly on|off; shared on|off; direct on|off; pin on|off; memlock rlimit|unlimited|SIZE; \
             max_iotlb_entries 2-1048576; queues 1-64; queue_size 2-32768, a power of two; packed on|off; in_order on|off; serial TEXT of at \
             most 20 bytes; iops 0-1000000000, requests in a second; bps none|SIZE; burst 1-60000, milliseconds; compat_reset keep|clean; \
             mem_table on|off; vhost_log on|off; reset_owner on|off; strict_new_owner on|off; cpus LIST of processors, for example 2,4-7; worker \
             shared|own.",
        ),
        ("queues 65", "attribute \"queues\" is \"65\"; a number from 1 to 64 is right", invalid, ""),
        (
            "max_iotlb_entries 1",
            "attribute \"max_iotlb_entries\" is \"1\"; a number from 2 to 1048576 is right",
            invalid,
            "",
        ),
        ("queue_size 100", "queue_size is \"100\"", invalid, "A power of two from 2 to 32768 is right."),
        ("pin maybe", "attribute \"pin\" is \"maybe\"; \"on\" or \"off\" is right", invalid, ""),
        (
            "serial 123456789012345678901",
            "serial \"123456789012345678901\" has 21 bytes",
            invalid,
            "At most 20 bytes are right.",
        ),
    ];
    let case = |(attribute, message, errno, hint): (&str, &str, &str, &str)| {
        let line = format!("dev add name d1 mgmtdev blk path {dir}/good.img {attribute}");
        (line, refusal(message, errno, hint))
    };
    let missing = refusal(
        "blk needs the attribute path",
        invalid,
        "Give the file or block device that holds the data: path /srv/disk.img",
    );
    let superfluous = refusal(
        "sim-blk has no attribute \"path\"",
        "Operation not supported",
        "It has: use_va on|off|objects; batch_mapping on|off; max_iotlb_entries 2-1048576; compat_reset keep|clean; verify_remap on|off; \
         mem_table on|off; vhost_log on|off; reset_owner on|off; queue_size 2-32768, a power of two; memlock rlimit|unlimited|SIZE; cpus LIST of processors, for example \
         2,4-7; worker shared|own.",
    );
    table
        .into_iter()
        .map(case)
        .chain([
            ("dev add name d1 mgmtdev blk".into(), missing),
            ("dev add name d1 mgmtdev sim-blk path /x".into(), superfluous),
        ])
        .collect()
}

#[test]
fn devices_that_cannot_be_added() {
    let vdpad = Vdpad::start(LIMIT);
    let dir = vdpad.dir().to_str().unwrap();
    vdpad.image("good", 1 << 20);
    vdpad.image("small", 511);
    vdpad.add_blk("disk0", 1 << 20, "");
    for (line, answer) in [bad_names(dir), bad_files(dir), bad_attributes(dir)].concat() {
        println!("{line}");
        let output = vdpad.ctl(&line);
        output.fails(1, &answer);
        assert_eq!(output.stdout, "");
    }
    // The failed attempts left nothing behind, and the file is free.
    assert_eq!(vdpad.client().devices().unwrap().len(), 1);
    vdpad.add("d1", "blk", &format!("path {dir}/good.img"));
}

/// The daemon lists what each kind takes; a wrong value of each attribute is answered with its name, the value, and what would be
/// right: both ends of a range, every word, the units of a size.
#[test]
fn every_attribute_says_what_it_takes() {
    let vdpad = Vdpad::start(LIMIT);
    let image = vdpad.image("good", 1 << 20);
    let mut tried = 0;
    for (kind, needed) in
        [("blk", format!("path {}", image.display())), ("sim-blk", String::new()), ("sim-net", String::new())]
    {
        let list = vdpad.ctl(&format!("dev add name d mgmtdev {kind} {needed} no_such_attribute 1")).stderr;
        let list = list.split_once("It has: ").unwrap().1.trim_end().trim_end_matches('.');
        for (name, takes) in list.split("; ").map(|entry| entry.split_once(' ').unwrap()) {
            // Any text; and what may stand alone, so that another word is no value of it.
            if ["path", "serial", "readonly"].contains(&name) {
                continue;
            }
            let needed = if name == "null" { "" } else { &needed };
            let output = vdpad.ctl(&format!("dev add name d mgmtdev {kind} {needed} {name} 1GB"));
            let said = &output.stderr;
            let right = match takes {
                "HEX" => vec!["a feature word", "0x300000000"],
                "MAC" => vec!["an Ethernet address", "00:11:22:33:44:55"],
                "SIZE" => vec!["K, M, G or T", "bytes from 512"],
                _ if takes.starts_with("LIST") => vec!["numbers and ranges of processors", "0,2-5"],
                _ if takes.starts_with(|first: char| first.is_ascii_digit()) => {
                    takes.split(',').next().unwrap().split('-').collect()
                }
                words => {
                    words.split('|').map(|word| if word == "SIZE" { "K, M, G or T" } else { word }).collect()
                }
            };
            assert!(output.stdout.is_empty() && said.contains("\"1GB\""), "{kind} {name}: {said}");
            let all = right.iter().all(|word| said.contains(word));
            assert!(all && said.contains(name), "{kind} {name} takes {takes}: {said}");
            tried += 1;
        }
    }
    assert!(tried > 30, "{tried}");
    assert!(vdpad.client().devices().unwrap().is_empty());
}

/// Sizes are given with units everywhere.
#[test]
fn sizes_have_units() {
    let vdpad = Vdpad::start(LIMIT);
    for (at, unit) in ["4096", "4K", "4k", "1M", "1G", "1T"].into_iter().enumerate() {
        vdpad.add(&format!("null{at}"), "blk", &format!("null {unit} memlock {unit}"));
    }
    for wrong in ["1GB", "1.5G", "-1", "G", "0x1000", "99999999999T"] {
        for attribute in ["null", "memlock"] {
            let needed = if attribute == "null" { "" } else { "null 1M" };
            let said = vdpad.ctl(&format!("dev add name d mgmtdev blk {needed} {attribute} {wrong}")).stderr;
            let names = said.contains(attribute) && said.contains(&format!("is \"{wrong}\""));
            assert!(names && said.contains("K, M, G or T"), "{attribute} {wrong}: {said}");
        }
    }
}

#[test]
fn a_device_is_open_once() {
    let vdpad = Vdpad::start(LIMIT);
    for mgmtdev in ["blk", "sim-blk"] {
        let device = vdpad.add_any(mgmtdev, mgmtdev);
        let mut first = Disk::start(&device, disk::MEMORY_MIN);
        assert_eq!(refused(&device), Errno::BUSY);
        let text = VhostVdpaFd::open(&device).unwrap_err().to_string();
        assert!(
            text.ends_with("the device is open already; vhost-vdpa allows one open file per device"),
            "{text}"
        );
        first.check(3);
    }
}

#[test]
fn a_deleted_device_cannot_be_opened() {
    let vdpad = Vdpad::start(LIMIT);
    let device = vdpad.add_blk("disk0", 1 << 20, "");
    vdpad.ctl("dev del disk0").succeeds();
    assert_eq!(refused(&device), Errno::NOENT);
    vdpad.ctl("dev del disk0").fails(1, NO_DEVICE);
}

#[test]
fn a_device_in_use_is_deleted_by_force_only() {
    let vdpad = Vdpad::start(LIMIT);
    for mgmtdev in ["blk", "sim-blk"] {
        let device = vdpad.add_any("disk0", mgmtdev);
        let mut old = Disk::start(&device, disk::MEMORY_MIN);
        old.check(3);
        vdpad.ctl("dev del disk0").fails(
            1,
            "Error: vdpa: device disk0 is open.\nkernel answers: Device or resource busy\n\
             Close its client first, or take it away with \"vdpactl dev del DEV --force\".",
        );
        old.check(4);
        vdpad.ctl("dev del disk0 --force").succeeds();
        let status = old.session.ops().status().unwrap();
        assert!(status.contains(Status::DRIVER_OK | Status::NEEDS_RESET), "{status}");
        assert_eq!(refused(&device), Errno::NOENT);

        // Name and file are free even while the old client still runs; its end affects nobody.
        let again = vdpad.add_any("disk0", mgmtdev);
        let mut new = Disk::start(&again, disk::MEMORY_MIN);
        new.check(5);
        drop(old);
        new.check(6);
        assert!(vdpad.info("disk0").state.open);
        drop(new);
        vdpad.is_released("disk0");
        vdpad.ctl("dev del disk0").succeeds();
        // Workers and their rings remain, since other devices use them.
        let now = robust::eventually("all is given back", || {
            Some(vdpad.resources()).filter(|now| now.memfds == 0 && now.registered == 0)
        });
        assert_eq!(now.pinned_kib, 0, "{now:?}");
    }
}

#[test]
fn directories_that_cannot_be_served() {
    let vdpad = Vdpad::start(LIMIT);
    let served = vdpad.mount();
    let other = tempfile::tempdir().unwrap();
    let control = other.path().join("control.sock");
    let file = other.path().join("file");
    fs::write(&file, "").unwrap();
    let start = |dir: &Path| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vdpad"));
        run(command.args(["--log", "error", "--socket"]).arg(&control).arg("--dir").arg(dir))
    };
    start(&file).fails(
        1,
        &format!(
            "vdpad: cannot serve device files: cannot use {} as mount directory: Not a directory (os error 20)",
            file.display()
        ),
    );
    start(&file.join("below")).fails(
        1,
        &format!(
            "vdpad: cannot serve device files: cannot use {} as mount directory: Not a directory (os error 20)",
            file.join("below").display()
        ),
    );
    start(Path::new("/proc/nosuch")).fails(
        1,
        "vdpad: cannot serve device files: cannot use /proc/nosuch as mount directory: No such file or directory \
         (os error 2)",
    );
    start(&served).fails(
        1,
        &format!(
            "vdpad: cannot serve device files: {} is served by another vdpad; stop that one or choose another \
             directory",
            served.display()
        ),
    );
    assert!(vdpad.is_mounted(), "the other one is not harmed");
}

#[test]
fn a_control_socket_in_use_is_left_alone() {
    let vdpad = Vdpad::start(LIMIT);
    let other = tempfile::tempdir().unwrap();
    let dir = other.path().join("dev");
    let control = vdpad.dir().join("control.sock");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vdpad"));
    run(command.args(["--log", "error", "--dir"]).arg(&dir).arg("--socket").arg(&control)).fails(
        1,
        &format!(
            "vdpad: {} is in use by a running vdpad; stop that one or choose another path with --socket",
            control.display()
        ),
    );
    assert!(vdpad.client().version().is_ok());
    assert_eq!(vdpa_sys::fuse::fs_type_at(&dir).unwrap(), None, "its mount is removed again");
}
