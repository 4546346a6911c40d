//! The decisions of a vhost-vdpa device on which its live update depends, apart from what carries them out.
//!
//! One source for two users: this crate, and the kernel module in `kernel/`, which includes this file. Hence it needs only
//! `core`, allocates nothing, and compiles as edition 2021. Every number may come from a client: the arithmetic is checked, or
//! wraps where Linux 7.3 wraps; nothing here can panic. Numbers in parentheses cite the behavioural specification,
//! docs/uapi-spec.md.

// SPDX-License-Identifier: MIT OR Apache-2.0

/// Bits of the backend feature word (1.4, 8.2).
pub mod backend {
    /// `VHOST_BACKEND_F_IOTLB_PERSIST`.
    pub const IOTLB_PERSIST: u64 = 1 << 8;
    /// `VHOST_BACKEND_F_NEW_OWNER`.
    pub const NEW_OWNER: u64 = 1 << 9;
    /// `VHOST_BACKEND_F_IOTLB_REMAP`.
    pub const IOTLB_REMAP: u64 = 1 << 10;
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The device does not offer the request.
    NotOffered,
    /// There is no owner.
    NoOwner,
    /// The caller is the owner already.
    IsOwner,
    /// The device runs, and transfers are only allowed while it does not.
    Runs,
    /// The pages would exceed the caller's limit.
    OverLimit,
    /// An argument has no meaning.
    Arguments,
}

impl Refusal {
    /// The errno of the request, a positive number.
    pub const fn errno(self) -> i32 {
        match self {
            Self::NotOffered => 95,
            Self::NoOwner | Self::Arguments => 22,
            Self::IsOwner | Self::Runs => 16,
            Self::OverLimit => 12,
        }
    }
}

// ---- ranges of I/O addresses

/// The last byte of `size` bytes at `first`; `None` for no bytes, and past 2^64.
pub const fn last_byte(first: u64, size: u64) -> Option<u64> {
    match size.checked_sub(1) {
        Some(rest) => first.checked_add(rest),
        None => None,
    }
}

/// The last byte of an UPDATE, if all of it is in the device's range `limits` (2.4).
pub const fn update_last(iova: u64, size: u64, limits: (u64, u64)) -> Option<u64> {
    match last_byte(iova, size) {
        Some(last) if iova >= limits.0 && last <= limits.1 => Some(last),
        _ => None,
    }
}

/// The last byte of an INVALIDATE, which wraps: 0 bytes at 0 are the whole address space (2.5).
pub const fn invalidate_last(iova: u64, size: u64) -> u64 {
    iova.wrapping_add(size).wrapping_sub(1)
}

// ---- pinned pages

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Number of pages that an UPDATE pins; `None` where that is no number (3.3).
pub const fn pages_to_pin(iova: u64, size: u64) -> Option<u64> {
    match size.checked_add(iova % PAGE) {
        Some(0) | None => None,
        Some(bytes) => Some(bytes.div_ceil(PAGE)),
    }
}

/// Whether `more` pages on top of `pinned` are more than `limit`.
pub const fn exceeds(more: u64, pinned: u64, limit: u64) -> bool {
    match more.checked_add(pinned) {
        Some(total) => total > limit,
        None => true,
    }
}

/// Pages that follow one another in physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the first page.
    pub first: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
}

impl Run {
    /// Appends the run that follows in memory; `false` if `next` does not follow.
    pub const fn join(&mut self, next: Self) -> bool {
        match self.first.checked_add(self.pages) {
            Some(end) if end == next.first => match self.pages.checked_add(next.pages) {
                Some(pages) => {
                    self.pages = pages;
                    true
                }
                None => false,
            },
            _ => false,
        }
    }
}

// ---- memory by address

/// A piece of an address space, as far as an UPDATE needs it (3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its first address.
    pub start: u64,
    /// The address after its last.
    pub end: u64,
    /// Offset of `start` in the file behind it, in bytes.
    pub offset: u64,
}

/// The part of an UPDATE that lies in one area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes.
    pub size: u64,
    /// Offset in the file. A hole before the area counts as part of it, and its offset wraps, as in Linux.
    pub offset: u64,
}

/// The piece at `address` of what is left of an UPDATE. `area` is the first that ends above `address`.
pub const fn piece(address: u64, left: u64, area: Area) -> Piece {
    let room = area.end.saturating_sub(address);
    Piece {
        size: if left < room { left } else { room },
        offset: area.offset.wrapping_add(address.wrapping_sub(area.start)),
    }
}

// ---- what is offered

/// How a parent takes mappings (3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// A table at a time.
    Snapshot,
    /// A mapping at a time.
    Incremental,
    /// It takes none: the platform's IOMMU is programmed.
    Platform,
}

/// What a list says about a parent that does not speak for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// Nothing.
    No,
    /// Its data path never uses the owner's addresses.
    Independent,
    /// Its data path uses the owner's addresses where `use_va` says so.
    ByAddress,
}

