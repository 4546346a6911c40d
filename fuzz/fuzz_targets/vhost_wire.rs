//! Ioctl arguments and IOTLB messages: parsed alone, and as requests of this process on a device file.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use parking_lot::Mutex;
use vdpa_backend::front::fuse::{DeviceFile, IoctlCall, Opener};
use vdpa_backend::front::vhost::{VhostVdpaFile, fuzzing};
use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::dirty::{DirtyLimits, DirtyRange, DirtySink, DirtyTracking, Tracked, VhostLog};
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::iotlb::Table;
use vdpa_core::parent::{AddressMode, CompatReset, Dma, Parent, PinLimit, PrivateMemory, Profile, SetMap};
use vdpa_core::types::{Asid, IovaRange, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::guest::{GuestMemory, LinuxHost};
use vdpa_sys::process::Spaces;
use vdpa_sys::uapi::dirty;
use vdpa_sys::uapi::vhost as uapi;

#[derive(Arbitrary, Debug)]
enum Op {
    KnownIoctl {
        request: u8,
        argument: Vec<u8>,
        address: Address,
    },
    AnyIoctl {
        cmd: u32,
        argument: Vec<u8>,
        address: Address,
    },
    Write(Vec<u8>),
    Message {
        version: u8,
        asid: u8,
        iova: u32,
        size: u16,
        uaddr: Address,
        perm: u8,
        kind: u8,
    },
    /// A request of dirty tracking. Nothing is ever dirty, so no bitmap is written.
    Dirty {
        request: u8,
        argument: [u64; 7],
        address: Address,
    },
    Reopen,
}

/// An address in this process.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    /// Memory of this process that holds the argument and takes the answer.
    Scratch,
    Null,
    /// The last byte of the 64-bit space.
    Top,
    /// An address that no process can map.
    Unmapped,
}

fuzz_target!(|ops: Vec<Op>| {
    let device: Box<dyn Parent<Host = LinuxHost>> = Box::new(IdleParent::new());
    let device = Arc::new(Mutex::new(Device::new(device)));
    let file = VhostVdpaFile::new("fuzz".into(), Arc::clone(&device), Spaces::new());
    let opener = Opener { handle: 1, uid: 0, tid: 0, flags: 0 };
    file.open(&opener).expect("the device is closed");
    let mut scratch = vec![0_u64; 1024];
    let tid = std::process::id();
    for op in ops.iter().take(40) {
        match op {
            Op::KnownIoctl { request, argument, address } => {
                let (_, cmd) = uapi::REQUESTS[usize::from(*request) % uapi::REQUESTS.len()];
                ioctl(&file, tid, cmd, argument, *address, &mut scratch);
            }
            Op::AnyIoctl { cmd, argument, address } => {
                ioctl(&file, tid, *cmd, argument, *address, &mut scratch)
            }
            Op::Write(data) => write(&file, tid, data),
            Op::Message { version, asid, iova, size, uaddr, perm, kind } => {
                let mut bytes = vec![0; 72];
                bytes[..4].copy_from_slice(&u32::from(*version).to_ne_bytes());
                bytes[4..8].copy_from_slice(&u32::from(*asid).to_ne_bytes());
                bytes[8..16].copy_from_slice(&u64::from(*iova).to_ne_bytes());
                bytes[16..24].copy_from_slice(&u64::from(*size).to_ne_bytes());
                bytes[24..32].copy_from_slice(&uaddr.resolve(&mut scratch).to_ne_bytes());
                bytes[32] = *perm;
                bytes[33] = *kind;
                write(&file, tid, &bytes);
            }
            Op::Dirty { request, argument, address } => {
                let request = dirty::Request::ALL[usize::from(*request) % dirty::Request::ALL.len()];
                let bytes: Vec<u8> = argument.iter().flat_map(|word| word.to_ne_bytes()).collect();
                ioctl(&file, tid, request.number(dirty::NUMBER), &bytes, *address, &mut scratch);
            }
            Op::Reopen => {
                file.release(1);
                file.open(&opener).expect("it was just closed");
            }
        }
        let result = device.lock().check_invariants();
        assert_eq!(result, Ok(()), "after {op:?}");
    }
    file.release(1);
    assert_eq!(device.lock().mapped().entries, 0);
});

impl Address {
    fn resolve(self, scratch: &mut [u64]) -> u64 {
        match self {
            Self::Scratch => scratch.as_mut_ptr().expose_provenance() as u64,
            Self::Null => 0,
            Self::Top => u64::MAX,
            Self::Unmapped => 0xffff_8000_0000_0000,
        }
    }
}

