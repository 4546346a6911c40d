//! [`Objects`]: the kernel objects that the state of a device names, with the numbers under which they are held.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::state::{MemoryRef, StateSink, StateSource};
use vdpa_core::types::{Perm, Result};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::{GuestMemory, LinuxHost, MemoryRecord, ObjectFile, ObjectId};
use vdpa_sys::process::{OwnerSpace, Spaces};
use vdpa_sys::space::{SpaceFds, SpaceRecord};

use super::items::device::FIRST_OBJECT;
use super::{Held, Kind, Store, key, split_key};

/// Each object has this many keys: an address space has three descriptors.
const STEP: u32 = 4;
/// Marks the number of an address space as that of memory to be copied from it.
const PRIVATE: u64 = 1 << 63;

/// Address spaces of all restored devices, so that those of one client charge one account.
#[derive(Debug, Default)]
pub struct RestoredSpaces(Mutex<HashMap<(i32, u64), OwnerSpace>>);

/// A memory object, as it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    pub(super) dev: (u32, u32),
    pub(super) inode: u64,
    pub(super) created_ns: u64,
    pub(super) write: bool,
}

impl FileId {
    const fn of(object: ObjectId, write: bool) -> Self {
        let ObjectId { dev_major, dev_minor, inode, created_ns, .. } = object;
        Self { dev: (dev_major, dev_minor), inode, created_ns, write }
    }
}

/// What has a number. Keeps the object, so that its descriptor is not used for another one.
#[derive(Debug)]
enum Object {
    File(FileId, Arc<ObjectFile>),
    Event(EventFd),
    Space(OwnerSpace),
}

/// The objects of one device.
#[derive(Debug)]
pub(super) struct Objects {
    device: u32,
    store: Arc<dyn Store>,
    objects: BTreeMap<u32, Object>,
    /// Numbers that the records of the present snapshot name, or those from which the device was restored.
    used: HashSet<u32>,
    next: u32,
}

impl Objects {
    pub(super) fn new(device: u32, store: Arc<dyn Store>) -> Self {
        Self { device, store, objects: BTreeMap::new(), used: HashSet::new(), next: FIRST_OBJECT }
    }

    /// Takes the items of a process that has died.
    pub(super) fn reopen(
        device: u32,
        store: Arc<dyn Store>,
        items: Vec<Held>,
        spaces: &RestoredSpaces,
        registry: &Spaces,
    ) -> Self {
        let mut this = Self::new(device, store);
        let mut parts: BTreeMap<u32, (SpaceRecord, BTreeMap<u32, OwnedFd>)> = BTreeMap::new();
        for Held { key, kind, record, fd } in items {
            let (_, item) = split_key(key);
            let (number, part) = (item - item % STEP, item % STEP);
            this.next = this.next.max(number + STEP);
            match (kind, decode(&record)) {
                (Kind::Event, _) => {
                    if let Ok(event) = EventFd::from_peer(fd) {
                        this.objects.insert(number, Object::Event(event));
                    }
                }
                (_, Some(Decoded::File(id))) => {
                    this.objects.insert(number, Object::File(id, Arc::new(fd.into())));
                }
                (_, Some(Decoded::Space(record))) => {
                    parts.entry(number).or_insert_with(|| (record, BTreeMap::new())).1.insert(part, fd);
                }
                (_, None) => tracing::error!(device, item, "a held descriptor is not known"),
            }
        }
        for (number, (record, mut fds)) in parts {
            let (pidfd, mem, maps) = (fds.remove(&0), fds.remove(&1), fds.remove(&2));
            let (Some(pidfd), Some(mem), Some(maps)) = (pidfd, mem, maps) else {
                // It was being held, or released: no record names it. The parts that are held are not known.
                for part in 0..STEP {
                    let _ = this.store.release(key(device, number + part));
                }
                continue;
            };
            let mut known = spaces.0.lock();
            let space = known
                .entry((record.pid, record.random_addr))
                .or_insert_with(|| registry.restore(record, SpaceFds { pidfd, mem, maps }))
                .clone();
            this.objects.insert(number, Object::Space(space));
        }
        this
    }

    /// Begins to note which objects are named.
    pub(super) fn begin_snapshot(&mut self) {
        self.used.clear();
    }

    /// Releases every object that was not named since [`begin_snapshot`](Self::begin_snapshot), or since the objects were reopened.
    pub(super) fn end_snapshot(&mut self) {
        let unused: Vec<u32> =
            self.objects.keys().copied().filter(|number| !self.used.contains(number)).collect();
        for number in unused {
            self.remove(number);
        }
    }

