//! `vdpa-storm`: makes requests that no client would, to find out what breaks below: every pair of requests by two threads at the
//! same time, random sequences, opens and closes in a row. What comes back is not checked, except that the device still works
//! at the end; the findings are the kernel's (a warning, an oops, a report of a checker), and a hang.
#![forbid(unsafe_code)]

use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use vdpa_core::Errno;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uapi::vhost::REQUESTS;
use vdpa_sys::vhost_vdpa::{RawArg, VhostVdpaFd};

const PAGE: usize = 4096;
const SET_OWNER: u32 = 0xaf01;
const SET_STATUS: u32 = 0x4001_af72;
const GET_STATUS: u32 = 0x8001_af71;
const GET_BACKEND_FEATURES: u32 = 0x8008_af26;
/// KICK, CALL, ERR of a queue, and the configuration's.
const TAKE_EVENT: [u32; 3] = [0x4008_af20, 0x4008_af21, 0x4008_af22];
const SET_CONFIG_CALL: u32 = 0x4004_af77;
/// Types of IOTLB messages: all that exist, and one that does not.
const MESSAGES: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 200];

/// Makes requests that no client would.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The device file. It is reset and must not be in use.
    device: PathBuf,
    #[command(subcommand)]
    storm: Storm,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Storm {
    /// Two threads on one descriptor, for each pair of requests
    Pairs {
        /// How often each thread makes its request, for each pair
        #[arg(default_value_t = 20)]
        rounds: u32,
    },
    /// Opens and closes in a row, with memory mapped in between
    Opens {
        /// How many
        #[arg(default_value_t = 10_000)]
        count: u32,
    },
    /// Random sequences by two threads
    Random {
        /// For how long
        seconds: u64,
        /// Of the sequences
        #[arg(default_value_t = 1)]
        seed: u64,
    },
    /// A REMAP to other memory, and one to the same memory elsewhere: says which are accepted
    RemapOther,
    /// Prints which of the two live-update bits are offered
    Bits,
    /// Keeps the device open until its standard input ends
    Hold,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Ioctl(u32),
    Message(u8),
    Kick,
}

/// All requests, and the kick.
fn all() -> Vec<Op> {
    let ioctls = REQUESTS.iter().map(|(_, number)| Op::Ioctl(*number));
    // An ioctl that nobody knows, and the two of the live-update series, whatever numbers are configured.
    let more = [0x0000_af27, 0xafff].map(Op::Ioctl);
    let mut ops: Vec<_> = ioctls.chain(more).collect();
    ops.extend(MESSAGES.map(Op::Message));
    ops.push(Op::Kick);
    ops
}

/// Numbers that look random (xorshift).
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> Option<T> {
        let index = usize::try_from(self.next()).ok()?.checked_rem(list.len())?;
        list.get(index).copied()
    }
}

/// An open device with what requests refer to.
struct Victim {
    fd: VhostVdpaFd,
    memory: SharedMap,
    event: EventFd,
}

impl Victim {
    fn open(device: &Path) -> Result<Self, String> {
        let fd = VhostVdpaFd::open(device).map_err(|e| e.to_string())?;
        let file = memfd::create(c"vdpa-storm", 16 * PAGE as u64, None).map_err(|e| format!("memfd: {e}"))?;
        let memory = SharedMap::map(&file, 0, 16 * PAGE, Prot::RW, true).map_err(|e| format!("mmap: {e}"))?;
        let event = EventFd::new().map_err(|e| format!("eventfd: {e}"))?;
        Ok(Self { fd, memory, event })
    }

    /// Becomes the owner, maps the memory and starts the device, as far as it goes.
    fn start(&self, random: &mut Random) {
        let _ = self.fd.raw_ioctl(SET_OWNER, RawArg::Null);
        self.message(2, 0x1_0000, 8 * PAGE as u64, 3);
        for status in [1, 3, 11, 15] {
            let _ = self.fd.raw_ioctl(SET_STATUS, RawArg::Bytes(&mut [status]));
        }
        self.perform(Op::Ioctl(TAKE_EVENT[0]), random);
        self.perform(Op::Ioctl(TAKE_EVENT[1]), random);
    }

