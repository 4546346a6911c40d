//! The parts of [`Ring`](super::Ring) that differ for a packed ring (virtio 1.2 section 2.8). At most one request is in
//! flight.

use std::sync::atomic::{Ordering, fence};

use super::{DESC_F_NEXT, DESC_F_WRITE, IOVA, Segment};
use crate::case::Stop;
use crate::memory::Region;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Offset of the flags in a descriptor.
const FLAGS: usize = 14;

/// Position of the driver in a packed ring: the next descriptor to write, and the last request.
#[derive(Debug)]
pub(super) struct Position {
    index: u16,
    wrap: bool,
    /// Index of the last request's first descriptor, and its wrap counter.
    last: Option<(u16, bool)>,
}

impl Position {
    pub(super) const fn start() -> Self {
        Self { index: 0, wrap: true, last: None }
    }

    pub(super) fn vring_base(&self) -> u32 {
        let index = u32::from(self.index) | u32::from(self.wrap) << 15;
        index | index << 16
    }

    /// Writes a request and makes it available. It writes the flags of the first descriptor last, since these make the request
    /// available.
    pub(super) fn submit(
        &mut self,
        region: &Region,
        table: usize,
        size: u16,
        segments: &[Segment],
    ) -> Result<(), Stop> {
        let first = (self.index, self.wrap);
        let mut first_flags = 0;
        for (position, segment) in segments.iter().enumerate() {
            let more = if position + 1 < segments.len() { DESC_F_NEXT } else { 0 };
            let kind = if segment.write { DESC_F_WRITE } else { 0 };
            let flags = more | kind | if self.wrap { AVAIL } else { USED };
            let mut bytes = Vec::with_capacity(FLAGS);
            bytes.extend_from_slice(&(IOVA + segment.offset as u64).to_le_bytes());
            bytes.extend_from_slice(&segment.len.to_le_bytes());
            bytes.extend_from_slice(&first.0.to_le_bytes());
            let at = table + 16 * usize::from(self.index);
            region.write(at, &bytes)?;
            if position == 0 {
                first_flags = flags;
            } else {
                region.write(at + FLAGS, &flags.to_le_bytes())?;
            }
            self.index += 1;
            if self.index == size {
                (self.index, self.wrap) = (0, !self.wrap);
            }
        }
        fence(Ordering::SeqCst);
        region.write(table + 16 * usize::from(first.0) + FLAGS, &first_flags.to_le_bytes())?;
        fence(Ordering::SeqCst);
        self.last = Some(first);
        Ok(())
    }

    /// Whether the device has used the last request. If so, AVAIL and USED both equal the request's wrap counter, in the flags
    /// of the descriptor at its first index.
    pub(super) fn all_used(&self, region: &Region, table: usize) -> Result<bool, Stop> {
        let Some((index, wrap)) = self.last else { return Ok(true) };
        let flags = u16::from_le_bytes(region.read(table + 16 * usize::from(index) + FLAGS)?);
        let wanted = if wrap { AVAIL | USED } else { 0 };
        Ok(flags & (AVAIL | USED) == wanted)
    }
}
