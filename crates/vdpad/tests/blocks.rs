//! Disks whose blocks are larger than sectors: requests may begin and end at any sector, and lie anywhere in memory.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use vdpa_core::blk::{BlkConfig, Segment, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use zerocopy::FromBytes;

use support::blk::{Blk, DATA, FEATURES, IOERR, IOVA, OK, TIMEOUT, data};
use support::daemon::{Daemon, Disk, pattern};

const DISK: usize = 4 << 20;
const SECTORS: u64 = DISK as u64 / 512;
const BLOCK: usize = 4096;

/// A block device on a file, with blocks of 4 KiB.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Self {
        let out = Command::new("losetup").args(["-b", "4096", "-f", "--show"]).arg(file).output().unwrap();
        assert!(out.status.success(), "loop devices are needed: {}", String::from_utf8_lossy(&out.stderr));
        Self(String::from_utf8(out.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A loop device still in use is removed by its last user.
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A device on such a disk, and the file behind it.
struct Setup {
    blk: Blk,
    disk: Disk,
    _daemon: Daemon,
    _loop: Loop,
}

impl Setup {
    fn new(features: Features, attrs: &[(&str, &str)]) -> Self {
        let daemon = Daemon::start();
        let disk = daemon.disk("disk", DISK);
        let device = Loop::new(&disk.path);
        let all = [("path", device.0.to_str().unwrap()), ("memlock", "unlimited")];
        let path = daemon.add("d0", "blk", &[&all, attrs].concat());
        let blk = Blk::with(&path, features, 2);
        Self { blk, disk, _daemon: daemon, _loop: device }
    }

    /// The contents of the disk, including unflushed writes.
    fn all(&mut self) -> Vec<u8> {
        if self.blk.session.features().has(Features::BLK_FLUSH) {
            assert_eq!(self.blk.io(0, kind::FLUSH, 0, &[], &[]).status, OK);
        }
        self.disk.all()
    }
}

/// Of this number of sectors.
fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors * 512).unwrap()
}

/// xorshift64: the same numbers each time.
struct Numbers(u64);

