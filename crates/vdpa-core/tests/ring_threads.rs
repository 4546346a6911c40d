//! A driver and a device on two threads that wait whenever the ring allows it, so that a lost notification is a timeout.

use std::error::Error;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use vdpa_core::features::Features;
use vdpa_core::ring::driver::{AddError, Driver};
use vdpa_core::ring::{Buffer, Chain, Ring};
use vdpa_core::testing::{RingPair, TestArea, TestMemory};

const REQUESTS: u64 = 100_000;

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// An event that works as an eventfd: signals that no wait has consumed are merged into one.
fn event() -> (SyncSender<()>, Receiver<()>) {
    sync_channel(1)
}

fn wait(event: &Receiver<()>, side: &str) -> Outcome {
    event
        .recv_timeout(Duration::from_secs(20))
        .map_err(|error| format!("{side}: lost wake-up: {error}").into())
}

fn drive(mut driver: Driver<TestArea>, kick: &SyncSender<()>, call: &Receiver<()>) -> Outcome {
    let (mut next, mut done) = (0, 0);
    while done < REQUESTS {
        while next < REQUESTS {
            match driver.add(&[Buffer { iova: next, len: 1 }], &[], next) {
                Ok(()) => next += 1,
                Err(AddError::Full { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if driver.publish()? {
            let _ = kick.try_send(());
        }
        let before = done;
        while let Some(completion) = driver.pop_used()? {
            if completion.token != done {
                return Err(format!("request {} instead of {done}", completion.token).into());
            }
            done += 1;
        }
        if done == before && !driver.enable_interrupts()? {
            wait(call, "driver")?;
            driver.disable_interrupts()?;
        }
    }
    Ok(())
}

fn serve(
    mut queue: Ring<TestArea>,
    memory: &TestMemory,
    kick: &Receiver<()>,
    call: &SyncSender<()>,
) -> Outcome {
    let (mut chain, mut served) = (Chain::new(), 0);
    while served < REQUESTS {
        while queue.pop(memory, &mut chain)? {
            if chain.readable != [Buffer { iova: served, len: 1 }] {
                return Err(format!("{chain:?} instead of request {served}").into());
            }
            queue.push_used(chain.head, 0)?;
            served += 1;
        }
        if queue.publish()? {
            let _ = call.try_send(());
        }
        if served < REQUESTS && !queue.enable_kick()? {
            wait(kick, "device")?;
            queue.disable_kick()?;
        }
    }
    Ok(())
}

fn run(features: Features) -> Outcome {
    let RingPair { memory, driver, queue, .. } = RingPair::new(4, features);
    let ((kick, kicked), (call, called)) = (event(), event());
    thread::scope(|scope| {
        let device = scope.spawn(move || serve(queue, &memory, &kicked, &call));
        drive(driver, &kick, &called)?;
        device.join().map_err(|_| "the device panicked")?
    })
}

#[test]
fn no_wake_up_is_lost_with_flags() -> Outcome {
    run(Features::NONE)
}

#[test]
fn no_wake_up_is_lost_with_event_idx() -> Outcome {
    run(Features::of(&[Features::RING_EVENT_IDX]))
}

#[test]
fn no_wake_up_is_lost_in_a_packed_ring() -> Outcome {
    run(Features::of(&[Features::RING_PACKED]))
}

#[test]
fn no_wake_up_is_lost_in_a_packed_ring_with_event_idx() -> Outcome {
    run(Features::of(&[Features::RING_PACKED, Features::RING_EVENT_IDX]))
}
