//! Cases about configuration space.

use vdpa_core::Errno;

use crate::case::{Case, Ctx, Outcome, check, prepare};
use crate::device::vring_file;
use crate::request::Request;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "config.range",
        spec: "1.5, 9.4 vector 17",
        covers: &[Request::GET_CONFIG, Request::SET_CONFIG, Request::GET_CONFIG_SIZE],
        needs: &[],
        run: range,
    },
    Case {
        id: "config.part",
        spec: "1.5, 9.4 vector 18",
        covers: &[Request::GET_CONFIG],
        needs: &[],
        run: part,
    },
    Case { id: "config.write", spec: "1.5", covers: &[Request::SET_CONFIG], needs: &[], run: write },
    Case {
        id: "config.call-without-owner",
        spec: "1.5, 9.4 vector 50",
        covers: &[Request::SET_CONFIG_CALL],
        needs: &[],
        run: call,
    },
];

fn range(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let size = ctx.probe().config_size;
    check("GET_CONFIG_SIZE", device.get(Request::GET_CONFIG_SIZE), Ok(size.to_ne_bytes()))?;
    for (offset, len) in [(size, 1), (size + 1, 1), (0, size + 1), (0, 0), (u32::MAX, 1), (1, size)] {
        let what = format!("GET_CONFIG offset {offset} length {len} of {size}");
        check(&what, device.config(offset, len), Err(Errno::INVAL))?;
    }
    for (offset, len) in [(size, 1_usize), (0, 0), (u32::MAX, 1)] {
        let what = format!("SET_CONFIG offset {offset} length {len} of {size}");
        check(&what, device.set_config(offset, &vec![0; len]), Err(Errno::INVAL))?;
    }
    Ok(())
}

fn part(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let size = ctx.probe().config_size;
    let whole = prepare("GET_CONFIG of everything", device.config(0, size))?;
    for (offset, len) in [(6, 2), (0, 1), (1, 3), (size.saturating_sub(1), 1)] {
        let (first, end) = (offset as usize, (offset + len) as usize);
        if let Some(want) = whole.get(first..end) {
            check(
                &format!("GET_CONFIG offset {offset} length {len}"),
                device.config(offset, len),
                Ok(want.to_vec()),
            )?;
        }
    }
    Ok(())
}

fn write(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let before = prepare("GET_CONFIG", device.config(0, 1))?;
    check("SET_CONFIG of what is there, without an owner", device.set_config(0, &before), Ok(()))
}

fn call(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let event = prepare("eventfd", vdpa_sys::eventfd::EventFd::new())?;
    let number = |fd: i32| fd.to_ne_bytes();
    check("SET_CONFIG_CALL with an eventfd, no owner", set_call(&device, &event), Ok(()))?;
    check("SET_CONFIG_CALL -1", device.set(Request::SET_CONFIG_CALL, &number(-1)), Ok(()))?;
    check(
        "SET_CONFIG_CALL with a closed fd",
        device.set(Request::SET_CONFIG_CALL, &number(999_999)),
        Err(Errno::BADF),
    )?;
    let (reader, _writer) = prepare("pipe", rustix::pipe::pipe().map_err(crate::device::errno))?;
    check("SET_CONFIG_CALL with a pipe", set_call(&device, &reader), Err(Errno::INVAL))
}

fn set_call(device: &crate::device::Device, fd: impl std::os::fd::AsFd) -> Result<(), Errno> {
    use std::os::fd::AsRawFd as _;
    let [.., a, b, c, d] = vring_file(0, fd.as_fd().as_raw_fd());
    device.set(Request::SET_CONFIG_CALL, &[a, b, c, d])
}
