//! [`DeviceNotes`]: what a device notes in memory that outlives this process, and not in its journal: it changes too often for
//! that, or before anything else has changed.

use std::fmt;
use std::time::{Duration, SystemTime};

use vdpa_core::ring::inflight::LogMemory;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::uapi::report::UpdateReport;
use zerocopy::{FromBytes, IntoBytes};

use crate::front::vhost::UpdateHistory;

/// Words that a device needs.
pub(crate) const WORDS: usize = 128;
/// Version of everything in this file; 0 is memory that nobody has used.
const VERSION: u64 = 1;

/// Words by what they hold.
const HEADER: usize = 0;
/// The request in progress: its number, and in the lowest [`ATTEMPT_BITS`] bits how many processes have begun it.
const REQUEST: usize = 1;
const REFUSED: usize = 2;
/// Which of the two histories is the last complete one.
const PRESENT: usize = 3;
const HISTORIES: [usize; 2] = [16, 16 + HISTORY];
/// Words of a history: five, then a report.
const HISTORY: usize = 5 + REPORT;
const REPORT: usize = size_of::<UpdateReport>() / 8;

const ATTEMPT_BITS: u32 = 3;
/// A request that this many processes had begun, and died, is not begun by another one.
const ATTEMPTS_MAX: u64 = 2;

const _: () = assert!(size_of::<UpdateReport>().is_multiple_of(8));
/// Words for what the device itself counts.
pub(crate) const OWN: std::ops::Range<usize> = 96..WORDS;
const _: () = assert!(HISTORIES[1] + HISTORY <= OWN.start);

/// The notes of one device. Used under the device's lock, or by the one thread that answers its requests.
pub struct DeviceNotes {
    words: SharedWords,
}

impl fmt::Debug for DeviceNotes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceNotes").field("refused", &self.refused()).finish_non_exhaustive()
    }
}

impl DeviceNotes {
    /// The notes in these words; `None` for too few, or those of another version.
    pub(crate) fn new(words: SharedWords) -> Option<Self> {
        if words.words() < WORDS || ![0, VERSION].contains(&words.load(HEADER)) {
            return None;
        }
        words.store(HEADER, VERSION);
        Some(Self { words })
    }

    /// Notes that a request is begun, before anything is done. `false`, and it must not be begun, when [`ATTEMPTS_MAX`] processes had
    /// begun it and have died.
    pub(crate) fn begin(&self, unique: u64, resent: bool) -> bool {
        // Numbers are given out in turn: they do not reach the bits that are lost here.
        let number = unique << ATTEMPT_BITS;
        let noted = self.words.load(REQUEST);
        let attempts = noted & ((1 << ATTEMPT_BITS) - 1);
        let before = if resent && noted - attempts == number { attempts } else { 0 };
        if before >= ATTEMPTS_MAX {
            self.words.store(REFUSED, self.refused() + 1);
            return false;
        }
        self.words.store(REQUEST, number | (before + 1));
        true
    }

    /// Number of the request that was begun last.
    pub(crate) fn request(words: &SharedWords) -> u64 {
        words.load(REQUEST) >> ATTEMPT_BITS
    }

    /// Requests that were not begun again.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.words.load(REFUSED)
    }

    /// The history that was noted last.
    pub(crate) fn history(&self) -> UpdateHistory {
        let at = HISTORIES.get(usize::from(self.words.load(PRESENT) == 1)).copied().unwrap_or(0);
        let word = |offset| self.words.load(at + offset);
        let time = |ns| (ns > 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(ns));
        let report: Vec<u8> = (0..REPORT).flat_map(|index| word(5 + index).to_ne_bytes()).collect();
        let report = UpdateReport::read_from_bytes(&report).ok();
        UpdateHistory {
            owner_changes: word(0),
            owner_changed: time(word(1)),
            done: word(2),
            rolled_back: word(3),
            last: report.zip(time(word(4))),
        }
    }

    /// Notes a history. A process that dies meanwhile leaves the one before.
    pub(crate) fn set_history(&self, history: &UpdateHistory) {
        let next = 1 - u64::from(self.words.load(PRESENT) == 1);
        let at = HISTORIES.get(usize::from(next == 1)).copied().unwrap_or(0);
        let ns = |time: SystemTime| {
            time.duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
        };
        let UpdateHistory { owner_changes, owner_changed, done, rolled_back, last } = history;
        let head = [
            *owner_changes,
            owner_changed.map_or(0, ns),
            *done,
            *rolled_back,
            last.as_ref().map_or(0, |(_, at)| ns(*at)),
        ];
        let report = last.as_ref().map(|(report, _)| report.as_bytes()).unwrap_or_default();
        let report = report.as_chunks().0.iter().map(|bytes| u64::from_ne_bytes(*bytes));
        (at..).zip(head.into_iter().chain(report)).for_each(|(word, value)| self.words.store(word, value));
        self.words.store(PRESENT, next);
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    fn notes() -> (std::os::fd::OwnedFd, DeviceNotes) {
        let (fd, words) = SharedWords::create(c"notes", WORDS).unwrap();
        (fd, DeviceNotes::new(words).unwrap())
    }

    #[test]
    fn a_request_is_begun_twice_and_not_a_third_time() {
        let (_fd, notes) = notes();
        assert!(notes.begin(8, false) && notes.begin(10, false));
        assert!(notes.begin(8, true), "it was not in progress, and is begun for the first time");
        assert!(notes.begin(8, true));
        assert_eq!((notes.begin(8, true), notes.refused()), (false, 1));
        assert_eq!((notes.begin(8, true), notes.refused()), (false, 2));
        assert!(notes.begin(12, true));
    }

    #[test]
    fn a_history_is_found_again() {
        let (fd, notes) = notes();
        assert_eq!(notes.history().owner_changes, 0);
        assert!(notes.history().last.is_none());
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_890_123);
        for number in 1..4 {
            let mut report = UpdateReport::new_zeroed();
            (report.total, report.reason) = (number, [7; 120]);
            let history = UpdateHistory {
                owner_changes: number,
                owner_changed: Some(at),
                done: number + 1,
                rolled_back: number + 2,
                last: Some((report, at)),
            };
            notes.set_history(&history);
            let found = DeviceNotes::new(SharedWords::map(&fd).unwrap()).unwrap().history();
            assert_eq!(format!("{found:?}"), format!("{history:?}"));
        }
        let (_fd, words) = SharedWords::create(c"notes", WORDS).unwrap();
        words.store(HEADER, VERSION + 1);
        assert!(DeviceNotes::new(words).is_none());
    }
}
