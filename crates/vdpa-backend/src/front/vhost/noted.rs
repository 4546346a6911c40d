//! What a device file notes in memory that outlives this process: see [`DeviceNotes`].

use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::{UpdateHistory, VhostVdpaFile};
use crate::persist::DeviceNotes;
use crate::suspect::Turn;

/// The notes of a device file.
#[derive(Debug, Default)]
pub(super) struct Noted {
    /// `None` for a device that does not outlive this process.
    notes: Option<DeviceNotes>,
    /// While a request is in progress that an earlier process had read.
    turn: Mutex<Option<Turn>>,
}

impl Noted {
    /// Notes that a request is begun; `false` when it must not be, since processes have died of it.
    pub(super) fn begin(&self, unique: u64, resent: bool) -> bool {
        let Some(notes) = &self.notes else { return true };
        if resent {
            // Only one of those that may be what ends this process is begun at a time, so that it is known which one it was.
            let mut turn = Turn::take();
            while turn.is_none() {
                thread::sleep(Duration::from_millis(1));
                turn = Turn::take();
            }
            *self.turn.lock() = turn;
        }
        let begun = notes.begin(unique, resent);
        if !begun {
            self.end();
        }
        begun
    }

    /// The request has ended.
    pub(super) fn end(&self) {
        if let Some(turn) = self.turn.lock().take() {
            turn.give_back();
        }
    }
}

impl VhostVdpaFile {
    /// Keeps the history of updates in `notes`, which has that of an earlier process, and notes each request before it is begun: one
    /// of which processes die is not begun again.
    #[must_use]
    pub fn with_notes(self, notes: Option<DeviceNotes>) -> Self {
        let updates = notes.as_ref().map(DeviceNotes::history).unwrap_or_default();
        Self { updates: Mutex::new(updates), noted: Noted { notes, turn: Mutex::default() }, ..self }
    }

    /// Requests on the file that were refused because processes had begun them, and died.
    pub fn refused(&self) -> u64 {
        self.noted.notes.as_ref().map_or(0, DeviceNotes::refused)
    }

    pub(super) fn change_history(&self, change: impl FnOnce(&mut UpdateHistory)) {
        let mut updates = self.updates.lock();
        change(&mut updates);
        if let Some(notes) = &self.noted.notes {
            notes.set_history(&updates);
        }
    }
}
