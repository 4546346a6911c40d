//! VDUSE (uapi-spec 6.4): the interface of a program that implements a device of the kernel. The subject is the kernel; each case is the
//! program, and where it needs one also the client, which drives the device through the kernel's vhost-vdpa.

use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{Perm, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uapi::vduse::{DevConfig, VqConfig, feature, request};
use vdpa_sys::vduse::VduseDevice;

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::Device;
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::vduse::{Options, Program, RING, SPACE, config, control, new_name};

const QUEUE_READY: &[Need] = &[Need::VduseFeatures(feature::QUEUE_READY)];
const SUSPEND: &[Need] = &[Need::VduseFeatures(feature::SUSPEND)];
const GROUPS: &[Need] = &[Need::VduseVersion(1)];

macro_rules! case {
    ($id:literal, $spec:literal, $needs:expr, $run:expr) => {
        Case { id: $id, spec: $spec, covers: &[], needs: $needs, run: $run }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("vduse.version", "6.4.1", &[], version),
    case!("vduse.features", "6.4.1", QUEUE_READY, features),
    case!("vduse.create", "6.4.1", &[], create),
    case!("vduse.create-groups", "6.4.1", GROUPS, create_groups),
    case!("vduse.destroy", "6.4.1", &[], destroy),
    case!("vduse.open", "6.4.2", &[], open),
    case!("vduse.queue-setup", "6.4.2", &[], queue_setup),
    case!("vduse.queue-info", "6.4.2", &[], queue_info),
    case!("vduse.config-space", "6.4.2", &[], config_space),
    case!("vduse.mapping", "6.4.2", &[], mapping),
    case!("vduse.mapping-spaces", "6.4.2", GROUPS, mapping_spaces),
    case!("vduse.notifications", "6.4.2", &[], notifications),
    case!("vduse.answer", "6.4.3", &[], answer),
    case!("vduse.status", "6.4.3", &[], status),
    case!("vduse.queue-state", "6.4.3", &[], queue_state),
    case!("vduse.group-asid", "6.4.3", GROUPS, group_asid),
    case!("vduse.group-asid-first", "6.4.4", &[], group_asid_first),
    case!("vduse.queue-ready", "6.4.3", QUEUE_READY, queue_ready),
    case!("vduse.queue-ready-off", "6.4.3", &[], queue_ready_off),
    case!("vduse.suspend", "6.4.3", SUSPEND, suspend),
    case!("vduse.suspend-refused", "6.4.4", SUSPEND, suspend_refused),
    case!("vduse.suspend-off", "6.4.4", &[], suspend_off),
    case!("vduse.restart", "6.4.3", &[], restart),
    case!("vduse.timeout", "6.4.3", &[], timeout),
];

/// What the newest program of this kernel chooses.
fn newest(ctx: &Ctx<'_>) -> Options {
    let (version, features) = ctx.probe().vduse.unwrap_or_default();
    Options { version: version.min(1), features, ..Options::default() }
}

fn acknowledged() -> Status {
    Status::ACKNOWLEDGE | Status::DRIVER
}

/// Negotiates up to `DRIVER_OK`.
fn start(client: &Device) -> Outcome {
    let base = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
    prepare("VHOST_VDPA_SET_STATUS", client.set_status(acknowledged()))?;
    prepare("VHOST_SET_FEATURES", client.set_features(base))?;
    prepare("VHOST_VDPA_SET_STATUS", client.set_status(acknowledged() | Status::FEATURES_OK))?;
    let running = acknowledged() | Status::FEATURES_OK | Status::DRIVER_OK;
    prepare("VHOST_VDPA_SET_STATUS", client.set_status(running))
}

fn version(ctx: &mut Ctx<'_>) -> Outcome {
    let (newest, _) = ctx.probe().vduse.unwrap_or_default();
    let file = control(Options::FIRST)?;
    check("a version that does not exist", file.set_api_version(newest + 1), Err(Errno::INVAL))?;
    check("version 0", file.set_api_version(0), Ok(()))?;
    check("VDUSE_GET_API_VERSION after it", file.api_version(), Ok(0))?;
    check("a request that does not exist", file.unknown(), Err(Errno::INVAL))
}

fn features(ctx: &mut Ctx<'_>) -> Outcome {
    let (_, offered) = ctx.probe().vduse.unwrap_or_default();
    let file = control(Options::FIRST)?;
    check("a feature that does not exist", file.set_features(1 << 63), Err(Errno::INVAL))?;
    check("one that exists with one that does not", file.set_features(offered | 1 << 63), Err(Errno::INVAL))?;
    check("all", file.set_features(offered), Ok(()))?;
    check("VDUSE_GET_FEATURES is not changed by it", file.features(), Ok(offered))?;
    check("none", file.set_features(0), Ok(()))
}

/// Changes that make the configuration of a device one that the kernel refuses.
type Wrong = (&'static str, fn(&mut DevConfig));

fn refused(options: Options, wrong: &[Wrong]) -> Outcome {
    let file = control(options)?;
    for (what, change) in wrong {
        let name = new_name();
        let mut config = config(&name, options);
        change(&mut config);
        let created = file.create(config, &[0; SPACE]);
        if created.is_ok() {
            // It would be in the way of nobody, but for ever.
            let _ = file.destroy(&name);
        }
        check(what, created, Err(Errno::INVAL))?;
    }
    Ok(())
}

fn create(ctx: &mut Ctx<'_>) -> Outcome {
    const WRONG: &[Wrong] = &[
        ("reserved words", |config| config.reserved = [1; 11]),
        ("groups in version 0", |config| config.ngroups = 1),
        ("address spaces in version 0", |config| config.nas = 1),
        ("alignment 2", |config| config.vq_align = 2),
        ("alignment 24", |config| config.vq_align = 24),
        ("alignment 8192", |config| config.vq_align = 8192),
        ("65536 queues", |config| config.vq_num = 65536),
        ("no name", |config| config.name = [0; 256]),
        ("device id 3, a console", |config| config.device_id = 3),
        ("no ACCESS_PLATFORM", |config| config.features &= !(1 << 33)),
        ("CONFIG_WCE of a block device", |config| config.features |= 1 << 11),
    ];
    refused(Options::FIRST, WRONG)?;
    let program = Program::new(ctx.bus()?, Options::FIRST)?;
    let again = program.control().create(config(program.name(), Options::FIRST), &[0; SPACE]);
    check("a name that exists", again, Err(Errno::EXIST))?;
    let mut large = config(&new_name(), Options::FIRST);
    large.config_size = 4097;
    let large = program.control().create_raw(&large, &[0; SPACE]);
    check("4097 bytes of configuration space", large, Err(Errno::INVAL))
}

fn create_groups(_: &mut Ctx<'_>) -> Outcome {
    const WRONG: &[Wrong] = &[
        ("no group", |config| config.ngroups = 0),
        ("no address space", |config| config.nas = 0),
        ("65536 groups", |config| config.ngroups = 65536),
        ("65536 address spaces", |config| config.nas = 65536),
    ];
    refused(Options { features: 0, ..Options::default() }, WRONG)
}

fn destroy(ctx: &mut Ctx<'_>) -> Outcome {
    let file = control(Options::FIRST)?;
    check("a name that does not exist", file.destroy(&new_name()), Err(Errno::INVAL))?;
    let program = Program::new(ctx.bus()?, Options::FIRST)?;
    check("a device that is open", file.destroy(program.name()), Err(Errno::BUSY))
}

fn open(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::new(ctx.bus()?, Options::FIRST)?;
    let second = VduseDevice::open(program.name()).map(drop);
    check("a second open", second, Err(Errno::BUSY))?;
    check("a request that does not exist", program.device()?.unknown(), Err(Errno::NOTTY))?;
    check("read without a request", program.device()?.read().map(drop), Err(Errno::AGAIN))
}

fn queue_setup(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::new(ctx.bus()?, Options::FIRST)?;
    let device = program.device()?;
    let right = VqConfig { max_size: RING, ..VqConfig::default() };
    let setup = |what, queue: VqConfig, want| check(what, device.setup_queue(&queue), want);
    setup("an index that does not exist", VqConfig { index: 1, ..right }, Err(Errno::INVAL))?;
    setup("a reserved field", VqConfig { reserved1: 1, ..right }, Err(Errno::INVAL))?;
    setup("reserved fields", VqConfig { reserved2: [1; 10], ..right }, Err(Errno::INVAL))?;
    setup("a group in version 0", VqConfig { group: 1, ..right }, Err(Errno::INVAL))?;
    setup("again", right, Ok(()))?;
    let none = device.queue(1).map(drop);
    check("information of a queue that does not exist", none, Err(Errno::INVAL))?;
    check("interrupt of a queue that does not exist", device.interrupt(1), Err(Errno::INVAL))
}

fn queue_info(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    let client = program.open_owned()?;
    let addr = VringAddr { desc: 0x1000, avail: 0x2000, used: 0x3000, ..VringAddr::default() };
    prepare("VHOST_SET_VRING_NUM", client.set_vring(Request::SET_VRING_NUM, 0, 32))?;
    prepare("VHOST_SET_VRING_ADDR", client.set_addr(0, &addr))?;
    prepare("VHOST_SET_VRING_BASE", client.set_vring(Request::SET_VRING_BASE, 0, 7))?;
    let info = prepare("VDUSE_VQ_GET_INFO", program.device()?.queue(0))?;
    check("entries", info.num, 32)?;
    check("areas", (info.desc_addr, info.driver_addr, info.device_addr), (0x1000, 0x2000, 0x3000))?;
    check("position and ready", (info.state.first().copied(), info.ready), (Some(7), 0))?;
    prepare("VHOST_VDPA_SET_VRING_ENABLE", client.set_vring(Request::SET_VRING_ENABLE, 0, 1))?;
    let info = prepare("VDUSE_VQ_GET_INFO", program.device()?.queue(0))?;
    check("ready once it is enabled", info.ready, 1)
}

fn config_space(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    let device = program.device()?;
    let end = u32::try_from(SPACE).unwrap_or(0);
    check("no bytes", device.set_config(0, &[]), Err(Errno::INVAL))?;
    check("beyond the end", device.set_config(end - 1, &[1, 2]), Err(Errno::INVAL))?;
    check("within", device.set_config(0, &[1, 2, 3, 4, 5, 6, 7, 8]), Ok(()))?;
    let client = program.open_owned()?;
    check("what a client reads", client.config(0, 8), Ok(vec![1, 2, 3, 4, 5, 6, 7, 8]))?;
    check("interrupt before DRIVER_OK", device.config_interrupt(), Err(Errno::INVAL))?;
    let event = prepare("eventfd", EventFd::new())?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&event.as_fd()).to_ne_bytes();
    prepare("VHOST_VDPA_SET_CONFIG_CALL", client.set(Request::SET_CONFIG_CALL, &number))?;
    start(&client)?;
    check("interrupt", device.config_interrupt(), Ok(()))?;
    check("the client hears of it", event.wait(Some(Duration::from_secs(10))), true)
}

fn mapping(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options::FIRST)?;
    let client = program.open_owned()?;
    let device = program.device()?;
    let nothing = device.mapping(0, u64::MAX).map(drop);
    check("before anything is mapped", nothing, Err(Errno::INVAL))?;
    let region = Region::new(2)?;
    region.write(0, b"of the client")?;
    program.seen();
    prepare("UPDATE", client.map(0x10_0000, &region, Perm::RW))?;
    let told = program.wait_for(request::UPDATE_IOTLB)?;
    check("the range of UPDATE_IOTLB", told.words.first_chunk(), Some(&[0, 0, u32::MAX, u32::MAX]))?;
    let (entry, file) = prepare("VDUSE_IOTLB_GET_FD", device.mapping(0x10_1000, u64::MAX))?;
    let range = (entry.start, entry.last, entry.perm);
    check("the mapping as a whole", range, (0x10_0000, 0x10_0000 + 2 * PAGE - 1, 3))?;
    let mut bytes = [0; 13];
    let read = rustix::io::pread(&file, &mut bytes, entry.offset).unwrap_or(0);
    check("its file is the client's", (read, &bytes), (13, b"of the client"))?;
    let between = device.mapping(0, 0xf_ffff).map(drop);
    check("where nothing is mapped", between, Err(Errno::INVAL))?;
    check("a range of which the end is first", device.mapping(2, 1).map(drop), Err(Errno::INVAL))?;
    let second = device.mapping_in(0, 0, u64::MAX).map(drop);
    check("VDUSE_IOTLB_GET_FD2 in version 0", second, Err(Errno::NOTTY))
}

fn mapping_spaces(ctx: &mut Ctx<'_>) -> Outcome {
    let options = Options { queues: 2, groups: 2, ..newest(ctx) };
    let program = Program::attached(ctx.bus()?, options)?;
    let client = program.open_owned()?;
    let asid = BackendFeatures::of(&[BackendFeatures::IOTLB_MSG_V2, BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", client.set_backend(asid))?;
    let region = Region::new(1)?;
    let update = vdpa_core::types::IotlbMsg {
        iova: 0x5000,
        size: region.size(),
        uaddr: region.uaddr(),
        perm: Perm::RO,
        kind: vdpa_core::types::iotlb_type::UPDATE,
    };
    program.seen();
    prepare("UPDATE in address space 1", client.message(1, update))?;
    let told = program.wait_for(request::UPDATE_IOTLB)?;
    check("the address space of UPDATE_IOTLB", told.words.last(), Some(&1))?;
    let device = program.device()?;
    let (entry, _) = prepare("VDUSE_IOTLB_GET_FD2", device.mapping_in(1, 0, u64::MAX))?;
    check("range and rights", (entry.start, entry.last, entry.perm), (0x5000, 0x5000 + PAGE - 1, 1))?;
    check("address space 0", device.mapping_in(0, 0, u64::MAX).map(drop), Err(Errno::INVAL))?;
    check("one that does not exist", device.mapping_in(2, 0, u64::MAX).map(drop), Err(Errno::INVAL))
}

fn notifications(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    let device = program.device()?;
    let client = program.open_owned()?;
    let event = || prepare("eventfd", EventFd::new());
    let (kick, call, wanted) = (event()?, event()?, event()?);
    check("interrupt before DRIVER_OK", device.interrupt(0), Err(Errno::INVAL))?;
    prepare("VHOST_SET_VRING_KICK", client.set_fd(Request::SET_VRING_KICK, 0, Some(kick.as_fd())))?;
    prepare("VHOST_SET_VRING_CALL", client.set_fd(Request::SET_VRING_CALL, 0, Some(call.as_fd())))?;
    prepare("VHOST_VDPA_SET_VRING_ENABLE", client.set_vring(Request::SET_VRING_ENABLE, 0, 1))?;
    start(&client)?;
    check("interrupt", device.interrupt(0), Ok(()))?;
    check("the client hears of it", call.wait(Some(Duration::from_secs(10))), true)?;
    check("a file that is no eventfd", device.set_kick(0, Some(device.as_fd())), Err(Errno::INVAL))?;
    check("a queue that does not exist", device.set_kick(1, Some(wanted.as_fd())), Err(Errno::INVAL))?;
    // A notification that comes before there is an eventfd is remembered.
    kick.signal();
    thread::sleep(Duration::from_millis(200));
    check("VDUSE_VQ_SETUP_KICKFD", device.set_kick(0, Some(wanted.as_fd())), Ok(()))?;
    check("the notification of before", wanted.wait(Some(Duration::from_secs(10))), true)?;
    let _ = wanted.drain();
    kick.signal();
    check("the next one", wanted.wait(Some(Duration::from_secs(10))), true)
}

fn answer(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    let device = program.device()?;
    check("fewer bytes than an answer has", device.write(&[0; 151]), Err(Errno::INVAL))?;
    check("reserved words that are not 0", device.write(&[0xff; 152]), Err(Errno::INVAL))?;
    let unknown = [&[0xff, 0xff, 0xff, 0xff][..], &[0; 148]].concat();
    check("a number that is not open", device.write(&unknown), Err(Errno::NOENT))?;
    // The kernel goes on as before.
    let client = program.open_owned()?;
    check("a request after it", client.set_status(Status::ACKNOWLEDGE), Ok(()))
}

fn status(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    program.seen();
    let client = program.open_owned()?;
    let told = |message: &crate::vduse::Message| {
        (message.kind, message.words.first().copied().map(|word| word & 0xff))
    };
    let seen: Vec<_> = program.seen().iter().map(told).collect();
    check("open resets the device", seen, vec![(request::SET_STATUS, Some(0))])?;
    check("VHOST_VDPA_SET_STATUS", client.set_status(Status::ACKNOWLEDGE), Ok(()))?;
    let seen: Vec<_> = program.seen().iter().map(told).collect();
    check("what the program is told", seen, vec![(request::SET_STATUS, Some(1))])?;
    // A program that refuses leaves the status as it was, and the client reads that.
    program.refuse(request::SET_STATUS);
    let _ = client.set_status(acknowledged());
    check("the status after a refusal", client.status(), Ok(Status::ACKNOWLEDGE.0))?;
    program.answer_all();
    check("the next one", client.set_status(acknowledged()), Ok(()))?;
    check("its status", client.status(), Ok(acknowledged().0))?;
    program.seen();
    drop(client);
    let seen: Vec<_> = program.seen().iter().map(told).collect();
    check("close resets the device", seen, vec![(request::SET_STATUS, Some(0))])
}

fn queue_state(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    let client = program.open_owned()?;
    program.set_position(0x1234);
    program.seen();
    check("VHOST_GET_VRING_BASE", client.vring(Request::GET_VRING_BASE, 0, 0), Ok(0x1234))?;
    let told = program.wait_for(request::GET_VQ_STATE)?;
    check("the queue of GET_VQ_STATE", told.words.first().copied(), Some(0))?;
    program.refuse(request::GET_VQ_STATE);
    check("refused", client.vring(Request::GET_VRING_BASE, 0, 0), Err(Errno::IO))
}

fn group_asid(ctx: &mut Ctx<'_>) -> Outcome {
    let options = Options { queues: 2, groups: 2, ..newest(ctx) };
    let program = Program::attached(ctx.bus()?, options)?;
    let client = program.open_owned()?;
    check("groups", client.get(Request::GET_GROUP_NUM).map(u32::from_ne_bytes), Ok(2))?;
    check("address spaces", client.get(Request::GET_AS_NUM).map(u32::from_ne_bytes), Ok(2))?;
    check("the group of queue 1", client.vring(Request::GET_VRING_GROUP, 1, 0), Ok(1))?;
    program.seen();
    check("VHOST_VDPA_SET_GROUP_ASID", client.set_vring(Request::SET_GROUP_ASID, 1, 1), Ok(()))?;
    let told = program.wait_for(request::SET_VQ_GROUP_ASID)?;
    check("group and address space", told.words.first_chunk(), Some(&[1, 1]))?;
    program.refuse(request::SET_VQ_GROUP_ASID);
    check("refused", client.set_vring(Request::SET_GROUP_ASID, 1, 0), Err(Errno::IO))
}

fn group_asid_first(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options::FIRST)?;
    let client = program.open_owned()?;
    program.seen();
    let set = client.set_vring(Request::SET_GROUP_ASID, 0, 0);
    check("VHOST_VDPA_SET_GROUP_ASID of a program of version 0", set, Err(Errno::INVAL))?;
    check("what the program is told", program.seen(), Vec::new())
}

fn queue_ready(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options { features: feature::QUEUE_READY, ..newest(ctx) })?;
    let client = program.open_owned()?;
    for (value, what) in [(1, "enabled"), (0, "disabled")] {
        program.seen();
        check(what, client.set_vring(Request::SET_VRING_ENABLE, 0, value), Ok(()))?;
        let told = program.wait_for(request::SET_VQ_READY)?;
        check("queue and value", told.words.first_chunk(), Some(&[0, value]))?;
        let info = prepare("VDUSE_VQ_GET_INFO", program.device()?.queue(0))?;
        check("ready afterwards", u32::from(info.ready), value)?;
    }
    // The client cannot be told that it is refused, so the device ends.
    program.refuse(request::SET_VQ_READY);
    let _ = client.set_vring(Request::SET_VRING_ENABLE, 0, 1);
    check("a device that refused it", program.device()?.queue(0).map(drop), Err(Errno::PERM))
}

fn queue_ready_off(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options { features: 0, ..newest(ctx) })?;
    let client = program.open_owned()?;
    program.seen();
    check("enabled", client.set_vring(Request::SET_VRING_ENABLE, 0, 1), Ok(()))?;
    check("what the program is told", program.seen(), Vec::new())?;
    let info = prepare("VDUSE_VQ_GET_INFO", program.device()?.queue(0))?;
    check("ready", info.ready, 1)
}

