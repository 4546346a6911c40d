// SPDX-License-Identifier: GPL-2.0-only

//! Memory of clients: address spaces, their areas, pinned pages, files.

use super::gen;
use crate::uapi::ACCESS_WO;
use crate::rules::{Area, Run, PAGE};
use core::ptr::NonNull;
use kernel::error::{code::EFAULT, code::ENOMEM, to_result, Result};
use kernel::mm::Mm;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::{ordering::Relaxed, AtomicFlag};
use kernel::sync::Arc;

/// A counted reference to the address space of a client. It may be torn down; its account still counts (O17).
pub(crate) struct OwnedMm(ARef<Mm>);

impl OwnedMm {
    /// The address space of the calling process.
    pub(crate) fn current() -> Option<Self> {
        // SAFETY: Reads a field of the calling thread.
        let raw = unsafe { gen::vvl_current_mm() };
        // SAFETY: A thread that runs has a reference to its address space, so that another can be taken.
        (!raw.is_null()).then(|| Self(ARef::from(unsafe { Mm::from_raw(raw) })))
    }

    /// Takes over a reference.
    ///
    /// # Safety
    /// The caller gives away a reference taken with `mmgrab`.
    pub(super) unsafe fn from_raw(raw: NonNull<gen::mm_struct>) -> Self {
        // SAFETY: By the requirements of this function; `Mm` is transparent.
        Self(unsafe { ARef::from_raw(raw.cast()) })
    }

    /// Gives the reference away.
    pub(super) fn into_raw(self) -> *mut gen::mm_struct {
        ARef::into_raw(self.0).as_ptr().cast()
    }

    pub(super) fn as_raw(&self) -> *mut gen::mm_struct {
        self.0.as_raw()
    }

    /// Pages pinned by all users of the address space.
    pub(crate) fn pinned(&self) -> u64 {
        // SAFETY: A counted reference; the field is atomic.
        u64::try_from(unsafe { gen::vvl_pinned_vm(self.as_raw()) }).unwrap_or(0)
    }

    /// Adds pages to its account.
    pub(crate) fn charge(&self, pages: u64) {
        // SAFETY: A counted reference; the field is atomic.
        unsafe { gen::vvl_pinned_vm_add(self.as_raw(), pages as i64) };
    }

    /// Takes pages from its account.
    pub(crate) fn uncharge(&self, pages: u64) {
        // SAFETY: A counted reference; the field is atomic.
        unsafe { gen::vvl_pinned_vm_add(self.as_raw(), (pages as i64).wrapping_neg()) };
    }
}

/// The calling thread's RLIMIT_MEMLOCK, in pages.
pub(crate) fn memlock_pages() -> u64 {
    // SAFETY: Reads a limit of the calling thread.
    unsafe { gen::vvl_memlock_pages() }
}

/// The areas of the calling process, which do not change as long as this exists.
pub(crate) struct Areas(NonNull<gen::mm_struct>);

/// What is mapped somewhere.
pub(crate) struct Found {
    pub(crate) area: Area,
    /// The file behind a shared mapping, which a device can use.
    pub(crate) file: Option<FileRef>,
}

impl Areas {
    /// Takes the lock of the calling process's areas for reading.
    pub(crate) fn lock() -> Option<Self> {
        // SAFETY: Reads a field of the calling thread, which keeps its address space as long as it runs.
        let raw = NonNull::new(unsafe { gen::vvl_current_mm() })?;
        // SAFETY: The address space lives, and this thread does not hold its lock: no system call enters with it held.
        unsafe { gen::mmap_read_lock(raw.as_ptr()) };
        Some(Self(raw))
    }

    /// The first area that ends above `address`.
    pub(crate) fn at_or_above(&self, address: u64) -> Option<Found> {
        // SAFETY: The lock is held.
        let vma = unsafe { gen::find_vma(self.0.as_ptr(), address as usize) };
        // SAFETY: An area cannot go or change while the lock is held.
        let vma = unsafe { vma.as_ref() }?;
        // SAFETY: The two views of start and end are the same fields; all are plain numbers, and stable under the lock.
        let (start, end, flags) = unsafe {
            (vma.__bindgen_anon_1.__bindgen_anon_1.vm_start, vma.__bindgen_anon_1.__bindgen_anon_1.vm_end, gen::vvl_vma_flags(vma))
        };
        let usable = flags & gen::VM_SHARED as u64 != 0 && flags & (gen::VM_IO | gen::VM_PFNMAP) as u64 == 0;
        let file = NonNull::new(vma.vm_file).filter(|_| usable);
        Some(Found {
            area: Area { start: start as u64, end: end as u64, offset: (vma.vm_pgoff as u64).wrapping_mul(PAGE) },
            // SAFETY: The area has a reference to its file, so that another can be taken.
            file: file.map(|file| FileRef(unsafe { NonNull::new_unchecked(gen::get_file(file.as_ptr())) })),
        })
    }

    /// Pins up to `list.len()` pages from `address` on, for long, and returns their numbers in `list`. All or none.
    pub(crate) fn pin(&self, address: u64, write: bool, list: &mut PageList, count: usize) -> Result {
        let flags = gen::FOLL_LONGTERM | if write { gen::FOLL_WRITE } else { 0 };
        let pages = list.0.get_mut(..count).ok_or(EFAULT)?;
        // SAFETY: The lock of the calling thread's address space is held, and the list has room for `count` pointers.
        let pinned = unsafe { gen::pin_user_pages(address as usize, count, flags, pages.as_mut_ptr()) };
        if pinned < 0 {
            pages.fill(core::ptr::null_mut());
            return to_result(pinned as i32);
        }
        if pinned as usize == count {
            return Ok(());
        }
        // SAFETY: So many pages were pinned, and are in the list.
        unsafe { gen::unpin_user_pages(pages.as_mut_ptr(), pinned as usize) };
        pages.fill(core::ptr::null_mut());
        Err(ENOMEM)
    }
}

