//! [`PinLimit`]: how much of a client's memory a device may pin.

/// How many pages may be pinned for one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinLimit {
    /// As many as the soft `RLIMIT_MEMLOCK` of the calling process allows, as in the kernel (uapi-spec 3.3).
    Rlimit,
    /// This number, set when the device is created. The limit of the calling process does not matter.
    Pages(u64),
}

impl PinLimit {
    /// The limit in pages for a caller whose `RLIMIT_MEMLOCK` is `rlimit` pages.
    #[must_use]
    pub const fn pages(self, rlimit: u64) -> u64 {
        match self {
            Self::Rlimit => rlimit,
            Self::Pages(pages) => pages,
        }
    }

    /// The name of the limit, for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rlimit => "RLIMIT_MEMLOCK",
            Self::Pages(_) => "the device's memlock",
        }
    }
}
