//! Reading a log that a process has left.

use super::layout::{self, DESCRIPTORS, Shape, Slot, State};
use super::{Log, LogError, LogMemory, Repeat};
use crate::features::Features;

/// A request to be repeated.
#[derive(Clone, Debug)]
pub(in crate::ring) struct Taken {
    pub(in crate::ring) name: u16,
    pub(in crate::ring) attempts: u8,
    pub(in crate::ring) position: u64,
    /// Positions it occupies: descriptors of a packed ring, 1 of a split one.
    pub(in crate::ring) count: u16,
    /// Buffer id, of a packed ring.
    pub(in crate::ring) id: u16,
    /// Slots it occupies, its name first.
    pub(in crate::ring) parts: Vec<u16>,
}

impl Taken {
    pub(in crate::ring) const fn repeat(&self) -> Repeat {
        Repeat { head: self.name, attempts: self.attempts }
    }
}

/// A used element that the driver may not have been shown.
#[derive(Clone, Copy, Debug)]
pub(in crate::ring) struct Pushed {
    name: u16,
    /// Position behind it.
    pub(in crate::ring) end: u64,
    pub(in crate::ring) wrote: bool,
}

impl<M: LogMemory> Log<M> {
    /// Reads and checks a log; returns it with the requests taken and the used elements pushed, in order. Stores nothing.
    ///
    /// The log is not trusted: every index is checked, and what contradicts itself is an error.
    pub(in crate::ring) fn open(
        memory: M,
        size: u16,
        features: Features,
    ) -> Result<(Self, Vec<Taken>, Vec<Pushed>), LogError> {
        let shape = Shape::new(size, features);
        let (published, lost) = layout::open(&memory, shape)?;
        let pushed = pushed(&memory, shape, published)?;
        let used = pushed.last().map_or(published, |pushed| pushed.end);
        let taken = taken(&memory, shape, used)?;
        let in_flight = taken.iter().map(|taken| u64::from(taken.count)).sum::<u64>() + u64::from(lost);
        let avail = used + in_flight;
        if avail - published > size.into() {
            return Err(LogError::Count { what: "in flight", count: avail - published });
        }
        check_order(&taken, shape, used + u64::from(lost), avail)?;
        Ok((Self { memory, shape, avail, used, published, lost, last: (0, 0, 0) }, taken, pushed))
    }
}

/// The used elements behind `published`. They follow each other without a gap.
fn pushed<M: LogMemory>(memory: &M, shape: Shape, published: u64) -> Result<Vec<Pushed>, LogError> {
    let mut list = Vec::new();
    for name in 0..shape.size {
        let slot = Slot::unpack(memory.load(shape.slot(name)));
        let wrote = slot.state == State::PushedWritten;
        if (wrote || slot.state == State::Pushed) && slot.position > published {
            list.push(Pushed { name, end: slot.position, wrote });
        }
    }
    list.sort_unstable_by_key(|pushed| pushed.end);
    let mut start = published;
    for pushed in &list {
        let length = pushed.end - start;
        let right = if shape.in_order {
            // An element stands for any number of requests.
            (1..=u64::from(shape.size)).contains(&length)
        } else if shape.packed {
            length > 0 && length == u64::from(layout::load_link(memory, shape, pushed.name).1)
        } else {
            length == 1
        };
        if !right {
            let reason = "its used element overlaps another, or there is a gap before it";
            return Err(LogError::Request { name: pushed.name, reason });
        }
        start = pushed.end;
    }
    Ok(list)
}

/// The requests taken and not pushed, in the order in which they were taken.
fn taken<M: LogMemory>(memory: &M, shape: Shape, used: u64) -> Result<Vec<Taken>, LogError> {
    let mut list = Vec::new();
    let mut seen = vec![false; shape.size.into()];
    for name in 0..shape.size {
        let Slot { state, attempts, position } = Slot::unpack(memory.load(shape.slot(name)));
        // With IN_ORDER the last one of a run is pushed for all of them.
        if state != State::Taken || shape.in_order && position < used {
            continue;
        }
        let wrong = |reason| LogError::Request { name, reason };
        if attempts == 0 {
            return Err(wrong("it was taken, but nobody has begun it"));
        }
        let (id, count) = if shape.packed {
            let (id, count, _) = layout::load_link(memory, shape, name);
            (id, count)
        } else {
            (0, 1)
        };
        if count == 0 || count > shape.size {
            return Err(wrong("it has no descriptors, or more than the ring"));
        }
        let parts = parts(memory, shape, name, count, &mut seen).map_err(wrong)?;
        list.push(Taken { name, attempts, position, count, id, parts });
    }
    list.sort_unstable_by_key(|taken| taken.position);
    Ok(list)
}

/// The slots of a request. Each belongs to one only.
fn parts<M: LogMemory>(
    memory: &M,
    shape: Shape,
    name: u16,
    count: u16,
    seen: &mut [bool],
) -> Result<Vec<u16>, &'static str> {
    let needed = if shape.packed { usize::from(count).div_ceil(DESCRIPTORS) } else { 1 };
    let mut parts = Vec::with_capacity(needed);
    let mut next = Some(name);
    while parts.len() < needed {
        let name = next.ok_or("its descriptors end too early")?;
        let seen = seen.get_mut(usize::from(name)).ok_or("it goes on outside the log")?;
        if std::mem::replace(seen, true) {
            return Err("it shares a slot with another request");
        }
        parts.push(name);
        next = if shape.packed { layout::load_link(memory, shape, name).2 } else { None };
    }
    Ok(parts)
}

/// Checks that the requests were taken one after the other and before `avail`.
fn check_order(taken: &[Taken], shape: Shape, first: u64, avail: u64) -> Result<(), LogError> {
    let mut end = if shape.in_order { first } else { 0 };
    for request in taken {
        let wrong = |reason| LogError::Request { name: request.name, reason };
        if request.position < end || shape.in_order && request.position != end {
            return Err(wrong("it does not follow the request before it"));
        }
        end = request.position + u64::from(request.count);
        if end > avail {
            return Err(wrong("it lies behind the position that the others add up to"));
        }
    }
    Ok(())
}
