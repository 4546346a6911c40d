//! Cases about virtqueue requests and their arguments.

use std::os::fd::AsFd;

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::VringAddr;
use vdpa_sys::eventfd::EventFd;

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{errno, pair, vring_file};
use crate::request::Request;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "vring.num",
        spec: "1.6, 9.4 vector 20",
        covers: &[Request::SET_VRING_NUM],
        needs: &[],
        run: num,
    },
    Case {
        id: "vring.addr",
        spec: "1.6, 9.4 vector 21",
        covers: &[Request::SET_VRING_ADDR],
        needs: &[],
        run: addr,
    },
    Case {
        id: "vring.base",
        spec: "1.6, 9.4 vector 22",
        covers: &[Request::SET_VRING_BASE, Request::GET_VRING_BASE],
        needs: &[],
        run: base,
    },
    Case {
        id: "vring.group",
        spec: "1.6, 9.4 vector 23",
        covers: &[Request::GET_VRING_GROUP],
        needs: &[],
        run: group,
    },
    Case {
        id: "vring.group-asid",
        spec: "1.6, 9.4 vector 24",
        covers: &[Request::SET_GROUP_ASID],
        needs: &[],
        run: group_asid,
    },
    Case {
        id: "vring.group-asid-range",
        spec: "1.6, 9.4 vector 24",
        covers: &[Request::SET_GROUP_ASID],
        needs: &[Need::Queues(2)],
        run: group_asid_range,
    },
    Case {
        id: "vring.desc-group",
        spec: "1.6, 9.4 vector 25",
        covers: &[Request::GET_VRING_DESC_GROUP],
        needs: &[Need::NoBackend(BackendFeatures::DESC_ASID)],
        run: desc_group,
    },
    Case {
        id: "vring.size",
        spec: "1.6, 9.4 vector 25",
        covers: &[Request::GET_VRING_SIZE],
        needs: &[],
        run: size,
    },
    Case {
        id: "vring.fds",
        spec: "1.6, 9.4 vector 42",
        covers: &[Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR],
        needs: &[],
        run: fds,
    },
    Case {
        id: "vring.busyloop",
        spec: "1.6",
        covers: &[Request::SET_VRING_BUSYLOOP_TIMEOUT, Request::GET_VRING_BUSYLOOP_TIMEOUT],
        needs: &[],
        run: busyloop,
    },
    Case { id: "vring.enable", spec: "1.6", covers: &[Request::SET_VRING_ENABLE], needs: &[], run: enable },
];

fn num(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let largest = u32::from(ctx.probe().ring_size);
    for num in [0, 3, 2 * largest, 65_536, u32::MAX] {
        let what = format!("SET_VRING_NUM {num}");
        check(&what, device.set_vring(Request::SET_VRING_NUM, 0, num), Err(Errno::INVAL))?;
    }
    for num in [1, 2, largest] {
        check(&format!("SET_VRING_NUM {num}"), device.set_vring(Request::SET_VRING_NUM, 0, num), Ok(()))?;
    }
    Ok(())
}

fn addr(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let good = VringAddr { flags: 0, desc: 0x1000, avail: 0x2000, used: 0x3000, log: 0 };
    for (what, addr, want) in [
        ("flags 2", VringAddr { flags: 2, ..good }, Err(Errno::OPNOTSUPP)),
        ("used + 2", VringAddr { used: good.used + 2, ..good }, Err(Errno::INVAL)),
        ("avail + 1", VringAddr { avail: good.avail + 1, ..good }, Err(Errno::INVAL)),
        ("log + 2", VringAddr { log: 2, ..good }, Err(Errno::INVAL)),
        ("flags 2 and used + 2", VringAddr { flags: 2, used: 2, ..good }, Err(Errno::OPNOTSUPP)),
        ("desc + 1", VringAddr { desc: good.desc + 1, ..good }, Ok(())),
        ("flags 1 (log)", VringAddr { flags: 1, ..good }, Ok(())),
        ("nothing mapped there", good, Ok(())),
    ] {
        check(&format!("SET_VRING_ADDR {what}"), device.set_addr(0, &addr), want)?;
    }
    Ok(())
}

fn base(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    prepare("VHOST_SET_FEATURES", device.set_features(ctx.base_features()))?;
    for base in [0, 5, 65_535] {
        check(&format!("SET_VRING_BASE {base}"), device.set_vring(Request::SET_VRING_BASE, 0, base), Ok(()))?;
        check("GET_VRING_BASE", device.vring(Request::GET_VRING_BASE, 0, 0), Ok(base))?;
    }
    check("SET_VRING_BASE 65536", device.set_vring(Request::SET_VRING_BASE, 0, 65_536), Err(Errno::INVAL))
}

