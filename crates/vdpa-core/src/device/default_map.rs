//! The identity (1:1) map, with which the parent translates while a client has mapped nothing, and its restoration
//! (uapi-spec 4.5, 4.6, 6.1).
//!
//! ```text
//!                first UPDATE, INVALIDATE or END that reaches the parent
//!  identity map   ------------------------------------------------------> mapped
//!                <------------------------------------------------------
//!                 close, RESET_OWNER (`reset_map`), reset with CLEAN_MAP (`compat_reset`)
//! ```
//!
//! A parent without [`Profile::identity_map`](crate::parent::Profile::identity_map) has an empty table instead.

use crate::device::{Device, MemoryOf};
use crate::host::AddressSpace;
use crate::iotlb::{Mapping, RecordId, Table};
use crate::parent::{AddressMode, Dma, Parent};
use crate::types::{Asid, IovaRange, Perm};

/// By address space of a new device: whether it has the identity map; all or none of them.
pub(super) fn initial<P: Parent>(parent: &mut P) -> Vec<bool> {
    let translates = !matches!(parent.dma(), Dma::Platform);
    let profile = parent.profile();
    let passes = translates && profile.identity_map && profile.address_mode == AddressMode::OwnerAddresses;
    vec![passes; profile.address_spaces as usize]
}

impl<P: Parent> Device<P> {
    /// Whether the parent has the identity map in `asid`.
    pub(super) fn has_identity_map(&self, asid: Asid) -> bool {
        self.passthrough.get(asid.0 as usize).copied().unwrap_or(false)
    }

    /// Called before the first mappings are passed to the parent: removes the identity map.
    pub(super) fn remove_identity_map(&mut self, asid: Asid) {
        if !self.has_identity_map(asid) {
            return;
        }
        self.set_passthrough(asid, false);
        // Not needed where a whole table replaces it.
        if let Dma::DmaMap(map) = self.parent.dma()
            && self.ownership.owner().is_some()
        {
            map.dma_unmap(asid, IovaRange::ALL);
        }
    }

    /// Called when the owner has changed: identity maps now refer to the addresses of the new owner.
    pub(super) fn update_identity_maps(&mut self) {
        for asid in (0..).map(Asid).take(self.passthrough.len()) {
            if self.has_identity_map(asid) {
                self.clear_parent(asid);
                self.install_identity(asid);
            }
        }
    }

    /// Handles a reset with CLEAN_MAP: the parent gets its default translation again. The interface keeps its table, which
    /// the parent gets with the next message that is passed to it.
    pub(super) fn restore_default_map(&mut self) {
        let passes = self.default_passes();
        for asid in self.address_spaces_in_use() {
            if !self.has_identity_map(asid) {
                self.clear_parent(asid);
                self.parent_was_emptied(asid);
                self.set_passthrough(asid, passes);
                self.install_identity(asid);
            }
        }
    }

    /// Handles close and RESET_OWNER: empties every table, also the parent's, and uncharges all pages. The next owner gets the
    /// default translation.
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

    /// Address spaces in which the parent may have mappings.
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
        let passes = self.has_identity_map(asid);
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

    /// Installs the identity map in the parent for an address space that has one, if there is an owner. If the parent refuses
    /// it, nothing is mapped.
    fn install_identity(&mut self, asid: Asid) {
        if !self.has_identity_map(asid) {
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

/// The identity map of the owner's addresses.
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
