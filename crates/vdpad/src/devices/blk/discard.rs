//! Whether the storage behind a disk can give back space.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FallocateFlags, fallocate, major, minor};

/// Whether a discard can free space. For files the file system is asked, behind the end of the file, where nothing is. A file that
/// cannot be written is taken for one that can: no request reaches it.
pub(super) fn works(file: &File, is_block: bool) -> bool {
    let Ok(meta) = file.metadata() else { return true };
    if is_block {
        return queue_limit(meta.rdev(), "discard_max_bytes").is_none_or(|bytes| bytes > 0);
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let block = meta.blksize().max(512);
    let behind = meta.len().next_multiple_of(block);
    !matches!(
        fallocate(file, punch, behind, block),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::NODEV)
    )
}

/// A limit of the queue of a block device, or of the disk that it is a partition of; `None` where sysfs does not say.
fn queue_limit(device: u64, name: &str) -> Option<u64> {
    let base = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    let own = std::fs::read_to_string(format!("{base}/queue/{name}"));
    let text = own.or_else(|_| std::fs::read_to_string(format!("{base}/../queue/{name}"))).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [7; 5000]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        works(&file, false);
        assert!(std::fs::read(&path).unwrap() == [7; 5000]);
        // tmpfs can.
        let memory = vdpa_sys::memfd::create(c"disk", 8192, None).unwrap();
        assert!(works(&File::from(memory), false));
    }
}
