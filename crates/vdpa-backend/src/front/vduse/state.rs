//! What of a VDUSE device the kernel does not tell the next process.

use vdpa_core::features::Status;
use vdpa_core::ring::inflight::LogMemory as _;
use vdpa_sys::shared_words::SharedWords;

/// Groups of queues, and address spaces, that a device can have here.
pub(super) const GROUPS_MAX: usize = 8;

/// Words that are needed.
const WORDS: usize = 2;
/// In the first word, beside the status: the device is suspended.
const SUSPENDED: u64 = 1 << 8;

/// Status and address spaces of a device, in memory that may outlive this process. The second word has the address space of each group, a
/// byte each.
#[derive(Clone, Debug)]
pub struct KeptState(SharedWords);

impl KeptState {
    /// In these words, which are zero for a new device; `None` if they are too few.
    #[must_use]
    pub fn new(words: &SharedWords) -> Option<Self> {
        words.slice(0, WORDS).map(Self)
    }

    /// What the driver has set last.
    #[must_use]
    pub fn status(&self) -> Status {
        Status(self.0.load(0).to_le_bytes()[0])
    }

    pub(super) fn is_suspended(&self) -> bool {
        self.0.load(0) & SUSPENDED != 0
    }

    /// A reset or a new status. Address spaces stay, as in the kernel.
    pub(super) fn set_status(&self, status: Status) {
        let suspended = if status == Status::RESET { 0 } else { self.0.load(0) & SUSPENDED };
        self.0.store(0, u64::from(status.0) | suspended);
    }

    pub(super) fn set_suspended(&self) {
        self.0.store(0, self.0.load(0) | SUSPENDED);
    }

    pub(super) fn asids(&self) -> [u8; GROUPS_MAX] {
        self.0.load(1).to_le_bytes()
    }

    pub(super) fn set_asid(&self, group: usize, asid: u8) {
        let mut asids = self.asids();
        if let Some(of_group) = asids.get_mut(group) {
            *of_group = asid;
        }
        self.0.store(1, u64::from_le_bytes(asids));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_address_spaces_are_found_again() {
        let (fd, words) = SharedWords::create(c"vduse", WORDS).unwrap();
        let state = KeptState::new(&words).unwrap();
        state.set_status(Status::DRIVER_OK);
        state.set_suspended();
        state.set_asid(1, 7);
        let again = KeptState::new(&SharedWords::map(&fd).unwrap()).unwrap();
        assert_eq!(
            (again.status(), again.is_suspended(), again.asids()[..2].to_vec()),
            (Status::DRIVER_OK, true, vec![0, 7])
        );
        again.set_status(Status::RESET);
        assert_eq!((state.status(), state.is_suspended(), state.asids()[1]), (Status::RESET, false, 7));
        state.set_asid(GROUPS_MAX, 1);
        assert_eq!(state.asids()[2..], [0; 6]);
        assert!(KeptState::new(&words.slice(0, 1).unwrap()).is_none());
    }
}
