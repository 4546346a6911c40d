//! [`Told`]: what a process says of its ring with each submission, so that its successor need not wait where nothing is in flight.
//!
//! The kernel ends the polls of a process that has died milliseconds later. A successor that knows that nothing else is in flight does
//! not wait for them. What a process has said is out of date as soon as it takes a completion; the rest is in the queues themselves,
//! which are as the process has left them: completions stay in their places until 65536 others or a whole turn of the queue have come.

use vdpa_core::Errno;

use super::RingRecord;
use super::adopt::at;
use super::ring::{BARE, INTERNAL};
use super::slab::POLL;
use crate::mmap::SharedMap;

/// Bits of each number but the last: more than the largest queue has entries, twice.
const BITS: u32 = 18;
const MASK: u32 = (1 << BITS) - 1;
/// Bits of the epoch.
const EPOCH_BITS: u32 = 9;
/// Always set.
const VALID: u64 = 1 << 63;
/// Bytes of a completion, and where it has its flags.
const COMPLETION: u32 = 16;
const COMPLETION_FLAGS: u32 = 12;
/// Bytes of a submission, and where it has its `user_data`.
const SUBMISSION: u32 = 64;
const SUBMISSION_NAME: u32 = 32;
/// `IORING_CQE_F_MORE`, `IORING_SQ_CQ_OVERFLOW` (include/uapi/linux/io_uring.h).
const MORE: u32 = 1 << 1;
const CQ_OVERFLOW: u32 = 1 << 1;

/// What was true at a submission. Positions in queues are those of the kernel, modulo 2^18.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    /// Requests that were queued or in flight, without polls and cancellations.
    pub(super) in_flight: u32,
    /// Of the next completion to take.
    pub(super) completion: u32,
    /// Behind the last submission that was queued.
    pub(super) submission: u32,
    /// Which process has said so, by its number among those that have used the ring.
    pub(super) epoch: u64,
}

impl Told {
    /// In one word, which is never 0; `None` for more requests than can be told.
    pub(super) fn pack(self) -> Option<u64> {
        let field = |value: u32, index: u32| u64::from(value & MASK) << (index * BITS);
        (self.in_flight <= MASK).then(|| {
            VALID
                | (self.epoch & ((1 << EPOCH_BITS) - 1)) << (3 * BITS)
                | field(self.submission, 2)
                | field(self.completion, 1)
                | field(self.in_flight, 0)
        })
    }

    /// What such a word says; `None` if it is none, or not of the process with this epoch.
    pub(super) fn unpack(word: u64, epoch: u64) -> Option<Self> {
        let field = |index: u32| u32::try_from(word >> (index * BITS) & u64::from(MASK)).unwrap_or(0);
        let told = Self { in_flight: field(0), completion: field(1), submission: field(2), epoch };
        (told.pack() == Some(word)).then_some(told)
    }

    /// Whether by now nothing is in flight but polls and cancellations, in a ring whose process is dead. `false` also where that cannot
    /// be told.
    pub(super) fn only_polls(self, queues: &Queues<'_>) -> Result<bool, Errno> {
        let [completions, submissions] =
            [queues.completions(self.completion)?, queues.submissions(self.submission)?];
        Ok(completions.zip(submissions).is_some_and(|(completed, never)| completed + never == self.in_flight))
    }
}

/// Whether a request with this `user_data` is counted.
const fn is_counted(name: u64) -> bool {
    name != INTERNAL && (name & BARE != 0 || name & POLL == 0)
}

/// The queues of a ring whose process is dead.
pub(super) struct Queues<'a> {
    /// The mapping of both.
    pub(super) queues: &'a SharedMap,
    /// The mapping of the submissions themselves.
    pub(super) submissions: &'a SharedMap,
    pub(super) record: &'a RingRecord,
}

impl Queues<'_> {
    /// Positions of the next completion to take, and behind the last submission.
    pub(super) fn positions(&self) -> Result<(u32, u32), Errno> {
        Ok((self.field(at::CQ_HEAD)?, self.field(at::SQ_TAIL)?))
    }

    fn load(&self, at: u32) -> Result<u32, Errno> {
        self.queues.load_u32(at as usize).map(u32::from_le).map_err(|_| Errno::FAULT)
    }

    /// A field whose place the record says.
    fn field(&self, at: usize) -> Result<u32, Errno> {
        self.load(self.record.word(at))
    }

    fn name(map: &SharedMap, at: u32) -> Result<u64, Errno> {
        let mut bytes = [0; 8];
        map.read(at as usize, &mut bytes).map_err(|_| Errno::FAULT)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// How many requests that are counted have completed since the position `from`; `None` if completions were lost, or are not where
    /// they were.
    fn completions(&self, from: u32) -> Result<Option<u32>, Errno> {
        let (tail, mask) = (self.field(at::CQ_TAIL)?, self.record.word(at::CQ_ENTRIES) - 1);
        let count = tail.wrapping_sub(from) & MASK;
        if count > mask + 1 || self.field(at::SQ_FLAGS)? & CQ_OVERFLOW != 0 {
            return Ok(None);
        }
        let mut completed = 0;
        for position in (0..count).map(|offset| tail.wrapping_sub(count - offset)) {
            let entry = self.record.word(at::CQ_CQES) + (position & mask) * COMPLETION;
            let is_last = self.load(entry + COMPLETION_FLAGS)? & MORE == 0;
            completed += u32::from(is_last && is_counted(Self::name(self.queues, entry)?));
        }
        Ok(Some(completed))
    }

    /// How many requests that are counted were queued before the position `end`, and are not submitted; `None` if the positions make no
    /// sense.
    fn submissions(&self, end: u32) -> Result<Option<u32>, Errno> {
        let (head, tail) = (self.field(at::SQ_HEAD)?, self.field(at::SQ_TAIL)?);
        let entries = self.record.word(at::SQ_ENTRIES);
        // The kernel may have taken everything that was queued then; what was queued later was not told.
        let queued = end.wrapping_sub(head) & MASK;
        let queued = if queued > entries { 0 } else { queued };
        if tail.wrapping_sub(head) > entries || queued > tail.wrapping_sub(head) {
            return Ok(None);
        }
        let mut never = 0;
        for position in (0..queued).map(|offset| head.wrapping_add(offset)) {
            let index = self.load(self.record.word(at::SQ_ARRAY) + (position & (entries - 1)) * 4)?;
            if index >= entries {
                return Ok(None);
            }
            let name = Self::name(self.submissions, index * SUBMISSION + SUBMISSION_NAME)?;
            never += u32::from(is_counted(name));
        }
        Ok(Some(never))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_word_has_it_all_and_is_of_one_process() {
        for told in [
            Told { in_flight: 0, completion: 0, submission: 0, epoch: 0 },
            Told { in_flight: 65536, completion: MASK, submission: 1, epoch: 7 },
            Told { in_flight: 1, completion: 2, submission: MASK, epoch: 511 },
        ] {
            let word = told.pack().unwrap();
            assert_ne!(word, 0);
            assert_eq!(Told::unpack(word, told.epoch), Some(told));
            assert_eq!(Told::unpack(word, told.epoch + 1), None);
        }
        assert_eq!(Told::unpack(0, 0), None);
        assert_eq!(Told { in_flight: MASK + 1, completion: 0, submission: 0, epoch: 0 }.pack(), None);
    }
}
