//! [`Kept`]: what a device keeps outside of this process, beside its journal and its in-flight logs.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_sys::{memfd, open_mark};

use super::Controls;

/// What a disk was when it was made. It stays that, whatever becomes of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskFacts {
    /// Sectors of 512 bytes.
    pub(crate) sectors: u64,
    /// Discards are offered.
    pub(crate) discard: bool,
}

/// Given to a device when it is made, or made again after the end of the process that had served it.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// The device is made again: what it keeps must be there.
    restored: bool,
    memory: Mutex<Option<Arc<OwnedFd>>>,
    /// Queues of an interface.
    taps: Mutex<Vec<Arc<OwnedFd>>>,
    /// By which the keeper of a device is reached.
    keeper: Mutex<Option<Arc<OwnedFd>>>,
    /// The open file of the locks on a disk that others respect.
    lock: Mutex<Option<Arc<OwnedFd>>>,
    disk: Mutex<Option<DiskFacts>>,
    controls: Mutex<Option<Arc<dyn Controls>>>,
    /// What came with the request for a new device, until it is used.
    passed: Mutex<Option<Vec<OwnedFd>>>,
    /// It was said that descriptors come.
    is_passed: bool,
    /// Requests of the former process may be in flight.
    unsettled: bool,
    mark: Option<u64>,
}

impl Kept {
    /// For a new device that is to outlive this process.
    ///
    /// # Errors
    /// Of getrandom(2).
    pub(crate) fn new() -> Result<Self, Errno> {
        let mut bytes = [0; 8];
        getrandom(&mut bytes, GetRandomFlags::empty())
            .map_err(|error| Errno::from_raw(error.raw_os_error()))?;
        let mark = open_mark::FIRST | u64::from_ne_bytes(bytes) >> 2;
        Ok(Self { mark: Some(mark), ..Self::default() })
    }

    /// For a device that a predecessor of this process had served.
    pub(crate) fn restored(mark: Option<u64>, memory: Option<OwnedFd>) -> Self {
        Self { restored: true, memory: Mutex::new(memory.map(Arc::new)), mark, ..Self::default() }
    }

    /// With the descriptors that came with the request, if it says that they do.
    #[must_use]
    pub(crate) fn with_passed(self, passed: Option<Vec<OwnedFd>>) -> Self {
        Self { is_passed: passed.is_some(), passed: Mutex::new(passed), ..self }
    }

    /// Whether requests of the former process are known to have ended.
    #[must_use]
    pub(crate) const fn with_settled(mut self, settled: bool) -> Self {
        self.unsettled = !settled;
        self
    }

    /// With the queues of an interface that the former process had, in their order.
    #[must_use]
    pub(crate) fn with_taps(self, taps: Vec<OwnedFd>) -> Self {
        *self.taps.lock() = taps.into_iter().map(Arc::new).collect();
        self
    }

    /// With the open file of the locks on the disk that the former process had, if it had one.
    #[must_use]
    pub(crate) fn with_lock(self, lock: Option<OwnedFd>) -> Self {
        *self.lock.lock() = lock.map(Arc::new);
        self
    }

    /// With what the disk was when it was made, if the former process has said that.
    #[must_use]
    pub(crate) fn with_disk(self, disk: Option<DiskFacts>) -> Self {
        *self.disk.lock() = disk;
        self
    }

    /// Whether the device is made again.
    pub(crate) const fn is_restored(&self) -> bool {
        self.restored
    }

    /// Whether descriptors come with the request for this new device.
    pub(crate) const fn is_passed(&self) -> bool {
        self.is_passed
    }

    /// The descriptors that came with the request for a new device, once; `None` where none were to come.
    pub(crate) fn passed(&self) -> Option<Vec<OwnedFd>> {
        self.passed.lock().take()
    }

    /// Whether requests of the former process are known to have ended, so that nothing else needs to tell that.
    pub(crate) const fn is_settled(&self) -> bool {
        !self.unsettled
    }

    /// What the disk was when it was made; `None` for a new one.
    pub(crate) fn disk(&self) -> Option<DiskFacts> {
        *self.disk.lock()
    }

    /// The open file of the locks on the disk.
    pub(crate) fn lock(&self) -> Option<Arc<OwnedFd>> {
        self.lock.lock().clone()
    }

    /// Keeps what a disk is, and the open file of its locks.
    pub(crate) fn keep_disk(&self, disk: DiskFacts, lock: Option<&Arc<OwnedFd>>) {
        *self.disk.lock() = Some(disk);
        *self.lock.lock() = lock.cloned();
    }

    /// What of the device can be changed while it is in use.
    pub(crate) fn set_controls(&self, controls: Arc<dyn Controls>) {
        *self.controls.lock() = Some(controls);
    }

