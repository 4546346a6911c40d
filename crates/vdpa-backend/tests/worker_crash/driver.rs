//! The driver side: that of the core, and one for `IN_ORDER`, which the core's does not have.

use std::collections::VecDeque;

use vdpa_core::features::Features;
use vdpa_core::ring::{Area, Buffer, area_sizes, driver};
use vdpa_sys::mmap::{MapArea, SharedMap};

use super::{AVAIL, BUFFERS, DESC, SIZE, USED};

/// Bytes of an answer.
pub(super) const FULL: u32 = 8;

pub(super) enum Driver {
    Core(driver::Driver<MapArea>),
    InOrder(InOrder),
}

impl Driver {
    pub(super) fn new(memory: &SharedMap, features: Features) -> Self {
        let sizes = area_sizes(SIZE, features);
        let area = |at: u64, size| memory.area(usize::try_from(at).unwrap(), size).unwrap();
        let (desc, avail, used) = (area(DESC, sizes.desc), area(AVAIL, sizes.avail), area(USED, sizes.used));
        if features.has(Features::IN_ORDER) {
            Self::InOrder(InOrder {
                desc,
                avail,
                used,
                added: 0,
                answered: 0,
                open: VecDeque::new(),
                run: None,
            })
        } else {
            Self::Core(driver::Driver::new(SIZE, features, desc, avail, used).unwrap())
        }
    }

    pub(super) fn add(&mut self, token: u64) {
        let at = BUFFERS + token * 64;
        let (request, answer) = (Buffer { iova: at, len: 8 }, Buffer { iova: at + 32, len: FULL });
        match self {
            Self::Core(driver) => driver.add(&[request], &[answer], token).unwrap(),
            Self::InOrder(driver) => driver.add(request, answer, token),
        }
    }

    /// Makes the requests available; whether to kick.
    pub(super) fn publish(&mut self) -> bool {
        match self {
            Self::Core(driver) => driver.publish().unwrap(),
            Self::InOrder(driver) => {
                driver.avail.store_u16(2, driver.added).unwrap();
                true
            }
        }
    }

    /// The next answer: token and bytes written.
    pub(super) fn pop(&mut self) -> Option<(u64, u32)> {
        match self {
            Self::Core(driver) => driver.pop_used().unwrap().map(|done| (done.token, done.len)),
            Self::InOrder(driver) => driver.pop(),
        }
    }

    /// Asks for an interrupt; whether there are answers already.
    pub(super) fn enable_interrupts(&mut self) -> bool {
        match self {
            Self::Core(driver) => driver.enable_interrupts().unwrap(),
            Self::InOrder(driver) => driver.used.load_u16(2).unwrap() != driver.answered,
        }
    }
}

/// A split ring whose requests are answered in order (virtio 1.2 section 2.7.9), two descriptors each. It does not suppress
/// any notification.
pub(super) struct InOrder {
    desc: MapArea,
    avail: MapArea,
    used: MapArea,
    /// Requests, modulo 65536.
    added: u16,
    answered: u16,
    open: VecDeque<(u16, u64)>,
    /// The element whose requests are being popped: its last head, and the length of that one.
    run: Option<(u32, u32)>,
}

impl InOrder {
    fn add(&mut self, request: Buffer, answer: Buffer, token: u64) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let head = self.added.wrapping_mul(2) % SIZE;
        self.describe(head, request, NEXT);
        self.describe(head + 1, answer, WRITE);
        self.avail.store_u16(4 + 2 * usize::from(self.added % SIZE), head).unwrap();
        self.added = self.added.wrapping_add(1);
        self.open.push_back((head, token));
    }

    fn describe(&self, index: u16, buffer: Buffer, flags: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&buffer.iova.to_le_bytes());
        raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&(index + 1).to_le_bytes());
        self.desc.write(16 * usize::from(index), &raw).unwrap();
    }

    /// One used element stands for all requests up to the one that it names. Those before that were written in full.
    fn pop(&mut self) -> Option<(u64, u32)> {
        if self.used.load_u16(2).unwrap() == self.answered {
            self.run = None;
            return None;
        }
        let (last, len) = *self.run.get_or_insert_with(|| {
            let mut raw = [0; 8];
            self.used.read(4 + 8 * usize::from(self.answered % SIZE), &mut raw).unwrap();
            let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            (word(&raw[..4]), word(&raw[4..]))
        });
        let (head, token) = self.open.pop_front().expect("no more answers than requests");
        self.answered = self.answered.wrapping_add(1);
        if u32::from(head) == last {
            self.run = None;
            return Some((token, len));
        }
        Some((token, FULL))
    }
}
