//! Operations on one translation table, compared with a plain list of ranges.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::fuzzing::RecordTable;
use vdpa_core::types::IovaRange;

#[derive(Arbitrary, Debug)]
enum Op {
    /// An UPDATE in fragments: the cuts are offsets from the start.
    Update {
        first: u8,
        last: u8,
        cuts: [u8; 3],
    },
    /// An UPDATE in one fragment with any addresses.
    UpdateWide {
        first: u64,
        last: u64,
    },
    Invalidate {
        first: u8,
        last: u8,
    },
    InvalidateWide {
        first: u64,
        last: u64,
    },
    /// As a REMAP: removes a record, or one entry of it, and inserts other fragments in its place.
    Refill {
        iova: u8,
        whole: bool,
        cut: u8,
    },
    Stale(bool),
    Get(u64),
}

fn ranges(first: u64, last: u64, cuts: &[u8]) -> Vec<IovaRange> {
    let mut at: Vec<u64> = cuts.iter().map(|cut| first.saturating_add(u64::from(*cut))).collect();
    at.retain(|cut| first < *cut && *cut <= last);
    at.sort_unstable();
    at.dedup();
    let starts = std::iter::once(first).chain(at.iter().copied());
    let ends = at.iter().map(|cut| cut - 1).chain(std::iter::once(last));
    starts.zip(ends).filter_map(|(first, last)| IovaRange::new(first, last)).collect()
}

fuzz_target!(|ops: Vec<Op>| {
    let mut table = RecordTable::default();
    let mut model: Vec<(u64, u64)> = Vec::new();
    for op in ops.iter().take(200) {
        match *op {
            Op::Update { first, last, cuts } => {
                update(&mut table, &mut model, first.into(), last.into(), &cuts)
            }
            Op::UpdateWide { first, last } => update(&mut table, &mut model, first, last, &[]),
            Op::Invalidate { first, last } => remove(&mut table, &mut model, first.into(), last.into()),
            Op::InvalidateWide { first, last } => remove(&mut table, &mut model, first, last),
            Op::Refill { iova, whole, cut } => {
                if let Some((taken, put)) = table.refill(iova.into(), whole, cut.into()) {
                    model.retain(|&(first, last)| {
                        !taken.iter().any(|r| (r.first(), r.last()) == (first, last))
                    });
                    model.extend(put.iter().map(|r| (r.first(), r.last())));
                }
            }
            Op::Stale(stale) => table.table.mark_all_for_fuzzing(stale),
            Op::Get(iova) => {
                let hit = model.iter().find(|&&(first, last)| first <= iova && iova <= last);
                let entry = table.table.get(iova).map(|e| (e.range.first(), e.range.last()));
                assert_eq!(entry.as_ref(), hit);
            }
        }
        model.sort_unstable();
        let now: Vec<_> = table.table.iter().map(|e| (e.range.first(), e.range.last())).collect();
        assert_eq!(now, model, "after {op:?}");
        assert_eq!(table.table.check(), Ok(()), "after {op:?}");
    }
});

fn update(table: &mut RecordTable, model: &mut Vec<(u64, u64)>, first: u64, last: u64, cuts: &[u8]) {
    let Some(range) = IovaRange::new(first, last) else { return };
    let free = !model.iter().any(|&(f, l)| f <= last && first <= l);
    assert_eq!(table.table.overlapping(range).is_empty(), free);
    if free {
        let fragments = ranges(first, last, cuts);
        table.update(range, &fragments);
        model.extend(fragments.iter().map(|r| (r.first(), r.last())));
    }
}

/// Removes overlapping entries by the rule of the kernel's interval tree, also for inverted intervals.
fn remove(table: &mut RecordTable, model: &mut Vec<(u64, u64)>, first: u64, last: u64) {
    let before = model.len();
    model.retain(|&(f, l)| !(f <= last && first <= l));
    assert_eq!(table.remove(first, last), before - model.len());
}
