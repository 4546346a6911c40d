// SPDX-License-Identifier: GPL-2.0-only

//! Requests for a queue.

use super::{status, user};
use crate::layer::node::Locked;
use crate::layer::parent::{Parent, Queue};
use crate::uapi::{self, status::DRIVER_OK, VringState};
use kernel::error::code::{EBUSY, EINVAL, EIO, ENOBUFS, EOPNOTSUPP};
use kernel::prelude::*;

/// All queues of a device.
pub(super) fn all(parent: Parent<'_>) -> impl Iterator<Item = Queue> + '_ {
    (0..u64::from(parent.queues())).filter_map(move |index| parent.queue(index))
}

/// Lets a guest take the interrupts of a queue directly, if the parent has one and the client an eventfd.
pub(super) fn connect_interrupt(device: &Locked<'_>, queue: Queue) {
    let vq = device.vhost().queue(queue);
    if let Some(irq) = device.parent().interrupt(queue).filter(|_| vq.has_call()) {
        if vq.connect_interrupt(irq).is_err() {
            pr_info!("queue {}: interrupt {} stays with the host\n", queue.index(), irq);
        }
    }
}

/// Everything that is no request of the device.
pub(super) fn ioctl(device: &mut Locked<'_>, request: u32, argument: usize) -> Result {
    let parent = device.parent();
    // This one reads all of its argument first, the others the index.
    let [index, size] = if request == uapi::SET_VRING_NUM { user::read(argument)? } else { [user::read(argument)?, 0] };
    let queue = parent.queue(u64::from(index)).ok_or(ENOBUFS)?;
    match request {
        uapi::SET_VRING_NUM => set_size(device, queue, size),
        uapi::SET_VRING_ENABLE => {
            let [_, ready]: VringState = user::read(argument)?;
            parent.set_ready(queue, ready != 0);
            Ok(())
        }
        uapi::GET_VRING_GROUP => answer_group(parent, argument, queue, parent.group(queue)),
        uapi::GET_VRING_DESC_GROUP => answer_group(parent, argument, queue, parent.descriptor_group(queue)),
        uapi::SET_GROUP_ASID => {
            let [_, asid]: VringState = user::read(argument)?;
            set_group_asid(parent, u32::from(queue.index()), asid)
        }
        uapi::GET_VRING_SIZE => {
            let size = parent.queue_size(queue).ok_or(EOPNOTSUPP)?;
            user::write::<VringState>(argument, &[u32::from(queue.index()), u32::from(size)])
        }
        _ => of_vhost(device, queue, request, argument),
    }
}

fn set_size(device: &mut Locked<'_>, queue: Queue, size: u32) -> Result {
    if !size.is_power_of_two() || size > u32::from(device.state().queue_size_limit) {
        return Err(EINVAL);
    }
    device.vhost().queue(queue).set_size(size)?;
    device.parent().set_size(queue, size);
    Ok(())
}

fn answer_group(parent: Parent<'_>, argument: usize, queue: Queue, group: Option<u32>) -> Result {
    let num = group.ok_or(EOPNOTSUPP)?;
    if num >= parent.groups() {
        return Err(EIO);
    }
    user::write::<VringState>(argument, &[u32::from(queue.index()), num])
}

fn set_group_asid(parent: Parent<'_>, group: u32, asid: u32) -> Result {
    if group >= parent.groups() || asid >= parent.address_spaces() {
        return Err(EINVAL);
    }
    if parent.status() & DRIVER_OK != 0 {
        return Err(EBUSY);
    }
    parent.set_group_asid(group, asid)
}

/// Requests that vhost stores and the parent learns of.
fn of_vhost(device: &mut Locked<'_>, queue: Queue, request: u32, argument: usize) -> Result {
    let (parent, vhost) = (device.parent(), device.vhost());
    let vq = vhost.queue(queue);
    let started = parent.status() & DRIVER_OK != 0;
    match request {
        uapi::GET_VRING_BASE => vq.store_position(parent.position(queue, vq.is_packed())?),
        uapi::SET_VRING_CALL if started && vq.has_call() => vq.disconnect_interrupt(),
        _ => {}
    }
    vhost.queue_ioctl(request, argument)?;
    // As in Linux, what vhost has stored stays stored when the parent may not get it now.
    match request {
        uapi::SET_VRING_ADDR | uapi::SET_VRING_BASE if status::is_running(device) => Err(EINVAL),
        uapi::SET_VRING_ADDR => parent.set_address(queue, vq.addresses()).map_err(|_| EINVAL),
        uapi::SET_VRING_BASE => parent.set_position(queue, vq.position(vq.is_packed())),
        uapi::SET_VRING_CALL => {
            if started {
                connect_interrupt(device, queue);
            }
            parent.set_call(queue, &vq);
            Ok(())
        }
        _ => Ok(()),
    }
}
