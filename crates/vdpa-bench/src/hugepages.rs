//! [`Reserved`]: huge pages for the duration of a measurement.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The kernel's pool of pages of 2 MiB.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Bytes of a page.
const PAGE: u64 = 2 << 20;
/// How long to retry: memory that was just freed must be compacted before it yields huge pages.
const RESERVE_TIMEOUT: Duration = Duration::from_secs(10);
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Free pages of 2 MiB in the kernel's pool. Dropping it shrinks the pool to its former size.
///
/// A process that is killed leaves the pool enlarged; its size is in `nr_hugepages` of the pool's directory.
#[derive(Debug)]
pub struct Reserved {
    pool: PathBuf,
    /// Former size of the pool, if it was changed.
    before: Option<u64>,
}

impl Reserved {
    /// Makes sure that `bytes` are free in the pool, which it enlarges if needed. Blocks while the kernel compacts memory: seconds
    /// for some GiB.
    ///
    /// # Errors
    /// The reason as text. The pool is as before then.
    pub fn new(bytes: u64) -> Result<Self, String> {
        Self::of(Path::new(POOL), bytes, RESERVE_TIMEOUT)
    }

    fn of(pool: &Path, bytes: u64, timeout: Duration) -> Result<Self, String> {
        let mut reserved = Self { pool: pool.to_owned(), before: None };
        let wanted = bytes.div_ceil(PAGE);
        let free = reserved.read("free_hugepages")?;
        if free >= wanted {
            return Ok(reserved);
        }
        let before = reserved.read("nr_hugepages")?;
        reserved.before = Some(before);
        let begin = Instant::now();
        loop {
            reserved.write(before + wanted - free)?;
            let free = reserved.read("free_hugepages")?;
            if free >= wanted {
                return Ok(reserved);
            }
            if begin.elapsed() >= timeout {
                return Err(format!("of {wanted} pages of 2 MiB the kernel could only find {free}"));
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
    }

    fn read(&self, name: &str) -> Result<u64, String> {
        let path = self.pool.join(name);
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        text.trim().parse().map_err(|_| format!("{} holds no number", path.display()))
    }

    fn write(&self, pages: u64) -> Result<(), String> {
        let path = self.pool.join("nr_hugepages");
        std::fs::write(&path, pages.to_string()).map_err(|e| format!("{}: {e}", path.display()))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(e) = self.write(before)
        {
            eprintln!("vdpactl: the pool of huge pages stays larger than its {before} pages before: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(free: &str, all: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("free_hugepages"), free).unwrap();
        std::fs::write(directory.path().join("nr_hugepages"), all).unwrap();
        directory
    }

    fn size(pool: &tempfile::TempDir) -> String {
        std::fs::read_to_string(pool.path().join("nr_hugepages")).unwrap()
    }

    #[test]
    fn free_pages_suffice_and_a_failure_restores_the_pool() {
        let enough = pool("8\n", "20\n");
        drop(Reserved::of(enough.path(), 16 << 20, Duration::ZERO).unwrap());
        assert_eq!(size(&enough), "20\n");
        // This pool never grows, so the size written to it is restored.
        let short = pool("2\n", "20\n");
        let error = Reserved::of(short.path(), 16 << 20, Duration::ZERO).unwrap_err();
        assert!(error.contains("of 8 pages of 2 MiB the kernel could only find 2"), "{error}");
        assert_eq!(size(&short), "20");
        let none = tempfile::tempdir().unwrap();
        assert!(Reserved::of(none.path(), 1, Duration::ZERO).unwrap_err().contains("free_hugepages"));
    }
}