    /// Objects that have a number.
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    pub(super) fn release_all(&mut self) {
        let all: Vec<u32> = self.objects.keys().copied().collect();
        all.into_iter().for_each(|number| self.remove(number));
    }

    fn remove(&mut self, number: u32) {
        let parts = match self.objects.remove(&number) {
            Some(Object::Space(_)) => 3,
            Some(_) => 1,
            None => 0,
        };
        for part in 0..parts {
            if let Err(errno) = self.store.release(key(self.device, number + part)) {
                tracing::debug!(device = self.device, number, %errno, "a held descriptor was not released");
            }
            reach(CrashPoint::ObjectReleased);
        }
    }

    /// Gives an object the number that `known` has, or the next one, and holds what `hold` does.
    fn number(
        &mut self,
        known: Option<u32>,
        hold: impl FnOnce(&dyn Store, u64) -> Result<Object>,
    ) -> Result<u32> {
        let number = match known {
            Some(number) => number,
            None => {
                let number = self.next;
                reach(CrashPoint::HoldBegun);
                let object = hold(&*self.store, key(self.device, number))?;
                reach(CrashPoint::ObjectHeld);
                self.next = number.checked_add(STEP).ok_or(Errno::NOSPC)?;
                self.objects.insert(number, object);
                number
            }
        };
        self.used.insert(number);
        Ok(number)
    }

    fn find(&self, is: impl Fn(&Object) -> bool) -> Option<u32> {
        self.objects.iter().find(|(_, object)| is(object)).map(|(number, _)| *number)
    }

    fn get(&mut self, id: u64) -> Result<&Object> {
        let number = u32::try_from(id).map_err(|_| Errno::NOENT)?;
        let object = self.objects.get(&number).ok_or(Errno::NOENT)?;
        self.used.insert(number);
        Ok(object)
    }
}

impl StateSink<LinuxHost> for Objects {
    fn address_space(&mut self, space: &OwnerSpace) -> Result<u64> {
        let known = self.find(|object| matches!(object, Object::Space(other) if other.is_same(space)));
        let number = self.number(known, |store, key| {
            let fds = space.fds();
            let record = encode_space(space.record());
            store.hold(key, Kind::Other, fds.pidfd.as_fd(), &record)?;
            reach(CrashPoint::SpaceHalfHeld);
            store.hold(key + 1, Kind::Other, fds.mem.as_fd(), &record)?;
            store.hold(key + 2, Kind::Other, fds.maps.as_fd(), &record)?;
            Ok(Object::Space(space.clone()))
        })?;
        Ok(number.into())
    }

    fn memory(&mut self, memory: &GuestMemory) -> Result<MemoryRef> {
        match memory.record() {
            MemoryRecord::Object { object, write, .. } => {
                let id = FileId::of(object, write);
                let known = self.find(|object| matches!(object, Object::File(other, _) if *other == id));
                let number = self.number(known, |store, key| {
                    let file = memory.file().ok_or(Errno::INVAL)?;
                    store.hold(key, Kind::Memory, file.as_fd(), &encode_file(id))?;
                    Ok(Object::File(id, Arc::clone(file)))
                })?;
                Ok(MemoryRef { id: number.into(), offset: object.offset })
            }
            MemoryRecord::Private { uaddr, .. } => {
                let space = memory.space().ok_or(Errno::INVAL)?.clone();
                Ok(MemoryRef { id: StateSink::address_space(self, &space)? | PRIVATE, offset: uaddr })
            }
        }
    }

    fn event(&mut self, event: &EventFd) -> Result<u64> {
        let fd = event.as_fd().as_raw_fd();
        let known =
            self.find(|object| matches!(object, Object::Event(other) if other.as_fd().as_raw_fd() == fd));
        let number = self.number(known, |store, key| {
            store.hold(key, Kind::Event, event.as_fd(), &[])?;
            Ok(Object::Event(event.clone()))
        })?;
        Ok(number.into())
    }
}

impl StateSource<LinuxHost> for Objects {
    fn address_space(&mut self, id: u64) -> Result<OwnerSpace> {
        match self.get(id)? {
            Object::Space(space) => Ok(space.clone()),
            _ => Err(Errno::NOENT),
        }
    }

    fn memory(&mut self, at: MemoryRef, size: u64, perm: Perm) -> Result<GuestMemory> {
        if at.id & PRIVATE != 0 {
            let space = StateSource::address_space(self, at.id & !PRIVATE)?;
            return Ok(GuestMemory::from_private(space, at.offset, size));
        }
        let Object::File(id, file) = self.get(at.id)? else { return Err(Errno::NOENT) };
        if perm.write() && !id.write {
            return Err(Errno::ACCESS);
        }
        let object = ObjectId {
            dev_major: id.dev.0,
            dev_minor: id.dev.1,
            inode: id.inode,
            created_ns: id.created_ns,
            offset: at.offset,
        };
        GuestMemory::from_object(Arc::clone(file), object, size, id.write)
    }

