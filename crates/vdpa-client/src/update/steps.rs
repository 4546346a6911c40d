//! The steps of the strategies: the successor uses them to restore a device, the predecessor to roll back.

use std::path::Path;
use std::time::{Duration, Instant};

use vdpa_core::Errno;
use vdpa_core::blk::BlkConfig;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::vq::QueueState;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::eventfd::EventFd;

use super::{Cause, DeviceReport, Phase};
use crate::device::{DeviceFile, agree, driver_ok, set_backend, set_status};
use crate::dma::{in_batch, map_all, remap_all};
use crate::error::Error;
use crate::session::Setup;

/// How long an open may fail with EBUSY after the device was closed: a FUSE server processes the close asynchronously.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_PAUSE: Duration = Duration::from_micros(200);

pub(super) fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// Runs `step` and adds the time it took to `ns`.
pub(super) fn timed<T>(ns: &mut u64, step: impl FnOnce() -> T) -> T {
    let begin = monotonic_ns();
    let result = step();
    *ns = ns.saturating_add(monotonic_ns().saturating_sub(begin));
    result
}

pub(super) fn suspend<D: VdpaOps>(ops: &D) -> Result<(), Error> {
    ops.suspend().map_err(Error::request("VHOST_VDPA_SUSPEND"))
}

pub(super) fn resume<D: VdpaOps>(ops: &D) -> Result<(), Error> {
    ops.resume().map_err(Error::request("VHOST_VDPA_RESUME"))
}

pub(super) fn new_owner<D: VdpaOps>(ops: &D) -> Result<(), Error> {
    ops.new_owner().map_err(Error::request("VHOST_NEW_OWNER"))
}

/// Becomes the owner again if another process became the owner. EBUSY means that this process still is.
pub(super) fn claim<D: VdpaOps>(ops: &D) -> Result<(), Error> {
    match ops.new_owner() {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(source) => Err(Error::Request { request: "VHOST_NEW_OWNER", source }),
    }
}

/// Vring bases in the order of `Setup::vrings`. The device must be suspended, or have no SUSPEND and no request in flight.
pub(super) fn bases<D: VdpaOps>(ops: &D, setup: &Setup) -> Result<Vec<u32>, Error> {
    setup
        .vrings()
        .map(|vring| ops.vring_base(vring.index).map_err(Error::request("VHOST_GET_VRING_BASE")))
        .collect()
}

/// Whether the driver of a block device controls the write cache (VIRTIO_BLK_F_CONFIG_WCE).
fn has_writeback(setup: &Setup) -> bool {
    const BLOCK: u32 = 2;
    setup.device_id == BLOCK && setup.features.has(Features::BLK_CONFIG_WCE)
}

/// Offset of the field `writeback` in the configuration space of a block device (virtio 1.2 section 5.2.4).
const WRITEBACK: u32 = 32;
const _: () = assert!(std::mem::offset_of!(BlkConfig, wce) == WRITEBACK as usize);

/// The cache mode that the driver has set. A reset or a close makes the device forget it. The driver does not know of that
/// reset, so without the old mode a power failure could lose data that it takes for stable.
pub(super) fn writeback<D: VdpaOps>(ops: &D, setup: &Setup) -> Result<Option<u8>, Error> {
    if !has_writeback(setup) {
        return Ok(None);
    }
    let mut byte = [0];
    ops.config(WRITEBACK, &mut byte).map_err(Error::request("VHOST_VDPA_GET_CONFIG"))?;
    let [byte] = byte;
    Ok(Some(byte))
}

pub(super) fn reset<D: VdpaOps>(ops: &D) -> Result<(), Error> {
    set_status(ops, Status::RESET)
}

/// Negotiates features with a reset device and sets up its vrings. Does not start it.
pub(super) fn set_up_again<D: VdpaOps<Event = EventFd>>(
    ops: &D,
    setup: &Setup,
    bases: &[u32],
) -> Result<(), Error> {
    agree(ops, setup.features)?;
    set_up_vrings(ops, setup, bases)
}

