//! [`Forked`]: a child of the suite that has not exec'd, with the suite's own addresses.

use vdpa_core::Errno;
use vdpa_sys::fork;
use vdpa_sys::vhost_vdpa::RawArg;

use crate::case::Stop;
use crate::device::Device;
use crate::inprocess::Local;
use crate::request::Request;

/// A forked child that holds the device too. Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Forked {
    child: fork::Forked,
    /// A device in the suite's process, in the hands of the child: requests are made there on its behalf.
    local: Option<Local>,
}

impl Forked {
    pub(crate) fn start(device: &Device) -> Result<Self, Stop> {
        let child = fork::Forked::start(device.file().ok()).map_err(|errno| cannot("fork", errno))?;
        let local = device.local().map(|local| local.by(child.pid().cast_unsigned()));
        Ok(Self { child, local })
    }

    /// Limits the memory that may be locked for the child.
    pub(crate) fn limit_memlock(&self, bytes: u64) -> Result<(), Stop> {
        vdpa_sys::rlimit::set_memlock_of(self.child.pid(), bytes)
            .map_err(|errno| cannot("RLIMIT_MEMLOCK", errno))
    }

    /// A request without an argument, made by the child.
    pub(crate) fn call(&self, request: Request) -> Result<Result<(), Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.request(request, RawArg::Null));
        }
        let answer = self.child.call(request.wire_number().unwrap_or(0));
        answer.map(|result| result.map(drop)).map_err(|errno| cannot(request.name, errno))
    }

    /// A request that reads these bytes, made by the child.
    pub(crate) fn set(&self, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.request(request, RawArg::Bytes(&mut bytes.to_vec())));
        }
        let answer = self.child.ioctl(request.wire_number().unwrap_or(0), &mut bytes.to_vec());
        answer.map(|result| result.map(drop)).map_err(|errno| cannot(request.name, errno))
    }

    /// Writes bytes to the device in the child.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<Result<usize, Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.write(bytes));
        }
        let answer = self.child.write(bytes);
        answer
            .map(|result| result.map(|count| usize::try_from(count).unwrap_or(0)))
            .map_err(|errno| cannot("write", errno))
    }
}

/// A request that reads these bytes, made by a child in the memory of the suite, as after vfork(2).
pub(crate) fn vfork_set(device: &Device, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
    let answer = fork::vfork_ioctl(device.file()?, request.wire_number().unwrap_or(0), &mut bytes.to_vec());
    answer.map(|result| result.map(drop)).map_err(|errno| cannot("vfork", errno))
}

fn cannot(what: &str, errno: Errno) -> Stop {
    Stop::Failed(format!("forked child: {what}: {errno}"))
}
