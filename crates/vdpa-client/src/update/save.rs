//! Collects the state for the successor.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;

use super::{Cause, Plan, Strategy};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::queue::Slot;
use crate::session::{Session, Setup};
use crate::state::{mappings, v2};
use crate::vring::GuestQueue;

/// The descriptors of an update. The state refers to them by their index here.
///
/// They are duplicates, so that prepare does not depend on the sessions, which may be driven meanwhile.
#[derive(Debug, Default)]
pub(super) struct Table {
    copies: Vec<OwnedFd>,
    /// Numbers of the originals in this process. An exec keeps them.
    numbers: Vec<i32>,
}

impl Table {
    fn add(&mut self, fd: BorrowedFd<'_>) -> Result<i32, Cause> {
        let copy = fd.try_clone_to_owned().map_err(|e| Cause::System {
            action: "copy a descriptor for the successor",
            source: Errno::from_raw(e.raw_os_error().unwrap_or(0)),
        })?;
        self.copies.push(copy);
        self.numbers.push(fd.as_raw_fd());
        i32::try_from(self.copies.len() - 1).map_err(|_| Cause::Invalid {
            what: "descriptors".to_owned(),
            reason: "there are too many".to_owned(),
        })
    }

    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.copies.iter().map(AsFd::as_fd).collect()
    }
}

/// Replaces the indexes into `table` by the numbers of the descriptors in this process, for an exec.
pub(super) fn by_number(state: &mut v2::Prepared, table: &Table) {
    let number = |place: &mut i32| {
        let at = usize::try_from(*place).ok();
        *place = at.and_then(|at| table.numbers.get(at)).copied().unwrap_or(-1);
    };
    state.memory.memories.iter_mut().for_each(|m| number(&mut m.fd));
    state.descriptors.descriptors.iter_mut().for_each(|d| number(&mut d.fd));
    for device in &mut state.devices.devices {
        device.fd.iter_mut().for_each(number);
        for queue in &mut device.queues {
            number(&mut queue.kick_fd);
            number(&mut queue.call_fd);
        }
        for queue in &mut device.guest_queues {
            number(&mut queue.kick_fd);
            number(&mut queue.call_fd);
        }
    }
}

/// Collects everything that is known before the switch, and the descriptors that it refers to.
pub(super) fn prepared<D: DeviceFile>(
    devices: &[(&str, &Session<D>)],
    strategies: &[Strategy],
    plan: &Plan,
    begun_unix_ns: u64,
) -> Result<(v2::Prepared, Table, Memories), Cause> {
    let mut table = Table::default();
    let mut memories = Memories::default();
    let mut announced = mappings::Announcement::default();
    let mut list = Vec::new();
    for (&(name, session), &strategy) in devices.iter().zip(strategies) {
        let (ops, setup) = session.parts();
        let open = (strategy != Strategy::Reopen).then(|| ops.fd());
        list.push(device(name, strategy, open, setup, &mut table, &mut memories)?);
        announced.mappings |= !setup.regions.nameless().is_empty();
        announced.disabled |= setup.vrings().any(|vring| !vring.enabled);
    }
    let mut descriptors = Vec::new();
    for (name, fd) in &plan.descriptors {
        descriptors.push(v2::Descriptor { name: name.clone(), fd: table.add(fd.as_fd())? });
    }
    let update = v2::Update {
        // Set when the way is known.
        way: String::new(),
        predecessor: super::steps::own_pid(),
        begun_unix_ns,
        late: plan.late.clone(),
    };
    let prepared = v2::Prepared {
        update,
        memory: v2::Memories { memories: std::mem::take(&mut memories.saved) },
        devices: v2::Devices { devices: list },
        descriptors: v2::Descriptors { descriptors },
        announced,
    };
    Ok((prepared, table, memories))
}

/// Each memory once, however many mappings use it.
#[derive(Debug, Default)]
pub(super) struct Memories {
    saved: Vec<v2::Memory>,
    /// Index in the state by the address of the [`Memory`].
    known: HashMap<usize, u32>,
    /// Kept, so that no other memory gets the address of one that is known.
    kept: Vec<Arc<Memory>>,
}

