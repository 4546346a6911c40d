//! Tests of each rule of a pass, on rings in test memory.

use crate::ring::Buffer;
use crate::testing::{Pair, TestMemory};
use crate::types::{IovaRange, Perm, QueueIndex};

use super::*;

const FEATURES: Features = Features::of(&[Features::VERSION_1, Features::ACCESS_PLATFORM]);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const HEADER: usize = 12;

/// One queue with its driver side and its device side.
struct Queue {
    pair: Pair,
    features: Features,
    /// Notifications that the driver received.
    notified: usize,
    token: u64,
    /// Heads that a process had popped that has died.
    repeated: Vec<u16>,
}

impl Queue {
    fn new() -> Self {
        Self {
            pair: Pair::new(16, FEATURES),
            features: FEATURES,
            notified: 0,
            token: 0,
            repeated: Vec::new(),
        }
    }

    /// Makes a chain available and returns its token.
    fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> u64 {
        self.token += 1;
        self.pair.driver.add(readable, writable, self.token).unwrap();
        self.pair.driver.publish().unwrap();
        self.token
    }

    fn send(&mut self, bytes: &[u8]) -> u64 {
        let buffer = self.buffer_with(bytes);
        self.add(&[buffer], &[])
    }

    fn add_receive_buffer(&mut self, len: u32) -> Buffer {
        let buffer = self.pair.allocate(len);
        self.add(&[], &[buffer]);
        buffer
    }

    fn buffer_with(&mut self, bytes: &[u8]) -> Buffer {
        let buffer = self.pair.allocate(u32::try_from(bytes.len()).unwrap());
        self.pair.memory.write(buffer.iova, bytes).unwrap();
        buffer
    }

    fn read(&self, buffer: Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.len as usize];
        self.pair.memory.read(buffer.iova, &mut bytes).unwrap();
        bytes
    }

    /// Tokens and lengths of the completed requests.
    fn used(&mut self) -> Vec<(u64, u32)> {
        std::iter::from_fn(|| self.pair.driver.pop_used().unwrap())
            .map(|done| (done.token, done.len))
            .collect()
    }

    fn unmap(&self, buffer: Buffer) {
        let range = IovaRange::from_size(buffer.iova, buffer.len.into()).unwrap();
        self.pair.memory.protect(range, Perm::NONE);
    }
}

impl LoopbackQueue for Queue {
    type Memory = TestMemory;

    fn memory(&self) -> &TestMemory {
        &self.pair.memory
    }

    fn features(&self) -> Features {
        self.features
    }

    fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let popped = self.pair.queue.pop(&self.pair.memory, chain)?;
        self.repeated.retain(|head| *head != chain.head);
        Ok(popped)
    }

    fn is_repeated(&mut self, head: u16) -> bool {
        self.repeated.contains(&head)
    }

    fn complete(&mut self, head: u16, len: usize, notify: Notify) {
        self.pair.queue.push_used(head, u32::try_from(len).unwrap()).unwrap();
        if self.pair.queue.publish().unwrap() || notify == Notify::Always {
            self.notified += 1;
        }
    }
}

/// A device with all its queues.
struct Device {
    shared: Arc<Shared>,
    logic: Loopback,
    rx: Queue,
    tx: Queue,
    control: Queue,
}

impl Device {
    fn new() -> Self {
        let shared = Arc::new(Shared::default());
        shared.config().mac = MAC;
        let logic = Loopback::new(Arc::clone(&shared));
        Self { shared, logic, rx: Queue::new(), tx: Queue::new(), control: Queue::new() }
    }

    fn pass(&mut self) -> bool {
        self.logic.loop_back(&mut self.tx, &mut self.rx)
    }

    fn counters(&self, queue: u16) -> Vec<u64> {
        let all = self.shared.stats.vendor(QueueIndex(queue)).unwrap();
        all.into_iter().map(|(_, value)| value).collect()
    }

    /// Makes a command with `body` available and returns the buffer of its answer.
    fn command(&mut self, body: &[u8]) -> Buffer {
        let command = self.control.buffer_with(body);
        let answer = self.control.buffer_with(&[0xee]);
        self.control.add(&[command], &[answer]);
        answer
    }
}

/// A packet to `to` with `payload` bytes after its destination.
fn packet(to: [u8; 6], payload: usize) -> Vec<u8> {
    let header = (0..HEADER).map(|at| u8::try_from(at + 0xa0).unwrap());
    header.chain(to).chain((0..payload).map(|at| at.to_le_bytes()[0] ^ 0x55)).collect()
}

