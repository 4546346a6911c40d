//! Compares a backing file with the ledger, outside the device.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::engine::LoadError;
use super::ledger::Ledger;

/// Blocks read at a time.
const BATCH: u64 = 256;

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Blocks compared.
    pub blocks: u64,
    /// Blocks that are wrong.
    pub wrong: u64,
    /// What is wrong with the first of them.
    pub first: Option<String>,
}

/// Compares every block of `file` with what it should hold. The tenant must be quiet.
///
/// # Errors
/// [`LoadError`] when file or ledger cannot be read.
pub fn verify(file: &Path, ledger: &Ledger) -> Result<Verdict, LoadError> {
    let failed = |action| {
        move |e: std::io::Error| LoadError::System {
            action,
            source: vdpa_core::Errno::from_raw(e.raw_os_error().unwrap_or(0)),
        }
    };
    let file = File::open(file).map_err(failed("open the backing file"))?;
    let size = usize::try_from(ledger.block_size()).unwrap_or(0).max(1);
    let mut verdict = Verdict::default();
    let mut first = 0;
    while first < ledger.blocks() {
        let count = BATCH.min(ledger.blocks() - first);
        let mut data = vec![0; usize::try_from(count).unwrap_or(0) * size];
        file.read_exact_at(&mut data, first * ledger.block_size())
            .map_err(failed("read the backing file"))?;
        for (block, data) in (first..).zip(data.chunks_exact(size)) {
            verdict.blocks += 1;
            if let Err(corruption) = ledger.judge(block, data)? {
                verdict.wrong += 1;
                verdict.first.get_or_insert_with(|| corruption.to_string());
            }
        }
        first += count;
    }
    Ok(verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_corruption_is_found_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let (ledger, _fd) = Ledger::create(600, 512, 1).unwrap();
        let mut disk = vec![0; 600 * 512];
        for block in [0_u64, 5, 599] {
            let at = usize::try_from(block).unwrap() * 512;
            ledger.begin(block, block + 1).unwrap().write(&mut disk[at..at + 512]);
            ledger.commit(block, block + 1).unwrap();
        }
        std::fs::write(&path, &disk).unwrap();
        assert_eq!(verify(&path, &ledger).unwrap(), Verdict { blocks: 600, wrong: 0, first: None });

        // A lost write, a flipped bit, a block written where none should be.
        ledger.commit(5, 77).unwrap();
        disk[599 * 512 + 300] ^= 1;
        let copy = disk[..512].to_vec();
        disk[1024..1536].copy_from_slice(&copy);
        std::fs::write(&path, &disk).unwrap();
        let verdict = verify(&path, &ledger).unwrap();
        assert_eq!((verdict.blocks, verdict.wrong), (600, 3));
        assert!(verdict.first.unwrap().contains("block 2 holds block 0"));

        std::fs::write(&path, &disk[..1000]).unwrap();
        assert!(verify(&path, &ledger).is_err());
    }
}
