//! Cases about ownership: which process is the owner, and which requests only the owner may make.

use vdpa_core::Errno;
use vdpa_core::features::Status;
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use super::owned;
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::child::Child;
use crate::device::{Device, MESSAGE_SIZE, V2, encode, pair};
use crate::forked::{Forked, vfork_set};
use crate::memory::Region;
use crate::request::Request;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "owner.set-twice",
        spec: "1.6a, 9.4 vector 8",
        covers: &[Request::SET_OWNER],
        needs: &[],
        run: set_twice,
    },
    Case {
        id: "owner.reset-owner",
        spec: "1.1, 9.4 vector 7",
        covers: &[Request::RESET_OWNER],
        needs: &[Need::DeviceFile],
        run: reset_owner,
    },
    Case { id: "owner.needed", spec: "1.3, 4.3, 9.4 vector 6", covers: owned::ALL, needs: &[], run: needed },
    Case {
        id: "owner.not-needed",
        spec: "1.3, 4.3",
        covers: &[
            Request::GET_FEATURES,
            Request::SET_FEATURES,
            Request::GET_STATUS,
            Request::SET_STATUS,
            Request::SUSPEND,
            Request::RESUME,
        ],
        needs: &[],
        run: not_needed,
    },
    Case {
        id: "owner.child-vring-and-iotlb",
        spec: "0.1, 9.4 vector 48",
        covers: &[Request::SET_VRING_NUM, Request::IOTLB_UPDATE, Request::SET_OWNER],
        needs: &[Need::Child],
        run: child_refused,
    },
    Case {
        id: "owner.child-status",
        spec: "4.3, 9.4 vectors 49 and 50",
        covers: &[Request::SET_STATUS, Request::SET_CONFIG_CALL],
        needs: &[Need::Child],
        run: child_allowed,
    },
    Case {
        id: "owner.fork-vring-and-iotlb",
        spec: "0.1, 9.4 vector 48",
        covers: &[Request::SET_VRING_NUM, Request::IOTLB_BATCH_BEGIN, Request::SET_OWNER],
        needs: &[],
        run: fork_refused,
    },
    Case {
        id: "owner.fork-status",
        spec: "4.3, 9.4 vectors 49 and 50",
        covers: &[Request::SET_STATUS, Request::SET_CONFIG_CALL],
        needs: &[],
        run: fork_allowed,
    },
    Case {
        id: "owner.fork-becomes-owner",
        spec: "0.1, 4.7",
        covers: &[Request::SET_OWNER],
        needs: &[],
        run: fork_owns,
    },
    Case {
        id: "owner.vfork",
        spec: "0.1",
        covers: &[Request::SET_OWNER, Request::SET_VRING_NUM],
        needs: &[Need::DeviceFile],
        run: vfork,
    },
    Case {
        id: "owner.gone-is-still-owner",
        spec: "4.7",
        covers: &[Request::SET_OWNER, Request::CLOSE],
        needs: &[Need::Child],
        run: gone,
    },
    Case { id: "owner.thread", spec: "0.1", covers: &[Request::SET_VRING_NUM], needs: &[], run: thread },
    Case {
        id: "owner.mem-table",
        spec: "1.6a",
        covers: &[Request::SET_MEM_TABLE],
        needs: &[Need::DeviceFile],
        run: mem_table,
    },
    Case {
        id: "owner.fork-from-owner",
        spec: "1.6a",
        covers: &[Request::SET_FORK_FROM_OWNER, Request::GET_FORK_FROM_OWNER],
        needs: &[],
        run: fork_from_owner,
    },
];

/// A second process that has the device open: another program, or a forked child.
trait SecondProcess {
    fn call(&mut self, request: Request) -> Result<Result<(), Errno>, Stop>;
    fn set(&mut self, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop>;
    fn write(&mut self, bytes: &[u8]) -> Result<Result<usize, Errno>, Stop>;
}

impl SecondProcess for Child {
    fn call(&mut self, request: Request) -> Result<Result<(), Errno>, Stop> {
        Self::call(self, request)
    }

