//! Errors of a session with a device.

use std::path::PathBuf;

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{Features, Status};
use vdpa_core::types::{IovaRange, Perm, QueueIndex};

use vdpa_core::feature_names::text;

pub use vdpa_core::error::chain;

/// Errors of setting up or using a session.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The device file cannot be opened.
    #[error("cannot open device {}{}", path.display(), why_not_open(*.source, *.here))]
    Open {
        /// Path of the device file.
        path: PathBuf,
        /// Error of open(2).
        source: Errno,
        /// With `EBUSY`: the descriptor by which this process has the device open itself.
        here: Option<i32>,
    },
    /// A request to the device or the kernel failed.
    #[error("{request} failed")]
    Request {
        /// Name of the request, as in the kernel's header, or of the system call.
        request: &'static str,
        /// Error of the request.
        source: Errno,
    },
    /// The file is open and is no vhost-vdpa device.
    #[error(
        "this is no vhost-vdpa device: it does not know VHOST_VDPA_GET_DEVICE_ID; those of vdpad are /run/vdpad/dev/vhost-vdpa-N or \
         /dev/vhost-vdpa-N (vdpactl -s dev show)"
    )]
    NoDevice {
        /// Error of the request.
        source: Errno,
    },
    /// The device has an owner already.
    #[error(
        "the device has an owner: another process with the same open file, or this one before an exec; a program that takes a \
         device over calls update::incoming() or Session::assume() and does not negotiate"
    )]
    Owned,
    /// The device does not offer features that are required.
    #[error("the device does not offer {}; it offers {}", text(*.missing, *.device_id), text(*.offered, *.device_id))]
    FeaturesMissing {
        /// Those that it does not offer.
        missing: Features,
        /// Features that the device offers.
        offered: Features,
        /// Virtio device id, which says what the bits mean.
        device_id: u32,
    },
    /// The device is a legacy device, older than virtio 1.
    #[error(
        "the device offers features {} without VERSION_1 (bit 32); legacy devices are not supported", text(*.offered, 0)
    )]
    Legacy {
        /// Features that the device offers.
        offered: Features,
    },
    /// The device does not accept the features: it cleared FEATURES_OK (virtio 1.2 section 3.1.1).
    #[error("the device refused features {}: its status is {status} without features_ok", text(*.features, 0))]
    FeaturesRefused {
        /// Features that were requested.
        features: Features,
        /// Status of the device afterwards.
        status: Status,
    },
    /// A region cannot be mapped as requested.
    #[error("region \"{name}\" {problem}")]
    Region {
        /// Name of the region.
        name: String,
        /// The reason.
        problem: RegionProblem,
    },
    /// The device refused a mapping: with `EFAULT` for every reason, as the kernel does.
    #[error("the device refused to map region \"{name}\" at {range}{}", why_not_mapped(*.source))]
    Map {
        /// Name of the region.
        name: String,
        /// I/O virtual addresses of the mapping.
        range: IovaRange,
        /// Error of the device.
        source: Errno,
    },
    /// The device refused a mapping, and with it the session would have more memory than this process may pin.
    #[error(
        "the device refused to map region \"{name}\" at {range}: with it {wanted} bytes are pinned for this process, whose \
         RLIMIT_MEMLOCK is {limit}; raise it (ulimit -l, LimitMEMLOCK= of a unit), or have the device made with the attribute \
         memlock"
    )]
    Memlock {
        /// Name of the region.
        name: String,
        /// I/O virtual addresses of the mapping.
        range: IovaRange,
        /// Bytes that would be pinned for this session.
        wanted: u64,
        /// The limit in bytes.
        limit: u64,
        /// Error of the device.
        source: Errno,
    },
    /// A memory table was refused, and what was mapped before cannot be mapped again: the session has these regions no more.
    #[error(
        "the table of memory was refused, and the mappings before it could not be restored: {} {} not mapped any more",
        names.join(", "), if names.len() == 1 { "is" } else { "are" }
    )]
    Lost {
        /// Names of the regions.
        names: Vec<String>,
        /// Why the table was refused.
        source: Box<Self>,
    },
    /// A queue cannot be set up or used as requested.
    #[error("queue {index} {problem}")]
    Queue {
        /// Index of the queue.
        index: QueueIndex,
        /// The reason.
        problem: QueueProblem,
    },
}

fn why_not_open(errno: Errno, here: Option<i32>) -> String {
    let why = match (errno, here) {
        (Errno::BUSY, Some(fd)) => {
            return format!(
                ": this process has it open already, as descriptor {fd}; a program that was started or executed with it takes it \
                 over (update::incoming()), assumes it (Session::assume()) or closes it"
            );
        }
        (Errno::BUSY, None) => ": another process has it open, and a vhost-vdpa device can be open once",
        (Errno::ACCESS | Errno::PERM, _) => ": this user may not read and write it",
        (Errno::NOENT, _) => ": there is no such file; vdpactl -s dev show lists those of vdpad",
        _ => "",
    };
    why.to_owned()
}

