use std::sync::Arc;

use vdpa_core::types::IovaRange;

use super::*;

fn range(first: u64, size: u64) -> DirtyRange {
    DirtyRange { asid: Asid(0), range: IovaRange::from_size(first, size).unwrap() }
}

fn dirty(memory: &DirtyMemory, of: DirtyRange, clear: bool) -> Vec<u64> {
    let mut pages = Vec::new();
    memory
        .report(of, clear, &mut |bits| {
            for (word, bits) in bits {
                pages.extend((0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| word * 64 + bit));
            }
            Ok(())
        })
        .unwrap();
    pages
}

#[test]
fn a_marked_page_outlives_the_process() {
    let all = range(0, 1 << 30);
    let memory = DirtyMemory::create().unwrap();
    memory.start(4096, &[all], 7).unwrap();
    memory.mark(Asid(0), 0x1fff, 2);
    memory.mark(Asid(0), 512 << 20, 1);
    let again = DirtyMemory::reopen(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!((again.request(), again.tracked()), (Some(7), memory.tracked()));
    assert_eq!(dirty(&again, all, true), [1, 2, 131_072]);
    assert_eq!(dirty(&memory, all, true), [0; 0]);
}

#[test]
fn bits_without_a_summary_are_found_by_the_next_process() {
    let all = range(0, 1 << 40);
    let memory = DirtyMemory::create().unwrap();
    memory.start(4096, &[all], 0).unwrap();
    memory.mark(Asid(0), 700 << 30, 4096);
    // As if the process had died between the bit and that of its line.
    let words = SharedWords::map(&memory).unwrap();
    for word in 2048..2048 + (1 << 16) {
        vdpa_core::dirty::DirtyWords::clear(&words, word, u64::MAX);
    }
    assert_eq!(dirty(&memory, all, false), [0; 0]);
    let again = DirtyMemory::reopen(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
    assert_eq!(dirty(&again, all, true), [(700 << 30) / 4096]);
}

#[test]
fn memory_is_given_back() {
    let used = |memory: &DirtyMemory| rustix::fs::fstat(memory).unwrap().st_blocks;
    let all = range(0, 1 << 40);
    let memory = DirtyMemory::create().unwrap();
    assert_eq!(used(&memory), 0);
    memory.start(4096, &[all], 0).unwrap();
    (0..1024).for_each(|page| memory.mark(Asid(0), page << 30, 4096));
    assert!(used(&memory) > 0);
    memory.stop_marking();
    memory.forget().unwrap();
    assert_eq!((used(&memory), memory.tracked()), (0, None));
    memory.start(4096, &[all], 0).unwrap();
    assert_eq!(dirty(&memory, all, false), [0; 0]);
}

#[test]
fn what_is_marked_while_bits_are_taken_is_not_lost() {
    const PAGES: u64 = 4096;
    let all = range(0, PAGES * 4096);
    let memory = Arc::new(DirtyMemory::create().unwrap());
    memory.start(4096, &[all], 0).unwrap();
    // A page is written, then marked. Whoever takes its bit reads what was written until then.
    let pages: Arc<[std::sync::atomic::AtomicU64]> =
        (0..PAGES).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
    let writer = {
        let (memory, pages) = (Arc::clone(&memory), Arc::clone(&pages));
        std::thread::spawn(move || {
            for round in 1..200_000_u64 {
                let page = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
                pages[usize::try_from(page).unwrap()].store(round, Ordering::Relaxed);
                memory.mark(Asid(0), page * 4096, 4096);
            }
        })
    };
    let mut copy = vec![0; usize::try_from(PAGES).unwrap()];
    loop {
        let ended = writer.is_finished();
        for page in dirty(&memory, all, true) {
            let page = usize::try_from(page).unwrap();
            copy[page] = pages[page].load(Ordering::Relaxed);
        }
        if ended {
            break;
        }
    }
    writer.join().unwrap();
    let now: Vec<u64> = pages.iter().map(|page| page.load(Ordering::Relaxed)).collect();
    assert_eq!(copy, now);
}
