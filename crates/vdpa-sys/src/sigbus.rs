//! A SIGBUS handler for truncated files: after a client has truncated a mapped file, the next access raises SIGBUS.
//!
//! The handler looks the address up in a table of guest mappings, maps a page of zeros at the fault, marks the
//! mapping poisoned and returns; the repeated access succeeds. Any other SIGBUS kills the process
//! as it would without the handler.
//!
//! A thread that blocks SIGBUS is not protected: the kernel kills the process for a fault whose signal is blocked.
//!
//! With a page of zeros no access needs code to recover from the fault. The data path only loads a flag, which is normally
//! never written.
#![expect(unsafe_code, reason = "a signal handler, and a mapping placed over another one")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use vdpa_core::Errno;

use crate::errno;
use crate::mmap::Prot;

/// Largest number of guest mappings at a time: eight times the 2048 entries a kernel IOTLB may have.
const SLOTS: usize = 16384;

/// One registered mapping. `end` is 0 in a free slot; it is set last and cleared first.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    writable: AtomicBool,
    poisoned: AtomicBool,
}

impl Slot {
    /// Whether `addr` lies in the mapping. The slot of the mapping that faulted does not change meanwhile. Any
    /// other slot may be freed and reused between the loads, which the second load of `end` detects.
    fn contains(&self, addr: usize) -> bool {
        let end = self.end.load(Ordering::Acquire);
        addr < end && addr >= self.start.load(Ordering::Acquire) && self.end.load(Ordering::Relaxed) == end
    }
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        writable: AtomicBool::new(false),
        poisoned: AtomicBool::new(false),
    }
}; SLOTS];

/// Number of slots that were ever used, which the handler searches.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Slots that were used and are free. The handler never takes this lock.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// A mapping in the table, until dropped. Drop it before the addresses are unmapped.
pub(crate) struct Registration {
    slot: &'static Slot,
    index: usize,
}

impl Registration {
    /// Registers `[addr, addr + span)`, mapped with pages of `page` bytes, and installs the handler if it is the
    /// first.
    ///
    /// # Errors
    /// `ENOMEM` when the table is full.
    pub(crate) fn new(addr: usize, span: usize, page: usize, prot: Prot) -> Result<Self, Errno> {
        install()?;
        let index = {
            let mut free = FREE.lock();
            match free.pop() {
                Some(index) => index,
                None => {
                    let index = USED.load(Ordering::Relaxed);
                    if index >= SLOTS {
                        return Err(Errno::NOMEM);
                    }
                    USED.store(index + 1, Ordering::Release);
                    index
                }
            }
        };
        let slot = TABLE.get(index).ok_or(Errno::NOMEM)?;
        // Release: a handler that sees this start also sees that the slot was free before, see `Slot::contains`.
        slot.start.store(addr, Ordering::Release);
        slot.page.store(page, Ordering::Relaxed);
        slot.writable.store(prot.write, Ordering::Relaxed);
        slot.poisoned.store(false, Ordering::Relaxed);
        slot.end.store(addr + span, Ordering::Release);
        Ok(Self { slot, index })
    }

    /// Whether an access has hit a page without memory.
    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        self.slot.poisoned.load(Ordering::Relaxed)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.slot.end.store(0, Ordering::Release);
        FREE.lock().push(self.index);
    }
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registration").field("slot", &self.index).field("poisoned", &self.poisoned()).finish()
    }
}

fn install() -> Result<(), Errno> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let mut action = default_action();
        action.sa_sigaction = on_sigbus as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
        // Uses the alternate stack of threads that have one, since the fault may occur near the end of a small stack.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        set_action(&action)
    })
}

fn default_action() -> libc::sigaction {
    // SAFETY: all-zero is a valid sigaction: no flags, an empty mask, SIG_DFL.
    unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() }
}

fn set_action(action: &libc::sigaction) -> Result<(), Errno> {
    // SAFETY: `action` is a valid structure whose handler is SIG_DFL or `on_sigbus`, which does only what a
    // signal handler may; the previous action is not asked for.
    if unsafe { libc::sigaction(libc::SIGBUS, action, ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(errno::last())
    }
}

/// Runs on any thread at any instruction: no locks, no allocation, no errno left changed.
extern "C" fn on_sigbus(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t to a SA_SIGINFO handler; it is valid while the handler runs.
    let code = unsafe { (*info).si_code };
    // SAFETY: as above; `si_addr` is only used when the code says that the kernel raised it for a fault.
    let addr = unsafe { (*info).si_addr() } as usize;
    if code > 0 && cover(addr) {
        return;
    }
    // Not a guest mapping: act as without a handler. A fault happens again when this returns; a signal that a process
    // sent does not, and is sent again (it stays blocked until this returns).
    let _ = set_action(&default_action());
    if code <= 0 {
        // SAFETY: raising a signal on the own thread has no precondition.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

/// Maps a page of zeros at `addr` if it is in a guest mapping.
fn cover(addr: usize) -> bool {
    let used = USED.load(Ordering::Acquire).min(SLOTS);
    let found = TABLE.iter().take(used).find(|slot| slot.contains(addr));
    let Some(slot) = found else { return false };
    let page = slot.page.load(Ordering::Relaxed);
    let mut prot = libc::PROT_READ;
    if slot.writable.load(Ordering::Relaxed) {
        prot |= libc::PROT_WRITE;
    }
    slot.poisoned.store(true, Ordering::Relaxed);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: errno is this thread's; it is saved here and restored below.
    let errno = unsafe { *libc::__errno_location() };
    let start = addr & !(page - 1);
    // SAFETY: the page lies within a registered mapping (which begins and ends at page borders), and the thread
    // that faulted holds that mapping, so it is not being unmapped; replacing a page of it by another is what
    // its owner asked for.
    let result = unsafe { libc::mmap(ptr::with_exposed_provenance_mut(start), page, prot, flags, -1, 0) };
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    result != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use vdpa_core::ring::{Area, Fault};

    use super::*;
    use crate::mmap::SharedMap;

    #[test]
    fn a_truncated_file_poisons_its_mapping_and_no_other() {
        let fd = crate::memfd::create(c"shrinks", 16384, None).unwrap();
        let other = crate::memfd::create(c"stays", 16384, None).unwrap();
        let map = SharedMap::map_guest(&fd, 0, 16384, Prot::RW, false).unwrap();
        let neighbour = SharedMap::map_guest(&other, 0, 16384, Prot::RW, false).unwrap();
        let area = map.area(8192, 4096).unwrap();
        area.write(0, b"data").unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert!(!map.poisoned());
        assert_eq!(area.load_u16(0), Err(Fault { addr: 0 }), "the offset is the area's");
        assert!(map.poisoned() && !neighbour.poisoned());
        assert!(map.write(12288, b"lost").is_err(), "a second page is covered too");
        assert!(map.read(0, &mut [0; 4]).is_err(), "pages that the file still has fault as well");
        neighbour.write(0, b"fine").unwrap();
        drop((map, area));
        let fresh = SharedMap::map_guest(&other, 0, 4096, Prot::RO, false).unwrap();
        assert!(!fresh.poisoned(), "a reused slot is not poisoned");
    }

    #[test]
    fn truncated_read_only_mappings_survive_too() {
        let fd = crate::memfd::create(c"shrinks", 8192, None).unwrap();
        let map = SharedMap::map_guest(&fd, 0, 8192, Prot::RO, false).unwrap();
        rustix::fs::ftruncate(&fd, 0).unwrap();
        assert!(map.read(4000, &mut [0; 200]).is_err());
    }
}
