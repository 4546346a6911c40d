//! Lookup of the range that contains an address.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use rangemap::RangeInclusiveMap;
use vdpa_core::iotlb::{Layered, Lookup, RangeChange, Tree};
use vdpa_core::types::IovaRange;

use crate::measure::{Contender, Make};

/// Number of addresses that are looked up again and again: more than the branch predictor can learn.
const ADDRESSES: usize = 1 << 16;

#[derive(Clone, Copy)]
enum Layout {
    /// Ranges of 4 to 64 KiB with gaps of up to the same size, as a guest behind a virtual IOMMU maps them.
    Spread,
    /// Four clusters of such ranges, terabytes apart, as a program maps its own addresses.
    Clusters,
}

#[derive(Clone, Copy)]
enum Order {
    Random,
    Sequential,
}

/// A small generator (xorshift64*): the same addresses in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}

fn ranges(count: u64, layout: Layout) -> Vec<IovaRange> {
    let mut random = Random(count + 1);
    let mut at = 0x10_0000;
    let range = |i: u64| {
        if matches!(layout, Layout::Clusters) && i > 0 && i.is_multiple_of(count.div_ceil(4)) {
            at += 0x200_0000_0000;
        }
        let pages = 1 + random.next() % 16;
        let range = IovaRange::from_size(at, pages << 12).unwrap();
        at += (pages + random.next() % (pages + 1)) << 12;
        range
    };
    (0..count).map(range).collect()
}

fn addresses(ranges: &[IovaRange], order: Order) -> Vec<u64> {
    let mut random = Random(7);
    let count = ranges.len() as u64;
    let address = |i: u64| {
        let index = match order {
            Order::Random => random.next() % count,
            Order::Sequential => i / 4 % count,
        };
        let range = ranges[usize::try_from(index).unwrap()];
        range.first() + random.next() % range.size()
    };
    (0..ADDRESSES as u64).map(address).collect()
}

/// A contender that calls `find` for one address after the other.
fn contender(
    name: &'static str,
    addresses: Vec<u64>,
    find: impl Fn(u64) -> Option<usize> + 'static,
) -> Contender {
    let mut next = addresses.into_iter().cycle();
    let mut block = vec![0; 256];
    Contender::new(name, move |times| {
        let mut taken = Duration::ZERO;
        for _ in 0..times.div_ceil(256) {
            block.fill_with(|| next.next().unwrap());
            let started = Instant::now();
            let sum =
                black_box(&block).iter().fold(0usize, |sum, &iova| sum.wrapping_add(find(iova).unwrap()));
            black_box(sum);
            taken += started.elapsed();
        }
        taken * u32::try_from(times).unwrap() / u32::try_from(times.div_ceil(256) * 256).unwrap()
    })
}

#[inline]
fn found(lookup: &Lookup<usize>, iova: u64) -> Option<usize> {
    lookup.find(iova).map(|&(_, index)| index)
}

fn contenders(count: u64, layout: Layout, order: Order) -> Vec<Contender> {
    let ranges = ranges(count, layout);
    let addresses = addresses(&ranges, order);
    let lookup = Lookup::new(ranges.iter().copied().zip(0..).collect());
    let tree: BTreeMap<u64, (u64, usize)> =
        ranges.iter().zip(0..).map(|(range, index)| (range.first(), (range.last(), index))).collect();
    let shared: Tree<(u64, usize)> =
        ranges.iter().zip(0..).map(|(range, index)| (range.first(), (range.last(), index))).collect();
    let map: RangeInclusiveMap<u64, usize> =
        ranges.iter().zip(0..).map(|(range, index)| (range.first()..=range.last(), index)).collect();
    let firsts: Vec<u64> = ranges.iter().map(|range| range.first()).collect();
    for &iova in &addresses {
        assert_eq!(found(&lookup, iova), map.get(&iova).copied());
    }
    let values: Vec<_> = ranges.iter().copied().zip(0..).collect();
    let layered = Layered::new(values.clone());
    let changed = changed(&layered, &values);
    let find = |layered: &Layered<usize>, iova| layered.find(iova).map(|(_, &index)| index);
    vec![
        contender("vdpa-core Lookup", addresses.clone(), move |iova| found(&lookup, iova)),
        contender("vdpa-core Layered", addresses.clone(), move |iova| find(&layered, iova)),
        contender("vdpa-core Layered, changed", addresses.clone(), move |iova| find(&changed, iova)),
        contender("vdpa-core Tree", addresses.clone(), move |iova| {
            let (_, &(last, index)) = shared.floor(iova)?;
            (iova <= last).then_some(index)
        }),
        contender("sorted array, binary search", addresses.clone(), move |iova| {
            let index = firsts.partition_point(|&first| first <= iova).checked_sub(1)?;
            ranges.get(index).filter(|range| iova <= range.last()).map(|_| index)
        }),
        contender("BTreeMap", addresses.clone(), move |iova| {
            let (_, &(last, index)) = tree.range(..=iova).next_back()?;
            (iova <= last).then_some(index)
        }),
        contender("rangemap", addresses, move |iova| map.get(&iova).copied()),
    ]
}

/// The same ranges after every 16th was removed and added again, one by one: half of the changes after which a new index is made.
fn changed(layered: &Layered<usize>, values: &[(IovaRange, usize)]) -> Layered<usize> {
    let mut layered = layered.clone();
    for value in values.iter().step_by(16) {
        for change in [(Some(value.0), None), (None, Some(*value))] as [RangeChange<usize>; 2] {
            layered = layered.changed(&[change], values.len(), || values.to_vec());
        }
    }
    layered
}

/// One table per number of ranges and layout.
pub(crate) fn tables() -> Vec<(String, Make)> {
    let mut tables: Vec<(String, Make)> = Vec::new();
    for count in [32, 256, 4096, 65_536] {
        for (text, layout, order) in [
            ("random", Layout::Spread, Order::Random),
            ("random, clustered", Layout::Clusters, Order::Random),
            ("sequential", Layout::Spread, Order::Sequential),
        ] {
            let make = Box::new(move || contenders(count, layout, order));
            tables.push((format!("look-up, {count} ranges, {text}"), make));
        }
    }
    tables
}
