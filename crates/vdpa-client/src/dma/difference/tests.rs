use std::collections::BTreeMap;
use std::sync::LazyLock;

use proptest::prelude::*;
use vdpa_sys::memfd;

use super::*;
use crate::dma::Regions;

const PAGE: u64 = 4096;

/// Two objects, each mapped twice.
static MEMORY: LazyLock<Vec<Arc<Memory>>> = LazyLock::new(|| {
    let object = |name: &str| {
        let fd = memfd::create(c"difference", 16 * PAGE, None).unwrap();
        let map = || Memory::map(name, fd.try_clone().unwrap(), 0, 16 * PAGE, false).unwrap();
        [map(), map()]
    };
    ["one", "other"].into_iter().flat_map(object).collect()
});

/// A region: which memory, at which page of it, at which page of the device, how many pages, and whether it can be written.
type Spec = (usize, u64, u64, u64, bool);

/// A table without overlaps, of those regions that fit.
fn table(specs: &[Spec], names: usize) -> Regions {
    let mut regions = Regions::default();
    for (number, &(memory, offset, at, pages, writable)) in specs.iter().enumerate() {
        let region = TableRegion {
            name: format!("region {}", (number + names) % 16),
            memory: Arc::clone(&MEMORY[memory]),
            offset: offset * PAGE,
            iova: at * PAGE,
            size: pages * PAGE,
            perm: if writable { Perm::RW } else { Perm::RO },
        };
        // One that overlaps another is left out.
        let _ = regions.push(Region::of_table(&region, IovaRange::ALL).unwrap());
    }
    regions
}

fn specs() -> impl Strategy<Value = Vec<Spec>> {
    let spec = (0..4_usize, 0..8_u64, 0..24_u64, 1..5_u64, any::<bool>());
    prop::collection::vec(spec, 0..10)
}

/// A device that keeps what it is told, and fails at the messages in `fails`.
#[derive(Debug, Default)]
struct Device {
    /// By first address: size, address in this process, access.
    mapped: BTreeMap<u64, (u64, u64, Perm)>,
    /// What a device that takes whole tables translates with.
    installed: BTreeMap<u64, (u64, u64, Perm)>,
    before_remaps: Option<BTreeMap<u64, (u64, u64, Perm)>>,
    batch: bool,
    fails: Vec<usize>,
    messages: Vec<IotlbMsg>,
}

impl Device {
    fn with(regions: &Regions) -> Self {
        let entry = |piece: Piece<'_>| (piece.iova, (piece.size, piece.uaddr, piece.perm));
        let mapped: BTreeMap<_, _> = regions.pieces().map(entry).collect();
        Self { installed: mapped.clone(), mapped, ..Self::default() }
    }

    fn send(&mut self, msg: &IotlbMsg) -> Result<(), Errno> {
        let number = self.messages.len();
        self.messages.push(*msg);
        if self.fails.contains(&number) {
            if msg.kind == iotlb_type::BATCH_END {
                self.batch = false;
                // As the daemon: a failing END takes the REMAPs back.
                self.mapped = self.before_remaps.take().unwrap_or_else(|| self.mapped.clone());
            }
            return Err(Errno::FAULT);
        }
        let overlaps = |entry: (&u64, &(u64, u64, Perm))| {
            *entry.0 < msg.iova + msg.size && entry.0 + entry.1.0 > msg.iova
        };
        match msg.kind {
            iotlb_type::BATCH_BEGIN => self.batch = true,
            iotlb_type::BATCH_END => {
                self.batch = false;
                self.before_remaps = None;
            }
            iotlb_type::UPDATE => {
                assert!(!self.mapped.iter().any(overlaps), "{msg:x?} overlaps in {:x?}", self.mapped);
                self.change(|mapped| {
                    mapped.insert(msg.iova, (msg.size, msg.uaddr, msg.perm));
                });
            }
            iotlb_type::INVALIDATE => {
                assert!(self.mapped.contains_key(&msg.iova), "{msg:x?} removes nothing");
                self.change(|mapped| {
                    mapped.remove(&msg.iova);
                });
            }
            iotlb_type::REMAP => {
                if self.batch && self.before_remaps.is_none() {
                    self.before_remaps = Some(self.mapped.clone());
                }
                let entry = self.mapped.get_mut(&msg.iova).expect("REMAP of what is not mapped");
                assert_eq!((entry.0, msg.perm), (msg.size, Perm::NONE));
                entry.1 = msg.uaddr;
            }
            kind => panic!("message {kind}"),
        }
        if !self.batch {
            self.installed = self.mapped.clone();
        }
        Ok(())
    }