    fn set(&mut self, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
        Self::set(self, request, bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Result<usize, Errno>, Stop> {
        Self::write(self, bytes)
    }
}

impl SecondProcess for Forked {
    fn call(&mut self, request: Request) -> Result<Result<(), Errno>, Stop> {
        Self::call(self, request)
    }

    fn set(&mut self, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
        Self::set(self, request, bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Result<usize, Errno>, Stop> {
        Self::write(self, bytes)
    }
}

fn set_twice(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("SET_OWNER", device.call(Request::SET_OWNER), Ok(()))?;
    check("SET_OWNER again", device.call(Request::SET_OWNER), Err(Errno::BUSY))
}

fn reset_owner(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("RESET_OWNER(0) without an owner", device.call(Request::RESET_OWNER), Err(Errno::PERM))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check("RESET_OWNER(0) as owner", device.call(Request::RESET_OWNER), Err(Errno::FAULT))?;
    check("RESET_OWNER of a word 0", device.set(Request::RESET_OWNER, &pair(0, 0)), Err(Errno::NOTTY))?;
    let beyond = pair(ctx.probe().queues, 0);
    check(
        "RESET_OWNER of a word beyond the queues",
        device.set(Request::RESET_OWNER, &beyond),
        Err(Errno::NOBUFS),
    )
}

fn needed(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let refused = Err(Errno::PERM);
    for &request in owned::VRING {
        check(request.name, owned::vring(&device, request, 0, true), refused)?;
    }
    check("VHOST_SET_MEM_TABLE", device.set(Request::SET_MEM_TABLE, &pair(0, 0)), refused)?;
    let region = Region::new(1)?;
    check("UPDATE", device.map(0x1000, &region, Perm::RW), Err(Errno::FAULT))?;
    check("BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_BEGIN), Err(Errno::FAULT))
}

fn not_needed(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("GET_FEATURES", device.get(Request::GET_FEATURES), Ok(ctx.probe().features.0.to_ne_bytes()))?;
    check("SET_FEATURES", device.set_features(ctx.base_features()), Ok(()))?;
    check("SET_STATUS", device.set_status(Status::ACKNOWLEDGE), Ok(()))?;
    check("SUSPEND", device.call(Request::SUSPEND), Ok(()))?;
    check("RESUME", device.call(Request::RESUME), Ok(()))?;
    check("SET_STATUS 0", device.set_status(Status::RESET), Ok(()))
}

fn child_refused(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let child = ctx.child(&device)?;
    refused(&device, child)
}

fn fork_refused(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let child = ctx.fork(&device)?;
    refused(&device, child)
}

/// Checks that requests of the owner are refused if a second process makes them while this process is the owner.
fn refused(device: &Device, mut child: impl SecondProcess) -> Outcome {
    check("SET_VRING_NUM", child.set(Request::SET_VRING_NUM, &pair(0, 1))?, Err(Errno::PERM))?;
    check("SET_OWNER", child.call(Request::SET_OWNER)?, Err(Errno::BUSY))?;
    let begin = IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() };
    check("BATCH_BEGIN", child.write(&encode(V2, 0, &begin))?, Err(Errno::FAULT))?;
    check("BATCH_BEGIN by the owner", device.message_of_type(0, iotlb_type::BATCH_BEGIN), Ok(MESSAGE_SIZE))
}

fn child_allowed(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let child = ctx.child(&device)?;
    allowed(&device, child)
}

fn fork_allowed(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let child = ctx.fork(&device)?;
    allowed(&device, child)
}

/// Checks that requests without ownership succeed if a second process makes them while this process is the owner.
fn allowed(device: &Device, mut child: impl SecondProcess) -> Outcome {
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::ACKNOWLEDGE))?;
    check("SET_STATUS 0", child.set(Request::SET_STATUS, &[0])?, Ok(()))?;
    check("GET_STATUS afterwards", device.status(), Ok(0))?;
    check("SET_CONFIG_CALL -1", child.set(Request::SET_CONFIG_CALL, &(-1_i32).to_ne_bytes())?, Ok(()))
}

fn fork_owns(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let child = ctx.fork(&device)?;
    check("SET_OWNER by a forked child", child.call(Request::SET_OWNER)?, Ok(()))?;
    let size = u32::from(ctx.probe().ring_size);
    let num = |index| pair(index, size);
    check("SET_VRING_NUM by that child", child.set(Request::SET_VRING_NUM, &num(0))?, Ok(()))?;
    let parent = || device.set(Request::SET_VRING_NUM, &num(0));
    check("SET_VRING_NUM by its parent", parent(), Err(Errno::PERM))?;
    drop(child);
    check("SET_VRING_NUM by the parent of an owner that ended", parent(), Err(Errno::PERM))
}

fn vfork(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let num = pair(0, ctx.probe().ring_size.into());
    let by_child = || vfork_set(&device, Request::SET_VRING_NUM, &num);
    check("SET_VRING_NUM by a vforked child, no owner", by_child()?, Err(Errno::PERM))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check("SET_VRING_NUM by a vforked child of the owner", by_child()?, Ok(()))?;
    check("SET_VRING_NUM by the owner", device.set(Request::SET_VRING_NUM, &num), Ok(()))
}

fn gone(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let mut child = ctx.child(&device)?;
    check("SET_OWNER", child.call(Request::SET_OWNER)?, Ok(()))?;
    drop(child);
    check("SET_OWNER after the owner ended", device.call(Request::SET_OWNER), Err(Errno::BUSY))?;
    let num = device.set_vring(Request::SET_VRING_NUM, 0, 1);
    check("SET_VRING_NUM after the owner ended", num, Err(Errno::PERM))?;
    check("SET_STATUS after the owner ended", device.set_status(Status::RESET), Ok(()))?;
    drop(device);
    check("SET_OWNER after another open", ctx.open()?.call(Request::SET_OWNER), Ok(()))
}

fn thread(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let size = u32::from(ctx.probe().ring_size);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| device.set_vring(Request::SET_VRING_NUM, 0, size)).join().unwrap_or(Err(Errno::IO))
    });
    check("SET_VRING_NUM by another thread of the owner", result, Ok(()))?;
    // A duplicate of the descriptor is the same open file.
    let copy = device.duplicate()?;
    drop(device);
    check("SET_VRING_NUM by a duplicate", copy.set_vring(Request::SET_VRING_NUM, 0, size), Ok(()))
}

