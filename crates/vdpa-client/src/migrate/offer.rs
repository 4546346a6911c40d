//! What the messages say.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use vdpa_core::features::Features;
use vdpa_core::types::{IovaRange, Perm};

use super::error::{Malformed, MigrateError};

/// Most regions of an offer.
const REGIONS_MAX: usize = 4096;

/// What would move: the first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Offer {
    /// Name of the migration.
    pub id: String,
    /// Virtio device id (virtio 1.2 section 5).
    pub device_id: u32,
    /// Features that the driver uses now.
    pub features: Features,
    /// Bytes of a page.
    pub page_size: u64,
    /// The memory.
    pub regions: Vec<RegionOffer>,
}

/// Memory that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RegionOffer {
    /// Name of the region, unique.
    pub name: String,
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Access of the device.
    pub perm: Perm,
}

impl Offer {
    /// Checks an offer that has arrived: the regions are whole pages, have names of their own and do not overlap.
    pub(super) fn check(&self) -> Result<(), MigrateError> {
        let wrong = |what: String| Err(Malformed::Offer { what }.into());
        if self.page_size != vdpa_core::host::PAGE_SIZE {
            return wrong(format!(
                "pages of {} bytes; pages of {} are right",
                self.page_size,
                vdpa_core::host::PAGE_SIZE
            ));
        }
        if self.regions.len() > REGIONS_MAX || self.id.len() > 64 {
            return wrong(format!("{} regions, at most {REGIONS_MAX} are accepted", self.regions.len()));
        }
        let (mut names, mut ranges) = (HashSet::new(), Vec::new());
        for RegionOffer { name, iova, size, perm } in &self.regions {
            let whole = iova.is_multiple_of(self.page_size) && size.is_multiple_of(self.page_size);
            let Some(range) = IovaRange::from_size(*iova, *size).filter(|_| whole) else {
                return wrong(format!("region \"{name}\" is not whole pages"));
            };
            if !names.insert(name) || name.len() > 255 {
                return wrong(format!("two regions are called \"{name}\", or its name is too long"));
            }
            if !matches!(*perm, Perm::RO | Perm::WO | Perm::RW) {
                return wrong(format!("region \"{name}\" has an access that there is not"));
            }
            ranges.push(range);
        }
        ranges.sort_unstable_by_key(|range| range.first());
        match ranges.windows(2).find(|pair| matches!(pair, [a, b] if a.overlaps(*b))) {
            Some(pair) => wrong(format!("regions overlap: {pair:?}")),
            None => Ok(()),
        }
    }
}

/// What is known of the device when the machine stands still, beside its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Switched {
    /// Features that the driver uses.
    pub(super) features: Features,
    /// DRIVER_OK is set.
    pub(super) running: bool,
    /// The rings of the guest.
    pub(super) queues: Vec<Ring>,
}

/// A ring of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Ring {
    pub(super) index: u16,
    pub(super) size: u16,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) enabled: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_that_contradicts_itself_is_refused() {
        let region = |name: &str, iova, size| RegionOffer { name: name.into(), iova, size, perm: Perm::RW };
        let offer = |regions| Offer {
            id: "x".into(),
            device_id: 2,
            features: Features::NONE,
            page_size: 4096,
            regions,
        };
        offer(vec![region("a", 0, 4096), region("b", 4096, 4096)]).check().unwrap();
        for (regions, what) in [
            (vec![region("a", 0, 4096), region("a", 8192, 4096)], "are called \"a\""),
            (vec![region("a", 0, 8192), region("b", 4096, 4096)], "overlap"),
            (vec![region("a", 1, 4096)], "whole pages"),
            (vec![region("a", 0, 0)], "whole pages"),
            (vec![region("a", u64::MAX - 4095, 8192)], "whole pages"),
        ] {
            assert!(offer(regions).check().unwrap_err().to_string().contains(what));
        }
        let small = Offer { page_size: 512, ..offer(vec![]) };
        assert!(small.check().unwrap_err().to_string().contains("pages of 4096"));
    }
}
