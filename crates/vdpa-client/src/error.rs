//! Errors of driving a device.

use std::path::PathBuf;

use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{Features, Status};
use vdpa_core::types::{IovaRange, QueueIndex};

pub use vdpa_core::error::chain;

/// What went wrong while a session was set up or used.
#[derive(Debug, Error)]
pub enum Error {
    /// The device file cannot be opened. `EBUSY` means that another process has it open.
    #[error("cannot open device {}", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: Errno,
    },
    /// A request to the device or the kernel failed.
    #[error("{request} failed")]
    Request {
        /// Name of the request, as in the kernel's header, or of the system call.
        request: &'static str,
        /// The answer.
        source: Errno,
    },
    /// The device is older than virtio 1.
    #[error(
        "the device offers features {offered} without VERSION_1 (bit 32); legacy devices are not supported"
    )]
    Legacy {
        /// What it offers.
        offered: Features,
    },
    /// The device did not keep FEATURES_OK (virtio 1.2 section 3.1.1).
    #[error("the device refused features {features}: its status is {status} without features_ok")]
    FeaturesRefused {
        /// What was asked for.
        features: Features,
        /// What it answered.
        status: Status,
    },
    /// Memory that cannot be mapped as asked.
    #[error("region \"{name}\" {problem}")]
    Region {
        /// Name of the region.
        name: String,
        /// What is wrong with it.
        problem: RegionProblem,
    },
    /// The device refused a mapping.
    #[error("the device refused to map region \"{name}\" at {range}")]
    Map {
        /// Name of the region.
        name: String,
        /// Its I/O virtual addresses.
        range: IovaRange,
        /// The device's answer.
        source: Errno,
    },
    /// A queue that cannot be set up as asked.
    #[error("queue {index} {problem}")]
    Queue {
        /// Which queue.
        index: QueueIndex,
        /// What is wrong.
        problem: QueueProblem,
    },
}

impl Error {
    pub(crate) fn request(request: &'static str) -> impl Fn(Errno) -> Self {
        move |source| Self::Request { request, source }
    }
}

/// What is wrong with a region.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RegionProblem {
    /// There is one of that name already.
    #[error("exists already")]
    Exists,
    /// There is none of that name.
    #[error("does not exist")]
    Unknown,
    /// Size or address is not a whole number of pages, or the range wraps.
    #[error(
        "has iova {iova:#x} and size {size:#x}; both must be multiples of 4096, the size not 0, and the end below 2^64"
    )]
    Alignment {
        /// I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// Outside what the device can address.
    #[error("lies at {range}, outside the {usable} that the device can address")]
    OutOfRange {
        /// The region.
        range: IovaRange,
        /// What the device can do.
        usable: IovaRange,
    },
    /// It overlaps another one.
    #[error("overlaps region \"{other}\"")]
    Overlap {
        /// The other region.
        other: String,
    },
    /// Not within the memory it is to be a part of.
    #[error(
        "begins at byte {offset:#x} and has {size} bytes, which is not within the {memory} bytes of its memory, or \
         does not begin at a multiple of 4096"
    )]
    Outside {
        /// Where it begins in the memory.
        offset: u64,
        /// Bytes of the region.
        size: u64,
        /// Bytes of the memory.
        memory: u64,
    },
    /// The memory object is shorter than the region.
    #[error("has {size} bytes from byte {offset} of its memory object on, which has only {object}")]
    Short {
        /// Where it begins in the object.
        offset: u64,
        /// Bytes of the region.
        size: u64,
        /// Bytes of the object.
        object: u64,
    },
}

/// Why memory would not be the same for the next image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MemoryProblem {
    /// It belongs to this address space alone.
    #[error(
        "is private memory, which ends with this program: map it shared from a memfd, a hugetlb memfd or a file \
         (Backing::Object, Memory::map, Memory::from_mapping)"
    )]
    Private,
    /// Nothing is mapped there.
    #[error("is not mapped at {uaddr:#x}, where the caller said it is")]
    Hole {
        /// The address.
        uaddr: u64,
    },
    /// Another object or another offset is mapped there.
    #[error("is something else at {uaddr:#x} than the object and the offset that the caller gave")]
    Other {
        /// The first address where it differs.
        uaddr: u64,
    },
    /// The mappings of this process cannot be read.
    #[error("cannot be looked up among the mappings of this process: {source}")]
    Unreadable {
        /// Why not.
        source: Errno,
    },
}

/// What is wrong with a queue.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum QueueProblem {
    /// It was set up already.
    #[error("is set up already")]
    Exists,
    /// The session has no such queue.
    #[error("is not set up")]
    Unknown,
    /// The device is running.
    #[error("cannot be set up: the device runs already")]
    Running,
    /// Larger than the device can do, or not a size that such a ring can have.
    #[error(
        "cannot have {size} entries; a {} to {max} is possible",
        if *.power_of_two { "power of two from 2" } else { "number from 1" }
    )]
    Size {
        /// What was asked for.
        size: u16,
        /// Whether it has to be a power of two: not for the packed ring of a guest.
        power_of_two: bool,
        /// The device's limit.
        max: u16,
    },
    /// It does not fit where it was placed.
    #[error(
        "needs {needed} bytes at a multiple of 16, but was given offset {offset:#x} of a region of {size} bytes"
    )]
    Placement {
        /// Offset in the region.
        offset: u64,
        /// Bytes of ring needed.
        needed: u64,
        /// Bytes of the region.
        size: u64,
    },
    /// It is set up as the other kind.
    #[error("is a ring of {owner}, not of {asked}")]
    Kind {
        /// Whose ring it is.
        owner: &'static str,
        /// Who was asked for.
        asked: &'static str,
    },
    /// An area of a guest's ring that no mapping of the session covers.
    #[error(
        "has its {area} at I/O virtual address {iova:#x}, which is in no region or not aligned to {align}"
    )]
    Area {
        /// Which area, in virtio's words.
        area: &'static str,
        /// Where it was said to be.
        iova: u64,
        /// Its alignment in bytes.
        align: u64,
    },
    /// The driver side could not be set up or adopted.
    #[error("has no usable driver state: {reason}")]
    Driver {
        /// What the ring said.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_that_are_possible_depend_on_the_ring() {
        let text = |power_of_two| QueueProblem::Size { size: 0, power_of_two, max: 256 }.to_string();
        assert_eq!(text(true), "cannot have 0 entries; a power of two from 2 to 256 is possible");
        assert_eq!(text(false), "cannot have 0 entries; a number from 1 to 256 is possible");
    }
}
