//! What the holder counts, in memory that the service manager keeps: it goes on when the holder itself has died.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use vdpa_core::Errno;
use vdpa_core::ring::inflight::LogMemory;
use vdpa_sys::shared_words::SharedWords;

use crate::fdstore::{self, Store};
use crate::protocol::{Kind, Status};

/// Under this key the memory is in the service manager's store. No item of a daemon has it.
pub(super) const KEY: u64 = u64::MAX;
/// "VHCT" and the version of the format: word 0, then those of [`WORDS`].
const MAGIC: u64 = 0x1_5443_4856;
/// Generation, crashes, upgrades; how often a holder began.
const WORDS: usize = 5;

#[derive(Debug)]
pub(super) struct Counts {
    fd: OwnedFd,
    words: SharedWords,
}

impl Counts {
    /// New memory, which the service manager gets a copy of.
    pub(super) fn create(store: &Store) -> Result<Self, Errno> {
        let (fd, words) = SharedWords::create(c"vdpa-holder-counts", WORDS)?;
        words.store(0, MAGIC);
        if let Some(name) = fdstore::name(KEY, Kind::Memory, &[]) {
            store.store(&name, fd.as_fd())?;
        }
        Ok(Self { fd, words })
    }

    /// The memory of a holder that has died; `None` for one of another version.
    pub(super) fn open(fd: OwnedFd) -> Option<Self> {
        let words = SharedWords::map(&fd).ok()?;
        (words.words() >= WORDS && words.load(0) == MAGIC).then_some(Self { fd, words })
    }

    /// Goes on in `status` where the last holder was: the next generation begins.
    pub(super) fn continue_in(&self, status: &mut Status) {
        status.generation = self.words.load(1) + 1;
        (status.crashes, status.upgrades) = (self.words.load(2), self.words.load(3));
        self.words.store(4, self.words.load(4) + 1);
    }

    pub(super) fn save(&self, status: &Status) {
        for (word, value) in (1..).zip([status.generation, status.crashes, status.upgrades]) {
            self.words.store(word, value);
        }
    }

    pub(super) fn number(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Counts {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use vdpa_sys::memfd;

    use super::*;

    #[test]
    fn counts_go_on_in_another_holder() {
        let (fd, words) = SharedWords::create(c"counts", WORDS).unwrap();
        words.store(0, MAGIC);
        let first = Counts { fd: fd.try_clone().unwrap(), words };
        first.save(&Status { generation: 7, crashes: 3, upgrades: 2, ..Status::default() });
        let mut status = Status { pid: 5, ..Status::default() };
        Counts::open(fd).unwrap().continue_in(&mut status);
        assert_eq!(status, Status { pid: 5, generation: 8, crashes: 3, upgrades: 2, ..Status::default() });
        assert!(Counts::open(memfd::sealed(c"other", &[0; 64]).unwrap()).is_none());
    }

    /// The service manager keeps the memory for a holder of a later version. `VDPA_WRITE_GOLDEN=1` writes the file where there is
    /// none; it never changes.
    #[test]
    fn the_counts_of_version_1_are_read() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/counts-v1.bin");
        let words = [MAGIC, 7, 3, 2, 1];
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
            std::fs::write(&path, &bytes).unwrap();
        }
        let found = std::fs::read(&path).unwrap();
        let (fd, memory) = SharedWords::create(c"counts", WORDS).unwrap();
        for (word, value) in found.chunks_exact(8).enumerate() {
            memory.store(word, u64::from_le_bytes(value.try_into().unwrap()));
        }
        let counts = Counts::open(fd).unwrap();
        let mut status = Status::default();
        counts.continue_in(&mut status);
        assert_eq!(status, Status { generation: 8, crashes: 3, upgrades: 2, ..Status::default() });
        assert_eq!(counts.words.load(4), 2, "how often a holder began");
    }
}
