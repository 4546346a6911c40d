//! Memory that others write at any time.
#![expect(unsafe_code, reason = "a contract that an implementation promises to keep")]

/// A mapping whose bytes others may access at any time, such as the shared memory of a guest.
///
/// # Safety
/// As long as the object exists, `[base, base + len)` stays mapped at that address, readable and writable, and
/// no Rust reference to any of its bytes is ever made: the kernel, the guest and other threads change them
/// concurrently. (Pages that turn out to be inaccessible, as behind a truncated file, are no violation: the
/// kernel reports `EFAULT` for them.) A mapping that only allows reading may be used if the kernel is only
/// asked to read from it; for anything else it reports `EFAULT`.
pub unsafe trait StableMemory: Send + Sync {
    /// Address of the first byte.
    fn base(&self) -> usize;
    /// Bytes.
    fn len(&self) -> usize;
    /// Whether it has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
