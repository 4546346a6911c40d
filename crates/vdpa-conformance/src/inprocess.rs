//! Devices in this process: the requests of a device file are function calls, so that the suite needs neither a kernel
//! module nor a daemon.
//!
//! Memory, eventfds and processes are real: this module resolves addresses, fetches descriptors and recognises owners as a
//! server of device files does. It does not have what the file itself does (arguments at bad addresses, read, poll, mmap,
//! lengths of messages). Cases that check this have [`Need::DeviceFile`](crate::Need::DeviceFile).

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::inprocess::{InProcess, Node};
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::{AddressMode, Parent, PinLimit, PrivateMemory};
use vdpa_core::testing::{RamBlk, RamNet};
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, Perm, QueueIndex, Result, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::process::{Caller, OwnerSpace, ProcessCaller, Spaces};
use vdpa_sys::uapi::live;
use vdpa_sys::vhost_vdpa::RawArg;

use crate::device::{MESSAGE_SIZE, V1, V2, pair};
use crate::request::Request;

/// Error of a request that only a device file has. A case that gets it should have the need for a device file.
const NEEDS_FILE: Errno = Errno::NOSYS;

/// A device that serves its queues when it is called, instead of in a thread.
trait ServeOnKick: Parent<Host = LinuxHost> {
    /// Serves all queues. Called after a kick.
    fn serve(&mut self);
}

impl ServeOnKick for RamBlk<LinuxHost> {
    fn serve(&mut self) {
        Self::serve(self);
    }
}

impl ServeOnKick for RamNet<LinuxHost> {
    fn serve(&mut self) {
        Self::serve(self);
    }
}

type AnyDevice = Box<dyn ServeOnKick>;

/// A device in this process, which cases open.
#[derive(Clone, Debug)]
pub struct LocalDevice {
    node: Node<AnyDevice>,
    spaces: Spaces,
}

impl Default for LocalDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl LocalDevice {
    /// A block device with the address translation and the backend features of the kernel's simulator.
    #[must_use]
    pub fn new() -> Self {
        Self::with(RamBlk::on_host(64))
    }

    /// A block device as the simulator with `use_va=0`: it pins pages.
    #[must_use]
    pub fn pinned() -> Self {
        Self::with(RamBlk::on_host(64).with(|profile| {
            profile.address_mode = AddressMode::PinnedPages;
            profile.private_memory = PrivateMemory::Copy;
            // A fixed limit, so that the result does not depend on the limit of the user who runs the suite.
            profile.pin_limit = PinLimit::Pages(1 << 20);
        }))
    }

    /// A block device as the simulator with `batch_mapping=0`: it uses addresses of its owner and gets single mappings.
    #[must_use]
    pub fn single_mappings() -> Self {
        Self::with(RamBlk::on_host(64).with_single_mappings())
    }

    /// A network device as the kernel's network simulator.
    #[must_use]
    pub fn net() -> Self {
        Self::with(RamNet::new())
    }

    fn with(device: impl ServeOnKick + 'static) -> Self {
        Self { node: Node::new(Box::new(device)), spaces: Spaces::new() }
    }

    pub(crate) fn open(&self) -> Result<LocalFile> {
        self.node.open(Process { pid: None, spaces: self.spaces.clone() }).map(LocalFile)
    }
}

/// The process that makes a request.
#[derive(Clone, Debug)]
struct Process {
    /// Its process id; `None` for the calling thread.
    pid: Option<i32>,
    spaces: Spaces,
}

impl Process {
    fn caller(&self) -> Result<Caller> {
        Caller::new(self.pid.unwrap_or_else(|| rustix::thread::gettid().as_raw_nonzero().get()))
    }
}

impl vdpa_core::host::Caller<LinuxHost> for Process {
    fn is(&self, owner: &OwnerSpace) -> bool {
        self.caller().is_ok_and(|caller| caller.is(owner))
    }

    fn address_space(&self) -> Result<OwnerSpace> {
        let caller = self.caller()?;
        ProcessCaller { caller: &caller, spaces: &self.spaces }.address_space()
    }

    fn memlock_pages(&self) -> u64 {
        self.caller().map_or(0, |caller| caller.memlock_pages())
    }
}

/// A descriptor of an open device in this process, with the process that makes requests on it.
#[derive(Clone, Debug)]
pub(crate) struct LocalFile(InProcess<AnyDevice, Process>);

impl LocalFile {
    /// The same open device with the process `pid` as caller.
    pub(crate) fn for_process(&self, pid: u32) -> Self {
        let spaces = self.0.caller().spaces.clone();
        Self(self.0.for_caller(Process { pid: i32::try_from(pid).ok(), spaces }))
    }

