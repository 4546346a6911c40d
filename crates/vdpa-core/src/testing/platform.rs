//! [`TestHost`]: a platform in memory, with processes that map memory objects, fork and exec.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::dirty::BitLog;
use crate::errno::Errno;
use crate::host::{AddressSpace, Bytes, Caller, Event, Fragment, Host, MemoryObject, PAGE_SIZE, PinAccount};
use crate::ring::Fault;
use crate::types::{Perm, Result};

/// Address of the first mapping of a process. Later mappings leave a hole before them.
const FIRST: u64 = 0x7f00_0000_0000;

/// The platform.
#[derive(Clone, Debug)]
pub struct TestHost;

impl Host for TestHost {
    type AddressSpace = TestSpace;
    type Memory = TestPiece;
    type Event = TestEvent;
}

/// An event with a counter. Clones are the same event.
#[derive(Clone, Debug, Default)]
pub struct TestEvent(Arc<AtomicU64>);

impl TestEvent {
    /// Returns the counter and sets it to 0.
    #[must_use]
    pub fn take(&self) -> u64 {
        self.0.swap(0, Ordering::AcqRel)
    }

    /// Whether both are the same event.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Event for TestEvent {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// A memory object, such as a memfd. Clones are the same object.
#[derive(Clone, Debug)]
pub struct TestObject(Arc<Mutex<Vec<u8>>>);

impl TestObject {
    /// `size` bytes of zeros.
    ///
    /// # Panics
    /// When `size` is no multiple of the page size.
    #[must_use]
    pub fn new(size: u64) -> Self {
        assert!(size.is_multiple_of(PAGE_SIZE), "size {size} is no multiple of {PAGE_SIZE}");
        Self(Arc::new(Mutex::new(vec![0; usize::try_from(size).unwrap_or(0)])))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes().len() as u64
    }
}

/// The object or address space that memory is part of.
#[derive(Clone, Debug)]
enum Backing {
    Object(TestObject),
    /// A whole address space, by address.
    Space(TestSpace),
}

/// A part of a [`TestObject`], or a [whole address space](AddressSpace::whole).
#[derive(Clone, Debug)]
pub struct TestPiece {
    backing: Backing,
    offset: u64,
    size: u64,
    shared: bool,
}

impl TestPiece {
    /// All of the object, or of the address space, that this is a part of; and where in it this begins.
    pub(super) fn whole(&self) -> (Self, u64) {
        let size = match &self.backing {
            Backing::Object(object) => object.size(),
            Backing::Space(_) => u64::MAX,
        };
        (Self { offset: 0, size, ..self.clone() }, self.offset)
    }

    /// A part of it; `None` when it has no such part.
    pub(super) fn part(&self, offset: u64, size: u64) -> Option<Self> {
        let end = offset.checked_add(size)?;
        let offset = self.offset.checked_add(offset)?;
        (end <= self.size).then(|| Self { offset, size, ..self.clone() })
    }

    fn range(&self, offset: u64, len: usize) -> Result<std::ops::Range<usize>, Fault> {
        let fault = Fault { addr: offset };
        if offset > self.size || len as u64 > self.size - offset {
            return Err(fault);
        }
        let start = usize::try_from(self.offset + offset).map_err(|_| fault)?;
        Ok(start..start + len)
    }
}

impl MemoryObject for TestPiece {
    fn is_shared(&self) -> bool {
        self.shared
    }

    fn pin_pages(&self) -> u64 {
        if self.shared { self.size.div_ceil(PAGE_SIZE) } else { 0 }
    }

    fn same_object(&self, offset: u64, other: &Self, other_offset: u64) -> bool {
        let same = match (&self.backing, &other.backing) {
            (Backing::Object(this), Backing::Object(other)) => Arc::ptr_eq(&this.0, &other.0),
            (Backing::Space(this), Backing::Space(other)) => this.id == other.id,
            _ => false,
        };
        same && self.offset + offset == other.offset + other_offset
    }

    fn bit_log(&self) -> Option<Arc<dyn BitLog>> {
        Some(Arc::new(self.clone()))
    }
}

impl BitLog for TestPiece {
    fn pages(&self) -> u64 {
        self.size.saturating_mul(8)
    }

