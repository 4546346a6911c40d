// SPDX-License-Identifier: GPL-2.0-only

//! Status, reset, SUSPEND and RESUME.

use super::queues;
use crate::layer::node::Locked;
use crate::uapi::status::DRIVER_OK;
use crate::rules;
use kernel::error::code::EINVAL;
use kernel::prelude::*;

/// Whether a reset now drops the parent's own translation.
pub(super) fn cleans_map(device: &Locked<'_>) -> bool {
    rules::reset_cleans_map(device.vhost().acknowledged())
}

/// Resets the device. Mappings, owner and what was acknowledged stay.
pub(super) fn reset(device: &mut Locked<'_>, clean: bool) -> Result {
    let parent = device.parent();
    let state = device.state();
    state.suspended = false;
    state.queue_size_limit = 0;
    parent.reset(clean)?;
    state.queue_size_limit = parent.queue_size_limit();
    Ok(())
}

/// SET_STATUS: adds bits, or resets.
pub(super) fn write(device: &mut Locked<'_>, new: u8) -> Result {
    let parent = device.parent();
    let old = parent.status();
    if new != 0 && old & !new != 0 {
        return Err(EINVAL);
    }
    if old & DRIVER_OK != 0 && new & DRIVER_OK == 0 {
        disconnect_interrupts(device);
    }
    if new == 0 {
        reset(device, cleans_map(device))?;
    } else {
        parent.set_status(new);
    }
    if old & DRIVER_OK == 0 && new & DRIVER_OK != 0 {
        queues::all(parent).for_each(|queue| queues::connect_interrupt(device, queue));
    }
    Ok(())
}

/// Interrupts go through the host again.
pub(super) fn disconnect_interrupts(device: &Locked<'_>) {
    queues::all(device.parent()).for_each(|queue| device.vhost().queue(queue).disconnect_interrupt());
}

pub(super) fn is_running(device: &mut Locked<'_>) -> bool {
    device.parent().status() & DRIVER_OK != 0 && !device.state().suspended
}

/// SUSPEND. Does nothing before DRIVER_OK.
pub(super) fn suspend(device: &mut Locked<'_>) -> Result {
    let parent = device.parent();
    if parent.status() & DRIVER_OK == 0 {
        return Ok(());
    }
    parent.suspend()?;
    device.vhost().flush();
    device.state().suspended = true;
    Ok(())
}

/// RESUME. Does nothing before DRIVER_OK.
pub(super) fn resume(device: &mut Locked<'_>) -> Result {
    let parent = device.parent();
    if parent.status() & DRIVER_OK == 0 {
        return Ok(());
    }
    parent.resume()?;
    device.state().suspended = false;
    Ok(())
}