const fn why_not_mapped(errno: Errno) -> &'static str {
    match errno {
        Errno::FAULT => {
            "; either the range overlaps a mapping that the session does not know, or the limit on pinned memory that was set for \
             the device is exceeded; the log of the server says which"
        }
        _ => "",
    }
}

impl Error {
    /// Replaces a refused mapping by [`Memlock`](Self::Memlock), if the limit of this process explains it. `pinned` is what the
    /// session has mapped writable, with what was refused.
    pub(crate) fn explain(self, pinned: u64) -> Self {
        let limit = vdpa_sys::rlimit::memlock().soft;
        self.explain_by(pinned, limit)
    }

    fn explain_by(self, wanted: u64, limit: Option<u64>) -> Self {
        match (self, limit) {
            (Self::Map { name, range, source: source @ (Errno::FAULT | Errno::NOMEM) }, Some(limit))
                if wanted > limit =>
            {
                Self::Memlock { name, range, wanted, limit, source }
            }
            (error, _) => error,
        }
    }

    pub(crate) fn request(request: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::Request { request, source }
    }
}

/// Why a region cannot be mapped or used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegionProblem {
    /// The session has a region of that name already.
    #[error("exists already")]
    Exists,
    /// The session has no region of that name.
    #[error("does not exist")]
    Unknown,
    /// Size or address is not a multiple of the page size, or the range exceeds 2^64.
    #[error(
        "has iova {iova:#x} and size {size:#x}; both must be multiples of 4096, the size not 0, and the end below 2^64"
    )]
    Alignment {
        /// First I/O virtual address.
        iova: u64,
        /// Size in bytes.
        size: u64,
    },
    /// The region is outside the addresses that the device can use.
    #[error("lies at {range}, outside the {usable} that the device can address")]
    OutOfRange {
        /// Addresses of the region.
        range: IovaRange,
        /// Addresses that the device can use.
        usable: IovaRange,
    },
    /// The region overlaps another one.
    #[error("overlaps region \"{other}\"")]
    Overlap {
        /// Name of the other region.
        other: String,
    },
    /// There is no mapping of this range without a name.
    #[error("is not mapped at {range} by map_at")]
    NotMapped {
        /// Addresses given.
        range: IovaRange,
    },
    /// The region is not within the memory of which it is a part.
    #[error(
        "begins at byte {offset:#x} and has {size} bytes, which is not within the {memory} bytes of its memory, or \
         does not begin at a multiple of 4096"
    )]
    Outside {
        /// Offset of the region in the memory, in bytes.
        offset: u64,
        /// Size of the region in bytes.
        size: u64,
        /// Size of the memory in bytes.
        memory: u64,
    },
    /// A ring is in the region, and the new table has other memory, or none, where the ring is.
    #[error(
        "has the {area} of queue {queue}, at {iova:#x}, which the table would unmap or put elsewhere: leave the memory of a ring as \
         it is until the device is reset"
    )]
    HoldsRing {
        /// The queue.
        queue: QueueIndex,
        /// Name of the area in the virtio specification.
        area: &'static str,
        /// First I/O virtual address that would be other memory.
        iova: u64,
    },
    /// What was given as another mapping of the region is memory of something else.
    #[error(
        "cannot be remapped to that memory: it must be a mapping of the same object, from the same offset of it, in the same size"
    )]
    OtherObject,
    /// Guest memory of the crate `vm-memory` without a file.
    #[error(
        "has no file, so it would end with this program: make guest memory from files (a memfd), as \
         GuestMemoryMmap::from_ranges_with_files does"
    )]
    NoFile,
    /// The memory object is shorter than the region.
    #[error("has {size} bytes from byte {offset} of its memory object on, which has only {object}")]
    Short {
        /// Offset of the region in the object, in bytes.
        offset: u64,
        /// Size of the region in bytes.
        size: u64,
        /// Size of the object in bytes.
        object: u64,
    },
}

/// Why the next image could not map the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryProblem {
    /// The memory is private to this address space.
    #[error(
        "is private memory, which ends with this program: map it shared from a memfd, a hugetlb memfd or a file \
         (Backing::Object, Memory::map, Memory::from_mapping)"
    )]
    Private,
    /// Nothing is mapped there.
    #[error("is not mapped at {uaddr:#x}, where the caller said it is")]
    Hole {
        /// Virtual address in this process.
        uaddr: u64,
    },
    /// Another object, or another offset of the object, is mapped there.
    #[error("is something else at {uaddr:#x} than the object and the offset that the caller gave")]
    Other {
        /// First virtual address at which the mapping differs.
        uaddr: u64,
    },
    /// The mapping that was brought has another size than the memory.
    #[error("has {size} bytes, and the mapping that was brought has {mapped}")]
    Size {
        /// Bytes of the mapping.
        mapped: u64,
        /// Bytes of the memory.
        size: u64,
    },
    /// The memory is mapped in this process already.
    #[error("is mapped already: bring a mapping once, and before the devices are taken over")]
    Mapped,
    /// The mappings of this process cannot be read.
    #[error("cannot be looked up among the mappings of this process: {source}")]
    Unreadable {
        /// Error of reading them.
        source: Errno,
    },
}

