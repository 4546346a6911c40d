//! Streams of bytes that can be told from any other, and what becomes of them.

use std::io::{Read, Write};

/// Bytes that one call sends or receives.
const PIECE: usize = 64 << 10;

/// The bytes of a stream, one after the other.
struct Pattern(u64);

impl Pattern {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn fill(&mut self, piece: &mut [u8]) {
        for word in piece.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
        }
    }
}

/// The first `len` bytes of the stream with this seed.
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut all = vec![0; len];
    Pattern::new(seed).fill(&mut all);
    all
}

/// Sends the stream with this seed until `more` says that it is enough, asked with the number of bytes so far. Returns that number.
pub(crate) fn send(mut to: impl Write, seed: u64, mut more: impl FnMut(u64) -> bool) -> u64 {
    let (mut pattern, mut piece, mut sent) = (Pattern::new(seed), vec![0; PIECE], 0);
    while more(sent) {
        pattern.fill(&mut piece);
        to.write_all(&piece).unwrap();
        sent += PIECE as u64;
    }
    sent
}

/// Receives until the end, and asserts that every byte is that of the stream with this seed. Returns how many there were.
#[track_caller]
pub(crate) fn verify(mut from: impl Read, seed: u64) -> u64 {
    let (mut pattern, mut wanted, mut piece, mut received) =
        (Pattern::new(seed), vec![0; PIECE], vec![0; PIECE], 0);
    loop {
        let mut len = 0;
        while len < PIECE {
            match from.read(&mut piece[len..]).unwrap() {
                0 => break,
                more => len += more,
            }
        }
        pattern.fill(&mut wanted);
        assert!(piece[..len] == wanted[..len], "the stream differs behind byte {received}");
        received += len as u64;
        if len < PIECE {
            return received;
        }
    }
}
