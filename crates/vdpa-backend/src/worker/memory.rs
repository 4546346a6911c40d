//! [`ClientMemory`]: turns the IOTLB tables of a device into views for its worker thread.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::dirty::DirtyTracking;
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Removed, Table, Tree};
use vdpa_core::parent::SetMap;
use vdpa_core::types::{Asid, Result};
use vdpa_sys::guest::{GuestMemory, LinuxHost};
use vdpa_sys::rlimit;
use vdpa_sys::snapshot::Change;

use super::buffers::Buffers;
use super::pins::{Pins, is_pinnable};
use super::{MemoryView, QueueControl};

/// The [`QueueControl`] of a device together with the client memory that its queues use.
///
/// A [`Parent`](vdpa_core::parent::Parent) implementation owns it and returns it from
/// [`Parent::dma`](vdpa_core::parent::Parent::dma) as `Dma::SetMap`. Each new IOTLB table becomes a [`MemoryView`] of the
/// worker thread, at the cost of what has changed, however many entries there are. With pinning, mapped memory is also registered with the thread's io_uring, so that
/// [`MemoryView::fixed`] finds it.
///
/// It is called under the device's lock, on any thread but a worker. `set_map` blocks as
/// [`QueueControl::set_view`] does, and while pages are pinned: about half a second for 4 GiB of fresh 4 KiB pages. Dropping it
/// removes the device from its thread, as dropping a [`QueueControl`] does, and then unpins.
#[derive(Debug)]
pub struct ClientMemory {
    name: String,
    queues: QueueControl,
    pin: bool,
    /// By address space; one that was never mapped is missing.
    spaces: Vec<Space>,
}

/// State of one address space.
#[derive(Debug, Default)]
struct Space {
    /// The mappings that the view has, which they share with the table that they come from. Compared with the next table
    /// to find out what has changed.
    mapped: Tree<Mapping<GuestMemory>>,
    view: MemoryView,
    /// By the address in this process of each mapped part of an object: how many mappings lie in it.
    users: HashMap<usize, usize>,
    /// `None` without pinning.
    pins: Option<Pins>,
    /// That mappings are without registered buffers was said.
    warned: bool,
}

impl ClientMemory {
    /// Memory for the device of `queues`, which is called `name` in the log. Nothing is mapped. With `pin`, mapped memory is
    /// registered with io_uring: the profile must say [`AddressMode::Pinned`](vdpa_core::parent::AddressMode::Pinned) then, and
    /// [`AddressMode::Objects`](vdpa_core::parent::AddressMode::Objects) otherwise.
    #[must_use]
    pub fn new(name: &str, queues: QueueControl, pin: bool) -> Self {
        Self { name: name.to_owned(), queues, pin, spaces: Vec::new() }
    }

    /// The queues that use the memory, for the other methods of `Parent`.
    #[must_use]
    pub const fn queues(&self) -> &QueueControl {
        &self.queues
    }

    /// Makes these mappings, by first I/O virtual address, those of an address space: as
    /// [`set_map`](SetMap::set_map), for a parent that keeps mappings itself. Costs as much as has changed since the last call,
    /// where the tree was made from the one of that call.
    ///
    /// # Errors
    /// As [`set_map`](SetMap::set_map).
    pub fn set_entries(&mut self, asid: Asid, entries: &Tree<Mapping<GuestMemory>>) -> Result<()> {
        let index = asid.0 as usize;
        while self.spaces.len() <= index {
            self.spaces.push(Space { pins: self.pin.then(Pins::default), ..Space::default() });
        }
        let space = self.spaces.get_mut(index).ok_or(Errno::INVAL)?;
        let before = space.mapped.clone();
        let mut changes: Vec<Change<'_>> = Vec::new();
        entries.changes_since(&before, is_same, |_, before, after| changes.push((before, after)));
        let buffers = self.queues.buffers();
        let (now, pinned) = space.change(entries, &mut changes, buffers);
        let removed = Removed::of(changes.iter().filter_map(|(before, _)| before.map(|entry| entry.range)));
        let view = space.view.changed(&changes, &now, space.pins.as_ref().map(Pins::ranges));
        (space.mapped, space.view) = (now, view.clone());
        self.queues.set_view(asid, Arc::new(view), removed)?;
        if let Some(pins) = &mut space.pins {
            pins.release_unused(buffers);
            let without = pins.without_buffers();
            if without > 0 && !std::mem::replace(&mut space.warned, true) {
                tracing::warn!(
                    device = %self.name,
                    "no registered buffer is free: guest memory that is mapped from now on is served without"
                );
            }
            space.warned &= without > 0;
        }
        pinned.inspect_err(|errno| match *errno {
            // Another process still serves the device.
            Errno::AGAIN => {}
            errno => {
                tracing::warn!(device = %self.name, "guest memory cannot be pinned: {errno}{}", remedy(errno));
            }
        })
    }
}

