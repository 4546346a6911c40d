//! Limits on requests and bytes in a second: they hold, change at once, are kept, and harm nobody else. How exactly they hold is
//! measured by `just bench-limits`; here the bounds are wide, since other load on the machine moves them.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::time::{Duration, Instant};

use vdpa_core::blk::kind;

use held::{replace, start, upgrade};
use robust::Vdpad;
use robust::disk::{self, Disk};

const MIB: u64 = 1 << 20;

/// Keeps 32 reads in flight for a while. Returns how many were answered in a second.
fn rate(disk: &mut Disk, seconds: f64) -> f64 {
    let (begin, mut done, mut next) = (Instant::now(), 0_u32, 0);
    let mut submit = |disk: &mut Disk, slot| {
        disk.submit(slot, (kind::OUT, next % 1024, 1));
        next += 1;
    };
    (0..32).for_each(|slot| submit(disk, slot));
    disk.kick();
    while begin.elapsed().as_secs_f64() < seconds {
        disk.wait();
        let slots = disk.reap();
        done += u32::try_from(slots.len()).unwrap();
        slots.into_iter().for_each(|slot| submit(disk, slot));
        disk.kick();
    }
    let elapsed = begin.elapsed().as_secs_f64();
    disk.settle();
    f64::from(done) / elapsed
}

#[track_caller]
fn is_about(found: f64, wanted: f64) {
    assert!(found > wanted * 0.5 && found < wanted * 1.5, "{found} for {wanted}");
}

#[test]
fn limits_hold_change_and_are_kept() {
    let vdpad = start(&[]);
    let device = vdpad.add_blk("d0", 64 * MIB, "packed on iops 400 burst 20");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    is_about(rate(&mut disk, 1.0), 400.0);
    vdpad.ctl("dev set name d0 iops 200").succeeds();
    is_about(rate(&mut disk, 1.0), 200.0);
    for replace in [replace as fn(&Vdpad), upgrade, replace] {
        replace(&vdpad);
        is_about(rate(&mut disk, 1.0), 200.0);
    }
    vdpad.ctl("dev set name d0 iops none bps 1M").succeeds();
    is_about(rate(&mut disk, 1.0), 256.0);
    vdpad.ctl("dev set name d0 bps none").succeeds();
    let free = rate(&mut disk, 1.0);
    assert!(free > 400.0, "{free} without limits");
    disk.check(2);
}

/// A device that waits costs no processor, delays no neighbour of its thread, and can be stopped.
#[test]
fn a_device_that_waits_harms_nobody() {
    let vdpad = start(&["--workers", "1"]);
    let slow = vdpad.add_blk("slow", 64 * MIB, "packed on iops 10 burst 1");
    let mut slow = Disk::start(&slow, disk::MEMORY_MIN);
    let mut free = Disk::start(&vdpad.add_blk("free", 64 * MIB, "packed on"), disk::MEMORY_MIN);
    for slot in 0..disk::SLOTS {
        slow.submit(slot, (kind::OUT, slot, 1));
    }
    slow.kick();
    let busy = || {
        let pid = held::daemon(&vdpad).pid;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        // utime and stime, in hundredths of a second.
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = busy();
    std::thread::sleep(Duration::from_secs(2));
    let used = busy() - before;
    assert!(used < 50, "{used} hundredths of a second in two seconds of waiting");
    let rate = rate(&mut free, 0.5);
    assert!(rate > 200.0, "{rate} beside a device that waits");
    assert!(!slow.reap().is_empty());
    vdpad.ctl("dev set name slow iops none").succeeds();
    slow.settle();
    vdpad.ctl("dev set name slow iops 1").succeeds();
    for slot in 0..disk::SLOTS {
        slow.submit(slot, (kind::OUT, slot, 1));
    }
    slow.kick();
    // The client leaves; what it had in the ring is nobody's.
    let begin = Instant::now();
    drop(slow);
    vdpad.is_released("slow");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_cannot_be_is_refused() {
    let vdpad = start(&[]);
    vdpad.add_blk("d0", MIB, "");
    vdpad.add("s0", "sim-blk", "");
    for (command, words) in [
        ("dev set name d0 iops many", "iops is \"many\""),
        ("dev set name d0 burst 0", "burst is 0"),
        ("dev set name d0 iops 1000000001", "iops is 1000000001"),
        ("dev set name s0 iops 10", "s0 has no limits"),
        ("dev add name d1 mgmtdev blk null 1M iops x", "iops"),
    ] {
        let output = vdpad.ctl(command);
        assert!(output.code == Some(1) && output.stderr.contains(words), "{command}: {output:?}");
    }
}
