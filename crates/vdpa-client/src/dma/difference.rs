//! The difference of two memory tables, and how a device is told of it.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::types::{IotlbMsg, IovaRange, Perm, iotlb_type};

use super::{Piece, Region};
use crate::error::Error;
use crate::memory::Memory;

/// A region of the table that [`Session::set_memory`](crate::Session::set_memory) takes: `size` bytes from byte `offset` of a
/// memory on, for the device at `iova`.
#[derive(Clone, Debug)]
pub struct TableRegion {
    /// Name of the region, unique in the table. The next image finds it by this name.
    pub name: String,
    /// The memory.
    pub memory: Arc<Memory>,
    /// First byte of the region in the memory; a multiple of 4096.
    pub offset: u64,
    /// First I/O virtual address; a multiple of 4096.
    pub iova: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// Access for the device.
    pub perm: Perm,
}

/// What [`Session::set_memory`](crate::Session::set_memory) has changed, by the names of regions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryChange {
    /// Regions that were unmapped: they are not in the table, or are something else there.
    pub unmapped: Vec<String>,
    /// Regions that were mapped.
    pub mapped: Vec<String>,
    /// Regions that are the same memory at another address of this process.
    pub moved: Vec<String>,
    /// Number of regions that are as they were. The device was told nothing of them.
    pub kept: usize,
}

/// One message of a change, and how it is taken back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step<'a> {
    Unmap(Piece<'a>),
    Map(Piece<'a>),
    /// The same memory at another address of this process.
    Move {
        from: Piece<'a>,
        to: Piece<'a>,
    },
}

impl Step<'_> {
    const fn piece(&self) -> &Piece<'_> {
        match self {
            Self::Unmap(piece) | Self::Map(piece) | Self::Move { to: piece, .. } => piece,
        }
    }

    const fn message(&self) -> IotlbMsg {
        let Piece { iova, size, uaddr, perm, .. } = *self.piece();
        match self {
            Self::Unmap(_) => {
                IotlbMsg { iova, size, uaddr: 0, perm: Perm::NONE, kind: iotlb_type::INVALIDATE }
            }
            Self::Map(_) => IotlbMsg { iova, size, uaddr, perm, kind: iotlb_type::UPDATE },
            Self::Move { .. } => IotlbMsg { iova, size, uaddr, perm: Perm::NONE, kind: iotlb_type::REMAP },
        }
    }

    const fn inverse(&self) -> Self {
        match *self {
            Self::Unmap(piece) => Self::Map(piece),
            Self::Map(piece) => Self::Unmap(piece),
            Self::Move { from, to } => Self::Move { from: to, to: from },
        }
    }
}

/// A region may be a part of a table: what the difference has to know of it.
pub(crate) trait Place {
    fn range(&self) -> IovaRange;
    fn perm(&self) -> Perm;
    /// Address in this process.
    fn uaddr(&self) -> u64;
    /// Whether the first bytes of both are the same byte of the same object.
    fn same_bytes(&self, other: &Self) -> bool;
}

impl Place for Region {
    fn range(&self) -> IovaRange {
        self.range
    }

    fn perm(&self) -> Perm {
        self.perm
    }

    fn uaddr(&self) -> u64 {
        Self::uaddr(self)
    }

    fn same_bytes(&self, other: &Self) -> bool {
        self.memory.is_same_byte(self.offset, &other.memory, other.offset)
    }
}

/// What becomes of a region of the old table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is region number so many of the new table, as it is.
    Kept(usize),
    /// It is that region, at another address of this process.
    Moved(usize),
    Removed,
}

/// The difference of two tables, neither of which has overlapping regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// By number in the old table.
    pub(crate) old: Vec<Fate>,
    /// Numbers of the regions in the new table that were in no part of the old one.
    pub(crate) new: Vec<usize>,
}

impl Difference {
    pub(crate) fn of<P: Place>(old: &[P], new: &[P]) -> Self {
        let mut by_iova: Vec<(u64, usize)> = new.iter().map(|place| place.range().first()).zip(0..).collect();
        by_iova.sort_unstable();
        let mut is_new = vec![true; new.len()];
        let fate = |place: &P| {
            let first = place.range().first();
            let found = by_iova.binary_search_by_key(&first, |(first, _)| *first).ok();
            let number = found.and_then(|at| by_iova.get(at)).map(|(_, number)| *number);
            let Some((number, there)) = number.and_then(|number| Some((number, new.get(number)?))) else {
                return Fate::Removed;
            };
            let same = (place.range(), place.perm()) == (there.range(), there.perm());
            if !same || !place.same_bytes(there) {
                Fate::Removed
            } else if place.uaddr() == there.uaddr() {
                Fate::Kept(number)
            } else {
                Fate::Moved(number)
            }
        };
        let old: Vec<Fate> = old.iter().map(fate).collect();
        for fate in &old {
            if let Fate::Kept(number) | Fate::Moved(number) = fate
                && let Some(place) = is_new.get_mut(*number)
            {
                *place = false;
            }
        }
        let new = (0..).zip(is_new).filter_map(|(number, new)| new.then_some(number)).collect();
        Self { old, new }
    }