#[test]
fn a_packet_comes_back_as_it_was_sent() {
    let mut device = Device::new();
    let sent = packet(MAC, 100);
    let (first, second) = (device.tx.buffer_with(&sent[..20]), device.tx.buffer_with(&sent[20..]));
    let token = device.tx.add(&[first, second], &[]);
    let room = device.rx.add_receive_buffer(200);
    assert!(!device.pass());
    assert_eq!(device.tx.used(), [(token, 0)]);
    assert_eq!(device.rx.used(), [(1, 118)]);
    assert_eq!(device.rx.read(room)[..118], sent);
    assert_eq!((device.tx.notified, device.rx.notified), (1, 1));
    assert_eq!(device.counters(0), [1, 118, 0, 0, 0]);
    assert_eq!(device.counters(1), [1, 118, 0, 0]);
}

#[test]
fn the_filter_accepts_groups_and_addresses_that_strncmp_takes_for_its_own() {
    let passes = |to: [u8; 6], mac: [u8; 6]| accepts(&packet(to, 0), HEADER, &mac);
    assert!(passes(MAC, MAC) && passes([0xff; 6], MAC) && passes([1, 0, 0x5e, 0, 0, 1], MAC));
    // Only 52:54:00 is compared, because strncmp stops at the zero byte.
    assert!(passes([0x52, 0x54, 0, 9, 9, 9], MAC));
    assert!(!passes([0x52, 0x54, 1, 0x12, 0x34, 0x56], MAC));
    assert!(!passes([0x52, 0x56, 0, 0x12, 0x34, 0x56], MAC));
    let full = [0x52, 0x54, 1, 2, 3, 4];
    assert!(passes(full, full) && !passes([0x52, 0x54, 1, 2, 3, 5], full));
    // If the address begins with 00, as the default does, all destinations that begin with 00 are accepted.
    assert!(passes([0, 1, 2, 3, 4, 5], [0; 6]) && !passes([2, 0, 0, 0, 0, 0], [0; 6]));
}

#[test]
fn a_packet_needs_a_header_and_a_destination() {
    let whole = packet(MAC, 0);
    assert!(accepts(&whole, 12, &MAC) && !accepts(&whole[..17], 12, &MAC));
    assert!(accepts(&whole[2..], header_len(Features::NONE), &MAC));
    let mut device = Device::new();
    let tokens = [device.tx.send(&whole[..17]), device.tx.send(&whole)];
    device.rx.add_receive_buffer(64);
    device.pass();
    assert_eq!(device.tx.used(), tokens.map(|token| (token, 0)));
    assert_eq!(device.counters(0), [1, 18, 0, 0, 1]);
    assert_eq!(device.counters(1), [2, 35, 0, 0]);
    // Without VERSION_1 the header is shorter.
    device.tx.features = Features::NONE;
    device.tx.send(&whole[2..]);
    device.rx.add_receive_buffer(64);
    device.pass();
    assert_eq!(device.counters(0), [2, 34, 0, 0, 1]);
}

#[test]
fn a_packet_that_does_not_fit_is_truncated() {
    let mut device = Device::new();
    device.tx.send(&packet(MAC, 5000));
    let room = device.rx.add_receive_buffer(5000);
    device.tx.send(&packet(MAC, 100));
    device.rx.add_receive_buffer(30);
    device.pass();
    assert_eq!(device.rx.used(), [(1, 4096), (2, 30)]);
    assert_eq!(device.rx.read(room)[4090..4100], [&packet(MAC, 5000)[4090..4096], &[0; 4]].concat());
    assert_eq!(device.counters(0), [2, 4126, 0, 0, 0]);
    assert_eq!(device.counters(1), [2, 4096 + 118, 0, 0]);
}

#[test]
fn without_a_receive_buffer_a_packet_is_dropped_and_the_pass_ends() {
    let mut device = Device::new();
    let tokens = [device.tx.send(&packet(MAC, 1)), device.tx.send(&packet(MAC, 2))];
    assert!(!device.pass());
    assert_eq!(device.tx.used(), [(tokens[0], 0)]);
    assert_eq!(device.counters(0), [0, 0, 0, 1, 0]);
    // A chain with a readable buffer is no receive buffer and stays with the device.
    let readable = device.rx.buffer_with(&[0; 64]);
    device.rx.add(&[readable], &[]);
    assert!(!device.pass());
    assert_eq!(device.tx.used(), [(tokens[1], 0)]);
    assert_eq!((device.counters(0), device.rx.used()), (vec![0, 0, 0, 2, 0], vec![]));
}