impl Memories {
    /// The index of a memory that was described.
    pub(super) fn index(&self, memory: &Arc<Memory>) -> Option<u32> {
        self.known.get(&(Arc::as_ptr(memory) as usize)).copied()
    }

    fn add(&mut self, memory: &Arc<Memory>, table: &mut Table) -> Result<u32, Cause> {
        let key = Arc::as_ptr(memory) as usize;
        if let Some(&at) = self.known.get(&key) {
            return Ok(at);
        }
        let problem = |problem| Cause::Memory { name: memory.name().to_owned(), problem };
        let (fd, offset) = memory.object().ok_or_else(|| problem(crate::error::MemoryProblem::Private))?;
        let at = u32::try_from(self.saved.len()).unwrap_or(u32::MAX);
        let fd = table.add(fd)?;
        self.saved.push(v2::Memory { name: memory.name().to_owned(), fd, offset, size: memory.size() });
        self.known.insert(key, at);
        self.kept.push(Arc::clone(memory));
        Ok(at)
    }
}

fn device(
    name: &str,
    strategy: Strategy,
    open: Option<BorrowedFd<'_>>,
    setup: &Setup,
    table: &mut Table,
    memories: &mut Memories,
) -> Result<v2::Device, Cause> {
    let path = setup.path.as_deref().map(|p| p.to_str().map(str::to_owned));
    // JSON has no path that is not UTF-8; only `reopen` needs the path.
    if matches!(path, Some(None)) && open.is_none() {
        let reason = "it is not UTF-8".to_owned();
        return Err(Cause::Invalid { what: "path of the device".to_owned(), reason });
    }
    let mut mappings = Vec::with_capacity(setup.regions.list().len());
    for region in setup.regions.list() {
        mappings.push(v2::Mapping {
            name: region.name().to_owned(),
            memory: memories.add(region.memory(), table)?,
            offset: region.offset(),
            iova: region.range().first(),
            size: region.range().size(),
            perm: region.perm().0,
            asid: 0,
        });
    }
    for (memory, _) in nameless_memories(setup) {
        memories.add(memory, table)?;
    }
    let queues = setup.queues.iter().map(|q| queue(q, table)).collect::<Result<_, _>>()?;
    let guest_queues = setup.guest_queues.iter().map(|q| guest_queue(q, table)).collect::<Result<_, _>>()?;
    Ok(v2::Device {
        name: name.to_owned(),
        strategy: strategy.name().to_owned(),
        fd: open.map(|fd| table.add(fd)).transpose()?,
        path: path.flatten(),
        device_id: setup.device_id,
        features: setup.features.0,
        backend_features: setup.backend.0,
        running: setup.running,
        mappings,
        queues,
        guest_queues,
    })
}

/// The memories of the mappings without a name, each once, with the first such mapping.
pub(super) fn nameless_memories(setup: &Setup) -> impl Iterator<Item = (&Arc<Memory>, u64)> {
    let mut seen = HashSet::new();
    let all = setup.regions.nameless().iter().map(|(&iova, mapping)| (&mapping.memory, iova));
    all.filter(move |(memory, _)| seen.insert(Arc::as_ptr(memory)))
}

fn queue(slot: &Slot, table: &mut Table) -> Result<v2::Queue, Cause> {
    let Slot { vring, region, layout, .. } = slot;
    Ok(v2::Queue {
        index: vring.index.0,
        size: layout.size,
        region: region.clone(),
        desc: layout.desc,
        avail: layout.avail,
        used: layout.used,
        kick_fd: table.add(vring.kick.as_fd())?,
        call_fd: table.add(vring.call.as_fd())?,
    })
}

fn guest_queue(queue: &GuestQueue, table: &mut Table) -> Result<v2::GuestQueue, Cause> {
    let ring = queue.ring();
    Ok(v2::GuestQueue {
        index: queue.index().0,
        size: ring.size,
        desc: ring.desc,
        driver: ring.driver,
        device: ring.device,
        kick_fd: table.add(queue.kick().as_fd())?,
        call_fd: table.add(queue.call().as_fd())?,
    })
}