/// All steps between FEATURES_OK and DRIVER_OK.
pub(super) fn set_up_vrings<D: VdpaOps<Event = EventFd>>(
    ops: &D,
    setup: &Setup,
    bases: &[u32],
) -> Result<(), Error> {
    if let Some(byte) = setup.writeback.filter(|_| has_writeback(setup)) {
        ops.set_config(WRITEBACK, &[byte]).map_err(Error::request("VHOST_VDPA_SET_CONFIG"))?;
    }
    setup.vrings().zip(bases).try_for_each(|(vring, &base)| vring.set_up(ops, base_of(base, setup.features)))
}

fn base_of(base: u32, features: Features) -> QueueState {
    // The base of a split ring has 16 bits. If a device returned more, the low 16 are used.
    QueueState::decode(base, features)
        .or_else(|| QueueState::decode(base & 0xffff, features))
        .unwrap_or_else(|| QueueState::initial(features))
}

/// Starts a device that was set up again, if it ran before, and kicks every queue.
pub(super) fn run_again<D: VdpaOps>(ops: &D, setup: &Setup) -> Result<(), Error> {
    if setup.running {
        driver_ok(ops)?;
    }
    kick_all(setup);
    Ok(())
}

/// Kicks every queue. A device must remember kicks that arrive while it is suspended; one more kick is cheap and makes the
/// library independent of that.
pub(super) fn kick_all(setup: &Setup) {
    for vring in setup.vrings() {
        vring.kick.signal();
    }
}

/// Sends REMAP for every mapping, if the device uses owner addresses.
///
/// A device without IOTLB_PERSIST forgets its translation in a reset. The end of a batch, even of an empty one, restores
/// it (uapi-spec 4.5).
pub(super) fn remap<D: VdpaOps>(ops: &D, setup: &Setup, was_reset: bool) -> Result<(), Error> {
    if setup.backend.has(BackendFeatures::IOTLB_REMAP) {
        remap_all(ops, setup.regions.pieces(), setup.batch())
    } else if was_reset && !setup.backend.has(BackendFeatures::IOTLB_PERSIST) {
        in_batch(ops, setup.batch(), || Ok(()))
    } else {
        Ok(())
    }
}

/// Sets up and starts a device that was reset, with the addresses of this process.
pub(super) fn undo_reset<D: VdpaOps<Event = EventFd>>(
    ops: &D,
    setup: &Setup,
    bases: &[u32],
) -> Result<(), Error> {
    set_up_again(ops, setup, bases)?;
    remap(ops, setup, true)?;
    run_again(ops, setup)
}

/// Opens a device that was closed and sets it up as before, except for DRIVER_OK. Every page is pinned again.
pub(super) fn reopen<D: DeviceFile>(
    path: &Path,
    setup: &Setup,
    bases: &[u32],
    report: &mut DeviceReport,
) -> Result<D, (Phase, Cause)> {
    let owned = timed(&mut report.new_owner, || {
        let ops: D = open_with_retry(path)?;
        ops.set_owner().map_err(Error::request("VHOST_SET_OWNER"))?;
        set_backend(&ops, setup.backend)?;
        agree(&ops, setup.features)?;
        Ok(ops)
    });
    let ops = owned.map_err(|e: Error| (Phase::NewOwner, e.into()))?;
    timed(&mut report.remap, || map_all(&ops, setup.regions.pieces(), setup.batch()))
        .map_err(|e| (Phase::Remap, e.into()))?;
    timed(&mut report.vrings, || set_up_vrings(&ops, setup, bases)).map_err(|e| (Phase::Vrings, e.into()))?;
    Ok(ops)
}

/// The first value that occurs twice in a sorted list.
pub(super) fn first_duplicate<T: PartialEq>(sorted: &[T]) -> Option<&T> {
    sorted.windows(2).find_map(|pair| match pair {
        [one, other] if one == other => Some(one),
        _ => None,
    })
}

fn open_with_retry<D: DeviceFile>(path: &Path) -> Result<D, Error> {
    let begin = Instant::now();
    loop {
        match D::open(path) {
            Ok(ops) => return Ok(ops),
            Err(Errno::BUSY) if begin.elapsed() < BUSY_LIMIT => {
                std::thread::sleep(BUSY_PAUSE);
            }
            Err(source) => return Err(Error::Open { path: path.to_owned(), source, here: None }),
        }
    }
}
