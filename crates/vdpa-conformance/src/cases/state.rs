//! The state matrix (uapi-spec 1.7): the result of each request before FEATURES_OK, after FEATURES_OK, with DRIVER_OK, and
//! while suspended.

use std::os::fd::AsFd;

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::{Perm, VringAddr};
use vdpa_sys::eventfd::EventFd;

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::memory::Region;
use crate::request::Request;

/// A state of the device: a column of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceState {
    /// S0: before FEATURES_OK.
    Negotiating,
    /// S1: FEATURES_OK.
    FeaturesOk,
    /// S2: DRIVER_OK.
    Running,
    /// S3: DRIVER_OK and suspended.
    Suspended,
}

impl DeviceState {
    const WITHOUT_SUSPEND: &[Self] = &[Self::Negotiating, Self::FeaturesOk, Self::Running];
    const ALL: &[Self] = &[Self::Negotiating, Self::FeaturesOk, Self::Running, Self::Suspended];
}

/// Opens the device, becomes its owner and brings it into `state`. Sets up no queue.
pub(super) fn open_in(ctx: &Ctx<'_>, state: DeviceState) -> Result<Device, Stop> {
    let device = ctx.open_owned()?;
    let features_ok = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    if state == DeviceState::Negotiating {
        return Ok(device);
    }
    prepare("VHOST_SET_FEATURES", device.set_features(ctx.base_features()))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(features_ok))?;
    if state == DeviceState::FeaturesOk {
        return Ok(device);
    }
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(features_ok | Status::DRIVER_OK))?;
    if state == DeviceState::Suspended {
        prepare("VHOST_VDPA_SUSPEND", device.call(Request::SUSPEND))?;
    }
    Ok(device)
}

const SUSPEND: &[Need] = &[Need::Backend(BackendFeatures::SUSPEND)];

macro_rules! row {
    ($id:literal, $request:expr, $run:expr) => {
        Case { id: $id, spec: "1.7", covers: &[$request], needs: SUSPEND, run: $run }
    };
}

