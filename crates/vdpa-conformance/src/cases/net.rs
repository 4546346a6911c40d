//! Cases about a network device with three queues in two groups, and two address spaces. This is the profile of the kernel's
//! network simulator, for which the test vectors of uapi-spec 9.4 give exact values.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::case::{Case, Ctx, Need, Outcome, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::memory::{PAGE, Region};
use crate::request::Request;

/// The needs that describe such a device.
pub(super) const PROFILE: [Need; 4] =
    [Need::DeviceId(1), Need::Queues(3), Need::Groups(2), Need::AddressSpaces(2)];
/// ANY_LAYOUT, VERSION_1, ACCESS_PLATFORM, MTU, MAC, STATUS, CTRL_VQ, CTRL_MAC_ADDR.
const FEATURES: u64 = 0x3_0883_0028;
/// Backend features that the simulator offers, apart from those of the live-update series.
const BACKEND: u64 = 0x17e;
/// Bytes of `struct virtio_net_config`.
const CONFIG: u32 = 24;

/// The exact values are those of the simulator, which has no checksum offload: every card for packets of others has.
pub(super) const SIMULATOR: Need = Need::NoFeature(Features::NET_CSUM);
/// With several pairs there are more queues, and that for commands is another one.
const ONE_PAIR: Need = Need::NoFeature(Features::NET_MQ);

