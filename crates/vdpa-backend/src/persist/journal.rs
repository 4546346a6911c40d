//! [`DeviceLog`]: the journal of one device.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::device::state::{self, Record};
use vdpa_core::handover::Handover;
use vdpa_sys::journal::{AppendError, Contents, Journal, OpenError};
use vdpa_sys::process::Spaces;

use super::items::device::{DIRTY, FIRST_OBJECT, JOURNAL, LOGS, OF_LOG};
use super::objects::{Objects, RestoredSpaces};
use super::{DeviceFront, Held, Kind, Store, key, split_key};
use crate::front::vhost::AnyParent;

/// A kind of record in the journal: a [`DeviceFront`], then records of the device.
const CHANGE: u32 = 1;
/// The other kind, for a device that a second client can open: a [`DeviceFront`], then [sections](Section).
const SHARED_CHANGE: u32 = 2;
/// Bytes for which a journal has room at the start; it grows.
const INITIAL: usize = 16 << 10;
/// Bytes of the largest journal: three times what is written of a device with 2^20 mappings of 100 bytes, two tables of which
/// differ while a batch is open. It has as many bytes as are written, and no more than twice those of a checkpoint.
const MAX: usize = 768 << 20;
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
    /// It has a record of another program.
    #[error("the journal has a record of kind {kind}, which this program does not know")]
    Kind {
        /// The kind.
        kind: u32,
    },
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
    /// What was written last of a device that a second client can open.
    said: Option<Said>,
}

/// A device that a second client can open, as it is written to a log.
#[derive(Debug)]
pub struct SharedDevice<'a> {
    /// What both clients' devices share.
    pub handover: &'a Handover<AnyParent>,
    /// The devices, each with the number of its [`Handle`](vdpa_core::handover::Handle).
    pub devices: Vec<(u64, &'a mut Device<AnyParent>)>,
}

/// What was written last of a [`SharedDevice`].
#[derive(Debug)]
struct Said {
    /// Without the last request.
    front: DeviceFront,
    /// [`Handover::changes`].
    changes: u64,
    /// [`Handover::state`].
    state: Vec<Record>,
}

/// What a part of a [`SHARED_CHANGE`] is about. Each section begins with two numbers: this (1 byte: 0 for the handover, 1 for
/// a device, followed by 8 bytes with the number of its handle) and the bytes of its records (4 bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    /// What the devices share.
    Handover,
    /// The device of this handle.
    Device(u64),
}

/// The records of a device that a second client could open.
#[derive(Debug, Default)]
pub struct SharedRecords {
    /// Those that restore what the devices share.
    pub handover: Vec<Record>,
    /// Those of each device, by the number of its handle.
    pub devices: BTreeMap<u64, Vec<Record>>,
}

/// What a successor finds of one device.
#[derive(Debug)]
pub struct Reopened {
    /// To be continued.
    pub log: DeviceLog,
    /// The records that restore the device, if it is not shared.
    pub records: Vec<Record>,
    /// The records that restore a device that a second client could open. [`DeviceFront::shared`] says who has which.
    pub shared: Option<SharedRecords>,
    /// The last state of the device file.
    pub front: DeviceFront,
    /// The memory of the in-flight logs, if it was held.
    pub logs: Option<OwnedFd>,
    /// The memory of dirty pages; `None` of a program that had none.
    pub dirty: Option<OwnedFd>,
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
        Ok(Self { device, store, journal, objects, kept: 0, said: None })
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
        let (mut journal, mut logs, mut dirty, mut objects) = (None, None, None, Vec::new());
        for item in items {
            match split_key(item.key).1 {
                JOURNAL => journal = Some(item.fd),
                LOGS => logs = Some(item.fd),
                DIRTY => dirty = Some(item.fd),
                number if number >= FIRST_OBJECT => objects.push(item),
                _ => {}
            }
        }
        let missing = || LogError::System { action: "find the journal", errno: Errno::NOENT };
        let (journal, contents) = Journal::open(journal.ok_or_else(missing)?, MAX)?;
        let Contained { records, shared, front } = decode(&contents)?;
        reach(CrashPoint::JournalRead);
        let objects = Objects::reopen(device, Arc::clone(&store), objects, spaces, registry);
        let kept = objects.len();
        let log = Self { device, store, journal, objects, kept, said: None };
        Ok(Reopened { log, records, shared, front, logs, dirty })
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

