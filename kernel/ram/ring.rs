// SPDX-License-Identifier: GPL-2.0-only

//! A split ring, as the device sees it (virtio 1.3, 2.7). Everything in it is the driver's, and is read once.

use kernel::prelude::*;

/// Largest ring.
pub(crate) const MAX: u16 = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;

/// Memory of the driver, by I/O address. An access is in order with those before it where a barrier is needed.
pub(crate) trait Memory {
    /// Reads bytes; EFAULT where the device may not.
    fn read(&self, iova: u64, bytes: &mut [u8]) -> Result;
    /// Writes bytes; EFAULT where the device may not.
    fn write(&self, iova: u64, bytes: &[u8]) -> Result;
    /// Reads after this see what was written before what was read before (`smp_rmb`).
    fn read_barrier(&self);
    /// Writes before this are seen before those after it (`smp_wmb`); and reads after it come after them (`smp_mb`).
    fn write_barrier(&self);
}

fn word(memory: &impl Memory, iova: u64) -> Result<u16> {
    let mut bytes = [0; 2];
    memory.read(iova, &mut bytes)?;
    Ok(u16::from_le_bytes(bytes))
}

/// A queue.
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// Index of the next chain.
    pub(crate) next: u16,
    pub(crate) ready: bool,
    used_index: u16,
}

/// A piece of a chain.
struct Piece {
    iova: u64,
    length: u32,
    writable: bool,
}

/// A request: pieces to read, then pieces to write.
pub(crate) struct Chain {
    head: u16,
    pieces: KVec<Piece>,
}

impl Ring {
    pub(crate) const fn new() -> Self {
        Self { size: 0, descriptors: 0, available: 0, used: 0, next: 0, ready: false, used_index: 0 }
    }

    /// A reset, after which the size that was set stays.
    pub(crate) fn reset(&mut self) {
        *self = Self { size: self.size, ..Self::new() };
    }

    /// Starts at the position that was set: everything before it was completed.
    pub(crate) fn start(&mut self) {
        self.used_index = self.next;
    }

    /// The next request, if the driver has made one available.
    pub(crate) fn pop(&mut self, memory: &impl Memory) -> Result<Option<Chain>> {
        if self.size == 0 {
            return Err(EINVAL);
        }
        let end = word(memory, self.available.wrapping_add(2))?;
        let waiting = end.wrapping_sub(self.next);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.size {
            return Err(EINVAL);
        }
        memory.read_barrier();
        let slot = u64::from(self.next % self.size);
        let head = word(memory, self.available.wrapping_add(4).wrapping_add(slot.wrapping_mul(2)))?;
        let chain = self.walk(memory, head)?;
        self.next = self.next.wrapping_add(1);
        Ok(Some(chain))
    }

    fn walk(&self, memory: &impl Memory, head: u16) -> Result<Chain> {
        let mut pieces = KVec::new();
        let mut index = head;
        loop {
            // A chain is no longer than the ring, or it is a circle.
            if index >= self.size || pieces.len() >= usize::from(self.size) {
                return Err(EINVAL);
            }
            let mut bytes = [0; 16];
            memory.read(self.descriptors.wrapping_add(u64::from(index).wrapping_mul(16)), &mut bytes)?;
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
            let flags = u16::from_le_bytes([m, n]);
            let writable = flags & WRITE != 0;
            if !writable && pieces.last().is_some_and(|piece: &Piece| piece.writable) {
                return Err(EINVAL);
            }
            let iova = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            pieces.push(Piece { iova, length: u32::from_le_bytes([i, j, k, l]), writable }, GFP_KERNEL)?;
            if flags & NEXT == 0 {
                return Ok(Chain { head, pieces });
            }
            index = u16::from_le_bytes([o, p]);
        }
    }

    /// Completes a request.
    pub(crate) fn push(&mut self, memory: &impl Memory, chain: &Chain, written: u32) -> Result {
        let slot = u64::from(self.used_index.checked_rem(self.size).ok_or(EINVAL)?);
        let [a, b, c, d] = u32::from(chain.head).to_le_bytes();
        let [e, f, g, h] = written.to_le_bytes();
        memory.write(self.used.wrapping_add(4).wrapping_add(slot.wrapping_mul(8)), &[a, b, c, d, e, f, g, h])?;
        memory.write_barrier();
        self.used_index = self.used_index.wrapping_add(1);
        memory.write(self.used.wrapping_add(2), &self.used_index.to_le_bytes())
    }

    /// Whether the driver wants to be interrupted.
    pub(crate) fn wants_interrupt(&self, memory: &impl Memory) -> bool {
        memory.write_barrier();
        word(memory, self.available).map_or(true, |flags| flags & NO_INTERRUPT == 0)
    }
}

impl Chain {
    fn bytes(&self, writable: bool) -> u64 {
        let pieces = self.pieces.iter().filter(|piece| piece.writable == writable);
        pieces.map(|piece| u64::from(piece.length)).fold(0, u64::saturating_add)
    }

    /// Bytes that the device may read.
    pub(crate) fn readable(&self) -> u64 {
        self.bytes(false)
    }

    /// Bytes that the device may write.
    pub(crate) fn writable(&self) -> u64 {
        self.bytes(true)
    }

    /// Calls `act` for the parts of `length` bytes from byte `offset` on of one direction: where they are, and which of them.
    fn parts(&self, writable: bool, offset: u64, length: usize, mut act: impl FnMut(u64, usize, usize) -> Result) -> Result {
        let (mut skip, mut done) = (offset, 0_usize);
        for piece in self.pieces.iter().filter(|piece| piece.writable == writable) {
            let size = u64::from(piece.length);
            if skip >= size {
                skip = skip.wrapping_sub(size);
                continue;
            }
            let left = length.saturating_sub(done);
            if left == 0 {
                break;
            }
            let here = usize::try_from(size.wrapping_sub(skip)).unwrap_or(usize::MAX).min(left);
            act(piece.iova.wrapping_add(skip), done, here)?;
            done = done.saturating_add(here);
            skip = 0;
        }
        if done < length { Err(EINVAL) } else { Ok(()) }
    }

    pub(crate) fn read(&self, memory: &impl Memory, offset: u64, bytes: &mut [u8]) -> Result {
        self.parts(false, offset, bytes.len(), |iova, at, size| {
            let part = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..size)).ok_or(EINVAL)?;
            memory.read(iova, part)
        })
    }

    pub(crate) fn write(&self, memory: &impl Memory, offset: u64, bytes: &[u8]) -> Result {
        self.parts(true, offset, bytes.len(), |iova, at, size| {
            memory.write(iova, bytes.get(at..).and_then(|rest| rest.get(..size)).ok_or(EINVAL)?)
        })
    }
}
