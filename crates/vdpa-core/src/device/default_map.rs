//! What the parent translates with while the interface has mapped nothing: the 1:1 map, and its way back
//! (uapi-spec 4.5, 4.6, 6.1).
//!
//! ```text
//!                first UPDATE, INVALIDATE or END that reaches the parent
//!  passed through ------------------------------------------------------> mapped
//!                <------------------------------------------------------
//!                 close, RESET_OWNER (`reset_map`), reset with CLEAN_MAP (`compat_reset`)
//! ```
//!
//! A parent without [`Profile::identity_map`](crate::parent::Profile::identity_map) has an empty table in place of
//! the 1:1 map.

use crate::device::{Device, MemoryOf};
use crate::host::AddressSpace;
use crate::iotlb::{Mapping, RecordId, Table};
use crate::parent::{AddressMode, Dma, Parent};
use crate::types::{Asid, IovaRange, Perm};

/// Which address spaces of a new device pass addresses through: all, or none.
pub(super) fn initial<P: Parent>(parent: &mut P) -> Vec<bool> {
    let translates = !matches!(parent.dma(), Dma::Platform);
    let profile = parent.profile();
    let passes = translates && profile.identity_map && profile.address_mode == AddressMode::OwnerAddresses;
    vec![passes; profile.address_spaces as usize]
}

impl<P: Parent> Device<P> {
    /// Whether the parent passes addresses of `asid` through.
    pub(super) fn passes_through(&self, asid: Asid) -> bool {
        self.passthrough.get(asid.0 as usize).copied().unwrap_or(false)
    }

    /// The interface is about to tell the parent of mappings: a 1:1 map goes.
    pub(super) fn leave_default_map(&mut self, asid: Asid) {
        if !self.passes_through(asid) {
            return;
        }
        self.set_passthrough(asid, false);
        // A whole table replaces it anyway.
        if let Dma::DmaMap(map) = self.parent.dma()
            && self.ownership.owner().is_some()
        {
            map.dma_unmap(asid, IovaRange::ALL);
        }
    }

    /// The owner is there, or another one is: 1:1 maps are of its addresses from now on.
    pub(super) fn follow_owner(&mut self) {
        for asid in (0..).map(Asid).take(self.passthrough.len()) {
            if self.passes_through(asid) {
                self.clear_parent(asid);
                self.install_identity(asid);
            }
        }
    }

    /// A reset with CLEAN_MAP: the parent's translation is the default one again, and the interface keeps its
    /// table. Only a later message that reaches the parent brings that back.
    pub(super) fn restore_default_map(&mut self) {
        let passes = self.default_passes();
        for asid in self.address_spaces_in_use() {
            if !self.passes_through(asid) {
                self.clear_parent(asid);
                self.parent_was_emptied(asid);
                self.set_passthrough(asid, passes);
                self.install_identity(asid);
            }
        }
    }

    /// Close or RESET_OWNER: every table is emptied, for the parent too, the charge goes back, and the default
    /// translation waits for the next owner.
    pub(super) fn unmap_everything(&mut self) {
        let passes = self.default_passes();
        for asid in self.address_spaces_in_use() {
            self.clear_parent(asid);
            self.set_passthrough(asid, passes);
        }
        self.tables.clear();
        self.parent_tables.clear();
        self.ownership.uncharge(self.ownership.pinned_pages());
    }

    /// The device was restored: the parent, which is new, passes through what the one before it did.
    pub(super) fn restore_default_maps(&mut self) {
        for asid in (0..).map(Asid).take(self.passthrough.len()) {
            self.install_identity(asid);
        }
    }

    fn default_passes(&mut self) -> bool {
        initial(&mut self.parent).first().copied().unwrap_or(false)
    }

    /// Address spaces in which the parent may have anything.
    fn address_spaces_in_use(&self) -> Vec<Asid> {
        let passing =
            (0..).map(Asid).zip(&self.passthrough).filter(|(_, passes)| **passes).map(|(asid, _)| asid);
        let mut asids: Vec<Asid> = self.tables.keys().copied().chain(passing).collect();
        asids.sort_unstable();
        asids.dedup();
        asids
    }

    /// Empties the parent's translation.
    fn clear_parent(&mut self, asid: Asid) {
        let passes = self.passes_through(asid);
        match self.parent.dma() {
            Dma::SetMap(map) => drop(map.set_map(asid, &Table::default())),
            Dma::DmaMap(map) if passes => map.dma_unmap(asid, IovaRange::ALL),
            Dma::DmaMap(map) => {
                let table = self.tables.get(&asid).into_iter();
                table.flat_map(Table::iter).for_each(|entry| map.dma_unmap(asid, entry.range));
            }
            Dma::Platform => {}
        }
    }

    /// Gives the parent the 1:1 map of an address space that passes through, if there is an owner. A parent that
    /// refuses has nothing mapped.
    fn install_identity(&mut self, asid: Asid) {
        if !self.passes_through(asid) {
            return;
        }
        let Some(identity) = self.ownership.owner().and_then(identity::<P>) else { return };
        match self.parent.dma() {
            Dma::SetMap(map) => drop(map.set_map(asid, &Table::from_iter([identity]))),
            Dma::DmaMap(map) => drop(map.dma_map(asid, &identity)),
            Dma::Platform => {}
        }
    }

    fn set_passthrough(&mut self, asid: Asid, passes: bool) {
        if let Some(flag) = self.passthrough.get_mut(asid.0 as usize) {
            *flag = passes;
        }
    }
}

/// All addresses of the owner, at themselves.
fn identity<P: Parent>(owner: &<P::Host as crate::host::Host>::AddressSpace) -> Option<Mapping<MemoryOf<P>>> {
    Some(Mapping {
        range: IovaRange::ALL,
        uaddr: 0,
        perm: Perm::RW,
        memory: owner.whole()?,
        stale: false,
        record: RecordId::default(),
    })
}