    /// Makes the device serve its queues, after a kick.
    pub(crate) fn process_kick(&self) {
        self.0.with(|device, _| device.parent_mut().serve());
    }

    /// Reads the statistics of a queue.
    pub(crate) fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(String, u64)>> {
        let counters = self.0.with(|device, _| device.parent().vendor_stats(index))?;
        Ok(counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// Writes one IOTLB message, which is decoded as in uapi-spec 2.2.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<usize> {
        let word = |at: usize| -> Result<u32> {
            let word = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Errno::INVAL)?;
            Ok(u32::from_ne_bytes(*word))
        };
        let long = |at: usize| -> Result<u64> {
            let long = bytes.get(at..).and_then(|rest| rest.first_chunk()).ok_or(Errno::INVAL)?;
            Ok(u64::from_ne_bytes(*long))
        };
        let (version, second) = (word(0)?, word(4)?);
        let [perm, kind] = *bytes.get(32..).and_then(|rest| rest.first_chunk()).ok_or(Errno::INVAL)?;
        let kind = live::configured().message_from_wire(kind);
        let message = IotlbMsg { iova: long(8)?, size: long(16)?, uaddr: long(24)?, perm: Perm(perm), kind };
        self.0.with(|device, caller| {
            let asid = match version {
                V1 => 0,
                V2 if !device.acked_backend_features().has(BackendFeatures::IOTLB_ASID) => 0,
                V2 => second,
                _ => return Err(Errno::INVAL),
            };
            device.iotlb(caller, Asid(asid), &message).map_err(|error| error.errno())
        })?;
        Ok(MESSAGE_SIZE)
    }

    /// Makes a request. Its argument is given as bytes.
    pub(crate) fn request(&self, request: Request, argument: RawArg<'_>) -> Result<()> {
        match argument {
            RawArg::Null => self.without_argument(request),
            RawArg::Bytes(bytes) => match self.get(request) {
                Some(value) => put(bytes, &value?),
                None => self.set(request, bytes),
            },
            RawArg::Int(_) | RawArg::BadPointer => Err(NEEDS_FILE),
        }
    }

    /// Makes a request without an argument.
    fn without_argument(&self, request: Request) -> Result<()> {
        let device = &self.0;
        match request {
            Request::SET_OWNER => device.set_owner(),
            Request::NEW_OWNER => device.new_owner(),
            Request::RESET_OWNER => device.reset_owner(),
            Request::SUSPEND => device.suspend(),
            Request::RESUME => device.resume(),
            _ => Err(NEEDS_FILE),
        }
    }

    /// Makes a request that only returns a value; `None` for other requests.
    fn get(&self, request: Request) -> Option<Result<Vec<u8>>> {
        let device = &self.0;
        let long = |value: u64| value.to_ne_bytes().to_vec();
        let word = |value: u32| value.to_ne_bytes().to_vec();
        Some(match request {
            Request::GET_FEATURES => device.features().map(|features| long(features.0)),
            Request::GET_BACKEND_FEATURES => device.backend_features().map(|features| long(features.0)),
            Request::GET_DEVICE_ID => device.device_id().map(word),
            Request::GET_STATUS => device.status().map(|status| vec![status.0]),
            Request::GET_VRING_NUM => device.vring_num().map(|num| num.to_ne_bytes().to_vec()),
            Request::GET_CONFIG_SIZE => device.config_size().map(word),
            Request::GET_AS_NUM => device.as_num().map(word),
            Request::GET_VQS_COUNT => device.vqs_count().map(word),
            Request::GET_GROUP_NUM => device.group_num().map(word),
            Request::GET_IOVA_RANGE => {
                device.iova_range().map(|range| [long(range.first()), long(range.last())].concat())
            }
            Request::GET_FORK_FROM_OWNER => Ok(vec![device.with(|device, _| device.fork_from_owner())]),
            _ => return None,
        })
    }

    /// Makes a request that reads its argument and may write to it too.
    fn set(&self, request: Request, bytes: &mut [u8]) -> Result<()> {
        let device = &self.0;
        match request {
            Request::SET_FEATURES => device.set_features(Features(u64::from_ne_bytes(head(bytes)?))),
            Request::SET_BACKEND_FEATURES => {
                device.set_backend_features(BackendFeatures(u64::from_ne_bytes(head(bytes)?)))
            }
            Request::SET_STATUS => device.set_status(Status(u8::from_ne_bytes(head(bytes)?))),
            Request::SET_FORK_FROM_OWNER => {
                let value = u8::from_ne_bytes(head(bytes)?);
                device.with(|device, _| device.set_fork_from_owner(value))
            }
            Request::SET_CONFIG_CALL => {
                device.set_config_call(self.event(i32::from_ne_bytes(head(bytes)?))?.as_ref())
            }
            Request::GET_CONFIG | Request::SET_CONFIG => self.config(request, bytes),
            _ => self.vring(request, bytes),
        }
    }

