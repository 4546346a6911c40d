//! Prefetch of memory into the CPU cache.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "an instruction that the language has no name for")
)]

/// Prefetches the cache line of an address. Has no effect where nothing is mapped, and on processors other than x86-64.
#[inline]
pub(crate) fn prefetch(addr: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let at = std::ptr::with_exposed_provenance(addr);
        // SAFETY: a hint. It reads no byte as far as the program can tell, and never faults, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = addr;
}
