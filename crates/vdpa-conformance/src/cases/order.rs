//! Cases about the order of checks: which error a request returns if several apply.

use vdpa_core::Errno;
use vdpa_core::features::Status;
use vdpa_sys::vhost_vdpa::RawArg;

use super::owned;
use super::state::{DeviceState, open_in};
use crate::case::{Case, Ctx, Need, Outcome, check, prepare};
use crate::device::pair;
use crate::request::Request;

/// Requests of other vhost devices. The kernel checks owner and index, then refuses them (uapi-spec 1.1).
const REFUSED: &[Request] = &[
    Request::NEW_WORKER,
    Request::FREE_WORKER,
    Request::ATTACH_VRING_WORKER,
    Request::GET_VRING_WORKER,
    Request::NET_SET_BACKEND,
    Request::GET_FEATURES_ARRAY,
    Request::SET_FEATURES_ARRAY,
];

pub(super) const CASES: &[Case] = &[
    Case {
        id: "order.log-base",
        spec: "1.1, 9.4 vector 9",
        covers: &[Request::SET_LOG_BASE],
        needs: &[Need::DeviceFile],
        run: |ctx| {
            let device = ctx.open()?;
            check(
                "SET_LOG_BASE, bad pointer, no owner",
                device.bad_pointer(Request::SET_LOG_BASE),
                Err(Errno::NOTTY),
            )
        },
    },
    Case {
        id: "order.log",
        spec: "1.1",
        covers: &[Request::SET_LOG_BASE, Request::SET_LOG_FD],
        needs: &[Need::DeviceFile],
        run: log,
    },
    Case {
        id: "order.unknown",
        spec: "1.1, 9.4 vector 10",
        covers: &[Request::UNKNOWN],
        needs: &[Need::DeviceFile],
        run: unknown,
    },
    Case {
        id: "order.other-vhost",
        spec: "1.1",
        covers: REFUSED,
        needs: &[Need::DeviceFile],
        run: other_vhost,
    },
    Case {
        id: "order.endian",
        spec: "1.1",
        covers: &[Request::SET_VRING_ENDIAN, Request::GET_VRING_ENDIAN],
        needs: &[Need::DeviceFile],
        run: endian,
    },
    Case {
        id: "order.owner-before-pointer",
        spec: "1.1",
        covers: &[Request::SET_VRING_NUM, Request::SET_MEM_TABLE],
        needs: &[Need::DeviceFile],
        run: |ctx| {
            let device = ctx.open()?;
            for request in [Request::SET_VRING_NUM, Request::SET_VRING_ADDR, Request::SET_MEM_TABLE] {
                let what = format!("{}, bad pointer, no owner", request.name);
                check(&what, device.bad_pointer(request), Err(Errno::PERM))?;
            }
            Ok(())
        },
    },
    Case {
        id: "order.bad-pointer",
        spec: "1.3",
        covers: &[Request::GET_FEATURES, Request::SET_FEATURES, Request::GET_CONFIG, Request::SET_STATUS],
        needs: &[Need::DeviceFile],
        run: bad_pointer,
    },
    Case {
        id: "order.features-ok-before-pointer",
        spec: "1.4, 9.4 vector 15",
        covers: &[Request::SET_FEATURES],
        needs: &[Need::DeviceFile],
        run: |ctx| {
            let device = ctx.open()?;
            prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::FEATURES_OK))?;
            let refused = device.bad_pointer(Request::SET_FEATURES);
            check("SET_FEATURES after FEATURES_OK, bad pointer", refused, Err(Errno::BUSY))
        },
    },
    Case { id: "order.index-first", spec: "1.1, 1.6", covers: owned::VRING, needs: &[], run: index_first },
    Case {
        id: "order.group-asid",
        spec: "1.6",
        covers: &[Request::SET_GROUP_ASID],
        needs: &[],
        run: |ctx| {
            let device = open_in(ctx, DeviceState::Running)?;
            let asid = ctx.probe().address_spaces;
            let set = |group, asid| device.set_vring(Request::SET_GROUP_ASID, group, asid);
            check("SET_GROUP_ASID, bad ASID, while running", set(0, asid), Err(Errno::INVAL))?;
            check("SET_GROUP_ASID, bad group, while running", set(ctx.probe().queues, 0), Err(Errno::NOBUFS))
        },
    },
];

