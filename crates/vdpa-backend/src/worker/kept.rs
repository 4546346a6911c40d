//! [`KeptRings`]: the io_urings of worker threads that outlive this process, with the memory that is pinned in them.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use vdpa_core::types::Result;
use vdpa_sys::uring::{AdoptError, Ring, RingRecord};

use super::Buffers;
use super::buffers::SLOTS;
use super::slots::SlotTable;
use crate::persist::{Held, Kind, RINGS, Store, key, split_key};

/// How long the requests of a dead process may be in flight before its ring is given up, and its memory pinned again. A disk that
/// takes longer delays the devices of its thread only.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Has rings held for a successor of this process, and takes those of its predecessor.
pub(super) struct KeptRings {
    store: Arc<dyn Store>,
    /// Rings of the predecessor that no thread has taken, by number.
    left: Mutex<BTreeMap<u32, Left>>,
    /// Those of them that can be used, and that no thread has taken.
    ready: Mutex<BTreeMap<u32, ThreadRing>>,
    /// Numbers of rings that cannot be used, while the predecessor still uses them.
    unusable: Mutex<Vec<u32>>,
    /// Numbers of rings whose requests of the predecessor have ended.
    settled: Mutex<Vec<u32>>,
    next: AtomicU32,
    /// The predecessor still uses its rings.
    foreign: AtomicBool,
}

/// A ring of the predecessor.
struct Left {
    ring: OwnedFd,
    record: RingRecord,
    table: OwnedFd,
}

/// A ring for a thread that starts.
pub(super) struct ThreadRing {
    pub(super) ring: Ring,
    pub(super) buffers: Buffers,
    /// The number under which it is kept; `None` if it is not.
    pub(super) number: Option<u32>,
}

impl fmt::Debug for KeptRings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptRings").field("next", &self.next).finish_non_exhaustive()
    }
}

impl KeptRings {
    /// `items` are those of [`RINGS`] that the predecessor has had held. `foreign`: it still uses them.
    pub(super) fn new(store: Arc<dyn Store>, items: Vec<Held>, foreign: bool) -> Self {
        let (mut rings, mut tables, mut next) = (BTreeMap::new(), BTreeMap::new(), 0);
        for Held { key, kind, record, fd } in items {
            let Some(item) = split_key(key).1.checked_sub(RINGS) else { continue };
            let number = item / 2;
            next = next.max(number + 1);
            if kind == Kind::Ring {
                rings.extend(RingRecord::from_bytes(&record).map(|record| (number, (fd, record))));
            } else {
                tables.insert(number, fd);
            }
        }
        let mut left = BTreeMap::new();
        for (number, table) in tables {
            match rings.remove(&number) {
                Some((ring, record)) => drop(left.insert(number, Left { ring, record, table })),
                None => release(&*store, number),
            }
        }
        rings.into_keys().for_each(|number| release(&*store, number));
        let (left, next) = (Mutex::new(left), AtomicU32::new(next));
        let (ready, unusable, settled) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { store, left, ready, unusable, settled, next, foreign: AtomicBool::new(foreign) }
    }

    /// Whether the predecessor still uses its rings.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign.load(Ordering::Acquire)
    }

    /// The predecessor does not use its rings any more.
    pub(super) fn take_over(&self) {
        self.foreign.store(false, Ordering::Release);
    }

    /// The ring with this number, if the predecessor has left it, it can be used, and no thread has it.
    pub(super) fn take(&self, number: u32) -> Option<ThreadRing> {
        self.prepare(number);
        self.ready.lock().remove(&number)
    }

    /// Makes the ring with this number usable, if the predecessor has left it. If the predecessor has died, blocks until none of
    /// its requests is in flight there; if it lives, the ring is not [settled](Ring::settle). Returns whether none is.
    pub(super) fn prepare(&self, number: u32) -> bool {
        let Some(left) = self.left.lock().remove(&number) else {
            return self.settled.lock().contains(&number);
        };
        match self.try_take(number, left) {
            Ok(ring) => {
                self.ready.lock().insert(number, ring);
                self.settled.lock().push(number);
                true
            }
            Err(error) => {
                tracing::warn!(
                    ring = number,
                    "guest memory is pinned again, a ring cannot be taken over: {error}"
                );
                if self.is_foreign() {
                    self.unusable.lock().push(number);
                    // The predecessor completes them before this process goes on for it.
                    self.settled.lock().push(number);
                } else {
                    release(&*self.store, number);
                }
                false
            }
        }
    }

    fn try_take(&self, number: u32, Left { ring, record, table }: Left) -> Result<ThreadRing, AdoptError> {
        let table = SlotTable::open(table).map_err(|errno| AdoptError::Io { errno })?;
        let mut ring = Ring::map(ring, &record)?;
        table.shared().into_iter().for_each(|words| ring.share(words));
        let foreign = self.is_foreign();
        if !foreign {
            ring.settle(SETTLE_TIMEOUT)?;
        }
        let buffers = Buffers::of_other(ring.registrar(), table);
        if !foreign {
            buffers.take_over();
        }
        Ok(ThreadRing { ring, buffers, number: Some(number) })
    }

    /// Has a new ring held. If that fails it is a ring that ends with this process.
    pub(super) fn keep(&self, mut ring: Ring) -> ThreadRing {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let kept = SlotTable::create(SLOTS).and_then(|(fd, table)| {
            self.store.hold(key(0, RINGS + 2 * number + 1), Kind::Memory, fd.as_fd(), &[])?;
            self.store.hold_ring(key(0, RINGS + 2 * number), ring.as_fd(), &ring.save())?;
            Ok(table)
        });
        match kept {
            Ok(table) => {
                table.shared().into_iter().for_each(|words| ring.share(words));
                let buffers = Buffers::new(ring.registrar(), Some(table));
                ThreadRing { ring, buffers, number: Some(number) }
            }
            Err(errno) => {
                tracing::warn!(%errno, "a ring is not kept: after a crash guest memory will be pinned again");
                release(&*self.store, number);
                ThreadRing { buffers: Buffers::new(ring.registrar(), None), ring, number: None }
            }
        }
    }

    /// The thread has ended: its ring is not kept any more.
    pub(super) fn release(&self, number: u32) {
        release(&*self.store, number);
    }

    /// Gives up the rings that no thread has taken. The kernel ends what is in flight there.
    pub(super) fn release_left(&self) {
        let left = std::mem::take(&mut *self.left.lock()).into_keys();
        let ready = std::mem::take(&mut *self.ready.lock()).into_keys();
        left.chain(ready)
            .chain(self.unusable.lock().drain(..))
            .for_each(|number| release(&*self.store, number));
    }
}

/// One of both may be missing, if the process has ended in between.
fn release(store: &dyn Store, number: u32) {
    for item in [RINGS + 2 * number, RINGS + 2 * number + 1] {
        let _ = store.release(key(0, item));
    }
}