pub(super) const CASES: &[Case] = &[
    row!("state.set-features", Request::SET_FEATURES, |ctx| {
        let features = ctx.base_features();
        let refused = Err(Errno::BUSY);
        matrix(ctx, [Ok(()), refused, refused, refused], |device| device.set_features(features))
    }),
    row!("state.set-vring-num", Request::SET_VRING_NUM, |ctx| {
        let size = u32::from(ctx.probe().ring_size);
        always(ctx, |device| device.set_vring(Request::SET_VRING_NUM, 0, size))
    }),
    Case {
        id: "state.set-vring-addr",
        spec: "1.7, 9.4 vectors 43 and 44",
        covers: &[Request::SET_VRING_ADDR, Request::SUSPEND],
        needs: SUSPEND,
        run: |ctx| {
            let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
            matrix(ctx, [Ok(()), Ok(()), Err(Errno::INVAL), Ok(())], |device| device.set_addr(0, &addr))
        },
    },
    Case {
        id: "state.set-vring-base",
        spec: "1.7, 9.4 vectors 43 and 44",
        covers: &[Request::SET_VRING_BASE, Request::SUSPEND],
        needs: SUSPEND,
        run: |ctx| {
            matrix(ctx, [Ok(()), Ok(()), Err(Errno::INVAL), Ok(())], |device| {
                device.set_vring(Request::SET_VRING_BASE, 0, 1)
            })
        },
    },
    row!("state.get-vring-base", Request::GET_VRING_BASE, |ctx| {
        always(ctx, |device| device.set_vring(Request::GET_VRING_BASE, 0, 0))
    }),
    row!("state.set-vring-enable", Request::SET_VRING_ENABLE, |ctx| {
        always(ctx, |device| device.set_vring(Request::SET_VRING_ENABLE, 0, 0))
    }),
    Case {
        id: "state.set-vring-fds",
        spec: "1.7",
        covers: &[Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR],
        needs: SUSPEND,
        run: |ctx| {
            let event = prepare("eventfd", EventFd::new())?;
            for request in [Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR] {
                always(ctx, |device| {
                    device.set_fd(request, 0, Some(event.as_fd()))?;
                    device.set_fd(request, 0, None)
                })?;
            }
            Ok(())
        },
    },
    Case {
        id: "state.set-group-asid",
        spec: "1.7, 9.4 vectors 43 and 44",
        covers: &[Request::SET_GROUP_ASID],
        needs: SUSPEND,
        run: |ctx| {
            matrix(ctx, [Ok(()), Ok(()), Err(Errno::BUSY), Err(Errno::BUSY)], |device| {
                device.set_vring(Request::SET_GROUP_ASID, 0, 0)
            })
        },
    },
    row!("state.suspend", Request::SUSPEND, |ctx| always(ctx, |device| device.call(Request::SUSPEND))),
    Case {
        id: "state.resume",
        spec: "1.7",
        covers: &[Request::RESUME],
        needs: &[Need::Backend(BackendFeatures::SUSPEND), Need::Backend(BackendFeatures::RESUME)],
        run: |ctx| {
            always(ctx, |device| device.call(Request::RESUME))?;
            let device = open_in(ctx, DeviceState::Suspended)?;
            prepare("VHOST_VDPA_RESUME", device.call(Request::RESUME))?;
            let base = device.set_vring(Request::SET_VRING_BASE, 0, 1);
            check("SET_VRING_BASE after RESUME", base, Err(Errno::INVAL))
        },
    },
    row!("state.reset", Request::SET_STATUS, |ctx| always(ctx, |device| device.set_status(Status::RESET))),
    row!("state.set-status-superset", Request::SET_STATUS, |ctx| {
        always(ctx, |device| {
            let status = Status(device.status()?);
            device.set_status(status | Status::ACKNOWLEDGE)
        })
    }),
    row!("state.suspended-survives-status", Request::SET_STATUS, |ctx| {
        let device = open_in(ctx, DeviceState::Suspended)?;
        let status = prepare("VHOST_VDPA_GET_STATUS", device.status())?;
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status(status)))?;
        let base = device.set_vring(Request::SET_VRING_BASE, 0, 1);
        check("SET_VRING_BASE, suspended, after the status was written again", base, Ok(()))
    }),
    row!("state.reset-clears-suspended", Request::SET_STATUS, |ctx| {
        let device = open_in(ctx, DeviceState::Suspended)?;
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::RESET))?;
        prepare("VHOST_SET_FEATURES", device.set_features(ctx.base_features()))?;
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::FEATURES_OK | Status::DRIVER_OK))?;
        let base = device.set_vring(Request::SET_VRING_BASE, 0, 1);
        check("SET_VRING_BASE, running after SUSPEND and reset", base, Err(Errno::INVAL))
    }),
    row!("state.iotlb", Request::IOTLB_UPDATE, |ctx| {
        let region = Region::new(1)?;
        always(ctx, |device| {
            device.map(0x1000, &region, Perm::RW)?;
            device.unmap(0x1000, region.size()).and_then(|written| match written {
                MESSAGE_SIZE => Ok(()),
                _ => Err(Errno::MSGSIZE),
            })
        })
    }),
    Case {
        id: "state.config",
        spec: "1.7",
        covers: &[Request::GET_CONFIG, Request::SET_CONFIG],
        needs: SUSPEND,
        run: |ctx| {
            always(ctx, |device| {
                let byte = device.config(0, 1)?;
                device.set_config(0, &byte)
            })
        },
    },
    Case {
        id: "state.without-suspend",
        spec: "1.7",
        covers: &[Request::SET_VRING_NUM, Request::SET_VRING_BASE, Request::SET_GROUP_ASID],
        needs: &[Need::NoBackend(BackendFeatures::SUSPEND)],
        run: without_suspend,
    },
];

/// Checks that the request succeeds in every state.
fn always(ctx: &Ctx<'_>, request: impl Fn(&Device) -> Result<(), Errno>) -> Outcome {
    matrix(ctx, [Ok(()); 4], request)
}

/// Checks that the request gives `want` in the four states, each time with a new open of the device.
fn matrix(
    ctx: &Ctx<'_>,
    want: [Result<(), Errno>; 4],
    request: impl Fn(&Device) -> Result<(), Errno>,
) -> Outcome {
    for (&state, want) in DeviceState::ALL.iter().zip(want) {
        check(&format!("{state:?}"), request(&open_in(ctx, state)?), want)?;
    }
    Ok(())
}

fn without_suspend(ctx: &mut Ctx<'_>) -> Outcome {
    let size = u32::from(ctx.probe().ring_size);
    for &state in DeviceState::WITHOUT_SUSPEND {
        let running = state == DeviceState::Running;
        let device = open_in(ctx, state)?;
        let when = |request| format!("{state:?}: {request}");
        check(&when("SET_VRING_NUM"), device.set_vring(Request::SET_VRING_NUM, 0, size), Ok(()))?;
        let want = if running { Err(Errno::INVAL) } else { Ok(()) };
        check(&when("SET_VRING_BASE"), device.set_vring(Request::SET_VRING_BASE, 0, 1), want)?;
        let want = if running { Err(Errno::BUSY) } else { Ok(()) };
        check(&when("SET_GROUP_ASID"), device.set_vring(Request::SET_GROUP_ASID, 0, 0), want)?;
    }
    Ok(())
}
