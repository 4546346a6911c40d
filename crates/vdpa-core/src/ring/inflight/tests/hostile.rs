//! Logs that nobody has written.

use proptest::prelude::*;

use super::*;
use crate::features::Features;
use crate::ring::inflight::{LogError, log_size};
use crate::ring::{Chain, Ring};
use crate::testing::RingPair;

const SIZE: u16 = 8;

fn features(packed: bool, in_order: bool) -> Features {
    let features = if packed { Features::of(&[Features::RING_PACKED]) } else { Features::NONE };
    if in_order { features.with(Features::IN_ORDER) } else { features }
}

/// Recovers from the log and uses what comes out of it.
fn use_log(pair: &RingPair, features: Features, words: Vec<u64>) -> Result<(), LogError> {
    let life = Life::new(u64::MAX);
    let areas = pair.areas().map(|area| MortalArea { area, life: Rc::clone(&life) });
    let log = MortalLog { words: Rc::new(RefCell::new(words)), life };
    let (mut ring, repeats) = Ring::recover(SIZE, features, areas, log)?;
    let mut chain = Chain::new();
    for repeat in repeats {
        let _ = ring.retake(repeat, &pair.memory, &mut chain);
        ring.push_used(repeat.head, 0)?;
    }
    while let Ok(true) = ring.pop(&pair.memory, &mut chain) {
        ring.push_used(chain.head, 0)?;
    }
    ring.publish()?;
    Ok(())
}

/// A log with requests in every state.
fn log_in_use(pair: &mut RingPair, features: Features) -> Vec<u64> {
    let life = Life::new(u64::MAX);
    let [desc, avail, used] = pair.areas().map(|area| MortalArea { area, life: Rc::clone(&life) });
    let words = Rc::new(RefCell::new(vec![0; log_size(SIZE, features) / 8]));
    let log = MortalLog { words: Rc::clone(&words), life };
    let state = crate::vq::QueueState::initial(features);
    let ring = Ring::new(SIZE, features, desc, avail, used, state).unwrap();
    let mut ring = ring.with_log(log, features).unwrap();
    let mut chain = Chain::new();
    for token in 0..3 {
        pair.driver.add(&[pair.buffer(0, 8); 2], &[], token).unwrap();
        pair.driver.publish().unwrap();
        assert!(ring.pop(&pair.memory, &mut chain).unwrap());
        if token == 0 {
            ring.push_used(chain.head, 0).unwrap();
        }
    }
    words.borrow().clone()
}

proptest! {
    #[test]
    fn random_words_are_an_error_or_a_ring(
        packed: bool, in_order: bool,
        words in prop::collection::vec(any::<u64>(), 0..100),
        sane_header: bool,
    ) {
        let features = features(packed, in_order);
        let mut pair = RingPair::new(SIZE, features.without(Features::IN_ORDER));
        let mut log = log_in_use(&mut pair, features);
        let from = if sane_header { 16 } else { 0 };
        for (place, word) in log.iter_mut().skip(from).zip(words) {
            // Small positions, as they pass more checks.
            *place = if sane_header { word & 0xc300_0000_0000_0007 } else { word };
        }
        let _ = use_log(&pair, features, log);
    }

    #[test]
    fn flipped_bits_are_an_error_or_a_ring(
        packed: bool, in_order: bool,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..64u32), 1..4),
    ) {
        let features = features(packed, in_order);
        let mut pair = RingPair::new(SIZE, features.without(Features::IN_ORDER));
        let mut log = log_in_use(&mut pair, features);
        for (index, bit) in flips {
            let index = index.index(log.len());
            log[index] ^= 1 << bit;
        }
        let _ = use_log(&pair, features, log);
    }
}

#[test]
fn what_is_wrong_with_a_header_is_named() {
    let features = features(true, false);
    let mut pair = RingPair::new(SIZE, features);
    let good = log_in_use(&mut pair, features);
    assert_eq!(use_log(&pair, features, good.clone()), Ok(()));
    let with = |word: usize, value: u64| {
        let mut log = good.clone();
        log[word] = value;
        use_log(&pair, features, log).unwrap_err()
    };
    assert_eq!(with(0, 0), LogError::Absent);
    assert!(matches!(with(0, 1), LogError::Magic { found: 1 }));
    assert!(matches!(with(1, 2 << 48), LogError::Kind { .. }));
    assert!(matches!(with(2, 7), LogError::Checksum { .. }));
    assert!(matches!(with(8, 1 << 56), LogError::Count { what: "published", .. }));
    assert!(matches!(use_log(&pair, features, vec![0; 3]), Err(LogError::Room { words: 3, needed: 80 })));
}