    fn message(&self, kind: u8, iova: u64, size: u64, perm: u8) {
        let _ = self.write(kind, iova, size, self.memory.addr() as u64, perm);
    }

    fn write(&self, kind: u8, iova: u64, size: u64, uaddr: u64, perm: u8) -> Result<usize, Errno> {
        let mut bytes = Vec::with_capacity(72);
        bytes.extend_from_slice(&2_u32.to_ne_bytes());
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        for word in [iova, size, uaddr] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&[perm, kind]);
        bytes.resize(72, 0);
        self.fd.raw_write(&bytes)
    }

    fn perform(&self, op: Op, random: &mut Random) {
        match op {
            Op::Kick => self.event.signal(),
            Op::Message(kind) => {
                let page = PAGE as u64;
                let iova = random.of(&[0, page, 0x1_0000, 0x1_1000, u64::MAX - 0xfff, 3]).unwrap_or(0);
                let size = random.of(&[0, 1, page, 8 * page, u64::MAX, 2 * page + 7]).unwrap_or(page);
                // REMAP takes no permission.
                let perm = if kind == 7 { 0 } else { random.of(&[1, 2, 3, 0]).unwrap_or(3) };
                self.message(kind, iova, size, perm);
            }
            Op::Ioctl(number) => {
                let size = usize::try_from(number >> 16 & 0x3fff).unwrap_or(8).clamp(8, 64);
                let mut argument = vec![0; size];
                let index = u32::try_from(random.next() % 5).unwrap_or(0);
                let number_in = random.of(&[0_u64, 1, 2, 16, 256, 0xffff, u64::MAX]).unwrap_or(0);
                let word = if TAKE_EVENT.contains(&number) && !random.next().is_multiple_of(4) {
                    let fd = u64::try_from(self.event.as_raw_fd()).unwrap_or(0);
                    fd << 32 | u64::from(index)
                } else if number == SET_CONFIG_CALL && !random.next().is_multiple_of(4) {
                    u64::try_from(self.event.as_raw_fd()).unwrap_or(0)
                } else {
                    number_in << 32 | u64::from(index)
                };
                argument[..8].copy_from_slice(&word.to_ne_bytes());
                let argument = match random.next() % 16 {
                    0 => RawArg::Null,
                    1 => RawArg::BadPointer,
                    _ => RawArg::Bytes(&mut argument),
                };
                let _ = self.fd.raw_ioctl(number, argument);
            }
        }
    }

    /// Whether the device still answers.
    fn check(&self) -> Result<(), String> {
        let answer = self.fd.raw_ioctl(GET_STATUS, RawArg::Bytes(&mut [0]));
        answer.map(|_| ()).map_err(|e: Errno| format!("GET_STATUS afterwards: {e}"))
    }
}

/// Two threads perform these at the same time, so often.
fn race(victim: &Victim, pair: [Op; 2], rounds: u32, seed: u64) {
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for (op, seed) in pair.into_iter().zip([seed, seed.rotate_left(17)]) {
            let barrier = &barrier;
            scope.spawn(move || {
                let mut random = Random(seed | 1);
                barrier.wait();
                (0..rounds).for_each(|_| victim.perform(op, &mut random));
            });
        }
    });
}

fn pairs(device: &Path, rounds: u32) -> Result<u64, String> {
    let ops = all();
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut count = 0;
    for (index, first) in ops.iter().enumerate() {
        let victim = Victim::open(device)?;
        victim.start(&mut random);
        for second in ops.iter().skip(index) {
            race(&victim, [*first, *second], rounds, random.next());
            count += 1;
        }
        victim.check()?;
    }
    Ok(count)
}

fn opens(device: &Path, count: u32) -> Result<u64, String> {
    let mut random = Random(7);
    for number in 0..count {
        let victim = Victim::open(device)?;
        // Every eighth leaves the device as it is when a client dies in the middle.
        if number % 8 == 0 {
            victim.start(&mut random);
        }
    }
    Ok(u64::from(count))
}