/// The live-update bits that a device offers (8.6): those of the parent's own word and those that a list grants it. A parent
/// that uses the owner's addresses gets both bits or neither, and REMAP only where a new address can be installed (R3, O5).
pub const fn live_bits(own: u64, listed: Listed, use_va: bool, path: Path) -> u64 {
    let can_remap = use_va && matches!(path, Path::Snapshot);
    let granted = match listed {
        Listed::No => 0,
        Listed::Independent => backend::NEW_OWNER,
        Listed::ByAddress if !use_va => backend::NEW_OWNER,
        Listed::ByAddress if can_remap => backend::NEW_OWNER | backend::IOTLB_REMAP,
        Listed::ByAddress => 0,
    };
    let bits = (own | granted) & (backend::NEW_OWNER | backend::IOTLB_REMAP);
    if can_remap { bits } else { bits & !backend::IOTLB_REMAP }
}

/// Whether a reset drops the parent's own translation (4.5). A client that has acknowledged NEW_OWNER keeps it (8.8, O7).
pub const fn reset_cleans_map(acknowledged: u64) -> bool {
    acknowledged & (backend::IOTLB_PERSIST | backend::NEW_OWNER) == 0
}

// ---- NEW_OWNER

/// What NEW_OWNER depends on besides memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct NewOwner {
    /// The device offers it.
    pub offered: bool,
    /// There is an owner.
    pub owned: bool,
    /// The caller is that owner.
    pub by_owner: bool,
    /// Transfers are refused while the device runs.
    pub strict: bool,
    /// DRIVER_OK is set and the device is not suspended.
    pub runs: bool,
}

impl NewOwner {
    /// The checks before the limit on pinned memory, in their order (8.4, N1).
    ///
    /// # Errors
    /// The first check that fails.
    pub const fn check(&self) -> Result<(), Refusal> {
        if !self.offered {
            return Err(Refusal::NotOffered);
        }
        if !self.owned {
            return Err(Refusal::NoOwner);
        }
        if self.by_owner {
            return Err(Refusal::IsOwner);
        }
        if self.strict && self.runs {
            return Err(Refusal::Runs);
        }
        Ok(())
    }
}

// ---- REMAP

/// Checks what a REMAP may contain, before anything else (8.5, O14).
///
/// # Errors
/// [`Refusal::Arguments`] with a permission, and for no bytes.
pub const fn remap_arguments(perm: u8, size: u64) -> Result<(), Refusal> {
    if perm != 0 || size == 0 { Err(Refusal::Arguments) } else { Ok(()) }
}

/// A mapping, and the UPDATE that made it.
#[derive(Clone, Copy, Debug)]
pub struct Mapped<R> {
    /// First byte of the mapping.
    pub first: u64,
    /// Last byte of the mapping.
    pub last: u64,
    /// Identity of the UPDATE.
    pub record: R,
    /// First and last byte of the UPDATE; `None` once part of it is unmapped.
    pub whole: Option<(u64, u64)>,
}

/// What a REMAP replaces (R2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit<R> {
    /// All mappings of an UPDATE.
    Record(R),
    /// The single mapping with exactly this range.
    Entry(R),
}

/// Finds what a REMAP of [`first`, `last`] replaces among the mappings that overlap it, in ascending order: an UPDATE of exactly this
/// range, even if another has filled its gaps, or a mapping of exactly this range.
pub fn remap_unit<R: Copy>(
    first: u64,
    last: u64,
    hits: impl IntoIterator<Item = Mapped<R>>,
) -> Option<Unit<R>> {
    let mut entry = None;
    for (index, hit) in hits.into_iter().enumerate() {
        if hit.whole == Some((first, last)) {
            return Some(Unit::Record(hit.record));
        }
        if index == 0 && hit.first == first && hit.last == last {
            entry = Some(Unit::Entry(hit.record));
        }
    }
    entry
}

/// Whether every byte that is mapped now is the same byte of the same object in the new place (8.5, verification). Both are
/// pieces {first, last, object} in ascending order; `same(a, i, b, j)` compares byte `i` of `a` with byte `j` of `b`.
/// Takes time proportional to the number of pieces.
pub fn same_memory<A, B>(
    old: impl IntoIterator<Item = (u64, u64, A)>,
    new: impl IntoIterator<Item = (u64, u64, B)>,
    mut same: impl FnMut(&A, u64, &B, u64) -> bool,
) -> bool {
    let mut new = new.into_iter().peekable();
    for (first, last, object) in old {
        let mut at = first;
        loop {
            let Some((new_first, new_last, other)) = new.peek() else { return false };
            if *new_last < at {
                new.next();
                continue;
            }
            if *new_first > at || !same(&object, at.wrapping_sub(first), other, at.wrapping_sub(*new_first)) {
                return false;
            }
            if *new_last >= last {
                break;
            }
            at = new_last.wrapping_add(1);
        }
    }
    true
}

#[cfg(test)]
mod tests;
