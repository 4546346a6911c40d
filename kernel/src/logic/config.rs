// SPDX-License-Identifier: GPL-2.0-only

//! The configuration space and its interrupt.

use super::user;
use crate::layer::eventfd::EventFd;
use crate::layer::node::Locked;
use crate::layer::parent::Parent;
use crate::uapi::ConfigHead;
use core::mem::size_of;
use kernel::alloc::KVVec;
use kernel::error::code::EINVAL;
use kernel::prelude::*;

/// GET_CONFIG_SIZE.
pub(super) fn size(parent: Parent<'_>) -> u32 {
    u32::try_from(parent.config_size()).unwrap_or(u32::MAX)
}

/// The head of a request, which lies within the configuration; and where its bytes are.
fn head(parent: Parent<'_>, argument: usize) -> Result<(ConfigHead, usize)> {
    let [offset, length]: ConfigHead = user::read(argument)?;
    let within = u64::from(offset).checked_add(u64::from(length)).is_some_and(|end| end <= u64::from(size(parent)));
    if length == 0 || !within {
        return Err(EINVAL);
    }
    Ok(([offset, length], argument.wrapping_add(size_of::<ConfigHead>())))
}

/// GET_CONFIG.
pub(super) fn read(parent: Parent<'_>, argument: usize) -> Result {
    let ([offset, length], bytes) = head(parent, argument)?;
    let mut buffer = KVVec::from_elem(0, length as usize, GFP_KERNEL)?;
    parent.read_config(offset, &mut buffer);
    user::write_bytes(bytes, &buffer)
}

/// SET_CONFIG. What the parent makes of it cannot be seen.
pub(super) fn write(parent: Parent<'_>, argument: usize) -> Result {
    let ([offset, length], bytes) = head(parent, argument)?;
    let buffer = user::read_bytes(bytes, length as usize)?;
    parent.write_config(offset, &buffer);
    Ok(())
}

/// SET_CONFIG_CALL; -1 is no eventfd.
pub(super) fn set_call(device: &Locked<'_>, fd: i32) -> Result {
    let event = if fd == -1 { None } else { Some(EventFd::from_fd(fd)?) };
    device.config_call().replace(event);
    device.parent().set_config_call(device.config_call());
    Ok(())
}
