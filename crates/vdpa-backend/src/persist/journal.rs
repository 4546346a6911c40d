//! [`DeviceLog`]: the journal of one device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::device::state::{self, Record};
use vdpa_sys::journal::{AppendError, Journal, OpenError};
use vdpa_sys::process::Spaces;

use super::objects::{FIRST_ITEM, Objects, RestoredSpaces};
use super::{DeviceFront, Held, Kind, Store, key, split_key};
use crate::front::vhost::AnyParent;

/// Items of a device that are not [objects](super::objects).
const JOURNAL: u32 = 0;
const LOGS: u32 = 1;
/// The only kind of record in the journal: a [`DeviceFront`], then records of the device.
const CHANGE: u32 = 1;
/// Bytes for which a journal has room at the start; it grows.
const INITIAL: usize = 16 << 10;
/// Bytes of the largest journal: mappings of 100 bytes, three times 256,000 of them.
const MAX: usize = 96 << 20;
/// Objects that a device may have held before a checkpoint is made to find out which are still used.
const OBJECTS: usize = 64;

/// Why the journal of a device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The holder, or memory, has failed.
    #[error("cannot {action}: {errno}")]
    System {
        /// What was being done.
        action: &'static str,
        /// The reason.
        errno: Errno,
    },
    /// The journal cannot be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A record in it is damaged.
    #[error("the journal of the device is damaged")]
    Damaged,
    /// Its records are of another version.
    #[error(transparent)]
    Decode(#[from] state::DecodeError),
}

/// Writes every change of a device into its journal.
///
/// Used by the thread that answers the device's requests, under the device's lock.
#[derive(Debug)]
pub struct DeviceLog {
    device: u32,
    store: Arc<dyn Store>,
    journal: Journal,
    objects: Objects,
    /// Objects after the last checkpoint.
    kept: usize,
}

/// What a successor finds of one device.
#[derive(Debug)]
pub struct Reopened {
    /// To be continued.
    pub log: DeviceLog,
    /// The records that restore the device.
    pub records: Vec<Record>,
    /// The last state of the device file.
    pub front: DeviceFront,
    /// The memory of the in-flight logs, if it was held.
    pub logs: Option<OwnedFd>,
}

impl DeviceLog {
    /// An empty journal for the device with the number `device`, which is held from now on.
    ///
    /// # Errors
    /// [`LogError::System`].
    pub fn create(device: u32, store: Arc<dyn Store>) -> Result<Self, LogError> {
        let journal = Journal::create(c"vdpa-device", INITIAL, MAX).map_err(system("make a journal"))?;
        store
            .hold(key(device, JOURNAL), Kind::Memory, journal.as_fd(), &[])
            .map_err(system("have the journal held"))?;
        let objects = Objects::new(device, Arc::clone(&store));
        Ok(Self { device, store, journal, objects, kept: 0 })
    }

    /// Continues the journal of a process that has died: `items` are all that is held of the device.
    ///
    /// # Errors
    /// [`LogError`].
    pub fn reopen(
        device: u32,
        store: Arc<dyn Store>,
        items: Vec<Held>,
        spaces: &RestoredSpaces,
        registry: &Spaces,
    ) -> Result<Reopened, LogError> {
        let (mut journal, mut logs, mut objects) = (None, None, Vec::new());
        for item in items {
            match split_key(item.key).1 {
                JOURNAL => journal = Some(item.fd),
                LOGS => logs = Some(item.fd),
                number if number >= FIRST_ITEM => objects.push(item),
                _ => {}
            }
        }
        let missing = || LogError::System { action: "find the journal", errno: Errno::NOENT };
        let (journal, contents) = Journal::open(journal.ok_or_else(missing)?, MAX)?;
        if contents.damage.is_some() {
            return Err(LogError::Damaged);
        }
        let (mut records, mut front) = (Vec::new(), DeviceFront::default());
        for record in contents.records.iter().filter(|record| record.kind == CHANGE) {
            let (now, rest) = DeviceFront::decode(&record.payload).ok_or(LogError::Damaged)?;
            front = now;
            records.extend(state::decode_all(rest)?);
        }
        let objects = Objects::reopen(device, Arc::clone(&store), objects, spaces, registry);
        let kept = objects.len();
        let log = Self { device, store, journal, objects, kept };
        Ok(Reopened { log, records, front, logs })
    }

