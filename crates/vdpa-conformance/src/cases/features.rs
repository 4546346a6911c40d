//! Cases about device features, backend features and the numbers that the device reports about itself.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Bit, Features, Status};
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uapi::live;
use vdpa_sys::vhost_vdpa::RawArg;

use super::state::{DeviceState, open_in};
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::request::Request;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "features.offered",
        spec: "1.4, 1.9, 9.4 vector 11",
        covers: &[Request::GET_FEATURES],
        needs: &[],
        run: offered,
    },
    Case {
        id: "features.access-platform",
        spec: "6.1, 9.4 vector 12",
        covers: &[Request::SET_FEATURES],
        needs: &[Need::Feature(Features::ACCESS_PLATFORM)],
        run: access_platform,
    },
    Case {
        id: "features.unoffered-bit",
        spec: "6.1, 9.4 vector 13",
        covers: &[Request::SET_FEATURES],
        needs: &[],
        run: unoffered_bit,
    },
    Case {
        id: "features.fixed-after-features-ok",
        spec: "1.4, 9.4 vector 15",
        covers: &[Request::SET_FEATURES],
        needs: &[],
        run: fixed,
    },
    Case {
        id: "backend.offered",
        spec: "1.4, 8.6, 9.4 vector 3",
        covers: &[Request::GET_BACKEND_FEATURES],
        needs: &[],
        run: backend_offered,
    },
    Case {
        id: "backend.refused",
        spec: "1.4, 9.4 vector 4",
        covers: &[Request::SET_BACKEND_FEATURES],
        needs: &[Need::NoBackend(BackendFeatures::DESC_ASID)],
        run: backend_refused,
    },
    Case {
        id: "backend.unoffered-live",
        spec: "8.6",
        covers: &[Request::SET_BACKEND_FEATURES],
        needs: &[Need::NoBackend(BackendFeatures::IOTLB_REMAP)],
        run: backend_unoffered_remap,
    },
    Case {
        id: "backend.unoffered",
        spec: "1.4, 9.4 vector 4",
        covers: &[Request::SET_BACKEND_FEATURES],
        needs: &[],
        run: backend_unoffered,
    },
    Case {
        id: "backend.any-time",
        spec: "1.4, 9.4 vector 5",
        covers: &[Request::SET_BACKEND_FEATURES],
        needs: &[],
        run: backend_any_time,
    },
    Case {
        id: "identity.counts",
        spec: "1.4",
        covers: &[
            Request::GET_DEVICE_ID,
            Request::GET_VQS_COUNT,
            Request::GET_GROUP_NUM,
            Request::GET_AS_NUM,
            Request::GET_IOVA_RANGE,
        ],
        needs: &[],
        run: counts,
    },
    Case {
        id: "identity.vring-num-is-two-bytes",
        spec: "1.4, 9.4 vector 19",
        covers: &[Request::GET_VRING_NUM],
        needs: &[],
        run: vring_num,
    },
];

/// VIRTIO_F_NOTIFICATION_DATA: a kick carries data.
const NOTIFICATION_DATA: Bit = Bit(38);

fn offered(ctx: &mut Ctx<'_>) -> Outcome {
    let needed = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    let device = ctx.open()?;
    let offered = Features(u64::from_ne_bytes(prepare("GET_FEATURES", device.get(Request::GET_FEATURES))?));
    check("VERSION_1 and ACCESS_PLATFORM offered", offered & needed, needed)?;
    // An eventfd cannot carry the data, and DPDK ends if there is no doorbell page to which it can write the data.
    let write = Prot { read: false, write: true };
    let doorbell = device.file().is_ok_and(|file| SharedMap::map(file, 0, 4096, write, false).is_ok());
    let data = offered.has(NOTIFICATION_DATA);
    check("NOTIFICATION_DATA offered without doorbells", data && !doorbell, false)
}

fn access_platform(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("SET_FEATURES 0", device.set_features(Features::NONE), Err(Errno::INVAL))?;
    check("SET_FEATURES with ACCESS_PLATFORM", device.set_features(ctx.base_features()), Ok(()))
}

fn unoffered_bit(ctx: &mut Ctx<'_>) -> Outcome {
    let features = Features(ctx.base_features().0 | 1 << 63);
    check("SET_FEATURES with bit 63", ctx.open()?.set_features(features), Ok(()))
}

fn fixed(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let features = ctx.base_features();
    prepare("VHOST_SET_FEATURES", device.set_features(features))?;
    check("SET_FEATURES again before FEATURES_OK", device.set_features(features), Ok(()))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::FEATURES_OK))?;
    check("SET_FEATURES after FEATURES_OK", device.set_features(features), Err(Errno::BUSY))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::RESET))?;
    check("SET_FEATURES after a reset", device.set_features(features), Ok(()))
}

