// SPDX-License-Identifier: GPL-2.0-only

//! What each request does. No unsafe code.

mod config;
mod features;
mod map;
mod messages;
mod owner;
mod parents;
mod queues;
mod remap;
mod status;
mod user;

pub(crate) use messages::{message, Message};

use crate::layer::domain::Domain;
use crate::layer::iotlb::Iotlb;
use crate::layer::node::{Locked, Node};
use crate::layer::parent::{Doorbell, Parent};
use crate::uapi;
use kernel::error::code::{EINVAL, ENOIOCTLCMD, ENOTSUPP, EOPNOTSUPP};
use kernel::prelude::*;

/// What is remembered of a device.
pub(crate) struct State {
    /// Tables by address space; never more than the parent has.
    tables: KVec<Space>,
    batch: Option<Batch>,
    suspended: bool,
    /// Largest queue, as the parent said after the last reset; 0 after one that failed.
    queue_size_limit: u16,
    /// First and last I/O address.
    range: (u64, u64),
    /// Pages charged to the owner for this device (8.4: so that a new owner can be charged without a look at the tables).
    pinned: u64,
    domain: Option<Domain>,
}

/// One address space.
struct Space {
    asid: u32,
    table: Iotlb,
}

/// An open batch.
struct Batch {
    asid: u32,
    /// Once there was a REMAP: the table as it would be without. A failing END brings it back (R6).
    without_remaps: Option<Iotlb>,
}

impl State {
    pub(crate) const fn new() -> Self {
        Self {
            tables: KVec::new(),
            batch: None,
            suspended: false,
            queue_size_limit: 0,
            range: (0, u64::MAX),
            pinned: 0,
            domain: None,
        }
    }
}

/// Whether a device can be driven.
pub(crate) fn check_parent(parent: Parent<'_>) -> Result {
    let platform = !parent.takes_tables() && !parent.takes_mappings();
    // The platform's IOMMU gives a device one address space.
    if platform && (parent.groups() > 1 || parent.address_spaces() > 1) {
        return Err(EOPNOTSUPP);
    }
    Ok(())
}

/// The rest of an open, after vhost's part.
pub(crate) fn open(device: &mut Locked<'_>) -> Result {
    let parent = device.parent();
    *device.state() = State::new();
    // Nothing is negotiated yet, so that this is the plain reset (8.8).
    let opened = status::reset(device, false).and_then(|()| {
        if parent.takes_tables() || parent.takes_mappings() {
            return Ok(None);
        }
        Domain::attach(parent).map(Some)
    });
    let state = device.state();
    match opened {
        Ok(domain) => {
            state.range = parent
                .iova_range()
                .or_else(|| domain.as_ref().map(Domain::aperture))
                .unwrap_or((0, u64::MAX));
            state.domain = domain;
            Ok(())
        }
        Err(error) => {
            device.vhost().cleanup();
            Err(error)
        }
    }
}

/// The close of the file. Errors have nobody to go to.
pub(crate) fn close(device: &mut Locked<'_>) {
    let (parent, vhost) = (device.parent(), device.vhost());
    status::disconnect_interrupts(device);
    device.state().batch = None;
    let _ = status::reset(device, status::cleans_map(device));
    vhost.stop();
    parent.unbind();
    device.config_call().replace(None);
    let asids = 0..parent.address_spaces();
    for asid in asids {
        map::remove_space(device, asid);
    }
    *device.state() = State::new();
    vhost.cleanup();
}

/// A request of a client.
pub(crate) fn ioctl(node: &Node, request: u32, argument: usize) -> Result {
    if request == uapi::SET_BACKEND_FEATURES {
        return features::acknowledge(node.parent(), node.vhost(), user::read(argument)?);
    }
    let device = &mut node.lock();
    let parent = device.parent();
    match request {
        uapi::GET_DEVICE_ID => user::write(argument, &parent.device_id()),
        uapi::GET_STATUS => user::write(argument, &parent.status()),
        uapi::SET_STATUS => status::write(device, user::read(argument)?),
        uapi::GET_CONFIG => config::read(parent, argument),
        uapi::SET_CONFIG => config::write(parent, argument),
        uapi::GET_CONFIG_SIZE => user::write(argument, &config::size(parent)),
        uapi::SET_CONFIG_CALL => config::set_call(device, user::read(argument)?),
        uapi::GET_FEATURES => user::write(argument, &parent.device_features()),
        uapi::SET_FEATURES => features::set(device, argument),
        uapi::GET_BACKEND_FEATURES => user::write(argument, &features::offered(parent)),
        uapi::GET_VRING_NUM => user::write(argument, &parent.queue_size_limit()),
        uapi::GET_GROUP_NUM => user::write(argument, &parent.groups()),
        uapi::GET_AS_NUM => user::write(argument, &parent.address_spaces()),
        uapi::GET_VQS_COUNT => user::write(argument, &parent.queues()),
        uapi::GET_IOVA_RANGE => {
            let (first, last) = device.state().range;
            user::write::<uapi::IovaRange>(argument, &[first, last])
        }
        uapi::SUSPEND => status::suspend(device),
        uapi::RESUME => status::resume(device),
        uapi::NEW_OWNER => owner::transfer(device),
        // No log of written pages.
        uapi::SET_LOG_BASE | uapi::SET_LOG_FD => Err(ENOIOCTLCMD),
        _ => match device.vhost().ioctl(request, argument) {
            Err(error) if error == ENOIOCTLCMD => queues::ioctl(device, request, argument),
            Ok(()) if request == uapi::SET_OWNER => owner::bind_first(device),
            result => result,
        },
    }
}

/// The doorbell page at page `index` of the file.
pub(crate) fn doorbell(parent: Parent<'_>, index: u64) -> Result<Doorbell> {
    parent.queue(index).and_then(|queue| parent.doorbell(queue)).ok_or(EINVAL)
}

/// Checks an mmap: one whole page of its own, which can only be written.
pub(crate) fn check_doorbell(parent: Parent<'_>, length: u64, shared: bool, readable: bool, index: u64) -> Result {
    if length != crate::rules::PAGE || !shared || readable {
        return Err(EINVAL);
    }
    if !parent.has_doorbells() {
        return Err(ENOTSUPP);
    }
    let area = doorbell(parent, index)?;
    if area.address % crate::rules::PAGE != 0 {
        return Err(EINVAL);
    }
    if area.size != length {
        return Err(ENOTSUPP);
    }
    Ok(())
}