    fn config(&self, request: Request, bytes: &mut [u8]) -> Result<()> {
        let [offset, len] = words(bytes)?;
        let data = bytes.get_mut(8..).unwrap_or_default();
        // The length in the header can differ from that of the buffer only for a file.
        if data.len() as u64 != u64::from(len) {
            return Err(NEEDS_FILE);
        }
        match request {
            Request::GET_CONFIG => self.0.config(offset, data),
            _ => self.0.set_config(offset, data),
        }
    }

    /// Makes a request of the owner. The checks are in the kernel's order: owner, index, rest (uapi-spec 1.1).
    fn vring(&self, request: Request, bytes: &mut [u8]) -> Result<()> {
        self.0.with(|device, caller| device.check_owner(caller))?;
        let [first, num] = words(bytes)?;
        let queues = self.0.vqs_count()?;
        let index = QueueIndex(u16::try_from(first).map_err(|_| Errno::NOBUFS)?);
        if first >= queues {
            return Err(Errno::NOBUFS);
        }
        let ops = &self.0;
        match request {
            Request::SET_VRING_NUM => ops.set_vring_num(index, num),
            Request::SET_VRING_BASE => ops.set_vring_base(index, num),
            Request::SET_VRING_ENABLE => ops.set_vring_enable(index, num != 0),
            Request::SET_VRING_KICK => ops.set_vring_kick(index, self.event(num.cast_signed())?.as_ref()),
            Request::SET_VRING_CALL => ops.set_vring_call(index, self.event(num.cast_signed())?.as_ref()),
            Request::SET_VRING_ERR => ops.set_vring_err(index, self.event(num.cast_signed())?.as_ref()),
            Request::SET_VRING_ADDR => {
                let words: [u8; 40] = head(bytes)?;
                let long = |at: usize| -> Result<u64> {
                    Ok(u64::from_ne_bytes(head(words.get(at..).unwrap_or_default())?))
                };
                let (desc, used, avail, log) = (long(8)?, long(16)?, long(24)?, long(32)?);
                ops.set_vring_addr(index, &VringAddr { flags: num, desc, used, avail, log })
            }
            Request::SET_GROUP_ASID => ops.set_group_asid(GroupIndex(first), Asid(num)),
            Request::SET_VRING_BUSYLOOP_TIMEOUT => {
                ops.with(|device, caller| device.set_busyloop_timeout(caller, index, num))
            }
            _ => {
                let answer = ops.with(|device, caller| vring_answer(device, caller, request, index))?;
                put(bytes, &pair(first, answer))
            }
        }
    }

    /// Fetches an eventfd from the caller's descriptor table, as a server of device files does.
    fn event(&self, fd: i32) -> Result<Option<EventFd>> {
        if fd == -1 {
            return Ok(None);
        }
        let fd = self.0.caller().caller()?.get_fd(fd)?;
        EventFd::from_fd(fd).map(Some).map_err(|_| Errno::INVAL)
    }
}

/// Makes a request that returns a number for a queue.
fn vring_answer(
    device: &mut Device<AnyDevice>,
    caller: &Process,
    request: Request,
    index: QueueIndex,
) -> Result<u32> {
    match request {
        Request::GET_VRING_BASE => device.vring_base(caller, index),
        Request::GET_VRING_BUSYLOOP_TIMEOUT => device.busyloop_timeout(caller, index),
        Request::GET_VRING_GROUP => device.vring_group(caller, index).map(|group| group.0),
        Request::GET_VRING_DESC_GROUP => device.vring_desc_group(caller, index).map(|group| group.0),
        Request::GET_VRING_SIZE => device.vring_size(caller, index),
        _ => Err(NEEDS_FILE),
    }
}

fn head<const N: usize>(bytes: &[u8]) -> Result<[u8; N]> {
    bytes.first_chunk().copied().ok_or(Errno::FAULT)
}

fn words(bytes: &[u8]) -> Result<[u32; 2]> {
    let [a, b, c, d, e, f, g, h] = head(bytes)?;
    Ok([u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])])
}

fn put(bytes: &mut [u8], value: &[u8]) -> Result<()> {
    bytes.get_mut(..value.len()).ok_or(Errno::FAULT)?.copy_from_slice(value);
    Ok(())
}