fn suspend(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options { features: feature::SUSPEND, ..newest(ctx) })?;
    let client = program.open_owned()?;
    let offered = client.get(Request::GET_BACKEND_FEATURES).map(u64::from_ne_bytes);
    let offered = prepare("VHOST_GET_BACKEND_FEATURES", offered.map(BackendFeatures))?;
    check("SUSPEND is offered", offered.has(BackendFeatures::SUSPEND), true)?;
    check("RESUME is offered", offered.has(BackendFeatures::RESUME), false)?;
    let call = prepare("eventfd", EventFd::new())?;
    prepare("VHOST_SET_VRING_CALL", client.set_fd(Request::SET_VRING_CALL, 0, Some(call.as_fd())))?;
    prepare("VHOST_VDPA_SET_VRING_ENABLE", client.set_vring(Request::SET_VRING_ENABLE, 0, 1))?;
    start(&client)?;
    program.seen();
    check("VHOST_VDPA_SUSPEND", client.call(Request::SUSPEND), Ok(()))?;
    let kinds: Vec<_> = program.seen().iter().map(|message| message.kind).collect();
    check("what the program is told", kinds, vec![request::SUSPEND])?;
    let device = program.device()?;
    check("interrupt while suspended", device.interrupt(0), Err(Errno::INVAL))?;
    check("interrupt of configuration space", device.config_interrupt(), Err(Errno::INVAL))?;
    check("the client heard nothing", call.drain(), 0)?;
    // Only a reset ends it.
    prepare("reset", client.set_status(Status(0)))?;
    prepare("VHOST_SET_VRING_CALL", client.set_fd(Request::SET_VRING_CALL, 0, Some(call.as_fd())))?;
    prepare("VHOST_VDPA_SET_VRING_ENABLE", client.set_vring(Request::SET_VRING_ENABLE, 0, 1))?;
    start(&client)?;
    check("interrupt after a reset", device.interrupt(0), Ok(()))
}

