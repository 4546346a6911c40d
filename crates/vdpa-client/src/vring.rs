//! The set-up of one virtqueue on the device, both for rings of this program and for rings of a guest.

use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{IovaRange, QueueIndex, VringAddr};
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;

use crate::error::{Error, QueueProblem};
use crate::queue::queue;

/// A virtqueue whose ring a guest drives: the session has its addresses and does not access its contents.
///
/// Kicks arrive through `kick` (usually an ioeventfd) and interrupts leave through `call` (usually an irqfd). Both stay the
/// same open files over an update, so they stay bound in KVM.
#[derive(Debug)]
pub struct GuestQueue(pub(crate) Vring);

/// Where a guest has placed a ring, as I/O virtual addresses, and how large it is.
///
/// For a packed ring the driver and the device area are the two event suppression structures (virtio 1.2 section 2.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRing {
    /// Entries.
    pub size: u16,
    /// Descriptor area.
    pub desc: u64,
    /// Driver area.
    pub driver: u64,
    /// Device area.
    pub device: u64,
}

impl GuestQueue {
    /// Which virtqueue of the device it is.
    #[must_use]
    pub const fn index(&self) -> QueueIndex {
        self.0.index
    }

    /// Size and addresses of the ring.
    #[must_use]
    pub const fn ring(&self) -> GuestRing {
        let VringAddr { desc, avail, used, .. } = self.0.addr;
        GuestRing { size: self.0.size, desc, driver: avail, device: used }
    }

    /// The kick eventfd, which the device waits for.
    #[must_use]
    pub const fn kick(&self) -> &EventFd {
        &self.0.kick
    }

    /// The call eventfd, which the device signals.
    #[must_use]
    pub const fn call(&self) -> &EventFd {
        &self.0.call
    }

    /// Whether it is enabled, as far as this library knows.
    #[must_use]
    pub const fn enabled(&self) -> bool {
        self.0.enabled
    }
}

/// The parameters of a queue on the device. Clones share the events.
#[derive(Clone, Debug)]
pub(crate) struct Vring {
    pub(crate) index: QueueIndex,
    pub(crate) size: u16,
    pub(crate) addr: VringAddr,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) enabled: bool,
}

impl Vring {
    /// The areas of the ring that have bytes, each with its name.
    pub(crate) fn areas(&self, features: Features) -> impl Iterator<Item = (&'static str, IovaRange)> {
        let at = [self.addr.desc, self.addr.avail, self.addr.used];
        let sizes = area_sizes(self.size, features).into_iter();
        AREAS.into_iter().zip(at).zip(sizes).filter_map(|(((name, _), iova), size)| {
            IovaRange::from_size(iova, size).map(|range| (name, range))
        })
    }

    /// Sends all parameters of this vring to the device (`VHOST_SET_VRING_*`), starting at `base`, and enables it if it is.
    pub(crate) fn set_up<D: VdpaOps<Event = EventFd>>(&self, ops: &D, base: QueueState) -> Result<(), Error> {
        ops.set_vring_num(self.index, u32::from(self.size)).map_err(Error::request("VHOST_SET_VRING_NUM"))?;
        ops.set_vring_base(self.index, base.encode()).map_err(Error::request("VHOST_SET_VRING_BASE"))?;
        ops.set_vring_addr(self.index, &self.addr).map_err(Error::request("VHOST_SET_VRING_ADDR"))?;
        ops.set_vring_kick(self.index, Some(&self.kick)).map_err(Error::request("VHOST_SET_VRING_KICK"))?;
        ops.set_vring_call(self.index, Some(&self.call)).map_err(Error::request("VHOST_SET_VRING_CALL"))?;
        if !self.enabled {
            return Ok(());
        }
        ops.set_vring_enable(self.index, true).map_err(Error::request("VHOST_VDPA_SET_VRING_ENABLE"))
    }
}

/// Names and alignments of the three areas in bytes (virtio 1.2 sections 2.7 and 2.8). The descriptor area is the same in both
/// formats; for the others these are the alignments of split rings.
const AREAS: [(&str, u64); 3] = [("descriptor area", 16), ("driver area", 2), ("device area", 4)];

/// Bytes of the three areas of a ring.
const fn area_sizes(size: u16, features: Features) -> [u64; 3] {
    let entries = size as u64;
    if features.has(Features::RING_PACKED) {
        return [16 * entries, 4, 4];
    }
    let event = if features.has(Features::RING_EVENT_IDX) { 2 } else { 0 };
    [16 * entries, 4 + event + 2 * entries, 4 + event + 8 * entries]
}

/// Checks the addresses of a guest's ring: alignment, and whether the regions map the whole of each area.
pub(crate) fn check_guest_ring(
    index: QueueIndex,
    ring: GuestRing,
    features: Features,
    mapped: impl Fn(IovaRange) -> bool,
) -> Result<VringAddr, Error> {
    let at = [ring.desc, ring.driver, ring.device];
    for (((area, align), iova), needed) in AREAS.into_iter().zip(at).zip(area_sizes(ring.size, features)) {
        let inside = IovaRange::from_size(iova, needed).is_some_and(&mapped);
        if !iova.is_multiple_of(align) || !inside {
            return Err(queue(index, QueueProblem::Area { area, iova, align, needed }));
        }
    }
    Ok(VringAddr { desc: ring.desc, avail: ring.driver, used: ring.device, ..VringAddr::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_of_each_area_must_be_mapped() {
        let ring = GuestRing { size: 256, desc: 0x1000, driver: 0x2000, device: 0x3000 };
        let check = |last, features| {
            check_guest_ring(QueueIndex(1), ring, features, |area| area.last() <= last)
                .map(drop)
                .map_err(|e| e.to_string())
        };
        assert_eq!(check(0x3803, Features::NONE), Ok(()));
        assert_eq!(
            check(0x3802, Features::NONE).unwrap_err(),
            "queue 1 has its device area at I/O virtual address 0x3000, which needs 2052 bytes in regions of the session, \
             aligned to 4"
        );
        assert!(
            check(0x3803, Features::of(&[Features::RING_EVENT_IDX])).is_err(),
            "the event index is behind it"
        );
        assert_eq!(check(0x3003, Features::of(&[Features::RING_PACKED])), Ok(()));
        let error = check(0x1fff, Features::NONE).unwrap_err();
        assert!(error.contains("driver area"), "{error}");
    }
}