impl Space {
    /// Pins what was added and unpins what was removed, by `changes`, which lead to `entries`. Returns the mappings that are
    /// to be seen. One that cannot be pinned is not among them, nor any that was added with it, and `changes` do not name it: the
    /// view changes even then, because mappings that `entries` does not have any more must be unreachable in any case.
    fn change<'a>(
        &mut self,
        entries: &'a Tree<Mapping<GuestMemory>>,
        changes: &mut Vec<Change<'a>>,
        buffers: &Buffers,
    ) -> (Tree<Mapping<GuestMemory>>, Result<()>) {
        let mut now = entries.clone();
        let mut pinned = Ok(());
        if let Some(pins) = &mut self.pins {
            changes.iter().filter_map(|(before, _)| *before).for_each(|entry| pins.unpin(entry));
            let added: Vec<&Mapping<_>> = changes.iter().filter_map(|(_, after)| *after).collect();
            let mut done = 0;
            pinned = added.iter().try_for_each(|entry| pins.pin(entry, buffers).inspect(|()| done += 1));
            if pinned.is_err() {
                added.iter().take(done).for_each(|entry| pins.unpin(entry));
                let lost: Vec<u64> = added
                    .iter()
                    .filter(|entry| is_pinnable(entry))
                    .map(|entry| entry.range.first())
                    .collect();
                changes.iter_mut().for_each(|(_, after)| *after = after.filter(|entry| !is_pinnable(entry)));
                changes.retain(|(before, after)| before.is_some() || after.is_some());
                lost.iter().for_each(|&first| drop(now.remove(first)));
            }
        }
        self.count(changes);
        (now, pinned)
    }

    /// Counts the mappings of each part of an object that is mapped in this process, and keeps the parts that have any.
    fn count(&mut self, changes: &[Change<'_>]) {
        let map = |entry: &Mapping<GuestMemory>| entry.memory.map().map(|(map, _)| map.clone());
        for map in changes.iter().filter_map(|(_, after)| after.and_then(map)) {
            let users = self.users.entry(map.addr()).or_default();
            *users += 1;
            if *users == 1 {
                Arc::make_mut(&mut self.view.memory).insert(Arc::new(map));
            }
        }
        for addr in changes.iter().filter_map(|(before, _)| before.and_then(map)).map(|map| map.addr()) {
            if let Entry::Occupied(mut users) = self.users.entry(addr) {
                *users.get_mut() -= 1;
                if *users.get() == 0 {
                    users.remove();
                    Arc::make_mut(&mut self.view.memory).remove(addr);
                }
            }
        }
    }
}

impl SetMap<LinuxHost> for ClientMemory {
    fn set_map(&mut self, asid: Asid, table: &Table<GuestMemory>) -> Result<()> {
        self.set_entries(asid, table.entries())
    }

    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        Some(self.queues.dirty_tracking())
    }
}

impl Drop for ClientMemory {
    fn drop(&mut self) {
        // If requests are still in flight, their registered buffers stay registered: another device must not get a slot
        // that the kernel may still read from or write to.
        if self.queues.remove() {
            let pins = self.spaces.iter_mut().filter_map(|space| space.pins.as_mut());
            pins.for_each(|pins| pins.unpin_all(self.queues.buffers()));
        }
    }
}

/// A remedy for a refused pin, for the log.
fn remedy(errno: Errno) -> String {
    match rlimit::memlock().soft {
        Some(bytes) if errno == Errno::NOMEM => format!(
            "; without CAP_IPC_LOCK this daemon may lock {bytes} bytes in all (RLIMIT_MEMLOCK): raise that, or add \
             the device with pin off"
        ),
        _ => String::new(),
    }
}

/// Whether a request cannot tell two mappings that begin at the same address from each other: it reaches the same bytes in the
/// same way.
fn is_same(before: &Mapping<GuestMemory>, after: &Mapping<GuestMemory>) -> bool {
    let memory = match (before.memory.host_addr(0), after.memory.host_addr(0)) {
        (Some(before), Some(after)) => before == after,
        (None, None) => before.memory.same_object(0, &after.memory, 0),
        _ => false,
    };
    memory && (before.range, before.perm, before.stale) == (after.range, after.perm, after.stale)
}
