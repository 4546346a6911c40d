//! Bits that several processes change at the same time.

use std::sync::atomic::{AtomicU64, Ordering};

use vdpa_core::ring::Fault;

use super::{SharedMap, fault};

/// Changes of bits that other processes change at the same time.
impl SharedMap {
    /// Sets bits of a little-endian u64, ordered with all other accesses; returns the value before.
    ///
    /// # Errors
    /// As [`store_u64`](Self::store_u64).
    #[inline]
    pub fn set_bits(&self, offset: usize, bits: u64) -> Result<u64, Fault> {
        self.change(offset, |word| word.fetch_or(bits.to_le(), Ordering::SeqCst))
    }

    /// Clears bits of a little-endian u64, ordered with all other accesses; returns the value before.
    ///
    /// # Errors
    /// As [`store_u64`](Self::store_u64).
    #[inline]
    pub fn clear_bits(&self, offset: usize, bits: u64) -> Result<u64, Fault> {
        self.change(offset, |word| word.fetch_and(!bits.to_le(), Ordering::SeqCst))
    }

    #[inline]
    fn change(&self, offset: usize, change: impl FnOnce(&AtomicU64) -> u64) -> Result<u64, Fault> {
        let at: *mut u64 = self.0.writable(offset, size_of::<u64>())?;
        if !at.is_aligned() {
            return Err(fault(offset));
        }
        // SAFETY: `writable` checked that the bytes lie in the mapping, which `self` keeps, and they are aligned. Nothing in this
        // process holds a reference to them but atomics like this one.
        let before = change(unsafe { AtomicU64::from_ptr(at) });
        self.sound(offset)?;
        Ok(u64::from_le(before))
    }
}
