//! [`program`]: the programs of the workspace.

use std::path::{Path, PathBuf};

/// Names a directory with copies of the programs: for machines and users that have no build directory.
pub(crate) const PROGRAMS: &str = "VDPA_TEST_PROGRAMS";

/// The program `name` of the workspace, which `./test` and `cargo build --workspace --bins` build beside this test.
pub(crate) fn program(name: &str) -> PathBuf {
    // target/PROFILE/deps/TEST-HASH
    let test = std::env::current_exe().unwrap();
    let path = match std::env::var_os(PROGRAMS) {
        Some(dir) => Path::new(&dir).join(name),
        None => test.ancestors().nth(2).unwrap().join(name),
    };
    assert!(path.is_file(), "{} is missing: cargo build --workspace --bins", path.display());
    path
}
