//! [`ClientMemory`]: turns the IOTLB tables of a device into views for its worker thread.

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

/// The [`QueueControl`] of a device together with the client memory that its queues use.
///
/// A [`Parent`](vdpa_core::parent::Parent) implementation owns it and returns it from
/// [`Parent::dma`](vdpa_core::parent::Parent::dma) as `Dma::SetMap`. Each new IOTLB table becomes a [`MemoryView`] of the
/// worker thread. With pinning, mapped memory is also registered with the thread's io_uring, so that
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
    /// The entries of the present view, to find out what a new one removes.
    mapped: Vec<(IovaRange, MappedMemory)>,
    /// `None` without pinning.
    pins: Option<Pins>,
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
        // An entry that cannot be pinned is left out of the view. The view is replaced even then: entries that the table
        // does not have any more must be unreachable when this returns, also when it returns an error.
        let serves = |entry: &&Mapping<_>| space.pins.as_ref().is_none_or(|pins| pins.is_usable(entry));
        let entries: Vec<_> = table.iter().filter(serves).collect();
        let pins = space.pins.as_ref().map(|pins| pins.of(&entries)).unwrap_or_default();
        let now: Vec<_> = entries.iter().map(|entry| location_of(entry)).collect();
        let removed = Removed::between(&space.mapped, &now);
        self.queues.set_view(asid, Arc::new(MemoryView::from_entries(&entries, pins)), removed)?;
        space.mapped = now;
        if let Some(pins) = &mut space.pins {
            pins.unpin_gone(table, buffers);
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

/// What an entry maps and with which permissions, to compare entries of two tables.
#[derive(Debug)]
struct MappedMemory {
    memory: Location,
    perm: Perm,
    stale: bool,
}

/// How the data path reaches the bytes of an entry.
#[derive(Debug)]
enum Location {
    /// At this address in this process.
    Mapped(usize),
    /// By copying from and to the client's address space.
    Copied(GuestMemory),
}

impl PartialEq for MappedMemory {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.memory, &other.memory) {
            (Location::Mapped(here), Location::Mapped(there)) => here == there,
            (Location::Copied(here), Location::Copied(there)) => here.same_object(0, there, 0),
            _ => false,
        };
        same && (self.perm, self.stale) == (other.perm, other.stale)
    }
}

fn location_of(entry: &Mapping<GuestMemory>) -> (IovaRange, MappedMemory) {
    let addr = entry.memory.host_addr(0);
    let memory = addr.map_or_else(|| Location::Copied(entry.memory.clone()), Location::Mapped);
    (entry.range, MappedMemory { memory, perm: entry.perm, stale: entry.stale })
}