    fn set(&self, first: u64, last: u64) {
        let Backing::Object(object) = &self.backing else { return };
        let mut bytes = object.bytes();
        for page in first..=last.min(self.pages().saturating_sub(1)) {
            let byte = usize::try_from(self.offset + page / 8).ok().and_then(|at| bytes.get_mut(at));
            byte.into_iter().for_each(|byte| *byte |= 1 << (page % 8));
        }
    }
}

impl Bytes for TestPiece {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let (range, fault) = (self.range(offset, buf.len())?, Fault { addr: offset });
        match &self.backing {
            Backing::Object(object) => buf.copy_from_slice(object.bytes().get(range).ok_or(fault)?),
            Backing::Space(space) => space.read(offset, buf).map_err(|_| fault)?,
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        let (range, fault) = (self.range(offset, data.len())?, Fault { addr: offset });
        match &self.backing {
            Backing::Object(object) => object.bytes().get_mut(range).ok_or(fault)?.copy_from_slice(data),
            Backing::Space(space) => space.write(offset, data).map_err(|_| fault)?,
        }
        Ok(())
    }
}

/// A mapping of a process: what the kernel calls a VMA.
#[derive(Clone, Debug)]
struct Vma {
    start: u64,
    memory: TestPiece,
}

/// An address space. Clones are the same one.
#[derive(Clone, Debug)]
pub struct TestSpace {
    id: u32,
    vmas: Arc<Mutex<Vec<Vma>>>,
    account: Arc<PinAccount>,
}

impl TestSpace {
    fn new(vmas: Vec<Vma>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { id, vmas: Arc::new(Mutex::new(vmas)), account: Arc::default() }
    }

    /// Whether both are the same address space.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// The same address space as another process holds it: with an account of its own, to which nothing is charged.
    /// Further mappings are made in one of the two only.
    #[must_use]
    pub fn in_successor(&self) -> Self {
        Self { id: self.id, vmas: Arc::new(Mutex::new(self.vmas().clone())), account: Arc::default() }
    }

    fn vmas(&self) -> MutexGuard<'_, Vec<Vma>> {
        self.vmas.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, uaddr: u64, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        for Fragment { size, memory } in self.resolve(uaddr, rest.len() as u64, Perm::RO)? {
            let size = usize::try_from(size).map_err(|_| Errno::FAULT)?;
            let (now, later) = std::mem::take(&mut rest).split_at_mut_checked(size).ok_or(Errno::FAULT)?;
            memory.read(0, now).map_err(|_| Errno::FAULT)?;
            rest = later;
        }
        Ok(())
    }

    fn write(&self, uaddr: u64, data: &[u8]) -> Result<()> {
        let mut rest = data;
        for Fragment { size, memory } in self.resolve(uaddr, rest.len() as u64, Perm::WO)? {
            let size = usize::try_from(size).map_err(|_| Errno::FAULT)?;
            let (now, later) = rest.split_at_checked(size).ok_or(Errno::FAULT)?;
            memory.write(0, now).map_err(|_| Errno::FAULT)?;
            rest = later;
        }
        Ok(())
    }
}

impl AddressSpace for TestSpace {
    type Memory = TestPiece;

    fn resolve(&self, uaddr: u64, size: u64, _perm: Perm) -> Result<Vec<Fragment<TestPiece>>> {
        let vmas = self.vmas();
        let mut fragments = Vec::new();
        let end = uaddr.checked_add(size).ok_or(Errno::FAULT)?;
        let mut at = uaddr;
        while at < end {
            let holds = |vma: &&Vma| vma.start <= at && at - vma.start < vma.memory.size;
            let vma = vmas.iter().find(holds).ok_or(Errno::FAULT)?;
            let skip = at - vma.start;
            let size = (end - at).min(vma.memory.size - skip);
            let memory = TestPiece { offset: vma.memory.offset + skip, size, ..vma.memory.clone() };
            fragments.push(Fragment { size, memory });
            at += size;
        }
        Ok(fragments)
    }

    fn resolve_mapping(&self, uaddr: u64) -> Result<Fragment<TestPiece>> {
        let size = {
            let vmas = self.vmas();
            let vma = vmas.iter().find(|vma| vma.start <= uaddr && uaddr - vma.start < vma.memory.size);
            vma.map(|vma| vma.memory.size - (uaddr - vma.start)).ok_or(Errno::FAULT)?
        };
        self.resolve(uaddr, size, Perm::RW)?.pop().ok_or(Errno::FAULT)
    }

    fn account(&self) -> &PinAccount {
        &self.account
    }

    fn whole(&self) -> Option<TestPiece> {
        Some(TestPiece { backing: Backing::Space(self.clone()), offset: 0, size: u64::MAX, shared: false })
    }
}

/// A process. Clones are the same one, also after [`exec`](Self::exec).
#[derive(Clone, Debug)]
pub struct TestProcess(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    space: TestSpace,
    memlock_pages: u64,
}

impl Default for TestProcess {
    fn default() -> Self {
        Self::new()
    }
}

impl TestProcess {
    /// A process with nothing mapped and no limit on pinned pages.
    #[must_use]
    pub fn new() -> Self {
        Self::with(TestSpace::new(Vec::new()), u64::MAX)
    }

