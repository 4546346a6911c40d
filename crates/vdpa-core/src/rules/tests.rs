use proptest::prelude::*;

use super::*;
use crate::features::BackendFeatures;

#[test]
fn an_update_may_end_at_the_last_byte() {
    let all = (0, u64::MAX);
    assert_eq!(update_last(0xffff_ffff_ffff_f000, 4096, all), Some(u64::MAX));
    assert_eq!(update_last(0xffff_ffff_ffff_f000, 4097, all), None);
    assert_eq!(update_last(u64::MAX, 1, all), Some(u64::MAX));
    assert_eq!(update_last(5, 0, all), None);
    assert_eq!(update_last(0x0fff, 2, (0x1000, 0x2000)), None);
    assert_eq!(update_last(0x2000, 1, (0x1000, 0x2000)), Some(0x2000));
    assert_eq!(update_last(0x2000, 2, (0x1000, 0x2000)), None);
}

#[test]
fn an_invalidate_wraps() {
    assert_eq!(invalidate_last(0, 0), u64::MAX);
    assert_eq!(invalidate_last(0x1000, 0), 0x0fff);
    assert_eq!(invalidate_last(0xffff_ffff_ffff_f000, 4096), u64::MAX);
    assert_eq!(invalidate_last(0xffff_ffff_ffff_f000, 8192), 0x0fff);
}

#[test]
fn pages_are_counted_from_the_page_of_the_first_byte() {
    assert_eq!(pages_to_pin(0xffff_ffff_ffff_f000, 4096), Some(1));
    assert_eq!(pages_to_pin(1, 4096), Some(2));
    assert_eq!(pages_to_pin(0, 0), None);
    assert_eq!(pages_to_pin(1, u64::MAX), None);
    assert_eq!(pages_to_pin(0, u64::MAX), Some(1 << 52));
    assert!(!exceeds(3, 5, 8) && exceeds(4, 5, 8) && exceeds(u64::MAX, 1, u64::MAX));
}

#[test]
fn runs_join_only_what_follows() {
    let mut run = Run { first: 7, pages: 1 };
    assert!(run.join(Run { first: 8, pages: 2 }) && run == Run { first: 7, pages: 3 });
    assert!(!run.join(Run { first: 9, pages: 1 }) && !run.join(Run { first: 11, pages: 1 }));
    assert!(!Run { first: u64::MAX, pages: 1 }.join(Run { first: 0, pages: 1 }));
    assert!(!Run { first: 0, pages: u64::MAX }.join(Run { first: u64::MAX, pages: 1 }));
}

#[test]
fn a_hole_belongs_to_the_area_after_it() {
    let area = Area { start: 0x5000, end: 0x9000, offset: 0x2000 };
    assert_eq!(piece(0x6000, 0x1000, area), Piece { size: 0x1000, offset: 0x3000 });
    assert_eq!(piece(0x8000, u64::MAX, area), Piece { size: 0x1000, offset: 0x5000 });
    assert_eq!(piece(0x4000, 0x2000, area), Piece { size: 0x2000, offset: 0x1000 });
    assert_eq!(piece(0x1000, 1, area).offset, 0x2000_u64.wrapping_sub(0x4000));
    assert_eq!(piece(u64::MAX, 1, area).size, 0);
}

#[test]
fn bits_are_those_of_the_crate() {
    assert_eq!(backend::IOTLB_PERSIST, BackendFeatures::of(&[BackendFeatures::IOTLB_PERSIST]).0);
    assert_eq!(backend::NEW_OWNER, BackendFeatures::of(&[BackendFeatures::NEW_OWNER]).0);
    assert_eq!(backend::IOTLB_REMAP, BackendFeatures::of(&[BackendFeatures::IOTLB_REMAP]).0);
}

#[test]
fn remap_is_offered_where_an_address_can_be_installed() {
    use backend::{IOTLB_REMAP, NEW_OWNER};
    let both = NEW_OWNER | IOTLB_REMAP;
    assert_eq!(live_bits(0, Listed::ByAddress, true, Path::Snapshot), both);
    assert_eq!(live_bits(0, Listed::ByAddress, false, Path::Snapshot), NEW_OWNER);
    assert_eq!(live_bits(0, Listed::ByAddress, true, Path::Incremental), 0);
    assert_eq!(live_bits(0, Listed::Independent, true, Path::Snapshot), NEW_OWNER);
    assert_eq!(live_bits(0, Listed::No, true, Path::Snapshot), 0);
    assert_eq!(live_bits(both | 1, Listed::No, true, Path::Snapshot), both);
    assert_eq!(live_bits(both, Listed::No, false, Path::Snapshot), NEW_OWNER);
    assert_eq!(live_bits(both, Listed::No, false, Path::Platform), NEW_OWNER);
}

