//! Invariants that hold between two requests, for tests and fuzz targets.

use super::Device;
use crate::features::Status;
use crate::host::AddressSpace;
use crate::parent::Parent;

impl<P: Parent> Device<P> {
    /// Checks those invariants of ARCHITECTURE.md that concern the device's own state.
    ///
    /// # Errors
    /// A description of the first invariant that does not hold.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.check_tables()?;
        self.check_charge()?;
        self.check_queues()?;
        if !self.opened && (self.ownership.owner().is_some() || self.mapped().entries > 0) {
            return Err("closed with an owner or with mappings".to_owned());
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<(), String> {
        let profile = self.parent.profile();
        let after_failure =
            self.batch.iter().filter_map(|batch| Some((&batch.asid, batch.without_remaps.as_ref()?)));
        for (asid, table) in self.tables.iter().chain(after_failure) {
            table.check().map_err(|what| format!("address space {asid}: {what}"))?;
            if asid.0 >= profile.address_spaces {
                return Err(format!("a table for address space {asid} of {}", profile.address_spaces));
            }
            if table.len() > profile.max_iotlb_entries {
                return Err(format!("{} entries, limit {}", table.len(), profile.max_iotlb_entries));
            }
            if let Some(entry) = table.iter().find(|entry| !profile.iova_range.contains(entry.range)) {
                return Err(format!("{} is outside {}", entry.range, profile.iova_range));
            }
            if table.iter().any(|entry| entry.stale) && !self.offers_remap() {
                return Err("a stale entry without REMAP to refresh it".to_owned());
            }
        }
        match &self.batch {
            Some(batch) if !self.tables.contains_key(&batch.asid) => {
                Err(format!("a batch for address space {}, which has no table", batch.asid))
            }
            _ => Ok(()),
        }
    }

    fn check_charge(&self) -> Result<(), String> {
        let pinned = self.pages_of_mappings();
        let charged = self.ownership.pinned_pages();
        if pinned != charged {
            return Err(format!("{pinned} pages are pinned and {charged} charged"));
        }
        match self.ownership.owner().map(|owner| owner.account().pages()) {
            Some(account) if account < charged => {
                Err(format!("the owner's account has {account} pages, this device alone {charged}"))
            }
            None if charged > 0 => Err(format!("{charged} pages are charged to nobody")),
            _ => Ok(()),
        }
    }

    fn check_queues(&self) -> Result<(), String> {
        let may_run = self.status.contains(Status::DRIVER_OK) && !self.paused;
        if self.paused && !self.suspended {
            return Err("at rest without SUSPEND".to_owned());
        }
        for (index, info) in self.vring_infos().enumerate() {
            // A queue that could not be stopped at the close is stopped at the next open.
            if self.opened && info.running && !(may_run && info.enabled && info.size > 0) {
                return Err(format!(
                    "queue {index} runs: status {}, paused {}, {info:?}",
                    self.status, self.paused
                ));
            }
        }
        Ok(())
    }

    /// The tables of all address spaces.
    #[cfg(fuzzing)]
    pub const fn tables_for_fuzzing(
        &self,
    ) -> &std::collections::BTreeMap<crate::types::Asid, crate::iotlb::Table<super::MemoryOf<P>>> {
        &self.tables
    }

    /// Whether a batch is open.
    #[cfg(fuzzing)]
    pub const fn in_batch_for_fuzzing(&self) -> bool {
        self.batch.is_some()
    }
}
