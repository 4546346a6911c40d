//! What is held.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vdpa_core::Errno;

use crate::client::Held;
use crate::fdstore::{self, Store};
use crate::protocol::{ITEMS_MAX, Item, Kind, Status};

/// Descriptors by key.
#[derive(Debug, Default)]
pub(super) struct Table(pub(super) BTreeMap<u64, Entry>);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) record: Vec<u8>,
    pub(super) fd: OwnedFd,
}

impl Table {
    /// Takes an item; on an error its descriptor is closed. A copy goes to the service manager, if there is one.
    pub(super) fn hold(
        &mut self,
        key: u64,
        entry: Entry,
        max: usize,
        store: Option<&Store>,
    ) -> Result<(), Errno> {
        if self.0.contains_key(&key) {
            return Err(Errno::EXIST);
        }
        if self.0.len() >= max {
            return Err(Errno::NOSPC);
        }
        if let Some((store, name)) = store.zip(fdstore::name(key, entry.kind, &entry.record))
            && let Err(errno) = store.store(&name, entry.fd.as_fd())
        {
            tracing::warn!(key, %errno, "the service manager did not take a descriptor: it would not survive the holder");
        }
        self.0.insert(key, entry);
        Ok(())
    }

    pub(super) fn release(&mut self, key: u64, store: Option<&Store>) -> Result<(), Errno> {
        let entry = self.0.remove(&key).ok_or(Errno::NOENT)?;
        if let Some((store, name)) = store.zip(fdstore::name(key, entry.kind, &entry.record)) {
            // At worst the next start of the service finds one that it does not need.
            let _ = store.remove(&name);
        }
        Ok(())
    }

    /// The items after a key, the descriptors to pass with them, and whether there are more.
    pub(super) fn list(&self, after: Option<u64>) -> (Vec<Item>, Vec<BorrowedFd<'_>>, bool) {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.0.range((from, Bound::Unbounded));
        let (mut items, mut fds) = (Vec::new(), Vec::new());
        for (&key, entry) in rest.by_ref().take(ITEMS_MAX) {
            let ring = entry.kind == Kind::Ring;
            let number = if ring { entry.fd.as_raw_fd() } else { -1 };
            items.push(Item { key, kind: entry.kind, number, record: entry.record.clone() });
            if !ring {
                fds.push(entry.fd.as_fd());
            }
        }
        (items, fds, rest.next().is_some())
    }

    /// With how much is held of each kind.
    pub(super) fn count_in(&self, mut status: Status) -> Status {
        status.held = self.0.len() as u64;
        status.kinds =
            Kind::ALL.map(|kind| self.0.values().filter(|entry| entry.kind == kind).count() as u64);
        status
    }

    /// Everything, which is held no more.
    pub(super) fn take(&mut self) -> Vec<Held> {
        let items = std::mem::take(&mut self.0).into_iter();
        items.map(|(key, Entry { kind, record, fd })| Held { key, kind, record, fd }).collect()
    }

    /// Has the service manager forget everything.
    pub(super) fn forget(&self, store: Option<&Store>) {
        let Some(store) = store else { return };
        let names = self.0.iter().filter_map(|(&key, entry)| fdstore::name(key, entry.kind, &entry.record));
        for name in names.chain(fdstore::name(super::counts::KEY, Kind::Memory, &[])) {
            let _ = store.remove(&name);
        }
    }

    /// Whether a FUSE connection has a request that was not read.
    pub(super) fn request_waits(&self) -> bool {
        self.0.values().filter(|entry| entry.kind == Kind::Fuse).any(|entry| {
            let mut fds = [PollFd::new(&entry.fd, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec::default())).is_ok()
                && fds.iter().any(|fd| fd.revents().contains(PollFlags::IN))
        })
    }
}
