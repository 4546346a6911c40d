//! Tables that a front end replaces as a whole.

use super::*;
use crate::device::WholeMapping;
use crate::host::AddressSpace;

fn row(rig: &Rig, first: u64, pages: u64, uaddr: u64) -> WholeMapping<TestPiece> {
    let range = IovaRange::from_size(first, pages * PAGE).unwrap();
    let pieces = rig.owner.space().resolve(uaddr, pages * PAGE, Perm::RW).unwrap();
    (range, Perm::RW, pieces[0].memory.clone())
}

#[test]
fn a_table_is_replaced_as_a_whole_or_stays() {
    let mut rig = Rig::new(AddressMode::Objects);
    rig.send(iotlb_type::UPDATE, 0, 4 * PAGE, 0x10_0000).unwrap();
    let rows = vec![row(&rig, 9 * PAGE, 2, 0x10_0000), row(&rig, PAGE, 3, 0x10_2000)];
    rig.device.replace_mappings(&rig.owner, A0, rows.clone()).unwrap();
    let expected = [(PAGE, 4 * PAGE - 1, 0, false), (9 * PAGE, 11 * PAGE - 1, 0, false)];
    assert_eq!(rig.last_table(), expected);
    let overlapping = [rows.clone(), vec![row(&rig, 3 * PAGE, 1, 0x10_0000)]].concat();
    let refused = rig.device.replace_mappings(&rig.owner, A0, overlapping);
    assert!(matches!(refused, Err(IotlbError::Overlap { .. })), "{refused:?}");
    let many = (0..17).map(|at| row(&rig, at * PAGE, 1, 0x10_0000)).collect();
    let refused = rig.device.replace_mappings(&rig.owner, A0, many);
    assert_eq!(refused, Err(IotlbError::Full { entries: 17, limit: 16 }));
    let stranger = process(&[]);
    assert_eq!(rig.device.replace_mappings(&stranger, A0, Vec::new()), Err(IotlbError::NotOwner));
    assert!(matches!(
        rig.device.replace_mappings(&rig.owner, Asid(2), Vec::new()),
        Err(IotlbError::NoSuchAsid { .. })
    ));
    assert_eq!((rig.last_table(), rig.device.mapped().entries), (expected.to_vec(), 2));
    rig.device.replace_mappings(&rig.owner, A0, Vec::new()).unwrap();
    assert!(rig.last_table().is_empty());
}

#[test]
fn a_table_that_the_parent_refuses_leaves_nothing_mapped_or_charged() {
    let mut rig = Rig::new(AddressMode::Pinned);
    let rows = vec![row(&rig, 0, 4, 0x10_0000)];
    rig.device.replace_mappings(&rig.owner, A0, rows.clone()).unwrap();
    assert_eq!(rig.device.pinned_pages(), 4);
    rig.device.replace_mappings(&rig.owner, A0, rows.clone()).unwrap();
    assert_eq!(rig.device.pinned_pages(), 4, "those of the table before are not charged any more");
    rig.parent.lock().unwrap().refuse = 1;
    let refused = rig.device.replace_mappings(&rig.owner, A0, rows);
    assert_eq!(refused, Err(IotlbError::Parent { errno: Errno::NOSPC }));
    assert_eq!((rig.device.pinned_pages(), rig.device.mapped().entries), (0, 0));
}
