//! Cases about the device file: open, close, and the other system calls except ioctl.

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::fs::{OFlags, SeekFrom};
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};
use vdpa_sys::mmap::{Prot, SharedMap};

use crate::case::{Case, Ctx, Need, Outcome, check, prepare};
use crate::device::{MESSAGE_SIZE, V2, encode, errno};
use crate::memory::Region;
use crate::request::Request;

pub(super) const CASES: &[Case] = &[
    Case {
        id: "file.open-twice",
        spec: "4.2, 9.4 vector 1",
        covers: &[Request::OPEN],
        needs: &[],
        run: open_twice,
    },
    Case {
        id: "file.open-modes",
        spec: "4.2",
        covers: &[Request::OPEN],
        needs: &[Need::DeviceFile],
        run: open_modes,
    },
    Case {
        id: "file.close-forgets",
        spec: "4.7, 9.4 vector 47",
        covers: &[Request::CLOSE, Request::SET_OWNER, Request::SET_BACKEND_FEATURES, Request::GET_STATUS],
        needs: &[],
        run: close_forgets,
    },
    Case {
        id: "file.reopen-at-once",
        spec: "4.7",
        covers: &[Request::CLOSE],
        needs: &[],
        run: reopen_at_once,
    },
    Case {
        id: "file.read",
        spec: "1.10, 9.4 vector 40",
        covers: &[Request::READ],
        needs: &[Need::DeviceFile],
        run: read,
    },
    Case {
        id: "file.read-write-only",
        spec: "1.10",
        covers: &[Request::READ],
        needs: &[Need::DeviceFile],
        run: read_write_only,
    },
    Case {
        id: "file.pwrite",
        spec: "1.10",
        covers: &[Request::IOTLB_BATCH_BEGIN],
        needs: &[Need::DeviceFile],
        run: pwrite,
    },
    Case {
        id: "file.lseek",
        spec: "1.10, 9.4 vector 40",
        covers: &[Request::LSEEK],
        needs: &[Need::DeviceFile],
        run: lseek,
    },
    Case {
        id: "file.poll",
        spec: "1.10, 9.4 vector 40",
        covers: &[Request::POLL],
        needs: &[Need::DeviceFile],
        run: poll_ready,
    },
    Case {
        id: "file.mmap",
        spec: "1.9, 9.4 vector 41",
        covers: &[Request::MMAP],
        needs: &[Need::DeviceFile],
        run: mmap,
    },
    Case {
        id: "file.mmap-write-only",
        spec: "1.9",
        covers: &[Request::MMAP],
        needs: &[Need::DeviceFile],
        run: mmap_write_only,
    },
    Case {
        id: "file.epoll",
        spec: "1.10, 9.4 vector 40",
        covers: &[Request::POLL],
        needs: &[Need::DeviceFile],
        run: epoll_add,
    },
];

fn open_twice(ctx: &mut Ctx<'_>) -> Outcome {
    let first = ctx.open()?;
    check("open while it is open", ctx.try_open().map(drop), Err(Errno::BUSY))?;
    check("GET_STATUS of the first", first.status(), Ok(0))
}

fn open_modes(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_as(OFlags::WRONLY)?;
    check("GET_STATUS, open for writing only", device.status(), Ok(0))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check(
        "message, open for writing only",
        device.message_of_type(0, iotlb_type::BATCH_BEGIN),
        Ok(MESSAGE_SIZE),
    )?;
    drop(device);
    let device = ctx.open_as(OFlags::RDONLY)?;
    check("GET_STATUS, open for reading only", device.status(), Ok(0))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check(
        "message, open for reading only",
        device.message_of_type(0, iotlb_type::BATCH_BEGIN),
        Err(Errno::BADF),
    )
}

fn close_forgets(ctx: &mut Ctx<'_>) -> Outcome {
    let region = Region::new(1)?;
    let device = ctx.open_owned()?;
    let asid = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(asid))?;
    check("UPDATE", device.map(0x1000, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(Status::ACKNOWLEDGE))?;
    drop(device);

    let device = ctx.open()?;
    check("GET_STATUS after another open", device.status(), Ok(0))?;
    check("SET_OWNER after another open", device.call(Request::SET_OWNER), Ok(()))?;
    check("INVALIDATE: no table any more", device.unmap(0x1000, 1), Err(Errno::FAULT))?;
    // Without IOTLB_ASID acknowledged, the device ignores the ASID in a message.
    let update = IotlbMsg {
        iova: 0x1000,
        size: region.size(),
        uaddr: region.uaddr(),
        perm: Perm::RW,
        kind: iotlb_type::UPDATE,
    };
    check(
        "UPDATE with a foreign ASID: it is not acknowledged",
        device.message(0xffff, update),
        Ok(MESSAGE_SIZE),
    )
}

fn reopen_at_once(ctx: &mut Ctx<'_>) -> Outcome {
    for round in 0..100 {
        check(&format!("open number {round}, right after close"), ctx.try_open().map(drop), Ok(()))?;
    }
    Ok(())
}

fn read(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let mut bytes = [0; MESSAGE_SIZE];
    check("read", rustix::io::read(device.file()?, &mut bytes).map_err(errno), Err(Errno::INVAL))
}

fn read_write_only(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_as(OFlags::WRONLY)?;
    let mut bytes = [0; MESSAGE_SIZE];
    check(
        "read, open for writing only",
        rustix::io::read(device.file()?, &mut bytes).map_err(errno),
        Err(Errno::BADF),
    )
}

fn pwrite(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let begin = IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() };
    let written = rustix::io::pwrite(device.file()?, &encode(V2, 0, &begin), 4096).map_err(errno);
    check("pwrite of a message at some offset", written, Ok(MESSAGE_SIZE))
}

fn lseek(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    check("lseek", rustix::fs::seek(device.file()?, SeekFrom::Start(0)).map_err(errno), Err(Errno::SPIPE))
}

fn poll_ready(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let mut fds = [PollFd::new(device.file()?, PollFlags::IN | PollFlags::OUT)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    check("poll", poll(&mut fds, Some(&at_once)).map_err(errno), Ok(1))?;
    let [fd] = fds;
    check("events of poll", fd.revents(), PollFlags::IN | PollFlags::OUT)
}

fn epoll_add(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let set = prepare("epoll_create1", epoll::create(epoll::CreateFlags::CLOEXEC).map_err(errno))?;
    let added =
        epoll::add(&set, device.file()?, epoll::EventData::new_u64(0), epoll::EventFlags::IN).map_err(errno);
    check("epoll_ctl(ADD)", added, Err(Errno::PERM))
}

fn mmap(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let write = Prot { read: false, write: true };
    for (what, len, prot, want) in [
        ("8192 bytes to write", 8192, write, Errno::INVAL),
        ("4096 bytes to read and write", 4096, Prot::RW, Errno::INVAL),
        ("4096 bytes to write", 4096, write, Errno::NOTSUPP),
    ] {
        let mapped = SharedMap::map(device.file()?, 0, len, prot, false).map(drop);
        check(&format!("mmap of {what}"), mapped, Err(want))?;
    }
    Ok(())
}

fn mmap_write_only(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_as(OFlags::WRONLY)?;
    for (what, prot) in [("write", Prot { read: false, write: true }), ("read and write", Prot::RW)] {
        let mapped = SharedMap::map(device.file()?, 0, 4096, prot, false).map(drop);
        check(&format!("mmap of 4096 bytes to {what}, open for writing only"), mapped, Err(Errno::ACCESS))?;
    }
    Ok(())
}