#[test]
fn a_reset_keeps_the_map_for_clients_of_the_series() {
    assert!(reset_cleans_map(0) && reset_cleans_map(0x7e));
    assert!(!reset_cleans_map(backend::IOTLB_PERSIST) && !reset_cleans_map(backend::NEW_OWNER));
}

#[test]
fn new_owner_checks_in_this_order() {
    let all_wrong = NewOwner { offered: false, owned: false, by_owner: true, strict: true, runs: true };
    let refusals = [
        (all_wrong, Err(Refusal::NotOffered), 95),
        (NewOwner { offered: true, ..all_wrong }, Err(Refusal::NoOwner), 22),
        (NewOwner { offered: true, owned: true, ..all_wrong }, Err(Refusal::IsOwner), 16),
        (NewOwner { offered: true, owned: true, by_owner: false, ..all_wrong }, Err(Refusal::Runs), 16),
    ];
    for (facts, refusal, errno) in refusals {
        assert_eq!(facts.check(), refusal);
        assert_eq!(facts.check().map_err(Refusal::errno), Err(errno));
    }
    let running = NewOwner { offered: true, owned: true, runs: true, ..NewOwner::default() };
    assert_eq!(running.check(), Ok(()));
    assert_eq!(NewOwner { strict: true, runs: false, ..running }.check(), Ok(()));
}

#[test]
fn remap_takes_a_whole_update_or_one_mapping() {
    let update = Some((10, 49));
    let hit = |first, last, record, whole| Mapped { first, last, record, whole };
    let hits = [hit(10, 19, 'a', update), hit(20, 29, 'b', Some((20, 29))), hit(40, 49, 'a', update)];
    assert_eq!(remap_unit(10, 49, hits), Some(Unit::Record('a')));
    assert_eq!(remap_unit(10, 19, hits.into_iter().take(1)), Some(Unit::Entry('a')));
    assert_eq!(remap_unit(20, 29, hits.into_iter().skip(1).take(1)), Some(Unit::Record('b')));
    assert_eq!(remap_unit(10, 29, hits.into_iter().take(2)), None);
    let broken = hits.map(|hit| Mapped { whole: None, ..hit });
    assert_eq!(remap_unit(10, 49, broken), None);
    assert_eq!(remap_unit(10, 49, [] as [Mapped<char>; 0]), None);
    assert_eq!(remap_arguments(0, 1), Ok(()));
    assert!(remap_arguments(1, 1).is_err() && remap_arguments(0, 0).is_err());
}

/// Ascending pieces of up to 60 bytes: gap, length, object, offset in the object.
fn pieces() -> impl Strategy<Value = Vec<(u64, u64, (u8, u64))>> {
    prop::collection::vec((0..3_u64, 1..6_u64, 0..2_u8, 0..3_u64), 0..8).prop_map(|list| {
        let mut at = 0;
        let place = |(gap, length, object, offset)| {
            let first = at + gap;
            at = first + length;
            (first, at - 1, (object, offset))
        };
        list.into_iter().map(place).collect()
    })
}

/// The byte behind an address.
fn byte(pieces: &[(u64, u64, (u8, u64))], at: u64) -> Option<(u8, u64)> {
    let piece = pieces.iter().find(|(first, last, _)| (*first..=*last).contains(&at))?;
    Some((piece.2.0, piece.2.1 + at - piece.0))
}

proptest! {
    #[test]
    fn same_memory_is_byte_by_byte(old in pieces(), new in pieces()) {
        let expected = (0..64).all(|at| byte(&old, at).is_none_or(|old| byte(&new, at) == Some(old)));
        let at_piece = |(object, offset): &(u8, u64), i: u64| (*object, offset + i);
        // Pieces of one object that join are compared byte by byte only at their borders, which is enough.
        let same = |a: &(u8, u64), i, b: &(u8, u64), j| at_piece(a, i) == at_piece(b, j);
        prop_assert_eq!(same_memory(old, new, same), expected);
    }

    #[test]
    fn no_number_stops_the_program(a: u64, b: u64, c: u64, d: u64) {
        let _ = (update_last(a, b, (c, d)), invalidate_last(a, b), pages_to_pin(a, b), exceeds(a, b, c));
        let _ = piece(a, b, Area { start: c, end: d, offset: a ^ d });
        let _ = Run { first: a, pages: b }.join(Run { first: c, pages: d });
    }
}
