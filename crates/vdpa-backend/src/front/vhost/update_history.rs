//! [`UpdateHistory`]: changes of a device's owner, and reported updates.

use std::time::SystemTime;

use vdpa_sys::uapi::report::UpdateReport;

/// The history of a device's owners and updates, as [`VhostVdpaFile::updates`](super::VhostVdpaFile::updates) returns it. A
/// close of the file does not clear it, because an update by `reopen` closes the file.
#[derive(Clone, Debug, Default)]
pub struct UpdateHistory {
    /// Number of changes of the owner, by `VHOST_NEW_OWNER` or by a second open.
    pub owner_changes: u64,
    /// When the owner was last changed.
    pub owner_changed: Option<SystemTime>,
    /// Number of updates that were reported as done (`VDPA_LIVE_REPORT`).
    pub done: u64,
    /// Number of updates that were reported as rolled back.
    pub rolled_back: u64,
    /// The last report, and when it arrived.
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