fn log(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    for when in ["without an owner", "as owner"] {
        let what = |request| format!("{request} {when}");
        check(&what("SET_LOG_BASE"), device.set_u64(Request::SET_LOG_BASE, 0), Err(Errno::NOTTY))?;
        check(
            &what("SET_LOG_FD"),
            device.set(Request::SET_LOG_FD, &(-1_i32).to_ne_bytes()),
            Err(Errno::NOTTY),
        )?;
        if when == "without an owner" {
            prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
        }
    }
    Ok(())
}

fn unknown(ctx: &mut Ctx<'_>) -> Outcome {
    const NUMBER: u32 = 0xafff;
    let device = ctx.open()?;
    let word = |word: u32| device.raw(NUMBER, RawArg::Bytes(&mut pair(word, 0)));
    check("0xafff without an owner", word(0), Err(Errno::PERM))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check("0xafff of a word 0", word(0), Err(Errno::NOTTY))?;
    check("0xafff of a word beyond the queues", word(ctx.probe().queues), Err(Errno::NOBUFS))?;
    check("0xafff of NULL", device.raw(NUMBER, RawArg::Null), Err(Errno::FAULT))
}

fn other_vhost(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let queues = ctx.probe().queues;
    // The argument is large enough for each of the requests: a features array has its count in the first word, followed by
    // that many u64.
    let argument = |word: u32| {
        let mut bytes = pair(word, 0).to_vec();
        bytes.resize(16 + 8 * usize::try_from(word).unwrap_or(0), 0);
        bytes
    };
    for &request in REFUSED {
        let refused = device.set(request, &argument(0));
        check(&format!("{} without an owner", request.name), refused, Err(Errno::PERM))?;
    }
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    for &request in REFUSED {
        let name = request.name;
        check(&format!("{name} of a word 0"), device.set(request, &argument(0)), Err(Errno::NOTTY))?;
        let beyond = device.set(request, &argument(queues));
        check(&format!("{name} of a word beyond the queues"), beyond, Err(Errno::NOBUFS))?;
    }
    Ok(())
}

fn endian(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    for request in [Request::SET_VRING_ENDIAN, Request::GET_VRING_ENDIAN] {
        check(
            &format!("{} without an owner", request.name),
            device.set(request, &pair(0, 0)),
            Err(Errno::PERM),
        )?;
    }
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    for request in [Request::SET_VRING_ENDIAN, Request::GET_VRING_ENDIAN] {
        check(request.name, device.set(request, &pair(0, 0)), Err(Errno::NOTTY))?;
    }
    Ok(())
}

fn bad_pointer(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for request in [
        Request::GET_FEATURES,
        Request::SET_FEATURES,
        Request::GET_BACKEND_FEATURES,
        Request::SET_BACKEND_FEATURES,
        Request::GET_STATUS,
        Request::SET_STATUS,
        Request::GET_CONFIG,
        Request::SET_CONFIG,
        Request::SET_CONFIG_CALL,
        Request::GET_DEVICE_ID,
        Request::GET_VRING_NUM,
        Request::GET_IOVA_RANGE,
        Request::GET_CONFIG_SIZE,
        Request::GET_VQS_COUNT,
        Request::SET_VRING_NUM,
        Request::GET_VRING_BASE,
        Request::SET_VRING_KICK,
        Request::SET_GROUP_ASID,
        Request::SET_MEM_TABLE,
    ] {
        check(&format!("{}, bad pointer", request.name), device.bad_pointer(request), Err(Errno::FAULT))?;
    }
    Ok(())
}

fn index_first(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let beyond = Err(Errno::NOBUFS);
    for index in [ctx.probe().queues, u32::MAX] {
        for &request in owned::VRING {
            let refused = owned::vring(&device, request, index, false);
            check(&format!("{} of queue {index}, the rest wrong too", request.name), refused, beyond)?;
        }
    }
    Ok(())
}
