//! Whether a write is stable when it is answered: VIRTIO_BLK_F_FLUSH and VIRTIO_BLK_F_CONFIG_WCE.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/hanging.rs"]
mod hanging;
mod support;

use std::mem::offset_of;
use std::path::PathBuf;

use vdpa_core::blk::{BlkConfig, kind};
use vdpa_core::features::{Features, Status};
use vdpa_core::ops::VdpaOps;
use zerocopy::FromBytes;

use hanging::HangingFile;
use support::blk::{Blk, FEATURES, OK};
use support::daemon::Daemon;

const DISK: u64 = 1 << 20;
const WITH_WCE: Features = FEATURES.with(Features::BLK_CONFIG_WCE);

/// A disk that counts flushes.
fn setup(attrs: &[(&str, &str)]) -> (Daemon, HangingFile, PathBuf) {
    let daemon = Daemon::start();
    let file = HangingFile::new(&daemon.dir().join("counting"), DISK);
    file.recover();
    let path = daemon.add(
        "d0",
        "blk",
        &[&[("path", file.path.to_str().unwrap()), ("format", "raw")], attrs].concat(),
    );
    (daemon, file, path)
}

/// The number of flushes of the disk for one write, one write-zeroes, and one flush.
#[track_caller]
fn syncs(blk: &mut Blk, file: &HangingFile) -> [usize; 3] {
    let mut before = file.flushes();
    let mut count = |file: &HangingFile| {
        let more = file.flushes() - before;
        before = file.flushes();
        more
    };
    assert_eq!(blk.write(0, 8, &[1; 4096]), OK);
    let write = count(file);
    assert_eq!(blk.range(kind::WRITE_ZEROES, 8, 8, 0), OK);
    let zeroes = count(file);
    assert_eq!(blk.io(0, kind::FLUSH, 0, &[], &[]).status, OK);
    [write, zeroes, count(file)]
}

fn config(blk: &Blk) -> BlkConfig {
    BlkConfig::read_from_bytes(&blk.session.config().unwrap()).unwrap()
}

fn set_writeback(blk: &Blk, value: u8) {
    blk.session.ops().set_config(u32::try_from(offset_of!(BlkConfig, wce)).unwrap(), &[value]).unwrap();
}

const WRITE_BACK: [usize; 3] = [0, 0, 1];
const WRITE_THROUGH: [usize; 3] = [1, 1, 1];

#[test]
fn the_driver_switches_the_cache_at_once() {
    let (_daemon, file, path) = setup(&[]);
    let mut blk = Blk::with(&path, WITH_WCE, 1);
    assert!(blk.session.features().has(Features::BLK_CONFIG_WCE));
    assert_eq!((config(&blk).wce, syncs(&mut blk, &file)), (1, WRITE_BACK));
    for _ in 0..3 {
        set_writeback(&blk, 0);
        assert_eq!((config(&blk).wce, syncs(&mut blk, &file)), (0, WRITE_THROUGH));
        set_writeback(&blk, 1);
        assert_eq!((config(&blk).wce, syncs(&mut blk, &file)), (1, WRITE_BACK));
    }
    // The mode is kept until the device is reset, even when the client is replaced.
    set_writeback(&blk, 0);
    blk.session.ops().suspend().unwrap();
    blk.session.ops().resume().unwrap();
    assert_eq!((config(&blk).wce, syncs(&mut blk, &file)), (0, WRITE_THROUGH));
    blk.session.reset().unwrap();
    blk.session.renegotiate(WITH_WCE).unwrap();
    assert_eq!(config(&blk).wce, 1);
    blk.run(1);
    assert_eq!(syncs(&mut blk, &file), WRITE_BACK);
}

#[test]
fn nothing_else_can_be_written() {
    let (_daemon, file, path) = setup(&[]);
    let mut blk = Blk::with(&path, WITH_WCE, 1);
    let before = config(&blk);
    blk.session.ops().set_config(0, &[0; size_of::<BlkConfig>()]).unwrap();
    assert_eq!(config(&blk), BlkConfig { wce: 0, ..before });
    assert_eq!(syncs(&mut blk, &file), WRITE_THROUGH);
    blk.session.ops().set_config(0, &[0xff; size_of::<BlkConfig>()]).unwrap();
    assert_eq!(config(&blk), before, "the field says 1, whatever was written");
    let behind = u32::try_from(offset_of!(BlkConfig, wce)).unwrap() + 1;
    blk.session.ops().set_config(behind, &[0; 4]).unwrap();
    blk.session.ops().set_config(0, &[0; 32]).unwrap();
    assert_eq!((config(&blk), syncs(&mut blk, &file)), (before, WRITE_BACK));
}

/// The behaviour for drivers that do not use the field.
#[test]
fn without_the_feature_the_flush_command_decides() {
    let (daemon, file, path) = setup(&[]);
    for (features, expected) in [
        (FEATURES, WRITE_BACK),
        (FEATURES.without(Features::BLK_FLUSH), WRITE_THROUGH),
        // It cannot flush, so it gets write-through, until it requests the other mode.
        (WITH_WCE.without(Features::BLK_FLUSH), WRITE_THROUGH),
    ] {
        let mut blk = Blk::with(&path, features, 1);
        let wce = u8::from(expected == WRITE_BACK);
        assert_eq!((config(&blk).wce, syncs(&mut blk, &file)), (wce, expected), "{features:?}");
        if !features.has(Features::BLK_CONFIG_WCE) {
            set_writeback(&blk, 1 - wce);
            assert_eq!(
                (config(&blk).wce, syncs(&mut blk, &file)),
                (wce, expected),
                "{features:?}: not asked for"
            );
        }
        drop(blk);
        daemon.wait_for("d0", "the close", |info| !info.state.open);
    }
}

/// The driver in the guest does not notice the second program that opens the device.
#[test]
fn a_second_open_finds_the_cache_as_the_driver_has_set_it() {
    let (_daemon, file, path) = setup(&[("handover", "open")]);
    let mut old = Blk::with(&path, WITH_WCE, 1);
    set_writeback(&old, 0);
    assert_eq!(syncs(&mut old, &file), WRITE_THROUGH);
    let mut new = Blk::negotiated(&path, WITH_WCE);
    new.map(vdpa_sys::memfd::create(c"blk", support::blk::MEMORY, None).unwrap());
    old.session.ops().suspend().unwrap();
    old.session.ops().set_status(Status::RESET).unwrap();
    new.run(1);
    assert_eq!((config(&new).wce, syncs(&mut new, &file)), (0, WRITE_THROUGH));
}
