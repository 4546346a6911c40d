//! Guest memory of the crate `vm-memory`, as memory that devices may be told of.
#![expect(unsafe_code, reason = "promises for mappings of vm-memory what that crate promises")]

use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegion;

use crate::mmap::{Prot, SharedMap};
use crate::stable::StableMemory;

const PROT_READ: i32 = libc::PROT_READ;
const PROT_WRITE: i32 = libc::PROT_WRITE;

struct Region<B>(Arc<MmapRegion<B>>);

// SAFETY: the region stays mapped until its last reference is dropped, and this value has one. vm-memory hands out volatile
// accesses and raw pointers to it, never references. One without PROT_WRITE is the exception the trait allows.
unsafe impl<B: Bitmap + Send + Sync> StableMemory for Region<B> {
    fn base(&self) -> usize {
        self.0.as_ptr().expose_provenance()
    }

    fn len(&self) -> usize {
        self.0.size()
    }
}

impl<B: Bitmap + Send + Sync + 'static> From<Arc<MmapRegion<B>>> for SharedMap {
    /// The same memory, which stays mapped as long as either value exists.
    fn from(region: Arc<MmapRegion<B>>) -> Self {
        let prot = Prot { read: region.prot() & PROT_READ != 0, write: region.prot() & PROT_WRITE != 0 };
        Self::over_as(Arc::new(Region(region)), prot)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{
        Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    };

    use super::*;

    #[test]
    fn both_see_the_same_bytes_and_either_keeps_them() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x2000)]).unwrap();
        let region = memory.find_region(GuestAddress(0x1000)).unwrap();
        assert_eq!(region.len(), 0x2000);
        let map = SharedMap::from(region.get_mmap());
        memory.write_slice(b"guest", GuestAddress(0x1010)).unwrap();
        drop(memory);
        let mut bytes = [0; 5];
        map.read(0x10, &mut bytes).unwrap();
        assert_eq!((&bytes, map.len()), (b"guest", 0x2000));
    }
}
