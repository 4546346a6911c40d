//! An entropy source (virtio 1.2 section 5.4), a device type that vdpad does not have: `rng DIR` serves `DIR/rng0` until
//! SIGTERM or SIGINT. Needs /dev/fuse and the right to mount.
#![forbid(unsafe_code)]

use std::error::Error;
use std::path::Path;

use rustix::rand::{GetRandomFlags, getrandom};
use vdpa_backend::{Outcome, Request, RequestHandler, Service};
use vdpa_core::features::Features;
use vdpa_core::parent::Profile;
use vdpa_core::ring::Fault;

/// The virtio device id of entropy sources (virtio 1.2 section 5).
const ENTROPY: u32 = 4;

/// Bytes of the largest answer: the kernel's generator gives that many without a wait, and never fewer.
const BYTES_MAX: usize = 256;

struct Rng;

impl RequestHandler for Rng {
    fn handle(&mut self, _queue: u16, request: &Request<'_>) -> Result<Outcome, Fault> {
        let mut bytes = [0; BYTES_MAX];
        let wanted = usize::try_from(request.writable().len()).unwrap_or(BYTES_MAX).min(BYTES_MAX);
        // GRND_NONBLOCK: a thread that serves other devices must not wait for the kernel's generator at boot. The driver
        // asks again for what it did not get.
        let (random, _) = bytes.split_at_mut(wanted);
        let got = getrandom(&mut *random, GetRandomFlags::NONBLOCK).unwrap_or(0);
        let (random, _) = random.split_at(got);
        request.writable().write(request.memory(), random)?;
        Ok(Outcome::Done(u32::try_from(got).unwrap_or(0)))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).ok_or("usage: rng DIR")?;
    let service = Service::mount(Path::new(&dir))?;
    let path = service.add("rng0", Profile::on_objects(ENTROPY, Features::NONE, 1), &[], Rng)?;
    println!("{}", path.display());
    Ok(service.run()?)
}