    /// The objects that the records name, for [`Device::restore`].
    pub fn source(&mut self) -> &mut dyn state::StateSource<vdpa_sys::guest::LinuxHost> {
        &mut self.objects
    }

    /// Has the memory of the in-flight logs held.
    ///
    /// # Errors
    /// [`LogError::System`].
    pub fn hold_logs(&self, logs: impl AsFd) -> Result<(), LogError> {
        let held = self.store.hold(key(self.device, LOGS), Kind::Memory, logs.as_fd(), &[]);
        held.map_err(system("have the in-flight logs held"))
    }

    /// Writes what has changed of the device, if anything has, with `front`. When this returns the change outlives this
    /// process. Returns whether there was one.
    ///
    /// # Errors
    /// [`LogError::System`]: the change may be lost with this process.
    pub fn commit(&mut self, device: &mut Device<AnyParent>, front: &DeviceFront) -> Result<bool, LogError> {
        let records = device.take_changes(&mut self.objects).map_err(system("save what has changed"))?;
        if records.is_empty() {
            return Ok(false);
        }
        if self.objects.len() > self.kept + OBJECTS {
            self.checkpoint(device, front)?;
            return Ok(true);
        }
        let payload = payload(front, &records)?;
        match self.journal.append(CHANGE, &payload) {
            Ok(()) => Ok(true),
            Err(AppendError::Full { .. }) => self.checkpoint(device, front).map(|()| true),
            Err(AppendError::Io { errno }) => Err(LogError::System { action: "write the journal", errno }),
        }
    }

    /// Writes `front` although the device has not changed.
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_front(
        &mut self,
        device: &mut Device<AnyParent>,
        front: &DeviceFront,
    ) -> Result<(), LogError> {
        if self.commit(device, front)? {
            return Ok(());
        }
        match self.journal.append(CHANGE, &payload(front, &[])?) {
            Ok(()) => Ok(()),
            Err(AppendError::Full { .. }) => self.checkpoint(device, front),
            Err(AppendError::Io { errno }) => Err(LogError::System { action: "write the journal", errno }),
        }
    }

    /// Replaces the journal by one record with everything, and releases the objects that it does not name.
    fn checkpoint(&mut self, device: &Device<AnyParent>, front: &DeviceFront) -> Result<(), LogError> {
        self.objects.begin_snapshot();
        let records = device.snapshot(&mut self.objects).map_err(system("save the device"))?;
        let payload = payload(front, &records)?;
        self.journal.checkpoint([(CHANGE, payload.as_slice())]).map_err(|error| match error {
            AppendError::Full { .. } => LogError::System { action: "write the journal", errno: Errno::NOSPC },
            AppendError::Io { errno } => LogError::System { action: "write the journal", errno },
        })?;
        // Only now: what the journal before had named is not needed any more.
        self.objects.end_snapshot();
        self.kept = self.objects.len();
        Ok(())
    }

    /// Releases everything that is held of the device, which is deleted.
    pub fn remove(&mut self) {
        self.objects.release_all();
        for item in [LOGS, JOURNAL] {
            // The logs of a device without queues are not held.
            let _ = self.store.release(key(self.device, item));
        }
    }

    /// The memory of the in-flight logs, if this item of a device is that.
    #[must_use]
    pub fn logs_of(item: &Held) -> Option<BorrowedFd<'_>> {
        (split_key(item.key).1 == LOGS).then(|| item.fd.as_fd())
    }

    /// Whether nobody has changed the device since its journal was [reopened](Self::reopen), for a device that another process
    /// still serves.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.journal.is_current()
    }

    /// The number of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }
}

fn payload(front: &DeviceFront, records: &[Record]) -> Result<Vec<u8>, LogError> {
    let mut payload = Vec::new();
    front.encode(&mut payload);
    for record in records {
        state::encode(record, &mut payload)
            .map_err(|_| LogError::System { action: "encode a record", errno: Errno::MSGSIZE })?;
    }
    Ok(payload)
}

fn system(action: &'static str) -> impl Fn(Errno) -> LogError {
    move |errno| LogError::System { action, errno }
}
