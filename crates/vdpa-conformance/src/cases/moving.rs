//! Cases about a device that moves to another host: its state is saved and loaded. Requests of this project.
//!
//! The structure has its own declaration here, as that of dirty tracking has.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::VringAddr;
use vdpa_sys::vhost_vdpa::RawArg;

use super::state::{DeviceState, open_in};
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::Device;
use crate::memory::{PAGE, Region};
use crate::request::Request;

/// Where nothing can be mapped.
const BAD: u64 = !0xfff;
/// Bytes of the first version of the argument.
const ARGUMENT: u32 = 24;
/// Longest state that a device reads.
const MAX: u64 = 1 << 20;
/// Pages of the buffer.
const PAGES: u64 = 16;

const NEEDS: &[Need] = &[
    Need::Backend(BackendFeatures::DEVICE_STATE),
    Need::Backend(BackendFeatures::SUSPEND),
    Need::DeviceFile,
];
const BOTH: [Request; 2] = [Request::STATE_SAVE, Request::STATE_LOAD];

macro_rules! cases {
    ($($name:literal, $run:ident;)+) => {
        pub(super) const CASES: &[Case] = &[$(Case {
            id: concat!("moving.", $name),
            spec: "8.9",
            covers: &BOTH,
            needs: NEEDS,
            run: $run,
        }),+];
    };
}

cases! {
    "owner", owner;
    "sizes-and-flags", sizes_and_flags;
    "bad-pointer", bad_pointer;
    "states", states;
    "save-and-load", save_and_load;
    "not-a-state", not_a_state;
}

fn argument(argsz: u32, flags: u32, size: u64, data: u64) -> Vec<u8> {
    let head = [argsz.to_ne_bytes(), flags.to_ne_bytes()].concat();
    [head, size.to_ne_bytes().to_vec(), data.to_ne_bytes().to_vec()].concat()
}

/// Makes a request with a buffer; the size after it.
fn request(device: &Device, request: Request, buffer: &Region, size: u64) -> (Result<(), Errno>, u64) {
    let mut bytes = argument(ARGUMENT, 0, size, buffer.uaddr());
    let result = device.request(request, RawArg::Bytes(&mut bytes));
    let (words, _) = bytes.as_chunks::<8>();
    (result, words.get(1).map_or(0, |word| u64::from_ne_bytes(*word)))
}

/// Saves into a buffer; the bytes of the state.
fn save(device: &Device, buffer: &Region) -> Result<u64, Stop> {
    let (result, size) = request(device, Request::STATE_SAVE, buffer, buffer.size());
    check("STATE_SAVE", result, Ok(()))?;
    check("bytes of a state", (1..=buffer.size()).contains(&size), true)?;
    Ok(size)
}

fn load(device: &Device, buffer: &Region, size: u64) -> Result<(), Errno> {
    request(device, Request::STATE_LOAD, buffer, size).0
}

fn owner(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, buffer) = (ctx.open()?, Region::new(PAGES)?);
    for call in BOTH {
        let what = format!("{} without an owner", call.name);
        check(&what, request(&device, call, &buffer, buffer.size()).0, Err(Errno::PERM))?;
        check(&what, device.bad_pointer(call), Err(Errno::PERM))?;
    }
    Ok(())
}

fn sizes_and_flags(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, buffer) = (ctx.open_owned()?, Region::new(PAGES)?);
    let size = save(&device, &buffer)?;
    let set = |call, argsz: u32, flags| {
        // As long as the size says, so that nothing but the size can be wrong.
        let mut bytes = argument(
            argsz,
            flags,
            if call == Request::STATE_LOAD { size } else { buffer.size() },
            buffer.uaddr(),
        );
        bytes.resize(bytes.len().max(usize::try_from(argsz).unwrap_or(0)), 0xa5);
        device.set(call, &bytes)
    };
    for call in BOTH {
        let what = |what: &str| format!("{}: {what}", call.name);
        for argsz in [0, 4, ARGUMENT - 1] {
            check(&what(&format!("argsz {argsz}")), set(call, argsz, 0), Err(Errno::INVAL))?;
        }
        for bit in 0..32 {
            check(&what(&format!("flag {bit}")), set(call, ARGUMENT, 1 << bit), Err(Errno::INVAL))?;
        }
        check(&what("argsz of a later version"), set(call, ARGUMENT + 64, 0), Ok(()))?;
    }
    let (small, needed) = request(&device, Request::STATE_SAVE, &buffer, size - 1);
    check("STATE_SAVE, a buffer too small, and what is needed", (small, needed), (Err(Errno::TOOBIG), size))?;
    let (none, needed) = request(&device, Request::STATE_SAVE, &buffer, 0);
    check("STATE_SAVE without a buffer", (none, needed), (Err(Errno::TOOBIG), size))?;
    check("STATE_LOAD of nothing", load(&device, &buffer, 0), Err(Errno::INVAL))?;
    check("STATE_LOAD of too much", load(&device, &buffer, MAX + 1), Err(Errno::TOOBIG))
}

