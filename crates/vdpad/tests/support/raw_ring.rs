//! [`RawRing`]: a split ring written by hand: with indirect tables, and with requests that are answered in order, which the drivers of
//! the library do not have.

use std::collections::VecDeque;
use std::time::Instant;

use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::ring::split::area_sizes;
use vdpa_core::types::{QueueIndex, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::net::{Space, TIMEOUT};

/// Entries.
const SIZE: u16 = 64;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A ring whose descriptors are used in their order.
pub(crate) struct RawRing {
    index: QueueIndex,
    addr: VringAddr,
    kick: EventFd,
    call: EventFd,
    /// Descriptors used so far, and requests made and answered, modulo 65536.
    descriptors: u16,
    added: u16,
    answered: u16,
    /// Requests in flight: head, and the buffers that the device writes.
    open: VecDeque<(u16, Vec<Buffer>)>,
    /// With `IN_ORDER`: one used element stands for all requests up to the one that it names.
    in_order: bool,
    run: Option<(u32, u32)>,
}

impl RawRing {
    pub(crate) fn new(index: u16, space: &mut Space, in_order: bool) -> Self {
        let sizes = area_sizes(SIZE, false);
        let [desc, avail, used] = [sizes.desc, sizes.avail, sizes.used].map(|size| space.allocate(size).iova);
        Self {
            index: QueueIndex(index),
            addr: VringAddr { desc, avail, used, ..VringAddr::default() },
            kick: EventFd::new().unwrap(),
            call: EventFd::new().unwrap(),
            descriptors: 0,
            added: 0,
            answered: 0,
            open: VecDeque::new(),
            in_order,
            run: None,
        }
    }

    pub(crate) fn set_up(&self, device: &VhostVdpaFd) {
        device.set_vring_num(self.index, SIZE.into()).unwrap();
        device.set_vring_base(self.index, 0).unwrap();
        device.set_vring_addr(self.index, &self.addr).unwrap();
        device.set_vring_kick(self.index, Some(&self.kick)).unwrap();
        device.set_vring_call(self.index, Some(&self.call)).unwrap();
        device.set_vring_enable(self.index, true).unwrap();
    }

    /// Writes a descriptor to `at`.
    fn describe(space: &Space, at: u64, buffer: Buffer, flags: u16, next: u16) {
        let raw = [
            &buffer.iova.to_le_bytes()[..],
            &buffer.len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        space.write(Buffer { iova: at, len: 16 }, &raw.concat());
    }

    /// Writes any descriptor of the table.
    pub(crate) fn poke(&self, space: &Space, index: u16, buffer: Buffer, flags: u16, next: u16) {
        Self::describe(space, self.addr.desc + 16 * u64::from(index), buffer, flags, next);
    }

    /// Makes a request, in a table of its own or not; [`publish`](Self::publish) shows it to the device.
    pub(crate) fn add(
        &mut self,
        space: &mut Space,
        readable: &[Buffer],
        writable: &[Buffer],
        indirect: bool,
    ) {
        let all: Vec<_> = readable
            .iter()
            .map(|buffer| (*buffer, 0))
            .chain(writable.iter().map(|buffer| (*buffer, WRITE)))
            .collect();
        let count = u16::try_from(all.len()).unwrap();
        let head = self.descriptors % SIZE;
        let table = indirect.then(|| space.allocate(16 * all.len()));
        for (number, (buffer, flags)) in (0..).zip(all) {
            let last = number + 1 == count;
            let flags = if last { flags } else { flags | NEXT };
            match table {
                Some(table) => {
                    let at = table.iova + 16 * u64::from(number);
                    Self::describe(space, at, buffer, flags, number + 1);
                }
                None => self.poke(space, (head + number) % SIZE, buffer, flags, (head + number + 1) % SIZE),
            }
        }
        if let Some(table) = table {
            self.poke(space, head, table, INDIRECT, 0);
        }
        self.descriptors = self.descriptors.wrapping_add(if indirect { 1 } else { count });
        self.offer(space, head, writable.to_vec());
    }

    /// Makes a head available, whatever is there.
    pub(crate) fn offer(&mut self, space: &Space, head: u16, writable: Vec<Buffer>) {
        let at = self.addr.avail + 4 + 2 * u64::from(self.added % SIZE);
        space.write(Buffer { iova: at, len: 2 }, &head.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        self.open.push_back((head, writable));
    }

    /// Shows all requests to the device, and kicks.
    pub(crate) fn publish(&self, space: &Space) {
        space.write(Buffer { iova: self.addr.avail + 2, len: 2 }, &self.added.to_le_bytes());
        self.kick.signal();
    }

    fn used_index(&self, space: &Space) -> u16 {
        let bytes = space.read(Buffer { iova: self.addr.used + 2, len: 2 }, 2);
        u16::from_le_bytes(bytes.try_into().unwrap())
    }

    /// The next answer, which must come: the bytes that the device says it has written.
    #[track_caller]
    pub(crate) fn answer(&mut self, space: &Space) -> Vec<u8> {
        let deadline = Instant::now() + TIMEOUT;
        while self.used_index(space) == self.answered {
            self.run = None;
            assert!(Instant::now() < deadline, "queue {} answers nothing", self.index);
            let _ = self.call.wait(Some(std::time::Duration::from_millis(20)));
            let _ = self.call.drain();
        }
        let read = || {
            let at = self.addr.used + 4 + 8 * u64::from(self.answered % SIZE);
            let bytes = space.read(Buffer { iova: at, len: 8 }, 8);
            let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            (word(0), word(4))
        };
        let (id, len) = self.run.unwrap_or_else(read);
        self.answered = self.answered.wrapping_add(1);
        let place = self.open.iter().position(|(head, _)| u32::from(*head) == id);
        let (head, writable) =
            if self.in_order { self.open.pop_front() } else { self.open.remove(place.unwrap()) }.unwrap();
        let full: u32 = writable.iter().map(|buffer| buffer.len).sum();
        let is_named = u32::from(head) == id;
        self.run = if self.in_order && !is_named { Some((id, len)) } else { None };
        let mut left = if is_named { len } else { full };
        let mut bytes = Vec::new();
        for buffer in writable {
            let here = left.min(buffer.len);
            bytes.extend(space.read(buffer, here));
            left -= here;
        }
        assert_eq!(left, 0, "more was written than there is room");
        bytes
    }
}
