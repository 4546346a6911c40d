// SPDX-License-Identifier: GPL-2.0-only

//! Arguments in the memory of the client.

use core::mem::size_of;
use kernel::alloc::KVVec;
use kernel::prelude::*;
use kernel::transmute::{AsBytes, FromBytes};
use kernel::uaccess::{UserPtr, UserSlice};

/// Reads an argument.
pub(super) fn read<T: FromBytes>(address: usize) -> Result<T> {
    UserSlice::new(UserPtr::from_addr(address), size_of::<T>()).reader().read()
}

/// Writes a result.
pub(super) fn write<T: AsBytes>(address: usize, value: &T) -> Result {
    UserSlice::new(UserPtr::from_addr(address), size_of::<T>()).writer().write(value)
}

/// Reads so many bytes.
pub(super) fn read_bytes(address: usize, length: usize) -> Result<KVVec<u8>> {
    let mut bytes = KVVec::new();
    UserSlice::new(UserPtr::from_addr(address), length).read_all(&mut bytes, GFP_KERNEL)?;
    Ok(bytes)
}

/// Writes these bytes.
pub(super) fn write_bytes(address: usize, bytes: &[u8]) -> Result {
    UserSlice::new(UserPtr::from_addr(address), bytes.len()).writer().write_slice(bytes)
}
