//! The owner of a device, and the pinned pages that are charged to it.

use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::host::{AddressSpace, Caller, Host};
use crate::types::Result;

/// The owner of one device and the pages charged to it for this device.
///
/// The account of the present owner always carries the charge. A change of owner moves the total and does not walk the
/// tables (uapi-spec 8.4).
#[derive(Debug)]
pub(crate) struct Ownership<H: Host> {
    owner: Option<H::AddressSpace>,
    pinned: u64,
}

impl<H: Host> Ownership<H> {
    pub(crate) const fn new() -> Self {
        Self { owner: None, pinned: 0 }
    }

    pub(crate) fn owner(&self) -> Option<&H::AddressSpace> {
        self.owner.as_ref()
    }

    pub(crate) const fn pinned_pages(&self) -> u64 {
        self.pinned
    }

    /// Returns the owner if `caller` lives in its address space; `EPERM` otherwise, also while there is no owner.
    pub(crate) fn check(&self, caller: &dyn Caller<H>) -> Result<&H::AddressSpace> {
        let is_owner = |owner: &&H::AddressSpace| caller.is(owner) || faults::is(Fault::OwnerUnchecked);
        self.owner.as_ref().filter(is_owner).ok_or(Errno::PERM)
    }

    /// Records the first owner.
    pub(crate) fn set(&mut self, space: H::AddressSpace) {
        debug_assert!(self.owner.is_none() && self.pinned == 0);
        self.owner = Some(space);
    }

    /// Records the owner that a device had in another process, whose account is charged whatever the limit is now.
    ///
    /// # Errors
    /// `ENOMEM` when the account cannot count so many; nothing has changed then.
    pub(crate) fn restore(&mut self, space: H::AddressSpace, pinned: u64) -> Result<()> {
        space.account().charge(pinned, u64::MAX)?;
        (self.owner, self.pinned) = (Some(space), pinned);
        Ok(())
    }

    /// Charges the pinned pages to the new owner too, so that [`transfer`](Self::transfer) cannot fail. `ENOMEM` when that
    /// would exceed `limit` pages; nothing has changed then.
    pub(crate) fn charge_new_owner(&self, new_owner: &H::AddressSpace, limit: u64) -> Result<()> {
        if faults::is(Fault::ChargeNotMoved) {
            return Ok(());
        }
        let limit = if faults::is(Fault::ChargeUnlimited) { u64::MAX } else { limit };
        new_owner.account().charge(self.pinned, limit)
    }

    /// Reverts [`charge_new_owner`](Self::charge_new_owner).
    pub(crate) fn uncharge_new_owner(&self, new_owner: &H::AddressSpace) {
        new_owner.account().uncharge(self.pinned);
    }

    /// Makes `new_owner`, which [`charge_new_owner`](Self::charge_new_owner) has charged, the owner. The account of the old
    /// owner is uncharged whether or not its process still exists.
    pub(crate) fn transfer(&mut self, new_owner: H::AddressSpace) {
        if let Some(old) = self.owner.replace(new_owner) {
            if faults::is(Fault::ChargeNotMoved) {
                self.pinned = 0;
            }
            old.account().uncharge(self.pinned);
        }
    }

    pub(crate) fn charge(&mut self, pages: u64, limit: u64) -> Result<()> {
        let owner = self.owner.as_ref().ok_or(Errno::PERM)?;
        owner.account().charge(pages, limit)?;
        self.pinned += pages;
        Ok(())
    }

    pub(crate) fn uncharge(&mut self, pages: u64) {
        if let Some(owner) = &self.owner {
            let pages = if faults::is(Fault::ChargeNotMoved) { pages.min(self.pinned) } else { pages };
            owner.account().uncharge(pages);
            self.pinned -= pages;
        }
    }

    /// Removes the owner and uncharges its account.
    pub(crate) fn clear(&mut self) {
        self.uncharge(self.pinned);
        self.owner = None;
        self.pinned = 0;
    }
}
