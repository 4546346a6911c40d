//! [`Disk`]: the device file of one device of `recording`.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]
#![expect(unreachable_pub, reason = "shared by tests, each of which is a crate")]

use std::fs::File;
use std::path::PathBuf;

use vdpa_core::features::Bit;

use super::recording::offered;

/// A device file in its own directory.
pub struct Disk {
    _directory: tempfile::TempDir,
    pub path: PathBuf,
}

impl Disk {
    pub fn new(bits: &[Bit]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(format!("{:x}", offered(bits).0));
        File::create(&path).unwrap();
        Self { _directory: directory, path }
    }

    /// Returns the requests since the update began.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.path).unwrap();
        text.split_once("--- update\n").unwrap().1.lines().collect::<Vec<_>>().join(", ")
    }
}
