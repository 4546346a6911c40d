//! A request of this project, by which a client reports an update to the server of its device.
//!
//! The kernel's vhost-vdpa answers it as every request it does not know (`ENOTTY`), and an unmodified client never makes
//! it. Its number is in the table of [`live`](super::live).

use vdpa_core::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::iow;
use crate::uapi::vhost::VHOST_VIRTIO;

/// Version of [`UpdateReport`].
pub const VERSION: u32 = 1;
/// Number of the request, unless configured otherwise.
pub const NUMBER: u8 = 0xf8;
/// Longest text of [`UpdateReport::reason`], in bytes.
pub const REASON: usize = 120;

/// The argument of `VDPA_LIVE_REPORT`: one device's part in one update. Times are in ns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct UpdateReport {
    /// [`VERSION`].
    pub version: u32,
    /// 0 exec, 1 fork, 2 hand-over.
    pub way: u8,
    /// 0 live, 1 resume, 2 reset, 3 reopen.
    pub strategy: u8,
    /// 0 done, 1 rolled back.
    pub outcome: u8,
    /// 0.
    pub reserved: u8,
    /// Process that had the device, in the client's pid namespace.
    pub predecessor: i32,
    /// Process that has it.
    pub successor: i32,
    /// When the update was begun, since 1970-01-01 UTC.
    pub begun_unix: u64,
    /// Preparing, while the device ran.
    pub prepare: u64,
    /// From the beginning of the switch to its end, all devices of the update together.
    pub total: u64,
    /// Collecting the state.
    pub save: u64,
    /// Transfer of the complete state to the successor.
    pub transfer: u64,
    /// Reading and checking the state.
    pub load: u64,
    /// Commit of the update.
    pub commit: u64,
    /// SUSPEND and the requests that belong to it.
    pub suspend: u64,
    /// NEW_OWNER.
    pub new_owner: u64,
    /// Setting up the vrings again.
    pub vrings: u64,
    /// REMAP of each mapping.
    pub remap: u64,
    /// RESUME or DRIVER_OK.
    pub resume: u64,
    /// Mappings the device has.
    pub mappings: u32,
    /// Virtqueues it has.
    pub queues: u32,
    /// Why it was rolled back: UTF-8, zeros at the end.
    pub reason: [u8; REASON],
}

const _: () = assert!(size_of::<UpdateReport>() == 240);

impl Default for UpdateReport {
    fn default() -> Self {
        Self { version: VERSION, ..<Self as zerocopy::FromZeros>::new_zeroed() }
    }
}

impl UpdateReport {
    /// Sets the reason to `text`, cut to fit.
    pub fn set_reason(&mut self, text: &str) {
        let end = (0..=REASON.min(text.len())).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        self.reason = [0; REASON];
        self.reason.iter_mut().zip(text.bytes().take(end)).for_each(|(to, from)| *to = from);
    }

    /// The reason.
    #[must_use]
    pub fn reason(&self) -> String {
        let end = self.reason.iter().position(|&byte| byte == 0).unwrap_or(REASON);
        String::from_utf8_lossy(self.reason.get(..end).unwrap_or_default()).into_owned()
    }

    /// Checks what a client has sent.
    ///
    /// # Errors
    /// `EINVAL` for another version, or an unknown way, strategy or outcome.
    pub const fn check(&self) -> Result<(), Errno> {
        let known = self.version == VERSION && self.way <= 2 && self.strategy <= 3 && self.outcome <= 1;
        if known && self.reserved == 0 { Ok(()) } else { Err(Errno::INVAL) }
    }
}

/// The request with this number (`_IOW`).
#[must_use]
pub const fn request(number: u8) -> u32 {
    iow::<UpdateReport>(VHOST_VIRTIO, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_cut_between_characters() {
        let mut report = UpdateReport::default();
        report.set_reason(&"ü".repeat(100));
        assert_eq!(report.reason(), "ü".repeat(60));
        report.set_reason("x");
        assert_eq!(report.reason(), "x");
        report.check().unwrap();
        assert_eq!(UpdateReport { strategy: 4, ..report }.check(), Err(Errno::INVAL));
        assert_eq!(UpdateReport { version: 2, ..report }.check(), Err(Errno::INVAL));
        assert_eq!(request(NUMBER), 0x40f0_aff8);
    }
}
