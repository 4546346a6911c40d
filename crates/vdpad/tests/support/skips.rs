//! [`skip`]: says loudly that a test cannot run here.

use std::fs::File;
use std::io::Write;

/// Prints why, and adds it to the file named by `VDPA_SKIP_LOG`: the CI fails for reasons that it does not expect.
pub(crate) fn skip(reason: &str) {
    let line = format!("SKIPPED: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("VDPA_SKIP_LOG") {
        let mut log = File::options().create(true).append(true).open(path).unwrap();
        log.write_all(line.as_bytes()).unwrap();
    }
}