    /// As [`set_controls`](Self::set_controls) was told; `None` for a device of which nothing can be changed in this way.
    pub(crate) fn controls(&self) -> Option<Arc<dyn Controls>> {
        self.controls.lock().clone()
    }

    /// The queues of the interface of a device that is made again; `None` for a new one.
    pub(crate) fn taps(&self) -> Option<Vec<Arc<OwnedFd>>> {
        self.restored.then(|| self.taps.lock().clone())
    }

    /// Keeps the queues of an interface, which lasts as long as they do.
    pub(crate) fn keep_taps(&self, taps: &[Arc<OwnedFd>]) {
        *self.taps.lock() = taps.to_vec();
    }

    /// The queues that were kept.
    pub(crate) fn held_taps(&self) -> Vec<Arc<OwnedFd>> {
        self.taps.lock().clone()
    }

    /// With what reaches the keeper that the former process had started.
    #[must_use]
    pub(crate) fn with_keeper(self, keeper: Option<OwnedFd>) -> Self {
        *self.keeper.lock() = keeper.map(Arc::new);
        self
    }

    /// What reaches the [keeper](crate::keeper) of the device.
    pub(crate) fn keeper(&self) -> Option<Arc<OwnedFd>> {
        self.keeper.lock().clone()
    }

    /// Keeps what reaches a keeper, which lives as long as somebody has it.
    pub(crate) fn keep_keeper(&self, keeper: &Arc<OwnedFd>) {
        *self.keeper.lock() = Some(Arc::clone(keeper));
    }

    /// The memory file in which the device has its contents: `bytes` zeros for a new device, what the former process has left for
    /// one that is made again. It cannot be shrunk.
    ///
    /// # Errors
    /// `ENOENT` and `EINVAL` if the former contents are not there; `EMFILE`, `ENOMEM`.
    pub(crate) fn memory(&self, name: &CStr, bytes: u64) -> Result<Arc<OwnedFd>, CtlError> {
        let failed = |errno| CtlError::new(errno, format!("no memory for the contents of a disk: {errno}"));
        let mut memory = self.memory.lock();
        match &*memory {
            Some(known) if is_intact(known, bytes) => return Ok(Arc::clone(known)),
            Some(_) => return Err(CtlError::new(Errno::INVAL, "the contents of the disk have another size")),
            None if self.restored => {
                return Err(CtlError::new(Errno::NOENT, "the contents of the disk are gone"));
            }
            None => {}
        }
        let new = memfd::create(name, bytes, None).map_err(failed)?;
        fcntl_add_seals(&new, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|error| failed(Errno::from_raw(error.raw_os_error())))?;
        Ok(Arc::clone(memory.insert(Arc::new(new))))
    }

    /// The memory that the device has asked for.
    pub(crate) fn held_memory(&self) -> Option<Arc<OwnedFd>> {
        self.memory.lock().clone()
    }

    /// Place of the [mark](open_mark) that an open file of this device has, the same in every process that serves it: while
    /// another open file has it, operations of the former process are in flight. `None` for a device without a successor.
    pub(crate) const fn mark(&self) -> Option<u64> {
        self.mark
    }
}

/// Whether it has this size, and cannot lose it.
fn is_intact(memory: &OwnedFd, bytes: u64) -> bool {
    let sealed = fcntl_get_seals(memory).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    sealed && fstat(memory).is_ok_and(|stat| u64::try_from(stat.st_size) == Ok(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_made_once_and_must_be_there_the_next_time() {
        let new = Kept::new().unwrap();
        let memory = new.memory(c"disk", 8192).unwrap();
        assert!(Arc::ptr_eq(&memory, &new.memory(c"disk", 8192).unwrap()));
        assert!(Arc::ptr_eq(&memory, &new.held_memory().unwrap()));
        rustix::io::pwrite(&memory, b"data", 100).unwrap();
        assert!(rustix::fs::ftruncate(&memory, 0).is_err());
        let again = Kept::restored(new.mark(), Some(memory.try_clone().unwrap()));
        let mut bytes = [0; 4];
        rustix::io::pread(again.memory(c"disk", 8192).unwrap(), &mut bytes, 100).unwrap();
        assert_eq!((&bytes, again.mark()), (b"data", new.mark()));
        assert_eq!(again.memory(c"disk", 4096).unwrap_err().errno, Errno::INVAL);
        assert_eq!(Kept::restored(None, None).memory(c"disk", 8192).unwrap_err().errno, Errno::NOENT);
        let loose = memfd::create(c"disk", 8192, None).unwrap();
        assert!(Kept::restored(None, Some(loose)).memory(c"disk", 8192).is_err(), "it could be shrunk");
        assert_ne!(new.mark(), Kept::new().unwrap().mark());
        assert!(new.mark().unwrap() >= open_mark::FIRST && new.mark().unwrap() < 1 << 63);
        assert_eq!(Kept::default().mark(), None);
    }
}
