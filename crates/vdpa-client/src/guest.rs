//! Guest memory of the crate `vm-memory`.

use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use crate::memory::Memory;

/// Maps `memory` by `vm-memory`, at guest address `base`, and brings the mapping. The error is for people.
pub(crate) fn map(memory: &Arc<Memory>, base: u64) -> Result<GuestRegionMmap, String> {
    let (fd, offset) = memory.object().ok_or("it has no file")?;
    let file = fd.try_clone_to_owned().map(File::from).map_err(|e| e.to_string())?;
    let size = usize::try_from(memory.size()).map_err(|e| e.to_string())?;
    let mapping = MmapRegion::from_file(FileOffset::new(file, offset), size).map_err(|e| e.to_string())?;
    let mapping = Arc::new(mapping);
    memory.bring(Arc::clone(&mapping)).map_err(|e| format!("it {e}"))?;
    GuestRegionMmap::with_arc(mapping, GuestAddress(base)).ok_or_else(|| "it ends beyond 2^64".to_owned())
}
