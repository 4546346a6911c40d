//! SET_MEM_TABLE where it maps memory: what is kept, what is charged, and that all or nothing happens.

use proptest::prelude::*;

use super::*;

const AT: u64 = 0x10_0000;

fn region(page: u64, pages: u64, uaddr: u64) -> MemRegion {
    MemRegion { iova: page * PAGE, size: pages * PAGE, uaddr }
}

impl Rig {
    fn table(&mut self, regions: &[MemRegion]) -> Result<(), MemTableError> {
        let owner = self.owner.clone();
        let result = self.device.set_mem_table(&owner, regions);
        assert_eq!(self.device.check_invariants(), Ok(()));
        result
    }

    /// First page, pages and address of each entry that the parent has.
    fn pages(&self) -> Vec<(u64, u64, u64)> {
        let row = |(first, last, uaddr, stale): (u64, u64, u64, bool)| {
            assert!(!stale);
            (first / PAGE, (last + 1 - first) / PAGE, uaddr)
        };
        self.last_table().into_iter().map(row).collect()
    }
}

#[test]
fn only_the_owner_and_outside_of_batches() {
    let mut rig = Rig::new(AddressMode::Objects);
    let refused = rig.device.set_mem_table(&TestProcess::new(), &[]);
    assert_eq!(refused, Err(MemTableError::NotOwner));
    assert_eq!(refused.unwrap_err().errno(), Errno::PERM);
    rig.send(iotlb_type::BATCH_BEGIN, 0, 0, 0).unwrap();
    assert_eq!(rig.table(&[]).unwrap_err().errno(), Errno::BUSY);
    rig.send(iotlb_type::BATCH_END, 0, 0, 0).unwrap();
    rig.table(&[]).unwrap();
}

#[test]
fn what_is_in_both_tables_stays_pinned() {
    let mut rig = Rig::new(AddressMode::Pinned);
    rig.owner.set_memlock_pages(8);
    rig.table(&[region(0, 4, AT), region(8, 4, AT + 4 * PAGE)]).unwrap();
    assert_eq!(rig.device.pinned_pages(), 8);
    // Nothing may be pinned any more: what stays was not pinned again.
    rig.owner.set_memlock_pages(0);
    rig.table(&[region(8, 4, AT + 4 * PAGE)]).unwrap();
    assert_eq!((rig.pages(), rig.device.pinned_pages()), (vec![(8, 4, AT + 4 * PAGE)], 4));
    let refused = rig.table(&[region(0, 1, AT), region(8, 4, AT + 4 * PAGE)]).unwrap_err();
    assert!(
        matches!(refused, MemTableError::Table(IotlbError::MemLock { pages: 1, pinned: 4, .. })),
        "{refused}"
    );
    assert_eq!((refused.errno(), rig.device.pinned_pages()), (Errno::NOMEM, 4));
    // What is put elsewhere needs no more pages than it gives back.
    rig.owner.set_memlock_pages(4);
    rig.table(&[region(20, 4, AT)]).unwrap();
    assert_eq!(rig.pages(), [(20, 4, AT)]);
}

#[test]
fn a_region_that_grows_keeps_what_it_has() {
    let mut rig = Rig::new(AddressMode::Pinned);
    rig.table(&[region(4, 4, AT + 4 * PAGE)]).unwrap();
    rig.owner.set_memlock_pages(8);
    rig.table(&[region(2, 8, AT + 2 * PAGE)]).unwrap();
    let grown = [(2, 2, AT + 2 * PAGE), (4, 4, AT + 4 * PAGE), (8, 2, AT + 8 * PAGE)];
    assert_eq!((rig.pages(), rig.device.pinned_pages()), (grown.to_vec(), 8));
    // One that shrinks does not: entries are not split.
    rig.table(&[region(5, 4, AT + 5 * PAGE)]).unwrap();
    assert_eq!((rig.pages(), rig.device.pinned_pages()), (vec![(5, 4, AT + 5 * PAGE)], 4));
}

#[test]
fn another_address_of_the_same_memory_is_a_new_address_only() {
    let vmas = [(AT, 4, 1, 0, true), (2 * AT, 4, 1, 0, true), (3 * AT, 4, 2, 0, true)];
    for mode in [AddressMode::OwnerAddresses, AddressMode::Pinned] {
        let mut rig = Rig::with(profile(mode), process(&vmas));
        rig.table(&[region(0, 4, AT)]).unwrap();
        rig.owner.set_memlock_pages(0);
        rig.table(&[region(0, 4, 2 * AT)]).unwrap();
        assert_eq!(rig.pages(), [(0, 4, 2 * AT)], "{mode:?}");
        rig.owner.set_memlock_pages(4);
        rig.table(&[region(0, 4, 3 * AT)]).unwrap();
        assert_eq!(rig.pages(), [(0, 4, 3 * AT)]);
        // After a change of owner, the table is how addresses of the new one are told.
        let successor = process(&[(5 * AT, 4, 2, 0, true)]);
        rig.device.new_owner(&successor).unwrap();
        rig.device.set_mem_table(&successor, &[region(0, 4, 5 * AT)]).unwrap();
        assert_eq!(rig.pages(), [(0, 4, 5 * AT)]);
        assert_eq!(rig.device.mapped().stale, 0);
    }
}

