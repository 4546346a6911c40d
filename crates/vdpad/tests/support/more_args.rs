//! [`more_args`]: to run the tests with an option that they do not give; and what goes wrong then without a test noticing.

/// More arguments for each daemon that a test starts, from `VDPAD_TEST_ARGS`.
pub(crate) fn more_args() -> Vec<String> {
    let text = std::env::var("VDPAD_TEST_ARGS").unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Asserts that the daemon has made no system call that `--seccomp on` refuses, by its log. Says nothing in a test that has failed already.
pub(crate) fn nothing_was_refused(log: &str) {
    let refused = log.lines().find(|line| line.contains(vdpa_sys::sigsys::REFUSED));
    assert!(refused.is_none() || std::thread::panicking(), "{refused:?}");
}
