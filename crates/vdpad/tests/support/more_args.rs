//! [`more_args`]: to run the tests with an option that they do not give.

/// More arguments for each daemon that a test starts, from `VDPAD_TEST_ARGS`.
pub(crate) fn more_args() -> Vec<String> {
    let text = std::env::var("VDPAD_TEST_ARGS").unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}