macro_rules! case {
    ($id:literal, $spec:literal, [$($request:ident),+], $run:expr $(, $need:expr)?) => {
        Case {
            id: $id,
            spec: $spec,
            covers: &[$(Request::$request),+],
            needs: &[PROFILE[0], PROFILE[1], PROFILE[2], PROFILE[3], $($need)?],
            run: $run,
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("net.features", "6.2, 9.4 vectors 11 and 12", [GET_FEATURES, SET_FEATURES], features, SIMULATOR),
    case!(
        "net.backend-features",
        "1.4, 9.4 vectors 3 to 5",
        [GET_BACKEND_FEATURES, SET_BACKEND_FEATURES],
        backend,
        SIMULATOR
    ),
    case!("net.config", "6.2, 9.4 vectors 17 and 18", [GET_CONFIG, GET_CONFIG_SIZE], config, SIMULATOR),
    case!("net.config-write", "6.2", [SET_CONFIG], config_write, SIMULATOR),
    case!(
        "net.vring-num",
        "6.1, 9.4 vectors 19 and 20",
        [GET_VRING_NUM, SET_VRING_NUM],
        vring_num,
        SIMULATOR
    ),
    case!("net.groups", "6.2, 9.4 vector 23", [GET_VRING_GROUP], groups, ONE_PAIR),
    case!("net.group-asid", "1.6, 9.4 vector 24", [SET_GROUP_ASID], group_asid, ONE_PAIR),
    case!("net.address-spaces", "2.7", [IOTLB_UPDATE, IOTLB_INVALIDATE], address_spaces),
    case!("net.asid", "2.3, 9.4 vector 34", [IOTLB_UPDATE], asid),
    case!(
        "net.batch-asid",
        "2.6, 9.4 vector 35",
        [IOTLB_BATCH_BEGIN, IOTLB_BATCH_END, IOTLB_UPDATE],
        batch_asid
    ),
];

fn features(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("GET_FEATURES", device.get(Request::GET_FEATURES).map(u64::from_ne_bytes), Ok(FEATURES))?;
    check("SET_FEATURES 0", device.set_features(Features::NONE), Err(Errno::INVAL))?;
    check("SET_FEATURES of all", device.set_features(Features(FEATURES)), Ok(()))
}

fn backend(ctx: &mut Ctx<'_>) -> Outcome {
    let live = BackendFeatures::of(&[
        BackendFeatures::NEW_OWNER,
        BackendFeatures::IOTLB_REMAP,
        BackendFeatures::DIRTY_LOG,
        BackendFeatures::DEVICE_STATE,
    ]);
    let device = ctx.open()?;
    let offered = device.get(Request::GET_BACKEND_FEATURES).map(u64::from_ne_bytes);
    check(
        "GET_BACKEND_FEATURES, bits that the kernel does not have left out",
        offered.map(|word| word & !live.0),
        Ok(BACKEND),
    )?;
    for when in ["without an owner", "as owner"] {
        let set = device.set_backend(BackendFeatures(BACKEND));
        check(&format!("SET_BACKEND_FEATURES {BACKEND:#x} {when}"), set, Ok(()))?;
        if when == "without an owner" {
            prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
        }
    }
    Ok(())
}

fn config(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("GET_CONFIG_SIZE", device.get(Request::GET_CONFIG_SIZE).map(u32::from_ne_bytes), Ok(CONFIG))?;
    for (offset, len) in [(24, 1), (25, 1), (0, 25), (0, 0)] {
        check(
            &format!("GET_CONFIG offset {offset} length {len}"),
            device.config(offset, len),
            Err(Errno::INVAL),
        )?;
    }
    check("GET_CONFIG offset 6 length 2: the link is up", device.config(6, 2), Ok(vec![1, 0]))
}

fn config_write(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let mac = prepare("GET_CONFIG", device.config(0, 6))?;
    let other = vec![0x52, 0x54, 0, 0x12, 0x34, 0x56];
    check("SET_CONFIG of the address, without an owner", device.set_config(0, &other), Ok(()))?;
    check("GET_CONFIG", device.config(0, 6), Ok(other))?;
    check("SET_CONFIG of the link", device.set_config(6, &[0, 0]), Ok(()))?;
    check("GET_CONFIG: the link is up on every read", device.config(6, 2), Ok(vec![1, 0]))?;
    prepare("SET_CONFIG of what was there", device.set_config(0, &mac))
}

fn vring_num(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    check("GET_VRING_NUM", device.get(Request::GET_VRING_NUM).map(u16::from_ne_bytes), Ok(256))?;
    for queue in 0..3 {
        for (num, want) in [(0, Err(Errno::INVAL)), (3, Err(Errno::INVAL)), (256, Ok(()))] {
            let set = device.set_vring(Request::SET_VRING_NUM, queue, num);
            check(&format!("SET_VRING_NUM {num} of queue {queue}"), set, want)?;
        }
    }
    check("SET_VRING_NUM of queue 3", device.set_vring(Request::SET_VRING_NUM, 3, 256), Err(Errno::NOBUFS))
}

fn groups(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for (queue, want) in [(0, Ok(0)), (1, Ok(0)), (2, Ok(1)), (3, Err(Errno::NOBUFS))] {
        let group = device.vring(Request::GET_VRING_GROUP, queue, u32::MAX);
        check(&format!("GET_VRING_GROUP {queue}"), group, want)?;
    }
    Ok(())
}

fn group_asid(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for (group, asid, want) in [
        (2, 0, Err(Errno::INVAL)),
        (3, 0, Err(Errno::NOBUFS)),
        (0, 2, Err(Errno::INVAL)),
        (1, 1, Ok(())),
        (0, 1, Ok(())),
        (0, 0, Ok(())),
    ] {
        let set = device.set_vring(Request::SET_GROUP_ASID, group, asid);
        check(&format!("SET_GROUP_ASID group {group} to {asid}"), set, want)?;
    }
    Ok(())
}

/// Opens the device, becomes its owner and acknowledges IOTLB_ASID, so that the device uses the ASID of messages.
fn with_asid(ctx: &Ctx<'_>) -> Result<Device, crate::case::Stop> {
    let device = ctx.open_owned()?;
    let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    Ok(device)
}

fn update(region: &Region) -> IotlbMsg {
    IotlbMsg { iova: 0x1000, size: PAGE, uaddr: region.uaddr(), perm: Perm::RW, kind: iotlb_type::UPDATE }
}

fn address_spaces(ctx: &mut Ctx<'_>) -> Outcome {
    let device = with_asid(ctx)?;
    let region = Region::new(1)?;
    let everything = IotlbMsg { kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
    check("UPDATE of 0", device.message(0, update(&region)), Ok(MESSAGE_SIZE))?;
    check("INVALIDATE of 1, which has no table", device.message(1, everything), Err(Errno::FAULT))?;
    check("the same UPDATE of 1", device.message(1, update(&region)), Ok(MESSAGE_SIZE))?;
    check("again", device.message(1, update(&region)), Err(Errno::FAULT))?;
    check("INVALIDATE of everything in 1", device.message(1, everything), Ok(MESSAGE_SIZE))?;
    check("UPDATE of 0: still mapped", device.message(0, update(&region)), Err(Errno::FAULT))?;
    check("UPDATE of 1: free", device.message(1, update(&region)), Ok(MESSAGE_SIZE))
}

fn asid(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    check("UPDATE of 2, not acknowledged", device.message(2, update(&region)), Ok(MESSAGE_SIZE))?;
    check("UPDATE of 0: it went there", device.message(0, update(&region)), Err(Errno::FAULT))?;
    let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    check("UPDATE of 2, acknowledged", device.message(2, update(&region)), Err(Errno::FAULT))?;
    check("UPDATE of 1", device.message(1, update(&region)), Ok(MESSAGE_SIZE))
}

fn batch_asid(ctx: &mut Ctx<'_>) -> Outcome {
    let device = with_asid(ctx)?;
    let region = Region::new(1)?;
    check("BATCH_BEGIN of 0", device.message_of_type(0, iotlb_type::BATCH_BEGIN), Ok(MESSAGE_SIZE))?;
    check("UPDATE of 1", device.message(1, update(&region)), Err(Errno::FAULT))?;
    check("BATCH_BEGIN of 1", device.message_of_type(1, iotlb_type::BATCH_BEGIN), Err(Errno::FAULT))?;
    check("BATCH_END of 1", device.message_of_type(1, iotlb_type::BATCH_END), Err(Errno::FAULT))?;
    check("BATCH_END of 0", device.message_of_type(0, iotlb_type::BATCH_END), Ok(MESSAGE_SIZE))?;
    check("UPDATE of 1 afterwards", device.message(1, update(&region)), Ok(MESSAGE_SIZE))
}
