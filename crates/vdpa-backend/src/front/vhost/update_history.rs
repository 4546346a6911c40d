//! What is remembered of the owners of a device and of its updates.

use std::time::SystemTime;

use vdpa_sys::uapi::report::UpdateReport;

/// The history of a device. It outlives the file's closing: an update by `reopen` closes it too.
#[derive(Clone, Debug, Default)]
pub struct UpdateHistory {
    /// How often the owner was changed (`VHOST_NEW_OWNER`).
    pub owner_changes: u64,
    /// When that was last.
    pub owner_changed: Option<SystemTime>,
    /// UpdateHistory that were reported as done.
    pub done: u64,
    /// UpdateHistory that were reported as rolled back.
    pub rolled_back: u64,
    /// The last one that was reported, and when.
    pub last: Option<(UpdateReport, SystemTime)>,
}

impl UpdateHistory {
    pub(super) fn owner_changed(&mut self) {
        self.owner_changes += 1;
        self.owner_changed = Some(SystemTime::now());
    }

    pub(super) fn reported(&mut self, report: UpdateReport) {
        if report.outcome == 0 {
            self.done += 1;
        } else {
            self.rolled_back += 1;
        }
        self.last = Some((report, SystemTime::now()));
    }
}
