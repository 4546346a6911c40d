//! The rings of a device, which the program or its guest drives.
#![expect(unsafe_code, reason = "functions are exported by their names")]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;

use vdpa_client::eventfd::EventFd;
use vdpa_client::features::Features;
use vdpa_client::types::QueueIndex;
use vdpa_client::vq::QueueState;
use vdpa_client::vring::GuestRing;

use crate::border::{answer, descriptor, needed};
use crate::failure::Failure;
use crate::session::{index, vdpa_live_session};

/// The device does not serve the queue until vdpa_live_enable_queue().
pub const VDPA_LIVE_QUEUE_DISABLED: u32 = 1;
/// The device begins at base and not at the beginning of a fresh ring.
pub const VDPA_LIVE_QUEUE_AT_BASE: u32 = 2;

/// A virtqueue: a ring, split or packed as negotiated, in memory that is mapped for the device, and its events. The library does
/// not access the ring.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_queue {
    /// Number of the queue.
    pub index: u32,
    /// Entries; for a split ring a power of two.
    pub size: u32,
    /// I/O virtual address of the descriptor area.
    pub desc: u64,
    /// I/O virtual address of the driver area (available ring).
    pub driver: u64,
    /// I/O virtual address of the device area (used ring).
    pub device: u64,
    /// The eventfd that the device waits for.
    pub kick: c_int,
    /// The eventfd that the device signals.
    pub call: c_int,
    /// Where the device begins with VDPA_LIVE_QUEUE_AT_BASE, as VHOST_GET_VRING_BASE has given it.
    pub base: u32,
    /// 0, or VDPA_LIVE_QUEUE_DISABLED, VDPA_LIVE_QUEUE_AT_BASE or both.
    pub flags: u32,
}

/// A queue of the caller, checked.
pub(crate) struct Given {
    pub(crate) index: QueueIndex,
    pub(crate) ring: GuestRing,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) enabled: bool,
    base: Option<u32>,
}

impl Given {
    pub(crate) fn new(queue: &vdpa_live_queue) -> Result<Self, Failure> {
        let &vdpa_live_queue { size, desc, driver, device, kick, call, base, flags, .. } = queue;
        let known = VDPA_LIVE_QUEUE_DISABLED | VDPA_LIVE_QUEUE_AT_BASE;
        if flags & !known != 0 {
            return Err(Failure::invalid(format!(
                "flags of queue {} are {flags:#x}, of which {known:#x} have a meaning",
                queue.index
            )));
        }
        let size = u16::try_from(size).map_err(|_| {
            Failure::invalid(format!("queue {} cannot have {size} entries; at most 32768", queue.index))
        })?;
        Ok(Self {
            index: index(queue.index)?,
            ring: GuestRing { size, desc, driver, device },
            kick: event(kick, "kick")?,
            call: event(call, "call")?,
            enabled: flags & VDPA_LIVE_QUEUE_DISABLED == 0,
            base: (flags & VDPA_LIVE_QUEUE_AT_BASE != 0).then_some(base),
        })
    }

    fn base(&self, features: Features) -> Result<QueueState, Failure> {
        match self.base {
            None => Ok(QueueState::initial(features)),
            Some(base) => QueueState::decode(base, features).ok_or_else(|| {
                Failure::invalid(format!("base {base:#x} of queue {} is not one of a split ring", self.index))
            }),
        }
    }
}

pub(crate) fn event(fd: c_int, what: &str) -> Result<EventFd, Failure> {
    EventFd::from_fd(descriptor(fd, what)?).map_err(|e| Failure::invalid(format!("{what} ({fd}): {e}")))
}

/// Sets up a queue, before vdpa_live_start(). The library copies the descriptors.
///
/// -EBUSY: the device runs already. -EEXIST: the queue is set up. -EINVAL: the ring is not in memory that is mapped, or its size is
/// not possible.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_add_queue(
    session: Option<&vdpa_live_session>,
    queue: Option<&vdpa_live_queue>,
) -> c_int {
    answer(|| {
        let given = Given::new(needed(queue, "queue")?)?;
        needed(session, "session")?.with(|session| {
            let base = given.base(session.features())?;
            let Given { index, ring, kick, call, enabled, .. } = given;
            Ok(session.add_guest_queue_at(index, ring, kick, call, base, enabled)?)
        })?;
        Ok(0)
    })
}

/// Tells the ring and the events of a queue, as a successor needs them. The descriptors belong to the session. base is 0; see
/// vdpa_live_vring_base(). -ENOENT: it is not set up.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_find_queue(
    session: Option<&vdpa_live_session>,
    index: u32,
    queue: Option<&mut MaybeUninit<vdpa_live_queue>>,
) -> c_int {
    answer(|| {
        let out = needed(queue, "queue")?;
        let number = crate::session::index(index)?;
        let found = needed(session, "session")?.with(|session| {
            let queue = session.guest_queue(number)?;
            let GuestRing { size, desc, driver, device } = queue.ring();
            Ok(vdpa_live_queue {
                index,
                size: size.into(),
                desc,
                driver,
                device,
                kick: queue.kick().as_raw_fd(),
                call: queue.call().as_raw_fd(),
                base: 0,
                flags: if queue.enabled() { 0 } else { VDPA_LIVE_QUEUE_DISABLED },
            })
        })?;
        out.write(found);
        Ok(0)
    })
}

/// Makes the device serve a queue, or not with enabled 0. An update keeps it.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_enable_queue(
    session: Option<&vdpa_live_session>,
    queue: u32,
    enabled: c_int,
) -> c_int {
    answer(|| {
        let index = index(queue)?;
        let session = needed(session, "session")?;
        session.with(|session| Ok(session.set_queue_enabled(index, enabled != 0)?)).map(|()| 0)
    })
}
