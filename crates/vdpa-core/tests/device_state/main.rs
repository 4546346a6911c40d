//! Saved state of a device: any requests, saved and restored at any point, and what follows is the same on both devices.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its device must fail")]

mod golden;
mod handover;
mod moving;
mod parent;
mod records;
mod restore;
mod world;

use proptest::prelude::*;
use vdpa_core::device::state;

use self::parent::Kind;
use self::world::{Op, World};

/// One step: a request, and what is done after it.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// Nothing.
    Go,
    /// The device is restored from a snapshot.
    FromSnapshot,
    /// The device is restored from an early snapshot and all changes since.
    FromChanges,
    /// The device is quiesced and restored, and both go on.
    Quiesced,
}

fn then() -> impl Strategy<Value = Then> {
    prop_oneof![
        12 => Just(Then::Go),
        1 => Just(Then::FromSnapshot),
        1 => Just(Then::FromChanges),
        1 => Just(Then::Quiesced),
    ]
}

proptest! {
    #[test]
    fn a_restored_device_answers_as_the_original(
        kind in any_kind(),
        steps in prop::collection::vec((world::op(), then()), 1..60),
    ) {
        let mut original = World::new(&kind);
        original.step(&Op::Open);
        original.step(&Op::SetOwner(false));
        original.follow_changes();
        let mut restored: Option<World> = None;
        for (op, then) in steps {
            let answer = original.step(&op);
            original.follow_changes();
            if let Some(world) = &mut restored {
                prop_assert_eq!(world.step(&op), answer, "{:?}", op);
                world.follow_changes();
                prop_assert_eq!(world.everything(), original.everything(), "after {:?}", op);
            }
            let Some(mut world) = successor(&mut original, then) else { continue };
            prop_assert_eq!(world.everything(), original.everything(), "restored {:?} after {:?}", then, op);
            world.follow_changes();
            restored = Some(world);
        }
    }
}

fn any_kind() -> impl Strategy<Value = Kind> {
    let flags = any::<[bool; 9]>();
    (0..3u8, 0..4u8, flags, 1..12usize, 1..8usize).prop_map(|(way, mode, flags, entries, room)| Kind {
        way,
        mode,
        flags,
        entries,
        room,
    })
}

fn successor(original: &mut World, then: Then) -> Option<World> {
    let quiesced = match then {
        Then::Go => return None,
        Then::Quiesced => original.device.quiesce().unwrap(),
        Then::FromSnapshot | Then::FromChanges => Vec::new(),
    };
    let records = match then {
        Then::FromChanges => original.image.records(),
        _ => original.device.snapshot(&mut original.objects).unwrap(),
    };
    let bytes = state::encode_all(&records).unwrap();
    assert_eq!(state::decode_all(&bytes).unwrap(), records);
    let mut world = original.restore(&records).unwrap();
    if matches!(then, Then::Quiesced) {
        assert_eq!(world.device.stopped_queues(), quiesced);
        original.device.resume_queues(&[]).unwrap();
        original.follow_changes();
    }
    world.device.resume_queues(&quiesced).unwrap();
    Some(world)
}

#[test]
fn changes_cost_as_much_as_has_changed() {
    let kind = Kind { way: 0, mode: 0, flags: [true; 9], entries: 4096, room: 4096 };
    let mut world = World::new(&kind);
    world.step(&Op::Open);
    world.step(&Op::SetOwner(false));
    for page in 0..1000 {
        world.map(page * 2);
    }
    let first = world.device.take_changes(&mut world.objects).unwrap();
    assert!(first.len() > 1000, "the first call says everything");
    assert!(world.device.take_changes(&mut world.objects).unwrap().is_empty());
    world.map(1);
    let one = world.device.take_changes(&mut world.objects).unwrap();
    assert_eq!(one.len(), 2, "one mapping, one number of the next UPDATE: {one:?}");
    world.step(&Op::NewOwner(true));
    let owner = world.device.take_changes(&mut world.objects).unwrap();
    assert!(owner.len() <= 4, "all mappings are stale, in one record: {} records", owner.len());
    world.unmap_all();
    let none = world.device.take_changes(&mut world.objects).unwrap();
    assert!(none.len() <= 4, "all mappings are gone, in one record: {} records", none.len());
}

#[test]
fn changes_that_nobody_takes_are_not_kept_for_ever() {
    let kind = Kind { way: 1, mode: 1, flags: [true; 9], entries: 64, room: 64 };
    let mut world = World::new(&kind);
    world.step(&Op::Open);
    world.step(&Op::SetOwner(false));
    world.follow_changes();
    for _ in 0..40_000 {
        world.map(3);
        world.unmap_all();
    }
    let records = world.device.take_changes(&mut world.objects).unwrap();
    assert!(records.len() < 20, "the table as it is, and not {} changes", records.len());
    records.iter().for_each(|record| world.image.apply(record).unwrap());
    assert_eq!(world.image.records(), world.device.snapshot(&mut world.objects).unwrap());
    world.device.forget_changes();
    world.map(3);
    let records = world.device.take_changes(&mut world.objects).unwrap();
    assert!(matches!(records[0], state::Record::Device(_)));
}