#[test]
fn all_or_nothing() {
    let mut rig = Rig::new(AddressMode::Pinned);
    rig.send(iotlb_type::UPDATE, 0, 2 * PAGE, AT).unwrap();
    rig.send(iotlb_type::UPDATE, 2 * PAGE, 2 * PAGE, AT + 4 * PAGE).unwrap();
    let before = (rig.pages(), rig.device.pinned_pages());
    for (table, word) in [
        (vec![region(0, 2, AT), region(1, 2, AT)], "overlaps"),
        (vec![region(0, 2, AT), region(4, 2, 0x900_0000)], "no accessible memory"),
        ((0..17).map(|page| region(2 * page, 1, AT)).collect(), "entries"),
        (vec![region(u64::MAX / PAGE, 1, AT), region(1, 0, AT)], "outside"),
    ] {
        let error = rig.table(&table).unwrap_err();
        assert!(error.to_string().contains(word) && error.errno() == Errno::FAULT, "{error}");
        assert_eq!((rig.pages(), rig.device.pinned_pages()), before);
    }
    rig.parent.lock().unwrap().refuse = 1;
    let error = rig.table(&[region(1, 9, AT)]).unwrap_err();
    assert_eq!(error, MemTableError::Table(IotlbError::Parent { errno: Errno::NOSPC }));
    assert_eq!((rig.pages(), rig.device.pinned_pages()), before);
    rig.table(&[]).unwrap();
    assert_eq!((rig.pages(), rig.device.pinned_pages()), (vec![], 0));
}

proptest! {
    /// The parent has the bytes of the table and no others, whatever was mapped before and however the client has its memory mapped.
    #[test]
    fn the_parent_has_what_the_table_says(
        mode in 0..4_u8,
        tables in prop::collection::vec((prop::collection::vec((0..20_u64, 1..6_u64, 0..20_u64), 0..5), 0..3_usize), 1..8),
    ) {
        let mode = [
            AddressMode::OwnerAddresses, AddressMode::Objects, AddressMode::Pinned, AddressMode::PinnedPages,
        ][usize::from(mode)];
        // The same pages twice, in one mapping and in three; and other pages.
        let split = [(2 * AT, 4, 1, 0, true), (2 * AT + 4 * PAGE, 4, 1, 4, true), (2 * AT + 8 * PAGE, 8, 1, 8, true)];
        let vmas = [&[(AT, 16, 1, 0, true)][..], &split, &[(3 * AT, 16, 2, 0, true)]].concat();
        let mut rig = Rig::with(Profile { max_iotlb_entries: 64, ..profile(mode) }, process(&vmas));
        for (regions, refuse) in tables {
            let place = |at: u64| if at < 8 { AT + at * PAGE } else if at < 14 { 2 * AT + (at - 8) * PAGE } else { 3 * AT };
            let regions: Vec<_> = regions.iter().map(|&(page, pages, at)| region(page, pages, place(at))).collect();
            let overlap = regions.iter().enumerate().any(|(i, a)| {
                regions.iter().skip(i + 1).any(|b| a.iova < b.iova + b.size && b.iova < a.iova + a.size)
            });
            let before = rig.pages();
            rig.parent.lock().unwrap().refuse = refuse.saturating_sub(1);
            let result = rig.table(&regions);
            rig.parent.lock().unwrap().refuse = 0;
            if overlap || refuse == 2 {
                prop_assert!(result.is_err());
                if !overlap {
                    prop_assert_eq!(rig.pages(), before);
                }
                continue;
            }
            prop_assert_eq!(result, Ok(()));
            let rows = rig.pages();
            for page in 0..40 {
                let mapped = rows.iter().find(|(first, pages, _)| (*first..first + pages).contains(&page));
                let wanted = regions.iter().find(|region| (region.iova..region.iova + region.size).contains(&(page * PAGE)));
                let mapped = mapped.map(|(first, _, uaddr)| uaddr + (page - first) * PAGE);
                let wanted = wanted.map(|region| region.uaddr + (page * PAGE - region.iova));
                prop_assert_eq!(mapped, wanted, "page {} of {:x?}", page, rows);
            }
        }
    }
}
