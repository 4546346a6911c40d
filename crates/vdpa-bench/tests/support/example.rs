//! [`example`]: the examples of this package.

use std::path::PathBuf;
use std::process::Command;

/// The example `name`, which is built with the tests; the daemon beside it is the one under test.
pub(crate) fn example(name: &str) -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--locked", "--package", "vdpa-bench", "--example", name])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success());
    let target = std::env::current_exe().unwrap();
    target.ancestors().nth(3).unwrap().join("debug/examples").join(name)
}