fn backend_offered(ctx: &mut Ctx<'_>) -> Outcome {
    let base = BackendFeatures::of(&[
        BackendFeatures::IOTLB_MSG_V2,
        BackendFeatures::IOTLB_BATCH,
        BackendFeatures::IOTLB_ASID,
    ]);
    let offered = ctx.probe().backend;
    check("MSG_V2, BATCH and ASID offered", offered & base, base)?;
    check("bit 0 offered (libblkio would acknowledge it)", offered.0 & 1, 0)?;
    let remap = offered.has(BackendFeatures::IOTLB_REMAP);
    check("IOTLB_REMAP without NEW_OWNER", remap && !offered.has(BackendFeatures::NEW_OWNER), false)?;
    let device = ctx.open()?;
    check(
        "GET_BACKEND_FEATURES again",
        device.get(Request::GET_BACKEND_FEATURES),
        Ok(offered.0.to_ne_bytes()),
    )
}

fn backend_refused(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    for (word, want) in [
        (0x1, Errno::OPNOTSUPP),
        (0x8000, Errno::OPNOTSUPP),
        (1 << 63, Errno::OPNOTSUPP),
        (0x80, Errno::INVAL),
        (0x88, Errno::OPNOTSUPP),
    ] {
        // Skips a bit that is configured for a feature of the live-update series.
        if live::configured().features_from_wire(word) != BackendFeatures(word) {
            continue;
        }
        check(
            &format!("SET_BACKEND_FEATURES {word:#x}"),
            device.set_backend(BackendFeatures(word)),
            Err(want),
        )?;
    }
    Ok(())
}

fn backend_unoffered(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let offered = ctx.probe().backend;
    for bit in [
        BackendFeatures::SUSPEND,
        BackendFeatures::RESUME,
        BackendFeatures::IOTLB_PERSIST,
        BackendFeatures::NEW_OWNER,
    ] {
        let want = if offered.has(bit) { Ok(()) } else { Err(Errno::OPNOTSUPP) };
        let word = BackendFeatures::of(&[bit]);
        check(&format!("SET_BACKEND_FEATURES {:#x}", word.0), device.set_backend(word), want)?;
    }
    let enable = BackendFeatures::of(&[BackendFeatures::ENABLE_AFTER_DRIVER_OK]);
    check("SET_BACKEND_FEATURES 0x40, which is never checked", device.set_backend(enable), Ok(()))
}

fn backend_unoffered_remap(ctx: &mut Ctx<'_>) -> Outcome {
    let remap = BackendFeatures::of(&[BackendFeatures::IOTLB_REMAP]);
    check("SET_BACKEND_FEATURES IOTLB_REMAP", ctx.open()?.set_backend(remap), Err(Errno::OPNOTSUPP))
}

fn backend_any_time(ctx: &mut Ctx<'_>) -> Outcome {
    let offered = ctx.probe().backend;
    check("SET_BACKEND_FEATURES, all offered, without an owner", ctx.open()?.set_backend(offered), Ok(()))?;
    let device = open_in(ctx, DeviceState::Running)?;
    check("SET_BACKEND_FEATURES, all offered, while running", device.set_backend(offered), Ok(()))?;
    check("SET_BACKEND_FEATURES 0 while running", device.set_backend(BackendFeatures::NONE), Ok(()))
}

fn counts(ctx: &mut Ctx<'_>) -> Outcome {
    let probe = ctx.probe();
    let device = ctx.open()?;
    check("GET_DEVICE_ID", device.get(Request::GET_DEVICE_ID), Ok(probe.device_id.to_ne_bytes()))?;
    check(
        "at least one queue, group and address space",
        [probe.queues, probe.groups, probe.address_spaces].contains(&0),
        false,
    )?;
    check("GET_VQS_COUNT", device.get(Request::GET_VQS_COUNT), Ok(probe.queues.to_ne_bytes()))?;
    check("GET_GROUP_NUM", device.get(Request::GET_GROUP_NUM), Ok(probe.groups.to_ne_bytes()))?;
    check("GET_AS_NUM", device.get(Request::GET_AS_NUM), Ok(probe.address_spaces.to_ne_bytes()))?;
    let range: [u8; 16] = prepare("GET_IOVA_RANGE", device.get(Request::GET_IOVA_RANGE))?;
    let [first, last] = words(range)?;
    check("the first usable address is not beyond the last", first <= last, true)
}

fn words(bytes: [u8; 16]) -> Result<[u64; 2], Stop> {
    let mut words =
        bytes.chunks_exact(8).filter_map(|chunk| Some(u64::from_ne_bytes(chunk.try_into().ok()?)));
    match (words.next(), words.next()) {
        (Some(first), Some(last)) => Ok([first, last]),
        _ => Err(Stop::Failed("a range is 16 bytes".to_owned())),
    }
}

fn vring_num(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let mut bytes = [0xff; 4];
    prepare("GET_VRING_NUM", device.request(Request::GET_VRING_NUM, RawArg::Bytes(&mut bytes)))?;
    let [low, high] = ctx.probe().ring_size.to_ne_bytes();
    check("GET_VRING_NUM into 0xffffffff", bytes, [low, high, 0xff, 0xff])
}