fn random(device: &Path, duration: Duration, seed: u64) -> Result<u64, String> {
    let ops = all();
    let end = Instant::now() + duration;
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut count = 0;
    while Instant::now() < end {
        let victim = Victim::open(device)?;
        if random.next().is_multiple_of(2) {
            victim.start(&mut random);
        }
        let (first, second) = (random.next(), random.next());
        std::thread::scope(|scope| {
            for seed in [first, second] {
                let (victim, ops) = (&victim, &ops);
                scope.spawn(move || {
                    let mut random = Random(seed | 1);
                    for _ in 0..200 {
                        if let Some(op) = random.of(ops) {
                            victim.perform(op, &mut random);
                        }
                    }
                });
            }
        });
        victim.check()?;
        count += 400;
    }
    Ok(count)
}

fn bits(device: &Path) -> Result<u64, String> {
    let fd = VhostVdpaFd::open(device).map_err(|e| e.to_string())?;
    let mut word = [0; 8];
    let answer = fd.raw_ioctl(GET_BACKEND_FEATURES, RawArg::Bytes(&mut word));
    answer.map_err(|e| format!("GET_BACKEND_FEATURES: {e}"))?;
    Ok(u64::from_ne_bytes(word) & 0x600)
}

/// What a device says of a REMAP to the same file at another address, to another offset, and to another file.
fn remap_other(device: &Path) -> Result<u64, String> {
    let fd = VhostVdpaFd::open(device).map_err(|e| e.to_string())?;
    let memory = |what: &str, file: &std::os::fd::OwnedFd, offset| {
        SharedMap::map(file, offset, 4 * PAGE, Prot::RW, true).map_err(|e| format!("{what}: {e}"))
    };
    let create = || memfd::create(c"vdpa-storm", 8 * PAGE as u64, None).map_err(|e| format!("memfd: {e}"));
    let (file, other) = (create()?, create()?);
    let event = EventFd::new().map_err(|e| format!("eventfd: {e}"))?;
    let victim = Victim { fd, memory: memory("mmap", &file, 0)?, event };
    victim.fd.raw_ioctl(SET_OWNER, RawArg::Null).map_err(|e| format!("SET_OWNER: {e}"))?;
    let (iova, size) = (0x10_0000, 4 * PAGE as u64);
    let update = victim.write(2, iova, size, victim.memory.addr() as u64, 3);
    update.map_err(|e| format!("UPDATE: {e}"))?;
    let others = [
        ("the same file", memory("mmap", &file, 0)?),
        ("another offset", memory("mmap", &file, 4 * PAGE as u64)?),
        ("another file", memory("mmap", &other, 0)?),
    ];
    for (what, map) in &others {
        match victim.write(7, iova, size, map.addr() as u64, 0) {
            Ok(_) => println!("REMAP to {what}: accepted"),
            Err(errno) => println!("REMAP to {what}: {errno}"),
        }
    }
    Ok(others.len() as u64)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let device = &arguments.device;
    let (what, result) = match arguments.storm {
        Storm::Bits => {
            return match bits(device) {
                Ok(bits) => {
                    println!("{bits:#x}");
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    eprintln!("vdpa-storm: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Storm::Pairs { rounds } => ("pairs of requests", pairs(device, rounds)),
        Storm::Opens { count } => ("opens", opens(device, count)),
        Storm::Random { seconds, seed } => {
            ("random requests", random(device, Duration::from_secs(seconds), seed))
        }
        Storm::RemapOther => ("requests", remap_other(device)),
        Storm::Hold => (
            "device held",
            Victim::open(device).map(|victim| {
                println!("open");
                let _ = std::io::read_to_string(std::io::stdin());
                drop(victim);
                1
            }),
        ),
    };
    match result {
        Ok(count) => {
            println!("{count} {what}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vdpa-storm: {error}");
            ExitCode::FAILURE
        }
    }
}
