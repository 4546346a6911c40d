//! A driver with `IN_ORDER` made of one without: used elements that stand for several requests are replaced by one each.

use std::collections::VecDeque;

use crate::ring::Memory;
use crate::testing::RingPair;

/// Requests made available and not answered, in order.
#[derive(Debug)]
pub(super) struct Expander {
    packed: bool,
    size: u64,
    /// Position behind the last one: requests (split) or descriptors (packed).
    end: u64,
    requests: VecDeque<Available>,
}

#[derive(Debug)]
struct Available {
    start: u64,
    name: u16,
    writable: u32,
}

impl Expander {
    pub(super) const fn new(packed: bool, size: u16, start: u64) -> Self {
        Self { packed, size: size as u64, end: start, requests: VecDeque::new() }
    }

    /// Notes a request that the driver has just made available.
    pub(super) fn add(&mut self, pair: &RingPair, descriptors: u64, writable: u32) {
        let (start, mut name) = (self.end, [0; 2]);
        let (at, count) = if self.packed {
            (pair.ring.desc + (start + descriptors - 1) % self.size * 16 + 12, descriptors)
        } else {
            (pair.ring.avail + 4 + start % self.size * 2, 1)
        };
        pair.memory.read(at, &mut name).unwrap();
        self.requests.push_back(Available { start, name: u16::from_le_bytes(name), writable });
        self.end += count;
    }

    pub(super) fn expand(&mut self, pair: &RingPair) {
        while let Some(first) = self.requests.front().map(|first| first.start)
            && let Some((name, len)) = self.used(pair, first)
        {
            let count = 1 + self.requests.iter().position(|request| request.name == name).unwrap();
            for (i, request) in self.requests.drain(..count).enumerate() {
                let len = if i + 1 == count { len } else { request.writable };
                let mut raw = len.to_le_bytes().to_vec();
                raw.extend(request.name.to_le_bytes());
                if self.packed {
                    let lap = (request.start / self.size).is_multiple_of(2);
                    let flags: u16 = if lap { 1 << 7 | 1 << 15 } else { 0 } | if len > 0 { 2 } else { 0 };
                    raw.extend(flags.to_le_bytes());
                    pair.memory.write(pair.ring.desc + request.start % self.size * 16 + 8, &raw).unwrap();
                } else {
                    let mut raw = u32::from(request.name).to_le_bytes().to_vec();
                    raw.extend(len.to_le_bytes());
                    pair.memory.write(pair.ring.used + 4 + request.start % self.size * 8, &raw).unwrap();
                }
            }
        }
    }

    /// The used element at a position, if it is there.
    fn used(&self, pair: &RingPair, at: u64) -> Option<(u16, u32)> {
        let mut raw = [0; 8];
        if self.packed {
            pair.memory.read(pair.ring.desc + at % self.size * 16 + 8, &mut raw).unwrap();
            let [l0, l1, l2, l3, i0, i1, f0, f1] = raw;
            let both = if (at / self.size).is_multiple_of(2) { 1 << 7 | 1 << 15 } else { 0 };
            let used = u16::from_le_bytes([f0, f1]) & (1 << 7 | 1 << 15) == both;
            used.then(|| (u16::from_le_bytes([i0, i1]), u32::from_le_bytes([l0, l1, l2, l3])))
        } else {
            let mut index = [0; 2];
            pair.memory.read(pair.ring.used + 2, &mut index).unwrap();
            #[expect(clippy::cast_possible_truncation, reason = "an index of the ring")]
            let ahead = u16::from_le_bytes(index).wrapping_sub(at as u16);
            pair.memory.read(pair.ring.used + 4 + at % self.size * 8, &mut raw).unwrap();
            let [i0, i1, _, _, l0, l1, l2, l3] = raw;
            (1..=8)
                .contains(&ahead)
                .then(|| (u16::from_le_bytes([i0, i1]), u32::from_le_bytes([l0, l1, l2, l3])))
        }
    }
}
