//! The size of a disk, and its change while the disk is in use.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use rustix::fs::ftruncate;
use vdpa_backend::worker::ConfigSignal;
use vdpa_control::api::{CtlError, LimitChange, NewSize};
use vdpa_core::Errno;
use vdpa_core::blk::SECTOR;

use super::file::{self, Backing};
use super::lock::Locks;
use super::options::IOPS_MAX;
use crate::block::limit::{Limits, MAX_BURST_MS, SharedLimits};
use crate::devices::Controls;

/// Sectors of 512 bytes that a disk has: what configuration space says, and where requests end.
#[derive(Debug)]
pub(super) struct Capacity {
    sectors: AtomicU64,
    /// When the device was made.
    first: u64,
}

impl Capacity {
    pub(super) const fn new(sectors: u64) -> Self {
        Self { sectors: AtomicU64::new(sectors), first: sectors }
    }

    #[inline]
    pub(super) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, sectors: u64) {
        self.sectors.store(sectors, Ordering::Release);
    }

    /// The size, if it is not the one that the device was made with.
    pub(super) fn changed(&self) -> Option<u64> {
        Some(self.sectors()).filter(|now| *now != self.first)
    }
}

/// Changes the size. Does not keep the file open: a disk that was taken away is free at once.
#[derive(Debug)]
pub(super) struct DiskControls {
    file: Weak<OwnedFd>,
    locks: Weak<Locks>,
    path: PathBuf,
    is_block: bool,
    read_only: bool,
    block_size: u64,
    capacity: Arc<Capacity>,
    signal: ConfigSignal,
    limits: Arc<SharedLimits>,
}

impl DiskControls {
    pub(super) fn new(
        backing: &Backing,
        path: PathBuf,
        signal: ConfigSignal,
        limits: Arc<SharedLimits>,
    ) -> Self {
        Self {
            file: Arc::downgrade(&backing.file),
            locks: Arc::downgrade(&backing.locks),
            path,
            is_block: backing.is_block,
            read_only: backing.read_only,
            block_size: backing.block_size.into(),
            capacity: Arc::clone(&backing.capacity),
            signal,
            limits,
        }
    }

    /// Makes the file longer.
    fn extend(&self, file: &File, bytes: u64, has: u64) -> Result<(), CtlError> {
        let path = self.path.display();
        let refuse = |errno, why: &str, hint: &str| {
            Err(CtlError::new(errno, format!("{path} has {has} bytes, and {why}")).with_hint(hint))
        };
        if self.is_block {
            return refuse(
                Errno::INVAL,
                "is a block device",
                "Make that larger first; size auto then takes its size.",
            );
        }
        if self.read_only {
            return refuse(
                Errno::INVAL,
                "the disk is read only",
                "Make the file larger first, and give size auto.",
            );
        }
        if !self.locks.upgrade().is_none_or(|locks| locks.may_resize()) {
            return refuse(
                Errno::BUSY,
                "a program that shares it needs it as it is",
                "End that program first.",
            );
        }
        ftruncate(file, bytes).map_err(|error| {
            CtlError::new(
                Errno::from_raw(error.raw_os_error()),
                format!("cannot make {path} {bytes} bytes long: {error}"),
            )
        })
    }
}

impl Controls for DiskControls {
    fn resize(&self, size: NewSize, force: bool) -> Result<(), CtlError> {
        let gone = || CtlError::new(Errno::NODEV, "the disk was taken away");
        let file = self.file.upgrade().ok_or_else(gone)?;
        let io = |error: std::io::Error| {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(5));
            CtlError::new(errno, format!("{}: {error}", self.path.display()))
        };
        let file = File::from(file.try_clone().map_err(io)?);
        let has = file::size(&file, self.is_block).map_err(io)?;
        let wanted = match size {
            NewSize::Auto => has - has % self.block_size,
            NewSize::Bytes(bytes) => bytes,
        };
        if wanted == 0 || !wanted.is_multiple_of(self.block_size) || wanted > i64::MAX.unsigned_abs() {
            return Err(CtlError::new(Errno::INVAL, format!("a disk cannot have {wanted} bytes"))
                .with_hint(format!("A multiple of {} is right.", self.block_size)));
        }
        let now = self.capacity.sectors() * SECTOR;
        if wanted < now && !force {
            return Err(CtlError::new(
                Errno::INVAL,
                format!("the disk would shrink from {now} to {wanted} bytes"),
            )
            .with_hint(
                "Its driver would lose what is behind the new end; --force does it. The file stays as it is.",
            ));
        }
        if wanted > has {
            self.extend(&file, wanted, has)?;
        }
        self.capacity.set(wanted / SECTOR);
        tracing::info!(file = %self.path.display(), from = now, to = wanted, "the disk has another size");
        Ok(())
    }

    fn limit(&self, change: LimitChange) -> Result<(), CtlError> {
        let wrong = |what: String, right: String| Err(CtlError::new(Errno::INVAL, what).with_hint(right));
        let now = self.limits.get();
        let limits = Limits {
            iops: change.iops.unwrap_or(now.iops),
            bps: change.bps.unwrap_or(now.bps),
            burst_ms: change.burst_ms.unwrap_or(now.burst_ms),
        };
        if limits.iops > IOPS_MAX {
            return wrong(format!("iops is {}", limits.iops), format!("0 (none) to {IOPS_MAX} is right."));
        }
        if !(1..=MAX_BURST_MS).contains(&limits.burst_ms) {
            return wrong(
                format!("burst is {}", limits.burst_ms),
                format!("1 to {MAX_BURST_MS} milliseconds are right."),
            );
        }
        self.limits.set(limits);
        Ok(())
    }

    fn signal(&self) {
        self.signal.signal();
    }
}