#[test]
fn a_receive_buffer_that_cannot_be_written_keeps_both_chains() {
    let mut device = Device::new();
    let room = device.rx.add_receive_buffer(256);
    device.rx.unmap(room);
    device.tx.send(&packet(MAC, 1));
    assert!(!device.pass());
    let empty = device.rx.pair.allocate(0);
    device.rx.add(&[], &[empty]);
    device.tx.send(&packet(MAC, 2));
    assert!(!device.pass());
    assert_eq!((device.tx.used(), device.rx.used()), (vec![], vec![]));
    assert_eq!(device.counters(0), [0, 0, 2, 0, 0]);
    // Later chains are not affected.
    device.rx.add_receive_buffer(64);
    let token = device.tx.send(&packet(MAC, 3));
    device.pass();
    assert_eq!((device.tx.used(), device.rx.used()), (vec![(token, 0)], vec![(3, 21)]));
}

#[test]
fn packets_that_cannot_be_read_are_counted_as_errors() {
    let mut device = Device::new();
    let lost = device.tx.pair.allocate(256);
    device.tx.unmap(lost);
    let tokens = [device.tx.add(&[lost], &[]), device.tx.send(&[]), device.tx.send(&packet(MAC, 0))];
    device.rx.add_receive_buffer(64);
    assert!(!device.pass());
    assert_eq!(device.tx.used(), tokens.map(|token| (token, 0)));
    assert_eq!(device.counters(1), [1, 18, 2, 0]);
    assert_eq!(device.counters(0), [1, 18, 0, 0, 0]);
}

#[test]
fn a_transmit_chain_with_a_writable_buffer_ends_the_pass() {
    let mut device = Device::new();
    let (sent, written) = (device.tx.buffer_with(&packet(MAC, 0)), device.tx.pair.allocate(8));
    device.tx.add(&[sent], &[written]);
    let token = device.tx.send(&packet(MAC, 0));
    device.rx.add_receive_buffer(64);
    assert!(!device.pass());
    assert_eq!((device.tx.used(), device.counters(1)), (vec![], vec![0, 0, 1, 0]));
    assert!(!device.pass());
    assert_eq!(device.tx.used(), [(token, 0)]);
}

#[test]
fn a_pass_ends_with_the_first_delivery_after_four_packets() {
    let mut device = Device::new();
    for _ in 0..7 {
        device.tx.send(&packet(MAC, 0));
        device.rx.add_receive_buffer(64);
    }
    assert!(device.pass());
    assert_eq!(device.rx.used().len(), 5);
    assert!(!device.pass());
    assert_eq!(device.rx.used().len(), 2);
    // Packets that are not delivered count, but do not end the pass.
    let other = [2, 2, 2, 2, 2, 2];
    for to in [other, other, other, other, other, MAC, MAC] {
        device.tx.send(&packet(to, 0));
    }
    device.rx.add_receive_buffer(64);
    device.rx.add_receive_buffer(64);
    assert!(device.pass());
    assert_eq!((device.tx.used().len(), device.rx.used().len()), (7 + 6, 1));
}

#[test]
fn only_the_control_queue_notifies_a_driver_that_disabled_interrupts() {
    let mut device = Device::new();
    for queue in [&mut device.tx, &mut device.rx, &mut device.control] {
        queue.pair.driver.disable_interrupts().unwrap();
    }
    device.tx.send(&packet(MAC, 0));
    device.rx.add_receive_buffer(64);
    device.command(&[1, 0]);
    device.pass();
    device.logic.control(&mut device.control);
    assert_eq!((device.tx.notified, device.rx.notified, device.control.notified), (0, 0, 1));
    assert_eq!((device.tx.used().len(), device.rx.used().len(), device.control.used().len()), (1, 1, 1));
}

#[test]
fn the_control_queue_sets_the_address() {
    let mut device = Device::new();
    let answer = device.command(&[1, 1, 2, 3, 4, 5, 6, 7]);
    assert!(!device.logic.control(&mut device.control));
    assert_eq!(device.control.used(), [(1, 1)]);
    assert_eq!(device.control.read(answer), [0]);
    assert_eq!(device.shared.config().mac, [2, 3, 4, 5, 6, 7]);
    // A command that is too short fails, but its bytes are stored.
    let answer = device.command(&[1, 1, 9, 9]);
    device.logic.control(&mut device.control);
    assert_eq!(device.control.read(answer), [1]);
    assert_eq!(device.shared.config().mac, [9, 9, 4, 5, 6, 7]);
    assert_eq!(device.counters(2), [2, 1, 1]);
}

