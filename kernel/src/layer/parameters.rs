// SPDX-License-Identifier: GPL-2.0-only

//! Parameters of the module.

use super::gen;
use kernel::str::{CStr, CStrExt};

/// Limit on the entries of one table, 0 if the parameter is not positive.
pub(crate) fn max_iotlb_entries() -> u32 {
    // SAFETY: An aligned static of the module, which is written only while the module is loaded (0444).
    let limit = unsafe { gen::max_iotlb_entries };
    u32::try_from(limit).unwrap_or(0)
}

/// Whether REMAP compares files and offsets.
pub(crate) fn verify_remap() -> bool {
    // SAFETY: An aligned static bool. A write through sysfs at the same time stores one byte, either 0 or 1.
    unsafe { core::ptr::addr_of!(gen::verify_remap).read_volatile() }
}

/// Whether NEW_OWNER is refused while the device runs.
pub(crate) fn strict_new_owner() -> bool {
    // SAFETY: As in `verify_remap`.
    unsafe { core::ptr::addr_of!(gen::strict_new_owner).read_volatile() }
}

/// The list of parents.
pub(crate) fn parents() -> &'static CStr {
    // SAFETY: A static that is written only while the module is loaded (0444), before any device is probed.
    let text = unsafe { gen::parents };
    if text.is_null() {
        return c"";
    }
    // SAFETY: Terminated, and valid until the module's parameters are freed, after the last device is gone.
    unsafe { CStr::from_char_ptr(text) }
}