fn suspend_refused(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options { features: feature::SUSPEND, ..newest(ctx) })?;
    let client = program.open_owned()?;
    start(&client)?;
    program.refuse(request::SUSPEND);
    check("VHOST_VDPA_SUSPEND", client.call(Request::SUSPEND), Err(Errno::IO))?;
    check("the device goes on", program.device()?.config_interrupt(), Ok(()))
}

fn suspend_off(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, Options { features: 0, ..newest(ctx) })?;
    let client = program.open_owned()?;
    let offered = client.get(Request::GET_BACKEND_FEATURES).map(u64::from_ne_bytes);
    let offered = prepare("VHOST_GET_BACKEND_FEATURES", offered.map(BackendFeatures))?;
    check("SUSPEND is offered", offered.has(BackendFeatures::SUSPEND), false)?;
    start(&client)?;
    check("VHOST_VDPA_SUSPEND", client.call(Request::SUSPEND), Err(Errno::OPNOTSUPP))
}

/// A request that a program had read and not answered is read again by the next one.
fn restart(ctx: &mut Ctx<'_>) -> Outcome {
    let mut program = Program::attached(ctx.bus()?, newest(ctx))?;
    let client = program.open_owned()?;
    program.seen();
    program.ignore(request::SET_STATUS);
    let waiting = thread::spawn(move || {
        let done = client.set_status(Status::ACKNOWLEDGE);
        (client, done)
    });
    let first = program.wait_for(request::SET_STATUS)?;
    program.seen();
    program.restart()?;
    let second = program.wait_for(request::SET_STATUS)?;
    let ended = waiting.join().map_err(|_| Stop::Failed("set-up: the client panicked".to_owned()))?;
    check("the same request", second, first)?;
    check("the client", ended.1, Ok(()))?;
    check("its status", ended.0.status(), Ok(Status::ACKNOWLEDGE.0))
}

/// A program that does not answer costs a client the time-out, and no more; its device is broken from then on.
fn timeout(ctx: &mut Ctx<'_>) -> Outcome {
    let program = Program::attached(ctx.bus()?, newest(ctx))?;
    let client = program.open_owned()?;
    program.set_timeout(1)?;
    program.ignore(request::GET_VQ_STATE);
    let got = client.vring(Request::GET_VRING_BASE, 0, 0);
    check("a request that is not answered", got, Err(Errno::IO))?;
    check("the device afterwards", program.device()?.queue(0).map(drop), Err(Errno::PERM))?;
    let got = client.vring(Request::GET_VRING_BASE, 0, 0);
    check("the next request", got, Err(Errno::IO))
}
