//! Descriptor chains as lists of buffers.

use super::layout::{Descriptor, WRITE};
use super::{Buffer, Fault, Memory, RingError};

/// Largest number of bytes in one chain (virtio 1.2 section 2.7.5.2).
const BYTES_MAX: u64 = 1 << 32;

/// One request as the driver made it available: the buffers of a descriptor chain, indirect ones included.
///
/// Reuse one chain for many requests: a pop allocates only while the lists of the chain still grow. Empty buffers are kept,
/// as in `vringh`: they count as buffers and have no bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Number of the request, by which it is completed: its first descriptor in a split ring.
    pub head: u16,
    /// Buffers the device reads, in order.
    pub readable: Vec<Buffer>,
    /// Buffers the device writes, in order; they come after the readable ones.
    pub writable: Vec<Buffer>,
}

impl Chain {
    /// An empty chain.
    #[must_use]
    pub const fn new() -> Self {
        Self { head: 0, readable: Vec::new(), writable: Vec::new() }
    }

    /// The bytes of the readable buffers.
    #[must_use]
    #[inline]
    pub fn readable(&self) -> BufferSlice<'_> {
        BufferSlice::new(&self.readable)
    }

    /// The bytes of the writable buffers.
    #[must_use]
    #[inline]
    pub fn writable(&self) -> BufferSlice<'_> {
        BufferSlice::new(&self.writable)
    }

    /// Removes the buffers and keeps the allocations.
    #[inline]
    pub(super) fn reset(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
    }

    /// Checks the total length of the buffers. Called once per chain, because keeping a sum here would cost time in each push.
    #[inline]
    pub(super) const fn check(&self, bytes: u64) -> Result<(), RingError> {
        if bytes > BYTES_MAX { Err(RingError::Length { head: self.head }) } else { Ok(()) }
    }

    /// Appends the buffer of one descriptor that is not indirect.
    #[inline]
    pub(super) fn push(&mut self, descriptor: Descriptor) -> Result<(), RingError> {
        if descriptor.wraps() {
            return Err(RingError::Wraps { iova: descriptor.addr, len: descriptor.len });
        }
        let buffer = Buffer { iova: descriptor.addr, len: descriptor.len };
        if descriptor.flags & WRITE != 0 {
            self.writable.push(buffer);
        } else if self.writable.is_empty() {
            self.readable.push(buffer);
        } else {
            return Err(RingError::Order { head: self.head });
        }
        Ok(())
    }
}

/// A contiguous part of the bytes of a list of buffers, which it borrows.
#[derive(Clone, Copy, Debug)]
pub struct BufferSlice<'a> {
    buffers: &'a [Buffer],
    /// Offset of the part in the first buffer; at most the length of that buffer.
    skip: u32,
    /// Length of the part in bytes.
    len: u64,
}

impl<'a> BufferSlice<'a> {
    /// All bytes of `buffers`.
    #[must_use]
    #[inline]
    pub fn new(buffers: &'a [Buffer]) -> Self {
        Self { buffers, skip: 0, len: buffers.iter().map(|buffer| u64::from(buffer.len)).sum() }
    }

    /// Number of bytes.
    #[must_use]
    #[inline]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Splits after `count` bytes; `None` when it has fewer.
    #[must_use]
    #[inline]
    pub fn split_at(self, count: u64) -> Option<(Self, Self)> {
        let rest = self.len.checked_sub(count)?;
        let first = Self { len: count, ..self };
        let (mut buffers, mut skip) = (self.buffers, u64::from(self.skip) + count);
        while let Some((buffer, others)) = buffers.split_first()
            && skip >= u64::from(buffer.len)
        {
            skip -= u64::from(buffer.len);
            buffers = others;
        }
        // The offset is less than the length of a buffer, or 0 after the last one.
        let skip = u32::try_from(skip).ok()?;
        Some((first, Self { buffers, skip, len: rest }))
    }

