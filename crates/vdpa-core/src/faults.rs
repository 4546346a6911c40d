//! Planted faults: deliberate errors of a device, by which tests prove that the conformance suite detects them.
//!
//! With the feature `planted-faults`, [`is`] is true for the one fault selected by [`plant`]. Without the feature `is` is the
//! constant `false`, and the compiler removes the code of all faults.

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident = $name:literal;)*) => {
        /// A deliberate error.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Fault {
            $($(#[$doc])* $fault,)*
        }

        #[cfg(feature = "planted-faults")]
        impl Fault {
            /// Every fault.
            pub const ALL: &[Self] = &[$(Self::$fault),*];

            /// Those that end the process, which is for the tests of what comes after, and not for the suite.
            pub const DEADLY: &[Self] = &[Self::DeadlySuspend, Self::DeadlyWrite];

            /// The name by which it is selected.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$fault => $name,)* }
            }
        }
    };
}

faults! {
    /// A second SET_OWNER succeeds.
    SetOwnerTwice = "set-owner-twice";
    /// Requests reserved to the owner succeed for every caller.
    OwnerUnchecked = "owner-unchecked";
    /// The owner survives the close.
    OwnerSurvivesClose = "owner-survives-close";
    /// NEW_OWNER without an owner is EPERM.
    NewOwnerErrno = "new-owner-errno";
    /// NEW_OWNER by the owner succeeds.
    NewOwnerByOwner = "new-owner-by-owner";
    /// NEW_OWNER succeeds and the old owner stays.
    NewOwnerIgnored = "new-owner-ignored";
    /// NEW_OWNER unmaps everything.
    NewOwnerUnmaps = "new-owner-unmaps";
    /// NEW_OWNER resumes a suspended device.
    NewOwnerResumes = "new-owner-resumes";
    /// NEW_OWNER leaves the pinned pages charged to the old owner.
    ChargeNotMoved = "charge-not-moved";
    /// NEW_OWNER is not refused over the new owner's limit.
    ChargeUnlimited = "charge-unlimited";
    /// INVALIDATE does not uncharge the pages.
    ChargeKept = "charge-kept";
    /// Entries with the old owner's addresses stay readable.
    StaleReadable = "stale-readable";
    /// An entry stays stale after its REMAP.
    RemapStaysStale = "remap-stays-stale";
    /// REMAP succeeds with a permission.
    RemapWithPermission = "remap-with-permission";
    /// REMAP removes the mapping before it checks the new memory.
    RemapNoRollback = "remap-no-rollback";
    /// REMAP succeeds on a device that does not offer it.
    RemapUnsupported = "remap-unsupported";
    /// UPDATE over an existing mapping replaces it.
    UpdateReplaces = "update-replaces";
    /// UPDATE of size 0 fails with EFAULT.
    UpdateEmptyErrno = "update-empty-errno";
    /// UPDATE gives the device every permission.
    UpdateIgnoresPermission = "update-ignores-permission";
    /// The table takes one entry fewer than its limit.
    TableLimit = "table-limit";
    /// INVALIDATE removes only entries that lie within its range.
    InvalidateWithin = "invalidate-within";
    /// INVALIDATE does not reach the data path.
    InvalidateUnheard = "invalidate-unheard";
    /// BATCH_END is refused without BATCH_BEGIN.
    BatchEndNeedsBegin = "batch-end-needs-begin";
    /// A reset unmaps everything.
    ResetUnmaps = "reset-unmaps";
    /// A reset without PERSIST keeps the translation of a device that drops it.
    ResetKeepsTranslation = "reset-keeps-translation";
    /// A reset removes the owner.
    ResetDisowns = "reset-disowns";
    /// A reset leaves the device suspended.
    ResetKeepsSuspended = "reset-keeps-suspended";
    /// Status bits can be cleared one by one.
    StatusClears = "status-clears";
    /// Features can be set after FEATURES_OK.
    FeaturesAnyTime = "features-any-time";
    /// Backend features can be acknowledged even if they are not offered.
    BackendAnyBit = "backend-any-bit";
    /// SUSPEND leaves the queues running.
    SuspendRunsOn = "suspend-runs-on";
    /// RESUME does not start the queues.
    ResumeStaysStopped = "resume-stays-stopped";
    /// Queues start without DRIVER_OK.
    StartEarly = "start-early";
    /// Enabling a queue starts it although the device is suspended.
    EnableWhileSuspended = "enable-while-suspended";
    /// A disabled queue keeps running.
    DisableRunsOn = "disable-runs-on";
    /// Any ring size up to the maximum is accepted.
    VringNumAny = "vring-num-any";
    /// Ring addresses can be changed while the device runs.
    VringAddrAnyTime = "vring-addr-any-time";
    /// A stopped queue reports one request too few.
    BaseBehind = "base-behind";
    /// A group can change its address space after DRIVER_OK.
    GroupAsidAnyTime = "group-asid-any-time";
    /// The asid of a message is used although IOTLB_ASID was not acknowledged.
    AsidUnasked = "asid-unasked";
    /// IOTLB messages of unknown versions are taken as version 2.
    VersionUnchecked = "version-unchecked";
    /// The index is checked before the owner.
    IndexBeforeOwner = "index-before-owner";
    /// An unknown request is EINVAL.
    UnknownRequestErrno = "unknown-request-errno";
    /// Descriptor -1 is refused.
    UnbindRefused = "unbind-refused";
    /// GET_CONFIG beyond the end returns the bytes before the end.
    ConfigBeyondEnd = "config-beyond-end";
    /// A successor takes over while a queue of its predecessor runs.
    ClaimAnyTime = "claim-any-time";
    /// The predecessor can use the device after the successor has taken it over.
    PredecessorGoesOn = "predecessor-goes-on";
    /// A successor that closes the device without driving it counts as having taken over.
    GivingUpCounts = "giving-up-counts";
    /// The close of the predecessor ends its successor too.
    CloseEndsBoth = "close-ends-both";
    /// Ranges to be tracked may overlap.
    DirtyOverlap = "dirty-overlap";
    /// The pages of data are not marked as dirty.
    DirtyDataUnmarked = "dirty-data-unmarked";
    /// The pages of rings are not marked as dirty.
    DirtyRingUnmarked = "dirty-ring-unmarked";
    /// A report of dirty pages clears them although it was asked not to.
    DirtyKeepIgnored = "dirty-keep-ignored";
    /// An unmap with a report forgets the pages before it reports them.
    DirtyUnmapForgets = "dirty-unmap-forgets";
    /// Unknown flags of the requests of dirty tracking are ignored.
    DirtyFlagsIgnored = "dirty-flags-ignored";
    /// SUSPEND ends the process.
    DeadlySuspend = "deadly-suspend";
    /// A write to sector 4096 of a block device ends the process.
    DeadlyWrite = "deadly-write";
}

/// Whether this fault is planted.
#[cfg(not(feature = "planted-faults"))]
#[must_use]
#[inline]
pub const fn is(_: Fault) -> bool {
    false
}

#[cfg(not(feature = "planted-faults"))]
const _: () = assert!(!is(Fault::SetOwnerTwice), "a constant, so that the compiler drops what depends on it");

#[cfg(feature = "planted-faults")]
pub use planted::{is, plant};

#[cfg(feature = "planted-faults")]
mod planted {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::Fault;

    const NONE: u8 = u8::MAX;
    static PLANTED: AtomicU8 = AtomicU8::new(NONE);

    /// Whether this fault is planted.
    #[must_use]
    pub fn is(fault: Fault) -> bool {
        PLANTED.load(Ordering::Relaxed) == fault as u8
    }

    /// Plants the fault `name` in every device of this process; `None` when there is no such fault.
    #[must_use]
    pub fn plant(name: &str) -> Option<Fault> {
        let fault = Fault::ALL.iter().copied().find(|fault| fault.name() == name)?;
        PLANTED.store(fault as u8, Ordering::Relaxed);
        Some(fault)
    }
}