    fn change(&mut self, change: impl Fn(&mut BTreeMap<u64, (u64, u64, Perm)>)) {
        change(&mut self.mapped);
        self.before_remaps.as_mut().into_iter().for_each(change);
    }
}

fn page_of(regions: &Regions, page: u64) -> Option<(u64, u64, Perm)> {
    let region = regions.at(page * PAGE)?;
    Some((region.range().first(), region.uaddr(), region.perm()))
}

proptest! {
    /// After the messages the device has the new table; regions that are the same get no message; a failure at any message leaves the
    /// old table.
    #[test]
    fn a_device_has_either_table(
        old in specs(), new in specs(), same in 0..10_usize, batch: bool, fails in 0..24_usize,
    ) {
        // Some regions are in both tables.
        let new: Vec<Spec> = old.iter().take(same).copied().chain(new).collect();
        let (old, new) = (table(&old, 0), table(&new, 3));
        let difference = Difference::of(old.list(), new.list());
        let change = difference.change(old.list(), new.list());
        let steps = difference.steps(old.list(), new.list(), true);

        let mut device = Device::with(&old);
        apply(&steps, batch, |msg| device.send(msg)).unwrap();
        let expected = Device::with(&new);
        prop_assert_eq!(&device.installed, &expected.mapped);
        for page in 0..32 {
            if page_of(&old, page).is_some() && page_of(&old, page) == page_of(&new, page) {
                let (first, ..) = page_of(&old, page).unwrap();
                let (old, new) = (old.at(first).unwrap(), new.at(first).unwrap());
                let touched = device.messages.iter().any(|msg| msg.size > 0 && msg.iova == first);
                prop_assert!(!touched || old.range() != new.range(), "{first:#x} is in both and was touched");
            }
        }
        let steps_sent = device.messages.iter().filter(|msg| msg.size > 0).count();
        let counted = change.unmapped.len() + change.mapped.len() + change.moved.len();
        prop_assert_eq!(steps_sent, counted);
        prop_assert_eq!(change.kept + change.unmapped.len() + change.moved.len(), old.list().len());
        prop_assert_eq!(change.kept + change.mapped.len() + change.moved.len(), new.list().len());

        let count = device.messages.len();
        let mut device = Device { fails: vec![fails], ..Device::with(&old) };
        match apply(&steps, batch, |msg| device.send(msg)) {
            Ok(()) => prop_assert!(fails >= count),
            Err(failed) => {
                prop_assert!(fails < count);
                prop_assert!(failed.lost.is_empty(), "{:?}", failed.lost);
                prop_assert_eq!(&device.mapped, &Device::with(&old).mapped);
                prop_assert_eq!(&device.installed, &Device::with(&old).mapped);
                prop_assert!(!device.batch);
            }
        }
    }
}

#[test]
fn what_cannot_be_taken_back_is_named() {
    let old = table(&[(0, 0, 0, 2, true), (0, 4, 4, 2, true)], 0);
    let new = table(&[(2, 0, 0, 2, true), (2, 4, 4, 2, true)], 0);
    let difference = Difference::of(old.list(), new.list());
    let steps = difference.steps(old.list(), new.list(), true);
    assert_eq!(steps.len(), 4);
    // BEGIN, two INVALIDATEs, an UPDATE, one that fails; then an INVALIDATE, and an UPDATE that fails.
    let mut device = Device { fails: vec![4, 6], ..Device::with(&old) };
    let failed = apply(&steps, true, |msg| device.send(msg)).unwrap_err();
    assert!(
        failed.error.to_string().contains("map region \"region 1\" at [0x4000, 0x5fff]"),
        "{}",
        failed.error
    );
    assert_eq!(failed.lost, ["region 1"]);
    assert_eq!(device.installed.len(), 1);
}

#[test]
fn a_region_under_another_name_is_the_same() {
    let old = table(&[(0, 0, 0, 2, true), (0, 8, 8, 2, true)], 0);
    let new = table(&[(0, 0, 0, 2, true), (1, 8, 8, 2, true), (0, 12, 12, 1, false)], 5);
    let difference = Difference::of(old.list(), new.list());
    assert_eq!((&difference.old[..], &difference.new[..]), (&[Fate::Kept(0), Fate::Moved(1)][..], &[2][..]));
    let change = difference.change(old.list(), new.list());
    assert_eq!((change.kept, &change.moved[..]), (1, &["region 6".to_owned()][..]));
    let told = |remaps| difference.steps(old.list(), new.list(), remaps).len();
    assert_eq!((told(true), told(false)), (2, 1), "a device on objects is not told of other addresses");
}
