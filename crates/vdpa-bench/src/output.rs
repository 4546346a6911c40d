//! Prints the result of a command.

use std::error::Error;
use std::io::{self, Write as _};
use std::process::ExitCode;

use serde::Serialize;

use super::wire::chain;

/// Prints the outcome of `vdpactl COMMAND`, as JSON on one line or as text, or its error. The exit status is 1 after an error, if
/// `good` rejects the outcome, and if it cannot be printed.
pub(super) fn finish<T: Serialize>(
    command: &str,
    outcome: Result<T, impl Error>,
    json: bool,
    text: impl FnOnce(&T) -> String,
    good: impl FnOnce(&T) -> bool,
) -> ExitCode {
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("vdpactl: {command}: {}", chain(&error));
            return ExitCode::FAILURE;
        }
    };
    let printed =
        if json { serde_json::to_string(&outcome).unwrap_or_default() + "\n" } else { text(&outcome) };
    let written = io::stdout().write_all(printed.as_bytes());
    if good(&outcome) && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