    fn with(space: TestSpace, memlock_pages: u64) -> Self {
        Self(Arc::new(Mutex::new(State { space, memlock_pages })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same process, with the address space that another process knows it by.
    pub(super) fn with_space(&self, space: TestSpace) -> Self {
        Self::with(space, self.state().memlock_pages)
    }

    /// Its present address space.
    #[must_use]
    pub fn space(&self) -> TestSpace {
        self.state().space.clone()
    }

    /// Sets its soft `RLIMIT_MEMLOCK`.
    pub fn set_memlock_pages(&self, pages: u64) {
        self.state().memlock_pages = pages;
    }

    /// Pages charged to its present address space.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        self.state().space.account.pages()
    }

    /// Maps all of `object`, shared; returns the address.
    #[must_use]
    pub fn map(&self, object: &TestObject) -> u64 {
        self.map_part(object, 0, object.size(), true)
    }

    /// Maps a fresh object of `size` bytes, shared; returns the address.
    #[must_use]
    pub fn map_new(&self, size: u64) -> u64 {
        self.map(&TestObject::new(size))
    }

    /// Maps `size` bytes of `object` from `offset`, shared or private, right after the last shared mapping if that
    /// was made with [`map_next`](Self::map_next), else with a hole before it; returns the address.
    #[must_use]
    pub fn map_part(&self, object: &TestObject, offset: u64, size: u64, shared: bool) -> u64 {
        let at = self.end().map_or(FIRST, |end| end + 16 * PAGE_SIZE);
        self.place(at, object, offset, size, shared)
    }

    /// As [`map_part`](Self::map_part), without a hole before it: two VMAs that adjoin.
    #[must_use]
    pub fn map_next(&self, object: &TestObject, offset: u64, size: u64, shared: bool) -> u64 {
        self.place(self.end().unwrap_or(FIRST), object, offset, size, shared)
    }

    fn end(&self) -> Option<u64> {
        self.space().vmas().last().map(|vma| vma.start + vma.memory.size)
    }

    fn place(&self, start: u64, object: &TestObject, offset: u64, size: u64, shared: bool) -> u64 {
        self.map_at(start, object, offset, size, shared);
        start
    }

    /// As [`map_part`](Self::map_part), at an address where nothing is mapped.
    pub fn map_at(&self, start: u64, object: &TestObject, offset: u64, size: u64, shared: bool) {
        let memory = TestPiece { backing: Backing::Object(object.clone()), offset, size, shared };
        self.space().vmas().push(Vma { start, memory });
    }

    /// The object mapped at `uaddr`.
    #[must_use]
    pub fn object_at(&self, uaddr: u64) -> Option<TestObject> {
        let [fragment] = <[_; 1]>::try_from(self.space().resolve(uaddr, 1, Perm::RO).ok()?).ok()?;
        match fragment.memory.backing {
            Backing::Object(object) => Some(object),
            Backing::Space(_) => None,
        }
    }

    /// Copies from its memory.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn peek(&self, uaddr: u64, buf: &mut [u8]) -> Result<()> {
        self.space().read(uaddr, buf)
    }

    /// Copies into its memory.
    ///
    /// # Errors
    /// `EFAULT`.
    pub fn poke(&self, uaddr: u64, data: &[u8]) -> Result<()> {
        self.space().write(uaddr, data)
    }

    /// A child: another address space with the same mappings.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = self.state();
        Self::with(TestSpace::new(state.space.vmas().clone()), state.memlock_pages)
    }

    /// Replaces its address space by an empty one. The old one has no users then.
    pub fn exec(&self) {
        let mut state = self.state();
        state.space.vmas().clear();
        state.space = TestSpace::new(Vec::new());
    }
}

impl Caller<TestHost> for TestProcess {
    fn is(&self, owner: &TestSpace) -> bool {
        self.state().space.id == owner.id
    }

    fn address_space(&self) -> Result<TestSpace> {
        Ok(self.space())
    }

    fn memlock_pages(&self) -> u64 {
        self.state().memlock_pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_resolves_to_one_fragment_per_mapping() {
        let process = TestProcess::new();
        let (a, b) = (TestObject::new(2 * PAGE_SIZE), TestObject::new(PAGE_SIZE));
        let start = process.map(&a);
        let _ = process.map_next(&b, 0, PAGE_SIZE, false);
        let fragments = process.space().resolve(start + PAGE_SIZE, 2 * PAGE_SIZE, Perm::RW).unwrap();
        let seen: Vec<_> = fragments.iter().map(|f| (f.size, f.memory.is_shared())).collect();
        assert_eq!(seen, [(PAGE_SIZE, true), (PAGE_SIZE, false)]);
        assert_eq!(process.space().resolve(start, 4 * PAGE_SIZE, Perm::RW).err(), Some(Errno::FAULT));
        assert!(process.map(&a) > start + 3 * PAGE_SIZE, "a hole before it");
    }

    #[test]
    fn processes_share_objects_and_not_identities() {
        let process = TestProcess::new();
        let uaddr = process.map_new(PAGE_SIZE);
        let (space, child) = (process.space(), process.fork());
        assert!(process.is(&space) && process.clone().is(&space) && !child.is(&space));
        child.poke(uaddr + 5, &[7, 8]).unwrap();
        let mut bytes = [0; 2];
        process.peek(uaddr + 5, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 8]);
        process.exec();
        assert!(!process.is(&space));
        assert_eq!(process.peek(uaddr, &mut bytes), Err(Errno::FAULT));
        assert_eq!(child.peek(uaddr, &mut bytes), Ok(()));
    }
}