    fn event(&mut self, id: u64) -> Result<EventFd> {
        match self.get(id)? {
            Object::Event(event) => Ok(event.clone()),
            _ => Err(Errno::NOENT),
        }
    }
}

pub(super) enum Decoded {
    File(FileId),
    Space(SpaceRecord),
}

pub(super) fn encode_file(id: FileId) -> Vec<u8> {
    let mut out = vec![1, u8::from(id.write)];
    out.extend_from_slice(&id.dev.0.to_le_bytes());
    out.extend_from_slice(&id.dev.1.to_le_bytes());
    out.extend_from_slice(&id.inode.to_le_bytes());
    out.extend_from_slice(&id.created_ns.to_le_bytes());
    out
}

pub(super) fn encode_space(record: SpaceRecord) -> Vec<u8> {
    let mut out = vec![2];
    out.extend_from_slice(&record.pid.to_le_bytes());
    out.extend_from_slice(&record.random_addr.to_le_bytes());
    out
}

pub(super) fn decode(record: &[u8]) -> Option<Decoded> {
    match record {
        [1, write, rest @ ..] => {
            let (major, rest) = rest.split_first_chunk()?;
            let (minor, rest) = rest.split_first_chunk()?;
            let (inode, rest) = rest.split_first_chunk()?;
            Some(Decoded::File(FileId {
                dev: (u32::from_le_bytes(*major), u32::from_le_bytes(*minor)),
                inode: u64::from_le_bytes(*inode),
                created_ns: u64::from_le_bytes(rest.try_into().ok()?),
                write: *write == 1,
            }))
        }
        [2, rest @ ..] => {
            let (pid, rest) = rest.split_first_chunk()?;
            let random_addr = u64::from_le_bytes(rest.try_into().ok()?);
            Some(Decoded::Space(SpaceRecord { pid: i32::from_le_bytes(*pid), random_addr }))
        }
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::fd::BorrowedFd;

    use parking_lot::Mutex;
    use vdpa_sys::uring::RingRecord;

    use super::*;

    /// What is held, by key.
    #[derive(Debug, Default)]
    pub(in crate::persist) struct Keys(Mutex<BTreeMap<u64, OwnedFd>>);

    impl Store for Keys {
        fn hold(&self, key: u64, _: Kind, fd: BorrowedFd<'_>, _: &[u8]) -> Result<()> {
            let fd = fd.try_clone_to_owned().unwrap();
            self.0.lock().insert(key, fd).map_or(Ok(()), |_| Err(Errno::EXIST))
        }

        fn hold_ring(&self, _: u64, _: BorrowedFd<'_>, _: &RingRecord) -> Result<()> {
            Err(Errno::INVAL)
        }

        fn release(&self, key: u64) -> Result<()> {
            self.0.lock().remove(&key).map(drop).ok_or(Errno::NOENT)
        }
    }

    /// A daemon may release an object after the candidate that replaces it has listed it: the candidate must not name it.
    #[test]
    fn what_was_listed_and_no_record_names_is_held_anew() {
        let store = Arc::new(Keys::default());
        let (named, listed) = (EventFd::new().unwrap(), EventFd::new().unwrap());
        let mut objects = Objects::new(1, Arc::clone(&store) as _);
        let numbers = [&named, &listed].map(|event| StateSink::event(&mut objects, event).unwrap());
        let item = |(&key, fd): (&u64, &OwnedFd)| {
            let fd = fd.try_clone().unwrap();
            Held { key, kind: Kind::Event, record: Vec::new(), fd }
        };
        let items = store.0.lock().iter().map(item).collect();
        let (spaces, registry) = (RestoredSpaces::default(), Spaces::new());
        let mut successor = Objects::reopen(1, Arc::clone(&store) as _, items, &spaces, &registry);
        store.release(key(1, u32::try_from(numbers[1]).unwrap())).unwrap();
        let restored = StateSource::event(&mut successor, numbers[0]).unwrap();
        successor.end_snapshot();
        assert_eq!(successor.len(), 1);
        assert_eq!(StateSink::event(&mut successor, &restored).unwrap(), numbers[0], "it is named");
        let again = StateSink::event(&mut successor, &listed).unwrap();
        assert!(store.0.lock().contains_key(&key(1, u32::try_from(again).unwrap())), "it is held");
        assert!(StateSource::event(&mut successor, numbers[1]).is_err());
    }
}
