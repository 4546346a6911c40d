//! [`ClientMemory`]: client memory as the parent of a device is given it, shown to the worker thread as views.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Removed, Table};
use vdpa_core::parent::SetMap;
use vdpa_core::types::{Asid, IovaRange, Perm, Result};
use vdpa_sys::guest::{GuestMemory, LinuxHost};
use vdpa_sys::rlimit;

use super::pins::Pins;
use super::{MemoryView, QueueControl};

/// The control side of a device that takes whole translation tables: its queues, and the client memory that they use.
///
/// It is what [`Parent::dma`](vdpa_core::parent::Parent::dma) returns as `Dma::SetMap`. With pinning, mapped memory is
/// registered with the io_uring of the device's thread, so that [`MemoryView::fixed`] finds it. Called by the control side
/// of the device, under the device's lock. Dropping it removes the device from its thread, as dropping a
/// [`QueueControl`] does, and unpins.
#[derive(Debug)]
pub struct ClientMemory {
    name: String,
    queues: QueueControl,
    pin: bool,
    /// By address space; one that was never mapped is missing.
    spaces: Vec<Space>,
}

/// What is known of one address space.
#[derive(Debug, Default)]
struct Space {
    /// Entries of its last table, to find out which ones a new table does not have.
    mapped: Vec<(IovaRange, Place)>,
    /// `None` without pinning.
    pins: Option<Pins>,
}

impl ClientMemory {
    /// Memory for the device of `queues`, which is called `name` in the log. `pin` keeps mapped memory registered with
    /// io_uring: the profile must say [`AddressMode::Pinned`](vdpa_core::parent::AddressMode::Pinned) then, and
    /// [`AddressMode::Objects`](vdpa_core::parent::AddressMode::Objects) otherwise.
    #[must_use]
    pub fn new(name: &str, queues: QueueControl, pin: bool) -> Self {
        Self { name: name.to_owned(), queues, pin, spaces: Vec::new() }
    }

    /// The queues that use the memory.
    #[must_use]
    pub const fn queues(&self) -> &QueueControl {
        &self.queues
    }
}

impl SetMap<LinuxHost> for ClientMemory {
    fn set_map(&mut self, asid: Asid, table: &Table<GuestMemory>) -> Result<()> {
        let index = asid.0 as usize;
        while self.spaces.len() <= index {
            self.spaces.push(Space { mapped: Vec::new(), pins: self.pin.then(Pins::default) });
        }
        let space = self.spaces.get_mut(index).ok_or(Errno::INVAL)?;
        let buffers = self.queues.buffers();
        let pinned = space.pins.as_mut().map_or(Ok(()), |pins| pins.pin_new(table, buffers));
        // An entry that cannot be pinned is left out of the view. The view is replaced all the same: entries that the
        // table does not have any more must be out of reach when this returns, whatever it returns.
        let serves = |entry: &&Mapping<_>| space.pins.as_ref().is_none_or(|pins| pins.serves(entry));
        let entries: Vec<_> = table.iter().filter(serves).collect();
        let pins = space.pins.as_ref().map(|pins| pins.of(&entries)).unwrap_or_default();
        let now: Vec<_> = entries.iter().map(|entry| place(entry)).collect();
        let removed = Removed::between(&space.mapped, &now);
        self.queues.set_view(asid, Arc::new(MemoryView::from_entries(&entries, pins)), removed)?;
        space.mapped = now;
        if let Some(pins) = &mut space.pins {
            pins.unpin_gone(table, buffers);
        }
        pinned.inspect_err(|errno| {
            tracing::warn!(device = %self.name, "guest memory cannot be pinned: {errno}{}", remedy(*errno));
        })
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

/// What can be done about a refused pin, for the log.
fn remedy(errno: Errno) -> String {
    match rlimit::memlock().soft {
        Some(bytes) if errno == Errno::NOMEM => format!(
            "; without CAP_IPC_LOCK this daemon may lock {bytes} bytes in all (RLIMIT_MEMLOCK): raise that, or add \
             the device with pin off"
        ),
        _ => String::new(),
    }
}

/// An entry as the data path sees it, without its range: where it is, and its rights.
#[derive(Debug)]
struct Place {
    memory: Location,
    perm: Perm,
    stale: bool,
}

/// Where the bytes of an entry are.
#[derive(Debug)]
enum Location {
    /// Mapped in this process, at this address.
    Mapped(usize),
    /// In an address space from which they are copied.
    Copied(GuestMemory),
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.memory, &other.memory) {
            (Location::Mapped(here), Location::Mapped(there)) => here == there,
            (Location::Copied(here), Location::Copied(there)) => here.same_object(0, there, 0),
            _ => false,
        };
        same && (self.perm, self.stale) == (other.perm, other.stale)
    }
}

fn place(entry: &Mapping<GuestMemory>) -> (IovaRange, Place) {
    let addr = entry.memory.host_addr(0);
    let memory = addr.map_or_else(|| Location::Copied(entry.memory.clone()), Location::Mapped);
    (entry.range, Place { memory, perm: entry.perm, stale: entry.stale })
}
