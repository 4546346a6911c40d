//! Compares a backing file with the journal, without the device.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::engine::LoadError;
use super::journal::Journal;

/// Blocks read at a time.
const BATCH: u64 = 256;

/// Result of a comparison.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Blocks compared.
    pub blocks: u64,
    /// Blocks that are wrong.
    pub wrong: u64,
    /// What is wrong with the first of them.
    pub first: Option<String>,
}

/// Compares every block of `file` with its expected contents. No write may be in flight.
///
/// # Errors
/// [`LoadError`] when file or journal cannot be read.
pub fn verify(file: &Path, journal: &Journal) -> Result<Comparison, LoadError> {
    let failed = |action| {
        move |e: std::io::Error| LoadError::System {
            action,
            source: vdpa_core::Errno::from_raw(e.raw_os_error().unwrap_or(0)),
        }
    };
    let file = File::open(file).map_err(failed("open the backing file"))?;
    let size = usize::try_from(journal.block_size()).unwrap_or(0).max(1);
    let mut comparison = Comparison::default();
    let mut first = 0;
    while first < journal.blocks() {
        let count = BATCH.min(journal.blocks() - first);
        let mut data = vec![0; usize::try_from(count).unwrap_or(0) * size];
        file.read_exact_at(&mut data, first * journal.block_size())
            .map_err(failed("read the backing file"))?;
        for (block, data) in (first..).zip(data.chunks_exact(size)) {
            comparison.blocks += 1;
            if let Err(corruption) = journal.verify(block, data)? {
                comparison.wrong += 1;
                comparison.first.get_or_insert_with(|| corruption.to_string());
            }
        }
        first += count;
    }
    Ok(comparison)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_corruption_and_nothing_else_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let (journal, _fd) = Journal::create(600, 512, 1).unwrap();
        let mut disk = vec![0; 600 * 512];
        for block in [0_u64, 5, 599] {
            let at = usize::try_from(block).unwrap() * 512;
            journal.begin(block, block + 1).unwrap().write(&mut disk[at..at + 512]);
            journal.commit(block, block + 1).unwrap();
        }
        std::fs::write(&path, &disk).unwrap();
        assert_eq!(verify(&path, &journal).unwrap(), Comparison { blocks: 600, wrong: 0, first: None });

        // A lost write, a flipped bit, and a block that was written to the wrong place.
        journal.commit(5, 77).unwrap();
        disk[599 * 512 + 300] ^= 1;
        let copy = disk[..512].to_vec();
        disk[1024..1536].copy_from_slice(&copy);
        std::fs::write(&path, &disk).unwrap();
        let comparison = verify(&path, &journal).unwrap();
        assert_eq!((comparison.blocks, comparison.wrong), (600, 3));
        assert!(comparison.first.unwrap().contains("block 2 holds block 0"));

        std::fs::write(&path, &disk[..1000]).unwrap();
        assert!(verify(&path, &journal).is_err());
    }
}