    /// Has the memory of dirty pages held.
    ///
    /// # Errors
    /// [`LogError::System`].
    pub fn hold_dirty(&self, dirty: impl AsFd) -> Result<(), LogError> {
        let held = self.store.hold(key(self.device, DIRTY), Kind::Memory, dirty.as_fd(), &[]);
        held.map_err(system("have the memory of dirty pages held"))
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
        // The memory of a client that has closed the device is not to stay allocated until the next one has come and gone.
        let is_closed = front.opener.is_none() && self.objects.len() > 0;
        if is_closed || self.objects.len() > self.kept + OBJECTS {
            self.checkpoint(device, front)?;
            return Ok(true);
        }
        let payload = payload(front, &records)?;
        reach(CrashPoint::RecordReady);
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

    /// Writes what has changed of a device that a second client can open, if anything has or if `always`. Otherwise as
    /// [`commit`](Self::commit).
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn commit_shared(
        &mut self,
        mut shared: SharedDevice<'_>,
        front: &DeviceFront,
        always: bool,
    ) -> Result<(), LogError> {
        let mut payload = Vec::new();
        front.encode(&mut payload);
        let begin = payload.len();
        let failed = system("save what has changed");
        let now = Said {
            front: DeviceFront { last: None, ..front.clone() },
            changes: shared.handover.changes(),
            state: shared.handover.state(&mut self.objects).map_err(&failed)?,
        };
        let said = self.said.as_ref();
        if said.is_none_or(|said| said.changes != now.changes || said.state != now.state) {
            let records = shared.handover.snapshot(&mut self.objects).map_err(&failed)?;
            Section::Handover.write(&records, &mut payload)?;
        }
        for (handle, device) in &mut shared.devices {
            let records = device.take_changes(&mut self.objects).map_err(&failed)?;
            if !records.is_empty() {
                Section::Device(*handle).write(&records, &mut payload)?;
            }
        }
        if !always && payload.len() == begin && said.is_some_and(|said| said.front == now.front) {
            return Ok(());
        }
        let has_client = now.front.opener.is_some() || shared.devices.len() > 1;
        self.said = Some(now);
        if !has_client && self.objects.len() > 0 || self.objects.len() > self.kept + OBJECTS {
            return self.checkpoint_shared(&shared, front);
        }
        reach(CrashPoint::RecordReady);
        match self.journal.append(SHARED_CHANGE, &payload) {
            Ok(()) => Ok(()),
            Err(AppendError::Full { .. }) => self.checkpoint_shared(&shared, front),
            Err(AppendError::Io { errno }) => Err(LogError::System { action: "write the journal", errno }),
        }
    }

    fn checkpoint_shared(&mut self, shared: &SharedDevice<'_>, front: &DeviceFront) -> Result<(), LogError> {
        self.objects.begin_snapshot();
        let failed = system("save the device");
        let mut payload = Vec::new();
        front.encode(&mut payload);
        let records = shared.handover.snapshot(&mut self.objects).map_err(&failed)?;
        Section::Handover.write(&records, &mut payload)?;
        for (handle, device) in &shared.devices {
            let records = device.snapshot(&mut self.objects).map_err(&failed)?;
            Section::Device(*handle).write(&records, &mut payload)?;
        }
        self.replace(SHARED_CHANGE, &payload)
    }

    /// Replaces the journal by one record with everything, and releases the objects that it does not name.
    fn checkpoint(&mut self, device: &Device<AnyParent>, front: &DeviceFront) -> Result<(), LogError> {
        self.objects.begin_snapshot();
        let records = device.snapshot(&mut self.objects).map_err(system("save the device"))?;
        let payload = payload(front, &records)?;
        self.replace(CHANGE, &payload)
    }

    /// Replaces the journal by a record that names every object in use.
    fn replace(&mut self, kind: u32, payload: &[u8]) -> Result<(), LogError> {
        self.journal.checkpoint([(kind, payload)]).map_err(|error| match error {
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
        for item in OF_LOG.into_iter().rev() {
            // Not all of them are held of every device.
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

    /// Releases what is held and the restored device does not name. For a device that was reopened while another process served it:
    /// that one may have released some of it since.
    pub fn release_unnamed(&mut self) {
        self.objects.end_snapshot();
        self.kept = self.objects.len();
    }

    /// The number of the device.
    #[must_use]
    pub const fn device(&self) -> u32 {
        self.device
    }
}

impl SharedRecords {
    /// Adds what the sections in `bytes` say.
    fn read(&mut self, mut bytes: &[u8]) -> Result<(), LogError> {
        while !bytes.is_empty() {
            let (section, records, rest) = Section::read(bytes).ok_or(LogError::Damaged)?;
            bytes = rest;
            let records = state::decode_all(records)?;
            match section {
                Section::Handover => self.handover = records,
                Section::Device(handle) => self.devices.entry(handle).or_default().extend(records),
            }
        }
        Ok(())
    }
}

impl Section {
    fn write(self, records: &[Record], out: &mut Vec<u8>) -> Result<(), LogError> {
        match self {
            Self::Handover => out.push(0),
            Self::Device(handle) => {
                out.push(1);
                out.extend_from_slice(&handle.to_le_bytes());
            }
        }
        let at = out.len();
        out.extend_from_slice(&[0; size_of::<u32>()]);
        let begin = out.len();
        encode(records, out)?;
        let len = u32::try_from(out.len() - begin).map_err(|_| too_long())?.to_le_bytes();
        out.iter_mut().skip(at).zip(len).for_each(|(to, from)| *to = from);
        Ok(())
    }

    /// The section at the beginning of `bytes`, its records, and what follows.
    fn read(bytes: &[u8]) -> Option<(Self, &[u8], &[u8])> {
        let (kind, rest) = bytes.split_first()?;
        let (section, rest) = match kind {
            0 => (Self::Handover, rest),
            1 => {
                let (handle, rest) = rest.split_first_chunk()?;
                (Self::Device(u64::from_le_bytes(*handle)), rest)
            }
            _ => return None,
        };
        let (len, rest) = rest.split_first_chunk()?;
        let (records, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
        Some((section, records, rest))
    }
}

/// What a journal says of its device.
struct Contained {
    records: Vec<Record>,
    shared: Option<SharedRecords>,
    front: DeviceFront,
}

fn decode(contents: &Contents) -> Result<Contained, LogError> {
    if contents.damage.is_some() {
        return Err(LogError::Damaged);
    }
    let (mut records, mut front) = (Vec::new(), DeviceFront::default());
    let mut shared: Option<SharedRecords> = None;
    for record in &contents.records {
        let (now, rest) = DeviceFront::decode(&record.payload).ok_or(LogError::Damaged)?;
        front = now;
        match record.kind {
            CHANGE => records.extend(state::decode_all(rest)?),
            SHARED_CHANGE => shared.get_or_insert_default().read(rest)?,
            kind => return Err(LogError::Kind { kind }),
        }
    }
    Ok(Contained { records, shared, front })
}

fn payload(front: &DeviceFront, records: &[Record]) -> Result<Vec<u8>, LogError> {
    let mut payload = Vec::new();
    front.encode(&mut payload);
    encode(records, &mut payload)?;
    Ok(payload)
}

fn encode(records: &[Record], out: &mut Vec<u8>) -> Result<(), LogError> {
    records.iter().try_for_each(|record| state::encode(record, out)).map_err(|_| too_long())
}

const fn too_long() -> LogError {
    LogError::System { action: "encode a record", errno: Errno::MSGSIZE }
}

fn system(action: &'static str) -> impl Fn(Errno) -> LogError {
    move |errno| LogError::System { action, errno }
}
