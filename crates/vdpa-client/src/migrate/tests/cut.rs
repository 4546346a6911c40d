//! The connection is cut after each byte: the device runs at one side.

use super::*;

#[test]
fn wherever_the_connection_is_cut_the_device_runs_at_one_side() {
    let mut outcomes = std::collections::BTreeMap::new();
    // The whole of it is about 140,000 bytes; of the memory it is of no interest where.
    let sent: Vec<usize> =
        (0..700).step_by(7).chain((700..140_000).step_by(9973)).chain(134_000..138_000).step_by(5).collect();
    for limit in sent {
        let outcome = move_it(Computer::default(), Place::default(), [limit, usize::MAX], limit % 2 == 0);
        *outcomes.entry(settle(outcome)).or_insert(0) += 1;
    }
    for limit in 0..=3 * 24 {
        let outcome = move_it(Computer::default(), Place::default(), [usize::MAX, limit], true);
        *outcomes.entry(settle(outcome)).or_insert(0) += 1;
    }
    println!("{outcomes:?}");
    for expected in ["here", "there", "there, and the source asks"] {
        assert!(outcomes.contains_key(expected), "{outcomes:?}");
    }
}

/// A stream that loses what is written from a message on, while the writer believes that it was sent: as TCP can.
struct Lossy(UnixStream, u16);

impl Read for Lossy {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Lossy {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.starts_with(b"VDPM") && buf.get(6..8) == Some(&self.1.to_le_bytes()[..]) {
            let _ = self.0.shutdown(std::net::Shutdown::Both);
            return Ok(buf.len());
        }
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_commit_that_is_lost_on_its_way_leaves_both_sides_asking() {
    let nodes = [node(true), node(true)];
    let (mut session, memory) = running(&nodes[0]);
    let before = bytes(&memory);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let target = nodes[1].clone();
    let destination = thread::spawn(move || {
        let mut place = Place::default();
        let device = Device::from_ops(target.open(ThisProcess::default()).unwrap());
        let arrival = Arrival::accept(theirs).unwrap();
        (arrival.prepare(device, true, &mut place).unwrap().receive(&mut place), place)
    });
    let mut machine = Computer::default();
    let mut stream = Lossy(ours, wire::Kind::Commit as u16);
    let sent = send(&mut session, &mut machine, &mut stream, &plan());
    let (arrived, place) = destination.join().unwrap();
    let outcome = Outcome { sent, arrived, session, machine, place, before, nodes };
    assert_eq!(settle(outcome), "there, after it has asked");
}

#[test]
fn an_undecided_source_goes_on_when_the_destination_is_gone() {
    // The answer to the commit is cut, and the destination ends.
    let mut outcome = move_it(Computer::default(), Place::default(), [usize::MAX, 2 * 24], true);
    assert!(matches!(outcome.sent, Err(SendError::Undecided { .. })), "{:?}", outcome.sent);
    outcome.arrived = Err(MigrateError::Cancelled);
    resume(&mut outcome.session, &mut outcome.machine).unwrap();
    assert!(runs(&outcome.nodes[0]) && !runs(&outcome.nodes[1]) && !outcome.machine.paused);
}