fn mem_table(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let memory = Region::new(1)?;
    let table = |regions: u32, padding: u32, size: u64| {
        let mut bytes = pair(regions, padding).to_vec();
        for region in 0..u64::from(regions) {
            for word in [(region + 1) << 20, size, memory.uaddr(), 0] {
                bytes.extend_from_slice(&word.to_ne_bytes());
            }
        }
        device.set(Request::SET_MEM_TABLE, &bytes)
    };
    check("SET_MEM_TABLE, no regions", table(0, 0, 0), Ok(()))?;
    check("SET_MEM_TABLE, 64 regions", table(64, 0, 4096), Ok(()))?;
    check("SET_MEM_TABLE, 65 regions", table(65, 0, 4096), Err(Errno::TOOBIG))?;
    check("SET_MEM_TABLE, padding set", table(65, 1, 4096), Err(Errno::OPNOTSUPP))?;
    check("SET_MEM_TABLE, region of size 0", table(1, 0, 0), Err(Errno::FAULT))
}

fn fork_from_owner(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("GET_FORK_FROM_OWNER at open", device.get(Request::GET_FORK_FROM_OWNER), Ok([1]))?;
    check("SET_FORK_FROM_OWNER 2", device.set(Request::SET_FORK_FROM_OWNER, &[2]), Err(Errno::INVAL))?;
    check("SET_FORK_FROM_OWNER 0", device.set(Request::SET_FORK_FROM_OWNER, &[0]), Ok(()))?;
    check("GET_FORK_FROM_OWNER", device.get(Request::GET_FORK_FROM_OWNER), Ok([0]))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check(
        "SET_FORK_FROM_OWNER with an owner",
        device.set(Request::SET_FORK_FROM_OWNER, &[1]),
        Err(Errno::BUSY),
    )
}
