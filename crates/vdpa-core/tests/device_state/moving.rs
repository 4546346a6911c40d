//! A device that moves to another host: it is there what it was here, and bytes that are no state leave a device reset.

use proptest::prelude::*;
use vdpa_core::Errno;
use vdpa_core::device::moving::{MoveError, STATE_MAX};
use vdpa_core::device::state::{Record, RestoreError, decode_all, encode_all};
use vdpa_core::features::{Features, Status};
use vdpa_core::types::QueueIndex;

use super::any_kind;
use super::parent::Kind;
use super::world::{self, Op, World};

/// A device that a client has open.
fn opened(kind: &Kind) -> World {
    let mut world = World::new(kind);
    world.step(&Op::Open);
    world.step(&Op::SetOwner(false));
    world.follow_changes();
    world
}

/// What of a state is the same after it was loaded and saved again: all but DRIVER_OK and what comes with it.
fn without_status(state: &[u8]) -> Vec<Record> {
    let records = decode_all(state).unwrap();
    records.into_iter().filter(|record| !matches!(record, Record::Status { .. })).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_device_that_has_moved_is_what_it_was(
        kind in any_kind(),
        ops in prop::collection::vec(world::op(), 1..60),
    ) {
        let mut source = opened(&kind);
        for op in &ops {
            source.step(op);
        }
        source.step(&Op::Suspend);
        let state = match source.device.save_to_move() {
            Ok(state) => state,
            Err(MoveError::Failed) => {
                prop_assert!(ops.iter().any(|op| matches!(op, Op::Fail)));
                return Ok(());
            }
            Err(error) => {
                let runs = source.device.vring_infos().any(|info| info.running);
                prop_assert_eq!(matches!(error, MoveError::Running { .. }), runs, "{}", error);
                return Ok(());
            }
        };
        let mut target = opened(&kind);
        let loaded = target.device.load_moved(&state);
        // Saved changes and a snapshot agree.
        target.follow_changes();
        match loaded {
            Ok(()) => {
                let again = target.device.save_to_move().unwrap();
                prop_assert_eq!(without_status(&again), without_status(&state));
                let expected = Status(source.device.status().0 & !Status::DRIVER_OK.0);
                prop_assert_eq!(target.device.status(), expected);
                prop_assert_eq!(target.device.negotiated_features(), source.device.negotiated_features());
            }
            // A driver that sets what no ring has, or bits that mean nothing, has no device there either.
            Err(MoveError::State(RestoreError::Vring { .. } | RestoreError::Invalid { kind: "status", .. })) => {
                prop_assert_eq!(target.device.status(), Status::RESET);
            }
            Err(error) => return Err(TestCaseError::fail(error.to_string())),
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_damaged_state_is_loaded(
        ops in prop::collection::vec(world::op(), 1..30),
        at in any::<prop::sample::Index>(),
        bit in 0..8u32,
        cut in any::<prop::sample::Index>(),
    ) {
        let kind = Kind { way: 0, mode: 1, flags: [true; 9], entries: 8, room: 8 };
        let mut source = opened(&kind);
        for op in &ops {
            source.step(op);
        }
        source.step(&Op::Suspend);
        let Ok(state) = source.device.save_to_move() else { return Ok(()) };
        let mut target = opened(&kind);
        let mut damaged = state.clone();
        damaged[at.index(state.len())] ^= 1 << bit;
        for bytes in [&damaged[..], &state[..cut.index(state.len())], &[state.as_slice(), &state].concat()] {
            prop_assert!(target.device.load_moved(bytes).is_err());
            prop_assert_eq!(target.device.status(), Status::RESET);
            prop_assert_eq!(target.device.negotiated_features(), None);
            target.follow_changes();
        }
    }
}

const KIND: Kind = Kind {
    way: 0,
    mode: 1,
    flags: [true, true, false, false, false, false, false, false, true],
    entries: 8,
    room: 8,
};

/// A device with a ring, suspended, and its state.
fn suspended() -> (World, Vec<u8>) {
    let mut world = opened(&KIND);
    world.step(&Op::BringUp(false, 0));
    world.step(&Op::SetConfig(3, 2));
    let running = world.device.save_to_move().unwrap_err();
    assert_eq!(running, MoveError::Running { index: QueueIndex(0) });
    assert_eq!(running.errno(), Errno::BUSY);
    world.step(&Op::Suspend);
    let state = world.device.save_to_move().unwrap();
    (world, state)
}

/// Loads the state with some of its records changed.
fn load_changed(change: impl Fn(&mut Vec<Record>)) -> MoveError {
    let (_, state) = suspended();
    let mut records = decode_all(&state).unwrap();
    change(&mut records);
    let mut target = opened(&KIND);
    let error = target.device.load_moved(&encode_all(&records).unwrap()).unwrap_err();
    assert_eq!(target.device.status(), Status::RESET);
    target.device.load_moved(&state).unwrap();
    error
}

fn each(records: &mut [Record], change: impl Fn(&mut Record)) {
    records.iter_mut().for_each(change);
}

#[test]
fn each_reason_to_refuse_a_state_is_told() {
    let without = |name: &'static str| load_changed(move |records| records.retain(|r| r.kind().name != name));
    for name in ["features", "status", "parent", "config"] {
        assert_eq!(without(name), RestoreError::Missing { kind: name }.into());
    }
    assert!(without("device").to_string().contains("beginning of the sequence is missing"));
    assert!(without("vring").to_string().contains("not one for each queue"));
    assert!(without("group").to_string().contains("not one for each group"));
    let twice = load_changed(|records| records.push(records[1].clone()));
    assert!(twice.to_string().contains("there twice"), "{twice}");
    let stray = load_changed(|records| records.push(Record::Pinned { pages: 1 }));
    assert_eq!(stray, RestoreError::Stray { kind: "pinned" }.into());
    let shape = |change: fn(&mut vdpa_core::device::state::Shape)| {
        load_changed(move |records| {
            each(records, |record| {
                if let Record::Device(shape) = record {
                    change(shape);
                }
            });
        })
    };
    assert!(shape(|shape| shape.device_id = 1).to_string().contains("virtio id 1"));
    assert!(shape(|shape| shape.queues = 9).to_string().contains("9 queues"));
    assert!(shape(|shape| shape.config_size = 4).to_string().contains("not all of configuration space"));
    let features = load_changed(|records| {
        each(records, |record| {
            if let Record::Features { in_force, .. } = record {
                *in_force = in_force.map(|word| word.with(Features::BLK_FLUSH));
            }
        });
    });
    assert!(features.to_string().contains("lacks 0x200"), "{features}");
    let vring = |change: fn(&mut vdpa_core::device::state::VringState)| {
        load_changed(move |records| {
            each(records, |record| {
                if let Record::Vring(vring) = record
                    && vring.index == QueueIndex(0)
                {
                    change(vring);
                }
            });
        })
        .to_string()
    };
    assert!(vring(|vring| vring.running = true).contains("its position is not known"));
    assert!(vring(|vring| vring.kick = Some(1)).contains("cannot move"));
    assert!(vring(|vring| vring.num = 7).contains("a power of two"));
    assert!(vring(|vring| vring.index = QueueIndex(8)).contains("no such queue"));
    let config = load_changed(|records| {
        each(records, |record| {
            if let Record::Parent { bytes } = record {
                bytes[2] ^= 1;
            }
        });
    });
    assert!(matches!(config, MoveError::Config { offset: 2, .. }), "{config}");
    assert!(config.to_string().contains("the same attributes"), "{config}");
}

#[test]
fn a_state_is_loaded_into_a_device_that_is_open_and_reset() {
    let (_, state) = suspended();
    let mut closed = World::new(&KIND);
    let not_open = closed.device.load_moved(&state).unwrap_err();
    assert!(not_open.to_string().contains("not open"), "{not_open}");
    let mut target = opened(&KIND);
    target.step(&Op::Status(3));
    let used = target.device.load_moved(&state).unwrap_err();
    assert_eq!(
        (used.errno(), used.to_string().contains("acknowledge|driver")),
        (Errno::BUSY, true),
        "{used}"
    );
    target.step(&Op::Status(0));
    assert_eq!(target.device.load_moved(&vec![0; STATE_MAX + 1]).unwrap_err().errno(), Errno::TOOBIG);
    target.device.load_moved(&state).unwrap();
    target.step(&Op::Status(15));
    assert_eq!(target.device.vring_infos().filter(|info| info.running).count(), 1, "it runs as it did");
}
