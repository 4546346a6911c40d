//! The limit on pinned pages and whom they are charged to.
//!
//! A device that counts no page against RLIMIT_MEMLOCK cannot show any of it; a case finds that out first.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, V2, WRITTEN, encode, pair};
use crate::memory::{PAGE, Region};
use crate::request::Request;

const MAPPED: Result<usize, Errno> = Ok(WRITTEN);
const REFUSED: Result<usize, Errno> = Err(Errno::FAULT);

pub(super) const CASES: &[Case] = &[
    Case {
        id: "pins.limit",
        spec: "3.3",
        covers: &[Request::IOTLB_UPDATE, Request::IOTLB_INVALIDATE],
        needs: &[],
        run: limit,
    },
    Case {
        id: "pins.move-with-ownership",
        spec: "8.4, 9.4 vector L4",
        covers: &[Request::NEW_OWNER, Request::IOTLB_UPDATE],
        needs: &[Need::Backend(BackendFeatures::NEW_OWNER), Need::Child],
        run: move_with_ownership,
    },
];

/// The soft RLIMIT_MEMLOCK of the suite, in pages; the previous one is back when this is dropped.
struct MemLock(Rlimit);

impl MemLock {
    fn new(pages: u64) -> Result<Self, Stop> {
        let before = getrlimit(Resource::Memlock);
        if before.maximum.is_some_and(|maximum| pages * PAGE > maximum) {
            return Err(Stop::CannotRun(format!("the hard RLIMIT_MEMLOCK is below {pages} pages")));
        }
        Self(before).set(pages)
    }

    fn set(self, pages: u64) -> Result<Self, Stop> {
        let limit = Rlimit { current: Some(pages * PAGE), maximum: self.0.maximum };
        setrlimit(Resource::Memlock, limit).map_err(|e| Stop::CannotRun(format!("RLIMIT_MEMLOCK: {e}")))?;
        Ok(self)
    }
}

impl Drop for MemLock {
    fn drop(&mut self) {
        // The soft limit was this before, so the hard limit allows it.
        let _ = setrlimit(Resource::Memlock, self.0);
    }
}

/// Ends the check unless the device refuses to pin a page that the limit does not allow. The caller owns it.
fn must_pin(device: &Device) -> Outcome {
    let limit = MemLock::new(0)?;
    let mapped = device.map(0, &Region::new(1)?, Perm::RW);
    drop(limit);
    match mapped {
        Ok(_) => Err(Stop::CannotRun("the device counts no page against RLIMIT_MEMLOCK".to_owned())),
        Err(_) => check("UPDATE with RLIMIT_MEMLOCK 0", mapped, REFUSED),
    }
}

fn limit(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    must_pin(&device)?;
    let _limit = MemLock::new(4)?;
    let (four, one) = (Region::new(4)?, Region::new(1)?);
    for round in ["first", "second"] {
        check(
            &format!("UPDATE of all the limit allows, {round} time"),
            device.map(0, &four, Perm::RW),
            MAPPED,
        )?;
        check("UPDATE of one page more", device.map(0x10_000, &one, Perm::RW), REFUSED)?;
        check("INVALIDATE", device.unmap(0, four.size()), MAPPED)?;
    }
    Ok(())
}

fn move_with_ownership(ctx: &mut Ctx<'_>) -> Outcome {
    drop(ctx.open_owned().and_then(|device| must_pin(&device).map(|()| device))?);
    let device = ctx.open()?;
    let mut child = ctx.child(&device)?;
    check("SET_OWNER", child.call(Request::SET_OWNER)?, Ok(()))?;
    let four = Region::new(4)?;
    let update = IotlbMsg {
        iova: 0,
        size: four.size(),
        uaddr: child.map(&four)?,
        perm: Perm::RW,
        kind: iotlb_type::UPDATE,
    };
    check("UPDATE of four pages", child.write(&encode(V2, 0, &update))?, MAPPED)?;
    let limit = MemLock::new(3)?;
    check("NEW_OWNER with a limit of three pages", device.call(Request::NEW_OWNER), Err(Errno::NOMEM))?;
    let num = child.set(Request::SET_VRING_NUM, &pair(0, 1))?;
    check("SET_VRING_NUM by the owner, which stays", num, Ok(()))?;
    let limit = limit.set(5)?;
    check("NEW_OWNER with a limit of five pages", device.call(Request::NEW_OWNER), Ok(()))?;
    let one = Region::new(1)?;
    check("UPDATE of the fifth page", device.map(0x10_000, &one, Perm::RW), MAPPED)?;
    check("UPDATE of a sixth page", device.map(0x20_000, &one, Perm::RW), REFUSED)?;
    check("INVALIDATE of the four", device.unmap(0, four.size()), MAPPED)?;
    check("UPDATE of a page in their place", device.map(0, &one, Perm::RW), MAPPED)?;
    drop(limit);
    prepare("SET_STATUS 0", device.set_status(vdpa_core::features::Status::RESET))
}
