//! What a tenant is told and what it tells: one JSON object per line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vdpa_client::update::{Report, Strategy, Way};
pub use vdpa_core::error::chain;
use vdpa_sys::memfd::HugePage;

/// The pages of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Pages {
    /// Of 4 KiB, of a memfd.
    #[default]
    #[serde(rename = "4k")]
    Small,
    /// Of 2 MiB, of a hugetlb memfd.
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

    /// What a memfd is made of.
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

/// How a tenant is set up: the argument of its command line, the same for every image of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// The device file.
    pub device: PathBuf,
    /// Guest memory, in bytes; a multiple of its pages.
    pub memory: u64,
    /// Its pages.
    pub pages: Pages,
    /// Requests kept in flight.
    pub queue_depth: u16,
    /// Bytes of a block; a multiple of 512.
    pub block_size: u32,
    /// Reads among 100 requests.
    pub read_percent: u8,
    /// After how long a request counts as lost, in ms.
    pub deadline_ms: u64,
    /// Seed of all choices.
    pub seed: u64,
    /// Inherited descriptor of the [`Ledger`](super::ledger::Ledger).
    pub ledger_fd: i32,
    /// Inherited descriptor of the [`Timeline`](super::timeline::Timeline).
    pub timeline_fd: i32,
    /// How often progress is told, in ms.
    pub progress_ms: u64,
    /// Where the sockets of hand-overs are made.
    pub directory: PathBuf,
}

/// What a tenant is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Command {
    /// Replace yourself.
    Update {
        /// How.
        strategy: Strategy,
        /// By what way.
        way: Way,
    },
    /// Issue nothing more, wait for what is in flight, flush, and say so.
    Quiesce,
    /// Issue requests.
    Go,
    /// Quiesce and end.
    Stop,
}

/// What a tenant tells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The device is set up. The tenant issues nothing before it is told to.
    Started {
        /// Backend features the device offers.
        backend_features: u64,
        /// Negotiated device features.
        features: u64,
        /// The strategy the library would choose.
        best: Strategy,
        /// Whether the limit on locked memory could be raised.
        memlock_raised: bool,
    },
    /// Still alive.
    Progress(Totals),
    /// Replaced, and the first completion has arrived.
    Update {
        /// How.
        strategy: Strategy,
        /// By what way.
        way: Way,
        /// Time of every phase.
        report: Report,
        /// Last completion before to first one after, in us.
        blackout_us: u64,
        /// When the first completion came, `CLOCK_MONOTONIC` in ns.
        at_ns: u64,
        /// Requests in flight while no driver was there.
        in_flight: u64,
    },
    /// Not replaced; the old program goes on.
    UpdateFailed {
        /// How.
        strategy: Strategy,
        /// By what way.
        way: Way,
        /// The error with its causes.
        error: String,
    },
    /// Nothing is in flight and everything is flushed.
    Quiesced(Totals),
    /// The last words.
    Finished(Totals),
    /// The tenant cannot go on.
    Failed {
        /// The error with its causes.
        error: String,
        /// Until then.
        totals: Totals,
    },
}

/// Counters of a tenant over all its images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// Requests completed.
    pub requests: u64,
    /// Reads among them.
    pub reads: u64,
    /// Writes among them.
    pub writes: u64,
    /// Requests that were not completed in time and have not come since.
    pub lost: u64,
    /// Completions for requests that were complete, or never made.
    pub duplicate: u64,
    /// Reads that returned something else than was written.
    pub corrupt: u64,
    /// Requests the device completed with an error.
    pub errors: u64,
    /// What the first corrupt read found.
    pub first_corruption: Option<String>,
}

impl Totals {
    /// Whether every request was answered once and right.
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
