//! [`Forked`]: a forked child of the suite without an exec, in which the suite's virtual addresses are valid.

use vdpa_core::Errno;
use vdpa_sys::fork;
use vdpa_sys::vhost_vdpa::RawArg;

use crate::case::Stop;
use crate::device::Device;
use crate::inprocess::LocalFile;
use crate::request::Request;

/// A forked child that has the device open too. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Forked {
    child: fork::Forked,
    /// For a device in the suite's process: the device, with the child as caller. The suite makes the child's requests.
    local: Option<LocalFile>,
}

impl Forked {
    pub(crate) fn start(device: &Device) -> Result<Self, Stop> {
        let child = fork::Forked::start(device.file().ok()).map_err(|errno| failed("fork", errno))?;
        let local = device.local().map(|local| local.for_process(child.pid().cast_unsigned()));
        Ok(Self { child, local })
    }

    /// Sets the child's RLIMIT_MEMLOCK.
    pub(crate) fn limit_memlock(&self, bytes: u64) -> Result<(), Stop> {
        vdpa_sys::rlimit::set_memlock_of(self.child.pid(), bytes)
            .map_err(|errno| failed("RLIMIT_MEMLOCK", errno))
    }

    /// Has the child make a request without an argument.
    pub(crate) fn call(&self, request: Request) -> Result<Result<(), Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.request(request, RawArg::Null));
        }
        let answer = self.child.call(request.wire_number().unwrap_or(0));
        answer.map(|result| result.map(drop)).map_err(|errno| failed(request.name, errno))
    }

    /// Has the child make a request whose argument is `bytes`.
    pub(crate) fn set(&self, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.request(request, RawArg::Bytes(&mut bytes.to_vec())));
        }
        let answer = self.child.ioctl(request.wire_number().unwrap_or(0), &mut bytes.to_vec());
        answer.map(|result| result.map(drop)).map_err(|errno| failed(request.name, errno))
    }

    /// Has the child write bytes to the device.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<Result<usize, Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.write(bytes));
        }
        let answer = self.child.write(bytes);
        answer
            .map(|result| result.map(|count| usize::try_from(count).unwrap_or(0)))
            .map_err(|errno| failed("write", errno))
    }
}

/// Makes a request whose argument is `bytes` in a child that shares the suite's address space, as after vfork(2).
pub(crate) fn vfork_set(device: &Device, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
    let answer = fork::vfork_ioctl(device.file()?, request.wire_number().unwrap_or(0), &mut bytes.to_vec());
    answer.map(|result| result.map(drop)).map_err(|errno| failed("vfork", errno))
}

fn failed(what: &str, errno: Errno) -> Stop {
    Stop::Failed(format!("forked child: {what}: {errno}"))
}
