//! What of a device file outlives this process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;

use super::opens::{Opens, SharedParent};
use super::{AnyParent, VhostVdpaFile};
use crate::front::fuse::Completed;
use crate::persist::{DeviceFront, DeviceLog, LogError};

/// The log of a device file, and what is needed to write it.
#[derive(Debug, Default)]
pub(super) struct Saved {
    /// `None` for a device that does not outlive this process.
    log: Mutex<Option<DeviceLog>>,
    /// Number of the request in progress.
    unique: AtomicU64,
    /// The last request that an earlier process had executed, with its result.
    last: Option<(u64, Completed)>,
}

impl Saved {
    pub(super) fn new(log: DeviceLog, last: Option<(u64, Completed)>) -> Self {
        Self { log: Mutex::new(Some(log)), unique: AtomicU64::new(0), last }
    }

    /// A request begins. Returns the result of one that was executed by an earlier process.
    pub(super) fn begin(&self, unique: u64, resent: bool) -> Option<Completed> {
        self.unique.store(unique, Ordering::Relaxed);
        let (last, completed) = self.last.as_ref()?;
        (resent && *last == unique).then(|| completed.clone())
    }

    /// Number of the request in progress.
    pub(super) fn unique(&self) -> u64 {
        self.unique.load(Ordering::Relaxed)
    }

    /// Has nothing held any more.
    pub(super) fn forget(&self) {
        if let Some(mut log) = self.log.lock().take() {
            log.remove();
        }
    }
}

impl VhostVdpaFile {
    /// Writes every change of the device into `log`, before the request that made it is answered. Called after
    /// [`with_handover`](Self::with_handover).
    ///
    /// # Errors
    /// As [`DeviceLog::commit`].
    pub fn with_log(self, log: DeviceLog) -> Result<Self, LogError> {
        let this = Self { saved: Saved::new(log, None), ..self };
        this.save_all()?;
        Ok(this)
    }

    /// Continues a device that an earlier process had served: `front` is what its log says of the file. Where a second client
    /// can open it, `shared` is what its devices share, and `successor` is the device of that client, if there is one.
    #[must_use]
    pub fn restored(
        self,
        log: DeviceLog,
        front: &DeviceFront,
        shared: Option<SharedParent>,
        successor: Option<Device<AnyParent>>,
    ) -> Self {
        let owned_since = (front.owned_since_ns > 0)
            .then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(front.owned_since_ns));
        Self {
            opens: Mutex::new(Opens::restored(front, shared, successor)),
            owned_since: Mutex::new(owned_since),
            saved: Saved::new(log, front.last.clone()),
            ..self
        }
    }

    /// Writes what was changed by another than the client, for example an administrator.
    pub fn log_change(&self) {
        self.save(None);
    }

    /// Has nothing of the device held any more: it is deleted.
    pub fn forget_log(&self) {
        self.saved.forget();
    }

    /// Writes what the request in progress has changed, with its result, which is not given for one that failed: that one
    /// fails again. A log that cannot be written is given up: the device then ends with this process.
    pub(super) fn save(&self, completed: Option<Completed>) {
        reach(CrashPoint::RequestExecuted);
        let last = completed.map(|completed| (self.saved.unique.load(Ordering::Relaxed), completed));
        if let Err(error) = self.write_log(last, false) {
            tracing::error!(device = %self.name, %error, "the device will not outlive this process");
            self.saved.forget();
        }
    }

    /// Writes the whole state.
    pub(super) fn save_all(&self) -> Result<(), LogError> {
        self.write_log(None, true)
    }

    fn write_log(&self, last: Option<(u64, Completed)>, always: bool) -> Result<(), LogError> {
        let mut log = self.saved.log.lock();
        let Some(log) = &mut *log else { return Ok(()) };
        let mut opens = self.opens.lock();
        let owned_since_ns = self.owned_since().map_or(0, since_1970);
        let mut front = DeviceFront { owned_since_ns, last, ..DeviceFront::default() };
        opens.save(&mut front);
        let Some(device) = self.device.lock().clone() else { return Ok(()) };
        let mut device = device.lock();
        match opens.shared(&mut device) {
            Some(shared) => log.commit_shared(shared, &front, always),
            None if always => log.commit_front(&mut device, &front),
            None => log.commit(&mut device, &front).map(drop),
        }
    }
}

/// A time in ns since 1970.
pub(super) fn since_1970(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