fn bad_pointer(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for call in BOTH {
        let what = |what: &str| format!("{}: {what}", call.name);
        check(&what("bad pointer"), device.bad_pointer(call), Err(Errno::FAULT))?;
        let half = argument(ARGUMENT, 0, 0, 0).into_iter().take(8).collect::<Vec<_>>();
        check(&what("half in memory"), device.set(call, &half), Err(Errno::FAULT))?;
        let bad = argument(ARGUMENT, 0, PAGES * PAGE, BAD);
        check(&what("a buffer out of reach"), device.set(call, &bad), Err(Errno::FAULT))?;
    }
    Ok(())
}

/// A device that never ran can be saved in every state in which no queue runs; one that is not reset cannot be loaded.
fn states(ctx: &mut Ctx<'_>) -> Outcome {
    let buffer = Region::new(PAGES)?;
    for state in [DeviceState::FeaturesOk, DeviceState::Running, DeviceState::Suspended] {
        let device = open_in(ctx, state)?;
        let size = save(&device, &buffer)?;
        check(&format!("STATE_LOAD, {state:?}"), load(&device, &buffer, size), Err(Errno::BUSY))?;
    }
    let device = open_in(ctx, DeviceState::Negotiating)?;
    let size = save(&device, &buffer)?;
    check("STATE_LOAD of a device that was reset", load(&device, &buffer, size), Ok(()))?;
    check("GET_STATUS", device.status(), Ok(0))
}

fn save_and_load(ctx: &mut Ctx<'_>) -> Outcome {
    const BASE: u32 = 5;
    let features_ok = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    let (device, buffer, again) =
        (open_in(ctx, DeviceState::FeaturesOk)?, Region::new(PAGES)?, Region::new(PAGES)?);
    let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
    prepare("VHOST_SET_VRING_NUM", device.set_vring(Request::SET_VRING_NUM, 0, 8))?;
    prepare("VHOST_SET_VRING_ADDR", device.set_addr(0, &addr))?;
    prepare("VHOST_SET_VRING_BASE", device.set_vring(Request::SET_VRING_BASE, 0, BASE))?;
    let config = prepare("VHOST_VDPA_GET_CONFIG", device.config(0, 6))?;
    let size = save(&device, &buffer)?;
    check("GET_VRING_BASE after STATE_SAVE", device.vring(Request::GET_VRING_BASE, 0, 0), Ok(BASE))?;
    drop(device);
    let device = ctx.open_owned()?;
    check("STATE_LOAD", load(&device, &buffer, size), Ok(()))?;
    check("GET_STATUS", device.status(), Ok(features_ok.0))?;
    check("GET_VRING_BASE", device.vring(Request::GET_VRING_BASE, 0, 0), Ok(BASE))?;
    // Not the word that is set, which a device with vhost's log takes at any time.
    check("SET_FEATURES after FEATURES_OK", device.set_features(Features(0)), Err(Errno::BUSY))?;
    check("GET_CONFIG", device.config(0, 6), Ok(config))?;
    let same = save(&device, &again)?;
    check("bytes of a state that was loaded", same, size)?;
    // A network card asks its driver to announce itself where it has moved to, which is part of its state.
    let pages = if ctx.probe().device_id == 1 { 0 } else { PAGES };
    for page in 0..usize::try_from(pages).unwrap_or(0) {
        let at = page * 4096;
        check("a state that was loaded", again.read::<4096>(at)? == buffer.read::<4096>(at)?, true)?;
    }
    check("SET_STATUS driver_ok", device.set_status(features_ok | Status::DRIVER_OK), Ok(()))?;
    prepare("VHOST_VDPA_SUSPEND", device.call(Request::SUSPEND))?;
    check("GET_VRING_BASE", device.vring(Request::GET_VRING_BASE, 0, 0), Ok(BASE))
}

fn not_a_state(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, buffer) = (open_in(ctx, DeviceState::FeaturesOk)?, Region::new(PAGES)?);
    let size = save(&device, &buffer)?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::RESET))?;
    for cut in [1, 7, 8, size / 2, size - 1] {
        check(&format!("STATE_LOAD of {cut} bytes"), load(&device, &buffer, cut), Err(Errno::INVAL))?;
        check("GET_STATUS", device.status(), Ok(0))?;
    }
    for at in (0..usize::try_from(size).unwrap_or(0)).step_by(13) {
        let [byte] = buffer.read::<1>(at)?;
        buffer.write(at, &[byte ^ 0x40])?;
        check(&format!("STATE_LOAD, byte {at} differs"), load(&device, &buffer, size), Err(Errno::INVAL))?;
        buffer.write(at, &[byte])?;
    }
    check("STATE_LOAD with something behind it", load(&device, &buffer, size + 1), Err(Errno::INVAL))?;
    check("GET_STATUS", device.status(), Ok(0))?;
    check("STATE_LOAD", load(&device, &buffer, size), Ok(()))
}
