//! Where does it run? For a side whose connection was cut.

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use super::error::MigrateError;
use super::wire::{self, Kind};

/// What a side says of the machine of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It runs with the side that says so, or will.
    Mine,
    /// The side that says so does not run it, and will not.
    NotMine,
    /// The side that says so does not know either, or knows of no such migration.
    Unknown,
}

/// Asks the other side, over a new stream, where the machine of the migration `id` runs. Blocks until it answers.
///
/// # Errors
/// [`MigrateError::Stream`], [`MigrateError::Malformed`].
pub fn ask<S: Read + Write>(stream: &mut S, id: &str) -> Result<Fate, MigrateError> {
    wire::write_json(stream, Kind::Ask, &id)?;
    wire::expect(stream, Kind::Answer)?.parse()
}

/// Answers a side that [asks](ask): `fate` says what is known of a migration. Whoever answers [`Fate::NotMine`] must never run the
/// machine afterwards. Blocks until it is asked.
///
/// # Errors
/// As [`ask`].
pub fn answer<S: Read + Write>(
    stream: &mut S,
    fate: impl FnOnce(&str) -> Fate,
) -> Result<Fate, MigrateError> {
    let id: String = wire::expect(stream, Kind::Ask)?.parse()?;
    let fate = fate(&id);
    wire::write_json(stream, Kind::Answer, &fate)?;
    Ok(fate)
}
