//! [`Stamp`]: the contents of a block of the load. Every block can be verified on its own.

use thiserror::Error;

/// First eight bytes of every block that was written.
const MAGIC: u64 = u64::from_le_bytes(*b"vdpaload");
/// Bytes of the stamp: magic, block number, sequence, client, checksum, zeros.
pub const STAMP_BYTES: usize = 40;
const CHECKSUM_AT: usize = 32;

/// What a block says about its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the block on the disk.
    pub block: u64,
    /// Sequence number of the write; 0 for a block that was never written.
    pub sequence: u64,
    /// The client that wrote it.
    pub client: u64,
}

/// What is wrong with a block.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Corruption {
    /// The block has neither a stamp nor zeros.
    #[error("block {block} holds no stamp (it begins with {found:#018x}), expected sequence {expected}")]
    NoStamp {
        /// Number of the block.
        block: u64,
        /// Its first eight bytes.
        found: u64,
        /// Sequence number expected.
        expected: u64,
    },
    /// The contents do not match the checksum.
    #[error("block {block} is torn or damaged: checksum {stored:#010x}, contents {computed:#010x}")]
    Checksum {
        /// Number of the block.
        block: u64,
        /// Checksum in the block.
        stored: u32,
        /// Checksum of the contents.
        computed: u32,
    },
    /// An intact block in the wrong place, or of another client.
    #[error("block {block} holds block {} of client {}, expected client {client}", .found.block, .found.client)]
    Misplaced {
        /// Number of the block.
        block: u64,
        /// LoadClient expected.
        client: u64,
        /// The stamp found.
        found: Stamp,
    },
    /// An intact block of another time.
    #[error("block {block} has sequence {found}, expected {expected}")]
    Sequence {
        /// Number of the block.
        block: u64,
        /// Sequence number found.
        found: u64,
        /// Sequence number of the last completed write.
        expected: u64,
    },
}

impl Stamp {
    /// Fills `data`, which must have at least [`STAMP_BYTES`], with the stamp, a pattern derived from it, and a checksum over
    /// everything.
    pub fn write(&self, data: &mut [u8]) {
        let mut pattern = SplitMix64(self.block ^ self.sequence.rotate_left(32) ^ self.client);
        for word in data.chunks_mut(8) {
            let bytes = pattern.next().to_le_bytes();
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = from;
            }
        }
        for (at, value) in [MAGIC, self.block, self.sequence, self.client, 0].into_iter().enumerate() {
            put(data, at * 8, &value.to_le_bytes());
        }
        let sum = crc32c::crc32c(data);
        put(data, CHECKSUM_AT, &sum.to_le_bytes());
    }

    /// Verifies that `data` has this stamp, or the one with the sequence number `pending`, of a write in flight.
    ///
    /// Returns the sequence number found.
    ///
    /// # Errors
    /// [`Corruption`].
    pub fn verify(&self, data: &[u8], pending: Option<u64>) -> Result<u64, Corruption> {
        let block = self.block;
        let magic = word(data, 0);
        if magic != MAGIC {
            if self.sequence == 0 && data.iter().all(|&b| b == 0) {
                return Ok(0);
            }
            return Err(Corruption::NoStamp { block, found: magic, expected: self.sequence });
        }
        let stored =
            data.get(CHECKSUM_AT..).and_then(|d| d.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b));
        let computed = checksum(data);
        if stored != computed {
            return Err(Corruption::Checksum { block, stored, computed });
        }
        let found = Self { block: word(data, 8), sequence: word(data, 16), client: word(data, 24) };
        if found.block != block || found.client != self.client {
            return Err(Corruption::Misplaced { block, client: self.client, found });
        }
        if found.sequence != self.sequence && Some(found.sequence) != pending {
            return Err(Corruption::Sequence { block, found: found.sequence, expected: self.sequence });
        }
        Ok(found.sequence)
    }
}

/// The checksum of a block; its own field counts as zero.
fn checksum(data: &[u8]) -> u32 {
    let (head, rest) = data.split_at_checked(CHECKSUM_AT).unwrap_or((data, &[]));
    let tail = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]), tail)
}

fn word(data: &[u8], at: usize) -> u64 {
    data.get(at..).and_then(|d| d.first_chunk::<8>()).map_or(0, |b| u64::from_le_bytes(*b))
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = data.get_mut(at..at + bytes.len()) {
        to.copy_from_slice(bytes);
    }
}

/// The random number generator splitmix64. The load takes all its choices from it, so a run can be repeated from its seed.
#[derive(Clone, Copy, Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The high half of the product: unbiased enough for limits far below 2^64.
        let product = u128::from(self.next()) * u128::from(limit);
        u64::try_from(product >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { block: 7, sequence: 42, client: 3 };

    fn written() -> Vec<u8> {
        let mut data = vec![0xaa; 4096];
        STAMP.write(&mut data);
        data
    }

    #[test]
    fn a_written_block_is_verified() {
        assert_eq!(STAMP.verify(&written(), None), Ok(42));
        let before = Stamp { sequence: 41, ..STAMP };
        assert_eq!(before.verify(&written(), Some(42)), Ok(42));
        let never = Stamp { sequence: 0, ..STAMP };
        assert_eq!(never.verify(&[0; 4096], None), Ok(0));
    }

    #[test]
    fn every_kind_of_corruption_is_found() {
        let found = |stamp: Stamp, data: &[u8]| stamp.verify(data, None).unwrap_err();
        assert!(matches!(found(STAMP, &[0; 4096]), Corruption::NoStamp { found: 0, .. }));
        let never = Stamp { sequence: 0, ..STAMP };
        assert!(matches!(found(never, &written()), Corruption::Sequence { found: 42, expected: 0, .. }));
        let elsewhere = Stamp { block: 8, ..STAMP };
        assert!(matches!(found(elsewhere, &written()), Corruption::Misplaced { .. }));
        let other = Stamp { client: 4, ..STAMP };
        assert!(matches!(found(other, &written()), Corruption::Misplaced { .. }));
        let later = Stamp { sequence: 43, ..STAMP };
        assert!(matches!(found(later, &written()), Corruption::Sequence { found: 42, expected: 43, .. }));
    }

    #[test]
    fn a_single_bit_anywhere_is_found() {
        let good = written();
        for at in 0..good.len() * 8 {
            let mut data = good.clone();
            data[at / 8] ^= 1 << (at % 8);
            // The padding behind the checksum is covered as well.
            assert!(STAMP.verify(&data, None).is_err(), "bit {at}");
        }
    }

    #[test]
    fn a_torn_write_is_found() {
        let mut data = written();
        let mut newer = vec![0; 4096];
        Stamp { sequence: 43, ..STAMP }.write(&mut newer);
        data[..2048].copy_from_slice(&newer[..2048]);
        assert!(matches!(STAMP.verify(&data, Some(43)), Err(Corruption::Checksum { .. })));
    }
}
