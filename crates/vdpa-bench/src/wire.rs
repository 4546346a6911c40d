//! The protocol of the client: commands and events, one JSON object per line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vdpa_client::update::{Report, Strategy, Way};
pub use vdpa_core::error::chain;
use vdpa_sys::memfd::HugePage;

/// Page size of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Pages {
    /// 4 KiB, from a memfd.
    #[default]
    #[serde(rename = "4k")]
    Small,
    /// 2 MiB, from a hugetlb memfd.
    #[serde(rename = "2m")]
    Huge,
}

impl Pages {
    /// Bytes of a page.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 4 << 10,
            Self::Huge => 2 << 20,
        }
    }

    /// The huge pages that the memfd needs, if any.
    #[must_use]
    pub const fn huge(self) -> Option<HugePage> {
        match self {
            Self::Small => None,
            Self::Huge => Some(HugePage::Mib2),
        }
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Small => "4k",
            Self::Huge => "2m",
        })
    }
}

impl FromStr for Pages {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "4k" => Ok(Self::Small),
            "2m" => Ok(Self::Huge),
            _ => Err(format!("\"{name}\": pages are 4k or 2m")),
        }
    }
}

/// Configuration of a client: the argument of its command line, the same for each of its images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientConfig {
    /// The device file.
    pub device: PathBuf,
    /// Guest memory, in bytes; a multiple of its page size.
    pub memory: u64,
    /// Page size of guest memory.
    pub pages: Pages,
    /// Requests kept in flight.
    pub queue_depth: u16,
    /// Bytes of a block; a multiple of 512.
    pub block_size: u32,
    /// Reads among 100 requests.
    pub read_percent: u8,
    /// Time after which a request counts as lost, in ms.
    pub deadline_ms: u64,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Inherited descriptor of the [`Journal`](super::journal::Journal).
    pub journal_fd: i32,
    /// Inherited descriptor of the [`Timeline`](super::timeline::Timeline).
    pub timeline_fd: i32,
    /// Interval of [`Event::Progress`], in ms.
    pub progress_ms: u64,
    /// Directory for the sockets of hand-overs.
    pub directory: PathBuf,
}

/// A command to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Update: the client replaces itself.
    Update {
        /// The strategy.
        strategy: Strategy,
        /// The way.
        way: Way,
    },
    /// Stop issuing requests, wait for those in flight, flush, and send [`Event::Quiesced`].
    Quiesce,
    /// Issue requests.
    Go,
    /// Quiesce and exit.
    Stop,
}

/// An event of the client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The device is set up. No request is issued before [`Command::Go`].
    Started {
        /// Backend features that the device offers.
        backend_features: u64,
        /// Negotiated device features.
        features: u64,
        /// The strategy that the client library would choose.
        best: Strategy,
        /// Whether RLIMIT_MEMLOCK could be raised.
        memlock_raised: bool,
    },
    /// Sent at regular intervals.
    Progress(Totals),
    /// The update is done, and the first completion has arrived.
    Update {
        /// The strategy.
        strategy: Strategy,
        /// The way.
        way: Way,
        /// The report of the client library.
        report: Report,
        /// Time from the last completion before the update to the first one after it, in us.
        blackout_us: u64,
        /// Time of that first completion, `CLOCK_MONOTONIC` in ns.
        at_ns: u64,
        /// Requests in flight during the downtime.
        in_flight: u64,
    },
    /// The update failed, and the old program continues.
    UpdateFailed {
        /// The strategy.
        strategy: Strategy,
        /// The way.
        way: Way,
        /// The error with its causes.
        error: String,
    },
    /// Nothing is in flight, and all writes are flushed.
    Quiesced(Totals),
    /// The client exits.
    Finished(Totals),
    /// The client cannot continue, and exits.
    Failed {
        /// The error with its causes.
        error: String,
        /// The counters at that time.
        totals: Totals,
    },
}

/// Counters of a client over all its images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// Requests completed.
    pub requests: u64,
    /// Reads among them.
    pub reads: u64,
    /// Writes among them.
    pub writes: u64,
    /// Requests that were not completed in time, and have not been completed since.
    pub lost: u64,
    /// Completions of requests that were completed before or never made.
    pub duplicate: u64,
    /// Reads that returned something other than what was written.
    pub corrupt: u64,
    /// Requests that the device completed with an error.
    pub errors: u64,
    /// Description of the first corrupt read.
    pub first_corruption: Option<String>,
}

impl Totals {
    /// Whether every request was completed once and correctly.
    #[must_use]
    pub const fn clean(&self) -> bool {
        self.lost == 0 && self.duplicate == 0 && self.corrupt == 0 && self.errors == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_documented() {
        let update = Command::Update { strategy: Strategy::Live, way: Way::HandOver };
        let line = r#"{"command":"update","strategy":"live","way":"hand-over"}"#;
        assert_eq!(serde_json::to_string(&update).unwrap(), line);
        assert_eq!(serde_json::from_str::<Command>(r#"{"command":"go"}"#).unwrap(), Command::Go);
        let event = Event::Progress(Totals { requests: 3, ..Totals::default() });
        let line = serde_json::to_string(&event).unwrap();
        assert!(line.starts_with(r#"{"event":"progress","requests":3"#), "{line}");
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
    }

    #[test]
    fn pages_have_names() {
        for pages in [Pages::Small, Pages::Huge] {
            assert_eq!(pages.to_string().parse(), Ok(pages));
            assert_eq!(serde_json::to_string(&pages).unwrap(), format!("\"{pages}\""));
        }
        assert!("1g".parse::<Pages>().unwrap_err().contains("4k or 2m"));
    }
}
