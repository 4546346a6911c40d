//! A disk in RAM as a vhost-vdpa device file: `ram_disk DIR` serves `DIR/ram0` until SIGTERM or SIGINT.
//!
//! docs/writing-a-device.md builds it step by step. Needs /dev/fuse and the right to mount.
#![forbid(unsafe_code)]

use std::error::Error;
use std::path::Path;

use vdpa_backend::{Outcome, Request, RequestHandler, Service};
use vdpa_core::blk::{BlkConfig, BlkRequest, FramingError, ID_BYTES, SECTOR, Status, kind};
use vdpa_core::features::Features;
use vdpa_core::parent::Profile;
use vdpa_core::ring::{Fault, Memory};
use zerocopy::IntoBytes;

/// The virtio device id of block devices (virtio 1.2 section 5).
const BLOCK: u32 = 2;

/// What GET_ID answers.
const SERIAL: &[u8; ID_BYTES] = b"ram0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

struct RamDisk {
    bytes: Vec<u8>,
}

impl RamDisk {
    /// The bytes of a transfer; `None` for one that is not inside the disk, or not of whole sectors.
    fn range(&mut self, sector: u64, len: u64) -> Option<&mut [u8]> {
        let first = usize::try_from(sector.checked_mul(SECTOR)?).ok()?;
        let end = first.checked_add(usize::try_from(len).ok()?)?;
        if len.is_multiple_of(SECTOR) { self.bytes.get_mut(first..end) } else { None }
    }

    /// Carries out a request: its status, and how many bytes of data the driver gets.
    fn transfer(&mut self, request: &Request<'_>, blk: &BlkRequest<'_>) -> Result<(Status, u64), Fault> {
        let memory = request.memory();
        match blk.header.kind {
            kind::IN => match self.range(blk.header.sector, blk.data_in.len()) {
                Some(bytes) => blk.data_in.write(memory, bytes).map(|_| (Status::Ok, blk.data_in.len())),
                None => Ok((Status::IoErr, 0)),
            },
            kind::OUT => match self.range(blk.header.sector, blk.data_out.len()) {
                Some(bytes) => blk.data_out.read(memory, bytes).map(|_| (Status::Ok, 0)),
                None => Ok((Status::IoErr, 0)),
            },
            kind::GET_ID => {
                let fits = blk.data_in.write(memory, SERIAL)?;
                Ok(if fits { (Status::Ok, ID_BYTES as u64) } else { (Status::IoErr, 0) })
            }
            // What is in RAM is as stable as it will ever be.
            kind::FLUSH => Ok((Status::Ok, 0)),
            _ => Ok((Status::Unsupp, 0)),
        }
    }
}

impl RequestHandler for RamDisk {
    fn handle(&mut self, _queue: u16, request: &Request<'_>) -> Result<Outcome, Fault> {
        let blk = match BlkRequest::parse(request.memory(), request.chain()) {
            Ok(blk) => blk,
            Err(FramingError::Fault(fault)) => return Err(fault),
            // It has no header, or no room for a status: nothing can be told to its driver.
            Err(_) => return Ok(Outcome::Done(0)),
        };
        let (status, written) = self.transfer(request, &blk)?;
        request.memory().write(blk.status, &[status.byte()])?;
        Ok(Outcome::Done(u32::try_from(written + 1).unwrap_or(u32::MAX)))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).ok_or("usage: ram_disk DIR")?;
    let disk = RamDisk { bytes: vec![0; 64 << 20] };
    let config = BlkConfig {
        capacity: (disk.bytes.len() as u64 / SECTOR).into(),
        seg_max: 126.into(),
        blk_size: 512.into(),
        ..BlkConfig::default()
    };
    let features = Features::of(&[Features::BLK_SEG_MAX, Features::BLK_BLK_SIZE, Features::BLK_FLUSH]);
    let service = Service::mount(Path::new(&dir))?;
    let path = service.add("ram0", Profile::on_objects(BLOCK, features, 1), config.as_bytes(), disk)?;
    println!("{}", path.display());
    Ok(service.run()?)
}