impl Numbers {
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[test]
fn the_driver_is_told_of_the_blocks() {
    for direct in ["on", "off"] {
        let setup = Setup::new(FEATURES, &[("direct", direct)]);
        let config = BlkConfig::read_from_bytes(&setup.blk.session.config().unwrap()).unwrap();
        assert_eq!((config.blk_size.get(), config.capacity.get()), (4096, SECTORS));
        assert_eq!(config.discard_sector_alignment.get(), 8);
    }
}

/// Every position of a request within its blocks, one after the other.
#[test]
fn any_sectors_can_be_read_and_written() {
    for direct in ["on", "off"] {
        let mut setup = Setup::new(FEATURES, &[("direct", direct)]);
        let mut model = pattern(0, DISK);
        let places =
            [(0, 1), (7, 1), (3, 2), (7, 2), (8, 8), (9, 7), (16, 15), (25, 15), (31, 34), (SECTORS - 1, 1)];
        for (turn, &(sector, count)) in (0..).zip(&places) {
            let (at, len) = (bytes(sector), bytes(count));
            assert_eq!(setup.blk.read(0, sector, len), Ok(model[at..at + len].to_vec()), "{sector}+{count}");
            let new = pattern((turn + 1) << 33, len);
            assert_eq!(setup.blk.write(0, sector, &new), OK, "{sector}+{count}");
            model[at..at + len].copy_from_slice(&new);
            assert!(setup.all() == model, "direct {direct}: {count} sectors at {sector}");
        }
        for (sector, len) in [(SECTORS, 512), (SECTORS - 1, 1024), (0, 700), (u64::MAX, 512)] {
            assert_eq!(setup.blk.write(0, sector, &vec![1; len]), IOERR, "write of {len} bytes at {sector}");
            assert_eq!(setup.blk.read(0, sector, len), Err(IOERR), "read of {len} bytes at {sector}");
        }
        assert!(setup.all() == model, "what failed has changed nothing");
    }
}

#[test]
fn any_sectors_can_be_zeroed_and_whole_blocks_discarded() {
    for (direct, features) in
        [("on", FEATURES), ("off", FEATURES), ("on", FEATURES.without(Features::BLK_FLUSH))]
    {
        let mut setup = Setup::new(features, &[("direct", direct)]);
        let mut model = pattern(0, DISK);
        for (sector, count) in [(0, 8), (17, 1), (22, 2), (25, 30), (63, 2), (65, 1000), (2000, 3)] {
            for flags in [0, Segment::UNMAP] {
                let sector = sector + if flags == 0 { 0 } else { 4096 };
                assert_eq!(setup.blk.range(kind::WRITE_ZEROES, sector, count, flags), OK);
                model[bytes(sector)..][..bytes(count.into())].fill(0);
            }
        }
        assert!(setup.all() == model, "direct {direct}: write-zeroes");
        assert_eq!(setup.blk.range(kind::DISCARD, 2050, 5, 0), OK, "no whole block, so nothing");
        assert_eq!(setup.blk.range(kind::DISCARD, 2060, 16, 0), OK);
        // A loop device frees discarded blocks.
        model[2064 * 512..2072 * 512].fill(0);
        assert!(setup.all() == model, "direct {direct}: discard");
    }
}

/// The data that a request is expected to read or to write.
struct Expected {
    queue: u16,
    token: u64,
    read: Option<(Vec<Buffer>, usize, usize)>,
}

/// Concurrent requests that share blocks but no sectors, of all sizes and at all offsets, compared with an array.
#[expect(clippy::cast_possible_truncation, reason = "numbers below the sizes of disk and memory")]
fn requests_at_depth(features: Features, attrs: &[(&str, &str)], rounds: u64) {
    let mut setup = Setup::new(features, attrs);
    let mut model = pattern(0, DISK);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for round in 0..rounds {
        let mut sector = numbers.below(SECTORS - 1024);
        let mut memory = 0;
        let mut all = Vec::new();
        // Compared when everything is answered, since nothing changes it meanwhile.
        let before = model.clone();
        for number in 0..28 {
            let count = if numbers.below(8) == 0 { 1 + numbers.below(40) } else { 1 + numbers.below(5) };
            let (at, len) = (sector as usize * 512, count as usize * 512);
            let queue = (number % 2) as u16;
            memory += [0, 0, 512, 1, 77][numbers.below(5) as usize];
            let cut = if numbers.below(3) == 0 { 1 + numbers.below(len as u64 - 1) as usize } else { len };
            let pieces = [data(memory, cut), data(memory + cut as u64 + 8, len - cut)];
            let pieces = &pieces[..if cut < len { 2 } else { 1 }];
            memory += len as u64 + 8;
            let expected = match numbers.below(8) {
                0..4 => {
                    let bytes = pattern((round << 40) + (number << 32), len);
                    setup.blk.put(pieces[0].iova - IOVA, &bytes[..cut]);
                    setup.blk.put(DATA + memory - (len - cut) as u64, &bytes[cut..]);
                    model[at..at + len].copy_from_slice(&bytes);
                    let token = setup.blk.submit(queue, kind::OUT, sector, pieces, &[]);
                    Expected { queue, token, read: None }
                }
                4 => {
                    let segment = Segment { sector, num_sectors: count as u32, flags: (number & 1) as u32 };
                    setup.blk.put(pieces[0].iova - IOVA, &segment.encode());
                    model[at..at + len].fill(0);
                    let segment = [Buffer { len: 16, ..pieces[0] }];
                    let token = setup.blk.submit(queue, kind::WRITE_ZEROES, 0, &segment, &[]);
                    Expected { queue, token, read: None }
                }
                _ => {
                    let token = setup.blk.submit(queue, kind::IN, sector, &[], pieces);
                    Expected { queue, token, read: Some((pieces.to_vec(), at, len)) }
                }
            };
            all.push(expected);
            sector += count + numbers.below(8) / 4 * numbers.below(12);
        }
        (0..2).for_each(|queue| setup.blk.notify(queue));
        for expected in &all {
            let done = setup.blk.finish(expected.queue, TIMEOUT).unwrap();
            assert_eq!(done.status, OK, "round {round}, request {}", done.token);
            assert!(all.iter().any(|expected| expected.token == done.token));
        }
        for Expected { token, read, .. } in all {
            let Some((pieces, at, len)) = read else { continue };
            let found = pieces.iter().flat_map(|piece| setup.blk.get(piece.iova - IOVA, piece.len as usize));
            assert!(found.eq(before[at..at + len].iter().copied()), "round {round}, read {token}");
        }
        if round % 8 == 7 {
            let found = setup.all();
            let wrong = found.chunks(512).zip(model.chunks(512)).position(|(found, model)| found != model);
            assert_eq!(wrong, None, "sector that differs after round {round}");
        }
    }
    assert_eq!(model.len() % BLOCK, 0);
    assert!(setup.all() == model);
}

#[test]
fn neighbours_in_a_block_keep_what_they_write() {
    requests_at_depth(FEATURES, &[("direct", "on")], 200);
}

#[test]
fn neighbours_in_a_block_keep_what_they_write_unpinned() {
    requests_at_depth(FEATURES, &[("direct", "on"), ("pin", "off")], 100);
}

#[test]
fn neighbours_in_a_block_keep_what_they_write_through() {
    requests_at_depth(FEATURES.without(Features::BLK_FLUSH), &[("direct", "on")], 40);
}

#[test]
fn neighbours_in_a_block_of_the_page_cache() {
    requests_at_depth(FEATURES, &[("direct", "off")], 100);
}