#[test]
fn a_command_of_another_class_gets_the_answer_of_the_previous_command() {
    let mut device = Device::new();
    let answers = [
        device.command(&[0, 0, 1]),
        device.command(&[1, 1, 2, 3, 4, 5, 6, 7]),
        device.command(&[0, 0, 1]),
        device.command(&[1, 0]),
        device.command(&[4, 0]),
    ];
    device.logic.control(&mut device.control);
    assert_eq!(answers.map(|answer| device.control.read(answer)[0]), [1, 0, 0, 1, 1]);
    // The initial answer of each pass is an error, whatever the last pass ended with.
    device.command(&[1, 1, 2, 3, 4, 5, 6, 7]);
    device.logic.control(&mut device.control);
    let answer = device.command(&[0, 0]);
    device.logic.control(&mut device.control);
    assert_eq!(device.control.read(answer), [1]);
    assert_eq!(device.counters(2), [7, 3, 4]);
}

#[test]
fn a_command_without_a_header_ends_the_pass_and_is_not_answered() {
    let mut device = Device::new();
    device.command(&[1]);
    device.command(&[1, 1, 2, 3, 4, 5, 6, 7]);
    device.logic.control(&mut device.control);
    assert_eq!((device.control.used(), device.counters(2)), (vec![], vec![1, 0, 1]));
    device.logic.control(&mut device.control);
    assert_eq!((device.control.used(), device.counters(2)), (vec![(2, 1)], vec![2, 1, 1]));
}

#[test]
fn a_command_without_room_for_an_answer_is_executed() {
    let mut device = Device::new();
    let command = device.control.buffer_with(&[1, 1, 2, 3, 4, 5, 6, 7]);
    device.control.add(&[command], &[]);
    device.logic.control(&mut device.control);
    assert_eq!(device.control.used(), [(1, 0)]);
    assert_eq!(device.shared.config().mac, [2, 3, 4, 5, 6, 7]);
}

/// What a process leaves that has died at this store.
fn dies_after_the_first_answer(device: &mut Device, first_answered: bool) -> (u64, u64, Buffer, Vec<u8>) {
    let sent = packet(MAC, 100);
    let buffer = device.rx.add_receive_buffer(256);
    let (received, transmitted) = (device.rx.token, device.tx.send(&sent));
    let (mut tx, mut rx) = (Chain::new(), Chain::new());
    // As far as `loop_back` has come.
    assert!(device.rx.pair.queue.pop(&device.rx.pair.memory, &mut rx).unwrap());
    push(&device.rx.pair.memory, rx.writable(), &sent).unwrap();
    let len = u16::try_from(sent.len()).unwrap();
    if first_answered {
        assert!(device.tx.pair.queue.pop(&device.tx.pair.memory, &mut tx).unwrap());
    }
    device.shared.stats.delivery.set(Some(Delivery { tx: tx.head, rx: rx.head, len }));
    if first_answered {
        device.tx.complete(tx.head, 0, Notify::IfEnabled);
    } else {
        device.tx.repeated.push(tx.head);
    }
    // To be popped again.
    device.rx.pair.queue.abandon(&rx).unwrap();
    device.rx.repeated.push(rx.head);
    (received, transmitted, buffer, sent)
}

#[test]
fn a_packet_whose_first_chain_was_answered_is_received_once() {
    let mut device = Device::new();
    let (received, transmitted, buffer, sent) = dies_after_the_first_answer(&mut device, true);
    device.pass();
    let len = u32::try_from(sent.len()).unwrap();
    assert_eq!((device.rx.used(), device.tx.used()), (vec![(received, len)], vec![(transmitted, 0)]));
    assert_eq!(&device.rx.read(buffer)[..sent.len()], sent);
    // The next packet has a buffer of its own.
    device.rx.add_receive_buffer(256);
    device.tx.send(&sent);
    device.pass();
    assert_eq!((device.rx.used().len(), device.tx.used().len()), (1, 1));
}

#[test]
fn a_packet_of_which_no_chain_was_answered_is_repeated() {
    let mut device = Device::new();
    let (received, transmitted, ..) = dies_after_the_first_answer(&mut device, false);
    device.pass();
    assert_eq!((device.rx.used()[0].0, device.tx.used()), (received, vec![(transmitted, 0)]));
    assert_eq!((device.rx.used(), device.tx.used()), (vec![], vec![]));
}

#[test]
fn a_reset_forgets_what_was_being_delivered() {
    let mut device = Device::new();
    dies_after_the_first_answer(&mut device, true);
    device.logic.reset();
    device.pass();
    assert_eq!(device.rx.used(), []);
}