    /// The non-empty pieces in order: address and length.
    #[inline]
    pub fn iter(&self) -> Pieces<'a> {
        Pieces { rest: *self }
    }

    /// Copies the first bytes from client memory. Returns `false` and reads nothing when the part is shorter than the buffer.
    ///
    /// # Errors
    /// [`Fault`] as from [`Memory::read`].
    pub fn read<M: Memory>(self, memory: &M, mut data: &mut [u8]) -> Result<bool, Fault> {
        if (data.len() as u64) > self.len {
            return Ok(false);
        }
        for piece in self.iter() {
            if data.is_empty() {
                break;
            }
            let count = data.len().min(piece.len as usize);
            let (now, later) = data.split_at_mut(count);
            memory.read(piece.iova, now)?;
            data = later;
        }
        Ok(true)
    }

    /// Copies `data` to the first bytes in client memory. Returns `false` and writes nothing when the part is shorter than
    /// `data`.
    ///
    /// # Errors
    /// [`Fault`] as from [`Memory::write`].
    pub fn write<M: Memory>(self, memory: &M, mut data: &[u8]) -> Result<bool, Fault> {
        if (data.len() as u64) > self.len {
            return Ok(false);
        }
        for piece in self.iter() {
            if data.is_empty() {
                break;
            }
            let (now, later) = data.split_at(data.len().min(piece.len as usize));
            memory.write(piece.iova, now)?;
            data = later;
        }
        Ok(true)
    }
}

impl<'a> IntoIterator for BufferSlice<'a> {
    type Item = Buffer;
    type IntoIter = Pieces<'a>;

    fn into_iter(self) -> Pieces<'a> {
        self.iter()
    }
}

/// Iterator over the pieces of a [`BufferSlice`].
#[derive(Clone, Debug)]
pub struct Pieces<'a> {
    rest: BufferSlice<'a>,
}

impl Iterator for Pieces<'_> {
    type Item = Buffer;

    #[inline]
    fn next(&mut self) -> Option<Buffer> {
        while self.rest.len > 0 {
            let (&buffer, others) = self.rest.buffers.split_first()?;
            let there = buffer.len.saturating_sub(self.rest.skip);
            let len = u32::try_from(self.rest.len).map_or(there, |rest| rest.min(there));
            // No overflow: the pop checked that no buffer passes the end of the address space.
            let iova = buffer.iova.wrapping_add(u64::from(self.rest.skip));
            self.rest = BufferSlice { buffers: others, skip: 0, len: self.rest.len - u64::from(len) };
            if len > 0 {
                return Some(Buffer { iova, len });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: [Buffer; 4] = [
        Buffer { iova: 0x1000, len: 3 },
        Buffer { iova: 0x2000, len: 0 },
        Buffer { iova: 0x3000, len: 1 },
        Buffer { iova: 0x4000, len: 4 },
    ];

    fn addresses(slice: BufferSlice<'_>) -> Vec<u64> {
        slice.iter().flat_map(|piece| (0..u64::from(piece.len)).map(move |i| piece.iova + i)).collect()
    }

    #[test]
    fn every_part_of_a_list_has_the_bytes_of_the_whole() {
        let all = addresses(BufferSlice::new(&LIST));
        assert_eq!(all, [0x1000, 0x1001, 0x1002, 0x3000, 0x4000, 0x4001, 0x4002, 0x4003]);
        for from in 0..=8 {
            for to in from..=8 {
                let (head, _) = BufferSlice::new(&LIST).split_at(to as u64).unwrap();
                let (_, part) = head.split_at(from as u64).unwrap();
                assert_eq!(part.len(), (to - from) as u64);
                assert_eq!(addresses(part), all[from..to], "{from}..{to}");
                assert!(part.iter().all(|piece| piece.len > 0));
            }
        }
        assert!(BufferSlice::new(&LIST).split_at(9).is_none());
    }

    #[test]
    fn a_chain_has_at_most_4_gib() {
        let half = Descriptor { addr: 0, len: 1 << 31, flags: 0, next: 0 };
        let mut chain = Chain::new();
        chain.push(half).unwrap();
        chain.push(half).unwrap();
        assert_eq!(chain.readable().len(), 1 << 32);
        assert_eq!(chain.check(1 << 32), Ok(()));
        assert_eq!(chain.check((1 << 32) + 1), Err(RingError::Length { head: 0 }));
    }
}