/// Why a queue cannot be set up or used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum QueueProblem {
    /// The queue was set up already.
    #[error("is set up already")]
    Exists,
    /// The session has no such queue.
    #[error("is not set up")]
    Unknown,
    /// The device is running, and queues can be set up only before that.
    #[error("cannot be set up: the device runs already")]
    Running,
    /// The size exceeds the device's maximum, or the ring format does not allow it.
    #[error(
        "cannot have {size} entries; a {} to {max} is possible",
        if *.power_of_two { "power of two from 2" } else { "number from 1" }
    )]
    Size {
        /// Requested number of entries.
        size: u16,
        /// Whether the size must be a power of two. This is not so for a guest's packed ring.
        power_of_two: bool,
        /// Largest size that the device supports.
        max: u16,
    },
    /// The ring does not fit into its region at the given offset.
    #[error(
        "needs {needed} bytes at a multiple of 16, but was given offset {offset:#x} of a region of {size} bytes"
    )]
    Placement {
        /// Offset of the ring in the region, in bytes.
        offset: u64,
        /// Size of the ring in bytes.
        needed: u64,
        /// Size of the region in bytes.
        size: u64,
    },
    /// The device may not read and write the region.
    #[error("needs a region that the device may read and write; this one is {perm:?}")]
    Access {
        /// Access of the region.
        perm: Perm,
    },
    /// The queue was set up for the other kind of driver (this program, or a guest).
    #[error("is a ring of {owner}, not of {asked}")]
    Kind {
        /// Who drives the ring.
        owner: &'static str,
        /// The kind of driver that the caller expected.
        asked: &'static str,
    },
    /// The regions of the session do not cover an area of a guest's ring, or the area is not aligned.
    #[error(
        "has its {area} at I/O virtual address {iova:#x}, which needs {needed} bytes in regions of the session, aligned to \
         {align}"
    )]
    Area {
        /// Name of the area in the virtio specification.
        area: &'static str,
        /// I/O virtual address that the caller gave.
        iova: u64,
        /// Required alignment in bytes.
        align: u64,
        /// Size of the area in bytes.
        needed: u64,
    },
    /// The queue is with the caller that took it.
    #[error("is taken: give it back with Session::put_queue")]
    Taken,
    /// The queue that was given back is not one of this session, or is here already.
    #[error("is not the one that was taken from this session")]
    Foreign,
    /// The index is not one of the device's.
    #[error("does not exist: the device has {count} queues, from 0 to {}", count.saturating_sub(1))]
    Index {
        /// Number of queues of the device.
        count: u32,
    },
    /// The driver side of the ring could not be set up or restored.
    #[error("has no usable driver state: {reason}")]
    Driver {
        /// Error message of the ring.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_that_is_refused_is_explained_by_the_limit_or_not() {
        let refused = |source| Error::Map { name: "ram".to_owned(), range: IovaRange::ALL, source };
        let text = |source, limit| refused(source).explain_by(1 << 30, limit).to_string();
        assert_eq!(
            text(Errno::FAULT, Some(8 << 20)),
            "the device refused to map region \"ram\" at [0x0, 0xffffffffffffffff]: with it 1073741824 bytes are pinned for this \
             process, whose RLIMIT_MEMLOCK is 8388608; raise it (ulimit -l, LimitMEMLOCK= of a unit), or have the device made \
             with the attribute memlock"
        );
        for (source, limit) in [(Errno::FAULT, None), (Errno::FAULT, Some(2 << 30))] {
            assert!(text(source, limit).ends_with("the log of the server says which"));
        }
        let other = text(Errno::IO, Some(0));
        assert_eq!(other, "the device refused to map region \"ram\" at [0x0, 0xffffffffffffffff]");
    }

    #[test]
    fn an_open_that_fails_says_what_would_help() {
        let text = |source, here| Error::Open { path: PathBuf::from("/dev/x"), source, here }.to_string();
        assert_eq!(
            text(Errno::BUSY, None),
            "cannot open device /dev/x: another process has it open, and a vhost-vdpa device can be open once"
        );
        assert_eq!(text(Errno::IO, None), "cannot open device /dev/x");
        let here = text(Errno::BUSY, Some(7));
        assert!(here.contains("this process has it open already, as descriptor 7"), "{here}");
    }

    #[test]
    fn the_sizes_that_are_possible_depend_on_the_ring() {
        let text = |power_of_two| QueueProblem::Size { size: 0, power_of_two, max: 256 }.to_string();
        assert_eq!(text(true), "cannot have 0 entries; a power of two from 2 to 256 is possible");
        assert_eq!(text(false), "cannot have 0 entries; a number from 1 to 256 is possible");
    }
}
