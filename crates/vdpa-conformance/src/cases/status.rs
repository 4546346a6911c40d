//! Cases about the status register, reset, SUSPEND and RESUME.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};

use super::state::{DeviceState, open_in};
use crate::case::{Case, Ctx, Need, Outcome, check, prepare};
use crate::request::Request;

const SUSPEND: Need = Need::Backend(BackendFeatures::SUSPEND);
const RESUME: Need = Need::Backend(BackendFeatures::RESUME);
const STATUS: &[Request] = &[Request::GET_STATUS, Request::SET_STATUS];

pub(super) const CASES: &[Case] = &[
    Case {
        id: "status.zero-at-open",
        spec: "4.2, 9.4 vector 2",
        covers: STATUS,
        needs: &[],
        run: zero_at_open,
    },
    Case {
        id: "status.any-order",
        spec: "1.5, 4.4, 9.4 vector 14",
        covers: STATUS,
        needs: &[],
        run: any_order,
    },
    Case {
        id: "status.no-bit-removed",
        spec: "1.5, 9.4 vector 16",
        covers: STATUS,
        needs: &[],
        run: no_bit_removed,
    },
    Case { id: "status.free-bits", spec: "1.5", covers: STATUS, needs: &[], run: free_bits },
    Case { id: "status.one-step", spec: "4.4", covers: STATUS, needs: &[], run: one_step },
    Case { id: "status.reset", spec: "4.5", covers: STATUS, needs: &[], run: reset },
    Case {
        id: "suspend.no-op-before-driver-ok",
        spec: "1.8, 9.4 vector 26",
        covers: &[Request::SUSPEND, Request::RESUME],
        needs: &[],
        run: suspend_before_driver_ok,
    },
    Case {
        id: "suspend.repeated",
        spec: "1.7",
        covers: &[Request::SUSPEND, Request::RESUME],
        needs: &[SUSPEND, RESUME],
        run: suspend_repeated,
    },
    Case {
        id: "suspend.unsupported",
        spec: "1.7, 1.8",
        covers: &[Request::SUSPEND],
        needs: &[Need::NoBackend(BackendFeatures::SUSPEND)],
        run: suspend_unsupported,
    },
    Case {
        id: "suspend.resume-unsupported",
        spec: "1.7, 1.8",
        covers: &[Request::RESUME],
        needs: &[Need::NoBackend(BackendFeatures::RESUME)],
        run: resume_unsupported,
    },
];

fn zero_at_open(ctx: &mut Ctx<'_>) -> Outcome {
    check("GET_STATUS", ctx.open()?.status(), Ok(0))
}

fn any_order(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("SET_STATUS FEATURES_OK from 0", device.set_status(Status::FEATURES_OK), Ok(()))?;
    check("GET_STATUS", device.status(), Ok(Status::FEATURES_OK.0))
}

fn no_bit_removed(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::FEATURES_OK))?;
    check("SET_STATUS 4 while 8 is set", device.set_status(Status::DRIVER_OK), Err(Errno::INVAL))?;
    check("GET_STATUS after the refusal", device.status(), Ok(Status::FEATURES_OK.0))?;
    check("SET_STATUS with the same value", device.set_status(Status::FEATURES_OK), Ok(()))
}

fn free_bits(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let status = Status::ACKNOWLEDGE | Status::FAILED;
    check("SET_STATUS with FAILED", device.set_status(status), Ok(()))?;
    check("GET_STATUS", device.status(), Ok(status.0))
}

fn one_step(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    prepare("VHOST_SET_FEATURES", device.set_features(ctx.base_features()))?;
    let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    check("SET_STATUS 0xf from 0", device.set_status(running), Ok(()))?;
    check("GET_STATUS", device.status(), Ok(running.0))
}

fn reset(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    prepare("VHOST_SET_FEATURES", device.set_features(ctx.base_features()))?;
    prepare("VHOST_SET_VRING_BASE", device.set_vring(Request::SET_VRING_BASE, 0, 5))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::FEATURES_OK))?;
    check("SET_STATUS 0", device.set_status(Status::RESET), Ok(()))?;
    check("GET_STATUS after a reset", device.status(), Ok(0))?;
    check("GET_VRING_BASE after a reset", device.vring(Request::GET_VRING_BASE, 0, 0), Ok(0))?;
    check("SET_OWNER after a reset: the owner stays", device.call(Request::SET_OWNER), Err(Errno::BUSY))
}

fn suspend_before_driver_ok(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("SUSPEND", device.call(Request::SUSPEND), Ok(()))?;
    check("RESUME", device.call(Request::RESUME), Ok(()))
}

fn suspend_repeated(ctx: &mut Ctx<'_>) -> Outcome {
    let device = open_in(ctx, DeviceState::Running)?;
    check("RESUME without SUSPEND", device.call(Request::RESUME), Ok(()))?;
    for round in ["first", "second"] {
        check(&format!("{round} SUSPEND"), device.call(Request::SUSPEND), Ok(()))?;
    }
    for round in ["first", "second"] {
        check(&format!("{round} RESUME"), device.call(Request::RESUME), Ok(()))?;
    }
    Ok(())
}

fn resume_unsupported(ctx: &mut Ctx<'_>) -> Outcome {
    check("RESUME", open_in(ctx, DeviceState::Running)?.call(Request::RESUME), Err(Errno::OPNOTSUPP))
}

fn suspend_unsupported(ctx: &mut Ctx<'_>) -> Outcome {
    check("SUSPEND", open_in(ctx, DeviceState::Running)?.call(Request::SUSPEND), Err(Errno::OPNOTSUPP))
}