impl Drop for Areas {
    fn drop(&mut self) {
        // SAFETY: Taken by `lock`, on this thread: the type is not `Send`.
        unsafe { gen::mmap_read_unlock(self.0.as_ptr()) };
    }
}

/// Room for the pages of one call.
pub(crate) struct PageList(KVec<*mut gen::page>);

impl PageList {
    /// Pages in a list: as many as pointers fit in a page.
    pub(crate) const LEN: usize = 512;

    pub(crate) fn new() -> Result<Self> {
        Ok(Self(KVec::from_elem(core::ptr::null_mut(), Self::LEN, GFP_KERNEL)?))
    }

    /// The run of one page that a [`pin`](Areas::pin) has put at `index`. Called once for each.
    pub(crate) fn take(&mut self, index: usize, write: bool) -> Option<PinnedRun> {
        let page = self.0.get_mut(index).filter(|page| !page.is_null())?;
        // SAFETY: A pinned page has an entry in the kernel's list of pages.
        let first = unsafe { gen::vvl_page_to_pfn(*page) };
        *page = core::ptr::null_mut();
        Some(PinnedRun { run: Run { first, pages: 1 }, write })
    }
}

impl Drop for PageList {
    fn drop(&mut self) {
        for page in self.0.iter().filter(|page| !page.is_null()) {
            // SAFETY: Pinned by `pin` and not taken.
            unsafe { gen::unpin_user_page(*page) };
        }
    }
}

/// Pinned pages that follow one another in physical memory. Unpins them when dropped.
pub(crate) struct PinnedRun {
    run: Run,
    write: bool,
}

impl PinnedRun {
    /// Takes over the pins of a mapping.
    ///
    /// # Safety
    /// The mapping was made from a run that was forgotten, and is forgotten itself.
    pub(super) unsafe fn from_mapping(address: u64, size: u64, perm: u32) -> Self {
        Self { run: Run { first: address / PAGE, pages: size / PAGE }, write: perm & ACCESS_WO != 0 }
    }

    /// Appends the run that follows in memory; gives it back if it does not.
    pub(crate) fn join(&mut self, next: Self) -> Option<Self> {
        if next.write != self.write || !self.run.join(next.run) {
            return Some(next);
        }
        core::mem::forget(next);
        None
    }

    pub(crate) fn pages(&self) -> u64 {
        self.run.pages
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.run.pages.wrapping_mul(PAGE)
    }

    /// Its physical address.
    pub(crate) fn address(&self) -> u64 {
        self.run.first.wrapping_mul(PAGE)
    }
}

impl Drop for PinnedRun {
    fn drop(&mut self) {
        for number in self.run.first..self.run.first.saturating_add(self.run.pages) {
            // SAFETY: The run has a pin on each of its pages, which exist therefore.
            unsafe {
                let page = gen::vvl_pfn_to_page(number);
                if self.write {
                    gen::set_page_dirty_lock(page);
                }
                gen::unpin_user_page(page);
            }
        }
    }
}

/// A reference to a file.
pub(crate) struct FileRef(NonNull<gen::file>);

impl FileRef {
    /// Whether two files have the same content, so that equal offsets are the same memory.
    pub(crate) fn same_content(&self, other: &Self) -> bool {
        // SAFETY: Both files exist; what backs a file does not change.
        unsafe { (*self.0.as_ptr()).f_mapping == (*other.0.as_ptr()).f_mapping }
    }
}

impl Drop for FileRef {
    fn drop(&mut self) {
        // SAFETY: The reference that this type stands for.
        unsafe { gen::fput(self.0.as_ptr()) };
    }
}

/// An UPDATE, as long as a mapping of it exists.
pub(crate) struct Record {
    pub(crate) first: u64,
    pub(crate) last: u64,
    broken: AtomicFlag,
}

impl Record {
    pub(crate) fn new(first: u64, last: u64) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { first, last, broken: AtomicFlag::new(false) }, GFP_KERNEL)?)
    }

    /// Some of it is unmapped now.
    pub(crate) fn break_up(&self) {
        self.broken.store(true, Relaxed);
    }

    /// First and last byte, as long as all of it is mapped.
    pub(crate) fn whole(&self) -> Option<(u64, u64)> {
        (!self.broken.load(Relaxed)).then_some((self.first, self.last))
    }
}

/// Where the memory of a mapping by address comes from. Parents see the beginning: a `vdpa_map_file`.
#[repr(C)]
pub(crate) struct Origin {
    seen_by_parents: gen::vdpa_map_file,
    file: FileRef,
    pub(crate) record: Arc<Record>,
    stale: AtomicFlag,
}

impl Origin {
    pub(crate) fn new(file: FileRef, offset: u64, record: Arc<Record>) -> Result<Arc<Self>> {
        let seen_by_parents = gen::vdpa_map_file { file: file.0.as_ptr(), offset };
        Ok(Arc::new(Self { seen_by_parents, file, record, stale: AtomicFlag::new(false) }, GFP_KERNEL)?)
    }

    /// Whether byte `i` from the beginning is byte `j` of another.
    pub(crate) fn same_byte(&self, i: u64, other: &Self, j: u64) -> bool {
        self.file.same_content(&other.file)
            && self.seen_by_parents.offset.wrapping_add(i) == other.seen_by_parents.offset.wrapping_add(j)
    }

    /// Its address is one of another address space (R7).
    pub(crate) fn is_stale(&self) -> bool {
        self.stale.load(Relaxed)
    }

    pub(crate) fn mark_stale(&self) {
        self.stale.store(true, Relaxed);
    }
}
