//! Requests that change the owner: SET_OWNER, NEW_OWNER, RESET_OWNER (uapi-spec 4.3, 8.4).

use crate::device::vring::Vring;
use crate::device::{Device, FORK_FROM_OWNER};
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::features::{BackendFeatures, Features, Status};
use crate::host::Caller;
use crate::parent::Parent;
use crate::rules::{self, Refusal};
use crate::types::Result;

impl<P: Parent> Device<P> {
    /// `VHOST_SET_OWNER` (uapi-spec 4.3).
    ///
    /// # Errors
    /// `EBUSY` when there is an owner, even if it is the caller; an error of the platform; an error of the parent, after
    /// which the negotiation state is cleared, as after a close.
    pub fn set_owner(&mut self, caller: &dyn Caller<P::Host>) -> Result<()> {
        if self.ownership.owner().is_some() {
            return if faults::is(Fault::SetOwnerTwice) { Ok(()) } else { Err(Errno::BUSY) };
        }
        let space = caller.address_space()?;
        self.parent.bind_owner(Some(&space)).inspect_err(|_| self.forget_negotiation())?;
        self.ownership.set(space);
        self.update_identity_maps();
        Ok(())
    }

    /// `VHOST_RESET_OWNER` with argument 0.
    ///
    /// The kernel's vhost-vdpa does not support it: the owner gets `EFAULT` (uapi-spec 1.1). With
    /// [`Profile::reset_owner`](crate::parent::Profile::reset_owner) the device stays open and gets the state it has after
    /// a close and an open: no owner, nothing mapped, nothing pinned. Blocks as a reset does.
    ///
    /// # Errors
    /// `EPERM`; `EFAULT` where it is not supported; `EIO` when a queue cannot be stopped: owner and mappings stay
    /// then.
    pub fn reset_owner(&mut self, caller: &dyn Caller<P::Host>) -> Result<()> {
        self.ownership.check(caller)?;
        if !self.parent.profile().reset_owner {
            return Err(Errno::FAULT);
        }
        self.reset_device(false)?;
        self.forget_owner();
        Ok(())
    }

    /// `VHOST_NEW_OWNER`, with the order of checks of uapi-spec 8.4. Mappings, pins, vring state,
    /// eventfds, status, negotiated words and an open batch stay; the pinned-page charge moves to the caller's
    /// account, whether or not the old owner still exists.
    ///
    /// Any process with the device open may call it, whether or not the device is suspended (O1, O2).
    ///
    /// # Errors
    /// `EOPNOTSUPP` when not offered; `EINVAL` without an owner; `EBUSY` when the caller is the owner, and in
    /// strict mode while the device runs; `ENOMEM` over the caller's limit; what the platform or the parent
    /// reports. Nothing changes on an error.
    pub fn new_owner(&mut self, caller: &dyn Caller<P::Host>) -> Result<()> {
        let old = self.ownership.owner();
        let profile = self.parent.profile();
        let facts = rules::NewOwner {
            offered: self.own_features.has(BackendFeatures::NEW_OWNER),
            owned: old.is_some(),
            by_owner: old.is_some_and(|old| caller.is(old)) && !faults::is(Fault::NewOwnerByOwner),
            strict: profile.strict_new_owner && !faults::is(Fault::NewOwnerIgnored),
            runs: self.status.contains(Status::DRIVER_OK) && !self.suspended,
        };
        facts.check().map_err(|refusal| match refusal {
            Refusal::NoOwner if faults::is(Fault::NewOwnerErrno) => Errno::PERM,
            refusal => Errno::from_raw(refusal.errno()),
        })?;
        if faults::is(Fault::NewOwnerIgnored) {
            return Ok(());
        }
        let new_owner = caller.address_space()?;
        self.ownership.charge_new_owner(&new_owner, profile.pin_limit.pages(caller.memlock_pages()))?;
        // This is the last step that can fail, so no bound owner ever has to be reverted (N2).
        if let Err(error) = self.parent.bind_owner(Some(&new_owner)) {
            self.ownership.uncharge_new_owner(&new_owner);
            return Err(error);
        }
        self.ownership.transfer(new_owner);
        if self.own_features.has(BackendFeatures::IOTLB_REMAP) && !faults::is(Fault::StaleReadable) {
            self.mark_stale();
        }
        self.update_identity_maps();
        if faults::is(Fault::NewOwnerUnmaps) {
            self.unmap_everything();
        }
        if faults::is(Fault::NewOwnerResumes) {
            return self.resume();
        }
        Ok(())
    }

    /// The common part of close and RESET_OWNER, after a reset of the device: removes mappings, pins, owner, eventfds and
    /// negotiated words. Errors are ignored, because no caller could receive them.
    pub(super) fn forget_owner(&mut self) {
        self.batch = None;
        self.forget_log();
        self.unmap_everything();
        let _ = self.parent.bind_owner(None);
        if !faults::is(Fault::OwnerSurvivesClose) {
            self.ownership.clear();
        }
        self.forget_negotiation();
    }

    /// Clears the state that the kernel's `vhost_dev_cleanup` clears.
    fn forget_negotiation(&mut self) {
        self.acked = BackendFeatures::NONE;
        self.base_features = Features::NONE;
        self.fork_from_owner = FORK_FROM_OWNER;
        self.vrings.iter_mut().for_each(Vring::close);
        self.touch_all();
    }

    /// `VHOST_SET_FORK_FROM_OWNER` (uapi-spec 1.6a): stored only, as vhost-vdpa has no workers to fork.
    ///
    /// # Errors
    /// `EBUSY` once there is an owner; `EINVAL` for anything but 0 and 1.
    pub fn set_fork_from_owner(&mut self, value: u8) -> Result<()> {
        if self.ownership.owner().is_some() {
            return Err(Errno::BUSY);
        }
        if value > 1 {
            return Err(Errno::INVAL);
        }
        self.fork_from_owner = value;
        Ok(())
    }

    /// `VHOST_GET_FORK_FROM_OWNER`.
    pub const fn fork_from_owner(&self) -> u8 {
        self.fork_from_owner
    }
}