/// Makes an ioctl as the kernel passes it on: the argument has the size and direction that the request number says.
fn ioctl(file: &VhostVdpaFile, tid: u32, cmd: u32, argument: &[u8], address: Address, scratch: &mut [u64]) {
    fuzzing::arguments(argument);
    let size = (cmd >> 16 & 0x3fff) as usize;
    let mut input = vec![0; if cmd >> 30 & 1 != 0 { size } else { 0 }];
    for (to, from) in input.iter_mut().zip(argument) {
        *to = *from;
    }
    for (to, from) in scratch.iter_mut().zip(argument.chunks(8)) {
        let mut word = [0; 8];
        word[..from.len()].copy_from_slice(from);
        *to = u64::from_ne_bytes(word);
    }
    let out_size = if cmd >> 31 != 0 { size } else { 0 };
    let out_size = u32::try_from(out_size).expect("14 bits");
    let call = IoctlCall { handle: 1, tid, cmd, arg: address.resolve(scratch), input: &input, out_size };
    if let Ok(reply) = file.ioctl(&call) {
        assert!(reply.result >= 0);
        assert!(reply.out.len() <= out_size as usize, "{cmd:#x} answers {} bytes", reply.out.len());
    }
}

fn write(file: &VhostVdpaFile, tid: u32, data: &[u8]) {
    for acked in [BackendFeatures::NONE, BackendFeatures(u64::MAX)] {
        match fuzzing::iotlb_message(data, acked) {
            Ok(_) => assert!(data.len() >= 40),
            Err(error) => assert_eq!(error, Errno::INVAL),
        }
    }
    if let Ok(written) = file.write(1, tid, data) {
        assert_eq!(written, 72);
    }
}

/// A parent that does nothing, with two queues and two address spaces.
#[derive(Debug)]
struct IdleParent {
    profile: Profile,
    running: [bool; 2],
    dirty: Arc<Bits>,
}

/// Dirty pages without a device.
#[derive(Debug)]
struct Bits(DirtyMemory);

impl DirtyTracking for Bits {
    fn limits(&self) -> DirtyLimits {
        DirtyLimits::MAP
    }

    fn tracked(&self) -> Option<Tracked> {
        self.0.tracked()
    }

    fn start(&self, page_size: u64, ranges: &[DirtyRange], request: u64) -> Result<()> {
        self.0.start(page_size, ranges, request)
    }

    fn stop(&self) -> Result<()> {
        self.0.forget()
    }

    fn report(&self, of: DirtyRange, clear: bool, sink: DirtySink<'_>) -> Result<()> {
        self.0.report(of, clear, sink)
    }

    fn set_vhost_log(&self, log: Option<VhostLog>) -> Result<()> {
        self.0.set_vhost_log(log);
        Ok(())
    }
}

impl IdleParent {
    fn new() -> Self {
        let profile = Profile {
            device_id: 2,
            vendor_id: 0,
            features: Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]),
            backend_features: BackendFeatures::of(&[
                BackendFeatures::ENABLE_AFTER_DRIVER_OK,
                BackendFeatures::NEW_OWNER,
                BackendFeatures::IOTLB_REMAP,
            ]),
            queues: 2,
            queue_size_max: 256,
            queue_groups: Vec::new(),
            descriptor_groups: Vec::new(),
            groups: 1,
            address_spaces: 2,
            iova_range: IovaRange::ALL,
            config_size: 60,
            suspend: true,
            resume: true,
            vring_size: true,
            reset_map: true,
            compat_reset: CompatReset::Clean,
            address_mode: AddressMode::OwnerAddresses,
            pin_limit: PinLimit::Rlimit,
            private_memory: PrivateMemory::Copy,
            max_iotlb_entries: 16,
            verify_remap: true,
            strict_new_owner: false,
            status_unsuspends: false,
            report_batch_errors: true,
            identity_map: false,
            mem_table: true,
            vhost_log: true,
            reset_owner: true,
            moves: true,
        };
        let dirty = Arc::new(Bits(DirtyMemory::create().expect("a memory file")));
        Self { profile, running: [false; 2], dirty }
    }
}

impl Parent for IdleParent {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, _offset: u32, out: &mut [u8]) {
        out.fill(7);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        Ok(features & self.profile.features)
    }

    fn start_queue(&mut self, index: QueueIndex, _: &QueueSetup<LinuxHost>, _: QueueState) -> Result<()> {
        self.running[usize::from(index.0)] = true;
        Ok(())
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        let ran = std::mem::take(&mut self.running[usize::from(index.0)]);
        Ok(ran.then_some(QueueState::Split { avail_index: 0 }))
    }

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        Dma::SetMap(self)
    }
}

impl SetMap<LinuxHost> for IdleParent {
    fn set_map(&mut self, _asid: Asid, _table: &Table<GuestMemory>) -> Result<()> {
        Ok(())
    }

    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        Some(Arc::clone(&self.dirty) as _)
    }
}