    /// The messages, in an order in which no two mappings ever overlap. Devices that do not use addresses of their owner are not told
    /// of what was moved: `remaps` is false then.
    pub(crate) fn steps<'a>(&self, old: &'a [Region], new: &'a [Region], remaps: bool) -> Vec<Step<'a>> {
        let (mut steps, mut moves) = (Vec::new(), Vec::new());
        for (region, fate) in old.iter().zip(&self.old) {
            match *fate {
                Fate::Removed => steps.push(Step::Unmap(region.piece())),
                Fate::Moved(number) if remaps => {
                    let to = new.get(number).map(Region::piece);
                    moves.extend(to.map(|to| Step::Move { from: region.piece(), to }));
                }
                Fate::Moved(_) | Fate::Kept(_) => {}
            }
        }
        let added = self.new.iter().filter_map(|&number| new.get(number));
        steps.into_iter().chain(moves).chain(added.map(|region| Step::Map(region.piece()))).collect()
    }

    /// What it is, in names.
    pub(crate) fn change(&self, old: &[Region], new: &[Region]) -> MemoryChange {
        let mut change = MemoryChange::default();
        for (region, fate) in old.iter().zip(&self.old) {
            match *fate {
                Fate::Removed => change.unmapped.push(region.name.clone()),
                Fate::Moved(number) => change.moved.extend(new.get(number).map(|there| there.name.clone())),
                Fate::Kept(_) => change.kept += 1,
            }
        }
        let added = self.new.iter().filter_map(|&number| new.get(number));
        change.mapped.extend(added.map(|region| region.name.clone()));
        change
    }
}

/// A change that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// The roll-back failed too: these regions of the old table are not mapped any more, or not at the old address.
    pub(crate) lost: Vec<String>,
}

/// Sends the messages of a change, in one batch if `batch`, so that a device that takes whole tables never has a part of it. All or
/// nothing: after a failure everything is taken back. `send` sends one message.
pub(crate) fn apply(
    steps: &[Step<'_>],
    batch: bool,
    mut send: impl FnMut(&IotlbMsg) -> Result<(), Errno>,
) -> Result<(), Failed> {
    const BEGIN: IotlbMsg = control(iotlb_type::BATCH_BEGIN);
    const END: IotlbMsg = control(iotlb_type::BATCH_END);
    if steps.is_empty() {
        return Ok(());
    }
    let request = |request, source| Failed { error: Error::Request { request, source }, lost: Vec::new() };
    if batch {
        send(&BEGIN).map_err(|source| request("VHOST_IOTLB_BATCH_BEGIN", source))?;
    }
    let mut done = 0;
    let result = steps.iter().try_for_each(|step| {
        send(&step.message()).map_err(|source| step.piece().failed(source))?;
        done += 1;
        Ok(())
    });
    let error = match result {
        // The device takes the whole table at the end of the batch.
        Ok(()) if batch => match send(&END) {
            Ok(()) => return Ok(()),
            Err(source) => request("VHOST_IOTLB_BATCH_END", source).error,
        },
        Ok(()) => return Ok(()),
        Err(error) => {
            let lost = take_back(steps.get(..done).unwrap_or_default(), &mut send);
            let ended = if batch { send(&END) } else { Ok(()) };
            // A device that refuses the table that it has had has another reason than a message.
            let lost = if ended.is_ok() { lost } else { names(steps) };
            return Err(Failed { error, lost });
        }
    };
    // A device that has refused at the end has the table that it had; the interface has the new one, except for what was moved.
    let begun = send(&BEGIN).is_ok();
    let lost = take_back(steps, &mut send);
    let ended = begun && send(&END).is_ok();
    Err(Failed { error, lost: if ended { lost } else { names(steps) } })
}

/// Sends the opposite of each step, the last one first; returns the names of regions of the old table for which that failed.
fn take_back(steps: &[Step<'_>], send: &mut impl FnMut(&IotlbMsg) -> Result<(), Errno>) -> Vec<String> {
    let mut lost = Vec::new();
    for step in steps.iter().rev() {
        let inverse = step.inverse();
        if send(&inverse.message()).is_err() {
            lost.push(inverse.piece().name.to_owned());
        }
    }
    lost
}

fn names(steps: &[Step<'_>]) -> Vec<String> {
    let of_old = steps.iter().filter(|step| !matches!(step, Step::Map(_)));
    of_old.map(|step| step.inverse().piece().name.to_owned()).collect()
}

const fn control(kind: u8) -> IotlbMsg {
    IotlbMsg { iova: 0, size: 0, uaddr: 0, perm: Perm::NONE, kind }
}

#[cfg(test)]
mod tests;