fn group(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let probe = ctx.probe();
    for queue in 0..probe.queues {
        let group = device.vring(Request::GET_VRING_GROUP, queue, u32::MAX);
        check(
            &format!("GET_VRING_GROUP {queue}: {group:?} is below GET_GROUP_NUM"),
            group.is_ok_and(|group| group < probe.groups),
            true,
        )?;
    }
    let beyond = device.vring(Request::GET_VRING_GROUP, probe.queues, 0);
    check("GET_VRING_GROUP beyond the queues", beyond, Err(Errno::NOBUFS))
}

fn group_asid(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let probe = ctx.probe();
    let set = |group, asid| device.set_vring(Request::SET_GROUP_ASID, group, asid);
    check("SET_GROUP_ASID group 0 to 0", set(0, 0), Ok(()))?;
    check("SET_GROUP_ASID to the last ASID", set(0, probe.address_spaces - 1), Ok(()))?;
    check("SET_GROUP_ASID to an ASID too many", set(0, probe.address_spaces), Err(Errno::INVAL))?;
    check("SET_GROUP_ASID, group at the number of queues", set(probe.queues, 0), Err(Errno::NOBUFS))
}

fn group_asid_range(ctx: &mut Ctx<'_>) -> Outcome {
    let probe = ctx.probe();
    if probe.groups >= probe.queues {
        let text = format!("no number between the {} groups and the {} queues", probe.groups, probe.queues);
        return Err(Stop::CannotRun(text));
    }
    let set = ctx.open_owned()?.set_vring(Request::SET_GROUP_ASID, probe.groups, 0);
    check("SET_GROUP_ASID, a group too many", set, Err(Errno::INVAL))
}

fn desc_group(ctx: &mut Ctx<'_>) -> Outcome {
    let group = ctx.open_owned()?.vring(Request::GET_VRING_DESC_GROUP, 0, 0);
    check("GET_VRING_DESC_GROUP", group, Err(Errno::OPNOTSUPP))
}

fn size(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let size = device.vring(Request::GET_VRING_SIZE, 0, 0);
    let plausible = match size {
        Ok(size) => size <= ctx.probe().ring_size.into(),
        Err(error) => error == Errno::OPNOTSUPP,
    };
    check(&format!("GET_VRING_SIZE {size:?} is a size or EOPNOTSUPP"), plausible, true)?;
    let beyond = device.vring(Request::GET_VRING_SIZE, ctx.probe().queues, 0);
    check("GET_VRING_SIZE beyond the queues", beyond, Err(Errno::NOBUFS))
}

fn fds(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let event = prepare("eventfd", EventFd::new())?;
    let (reader, _writer) = prepare("pipe", rustix::pipe::pipe().map_err(errno))?;
    for request in [Request::SET_VRING_KICK, Request::SET_VRING_CALL, Request::SET_VRING_ERR] {
        let name = request.name;
        check(&format!("{name} eventfd"), device.set_fd(request, 0, Some(event.as_fd())), Ok(()))?;
        check(&format!("{name} same eventfd"), device.set_fd(request, 0, Some(event.as_fd())), Ok(()))?;
        let pipe = device.set_fd(request, 0, Some(reader.as_fd()));
        check(&format!("{name} pipe"), pipe, Err(Errno::INVAL))?;
        for closed in [999_999, -2] {
            check(
                &format!("{name} fd {closed}"),
                device.set(request, &vring_file(0, closed)),
                Err(Errno::BADF),
            )?;
        }
        check(&format!("{name} fd -1"), device.set_fd(request, 0, None), Ok(()))?;
    }
    Ok(())
}

fn busyloop(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    check("SET", device.set_vring(Request::SET_VRING_BUSYLOOP_TIMEOUT, 0, 50), Ok(()))?;
    check("GET", device.vring(Request::GET_VRING_BUSYLOOP_TIMEOUT, 0, 0), Ok(50))?;
    let beyond = device.set(Request::SET_VRING_BUSYLOOP_TIMEOUT, &pair(ctx.probe().queues, 0));
    check("SET beyond the queues", beyond, Err(Errno::NOBUFS))
}

fn enable(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for num in [1, 1, 7, 0, 0] {
        let enabled = device.set_vring(Request::SET_VRING_ENABLE, 0, num);
        check(&format!("SET_VRING_ENABLE {num}"), enabled, Ok(()))?;
    }
    Ok(())
}
