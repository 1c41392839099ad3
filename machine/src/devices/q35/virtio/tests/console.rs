//! The console as a driver finds it.

use kvm_ops::Irqchip;

use super::driver::{
    ACCESS_PLATFORM, AVAILABLE, DATA, DESCRIPTORS, Descriptor, Driver, HEADER, NEEDS_RESET, NEXT,
    QUEUE_STEP, RAM, SIZE, USED, VERSION_1, WRITE,
};
use crate::ConsoleSink;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUES: u16 = 2;

/// A driver of the console, with the numbers of its chains.
struct Port {
    driver: Driver,
    console: ConsoleSink,
    offered: [u16; QUEUES as usize],
}

impl Port {
    fn new() -> Self {
        let console = ConsoleSink::capture();
        let output = console.clone();
        let driver = Driver::of(Irqchip::Full, [0x43, 0x10], |q35| {
            q35.with_console(output).unwrap()
        });
        let mut port = Self {
            driver,
            console,
            offered: [0; QUEUES as usize],
        };
        port.begin();
        port
    }

    fn begin(&mut self) {
        self.driver.begin_with(QUEUES);
        self.offered = [0; QUEUES as usize];
    }

    /// Puts a chain into a queue, and notifies the device.
    fn offer(&mut self, queue: u16, chain: &[Descriptor]) {
        let step = u64::from(queue) * QUEUE_STEP;
        let offered = &mut self.offered[usize::from(queue)];
        // Each chain has descriptors for itself.
        let head = *offered % (SIZE / 4) * 4;
        let shifted: Vec<_> = chain
            .iter()
            .map(|(at, len, flags, next)| (*at, *len, *flags, head + next))
            .collect();
        let table = DESCRIPTORS + step + 16 * u64::from(head);
        let entry = AVAILABLE + step + 4 + 2 * u64::from(*offered % SIZE);
        *offered += 1;
        let offered = *offered;
        self.driver.put_descriptors(table, &shifted);
        self.driver.write(entry, &head.to_le_bytes());
        self.driver
            .write(AVAILABLE + step + 2, &offered.to_le_bytes());
        self.notify(queue);
    }

    fn notify(&self, queue: u16) {
        let at = self.driver.notify_at() + 4 * u32::from(queue);
        self.driver.set(at, &queue.to_le_bytes());
    }

    fn used(&self, queue: u16) -> u16 {
        let at = USED + u64::from(queue) * QUEUE_STEP + 2;
        u16::from_le_bytes(self.driver.read(at))
    }

    /// The length that the device told of a chain of the receive queue.
    fn received(&self, number: u64) -> u32 {
        u32::from_le_bytes(self.driver.read(USED + 4 + 8 * number + 4))
    }

    fn type_in(&self, input: &[u8]) -> usize {
        self.driver.q35().type_console(input, &self.driver.board)
    }

    fn send(&mut self, text: &[u8]) {
        self.driver.write(DATA, text);
        self.offer(TRANSMIT, &[(DATA, text.len() as u32, 0, 0)]);
    }

    /// The device needs a reset, prints nothing meanwhile, and is well after one.
    #[track_caller]
    fn stopped(&mut self, why: &str) {
        let printed = self.console.printed();
        assert_eq!(self.driver.status() & NEEDS_RESET, NEEDS_RESET, "{why}");
        self.notify(TRANSMIT);
        assert_eq!(self.console.printed(), printed, "{why}");
        self.begin();
        self.send(b".");
        assert_eq!(self.console.printed(), printed + 1, "{why}");
    }
}

#[test]
fn the_port_has_two_queues_and_no_feature_of_its_own() {
    let port = Port::new();
    let expected = 1 << 28 | VERSION_1 | ACCESS_PLATFORM;
    assert_eq!(port.driver.offered(), expected);
    let queues = port.driver.get(port.driver.common(0x12));
    assert_eq!(queues, QUEUES.to_le_bytes());
}

#[test]
fn the_driver_s_chains_are_printed_in_their_order() {
    let mut port = Port::new();
    port.send(b"one, ");
    port.driver.write(DATA, b"two, ");
    port.driver.write(HEADER, b"three");
    port.offer(TRANSMIT, &[(DATA, 5, NEXT, 1), (HEADER, 5, 0, 0)]);
    assert_eq!(port.console.text(), "one, two, three");
    assert_eq!(port.used(TRANSMIT), 2);
    // A text of more than one piece.
    let long = vec![b'x'; 10_000];
    port.send(&long);
    assert_eq!(port.console.printed(), 15 + 10_000);
}

#[test]
fn typed_bytes_fill_the_buffers_that_are_there_and_those_that_come() {
    let mut port = Port::new();
    port.offer(RECEIVE, &[(DATA, 4, WRITE, 0)]);
    assert_eq!(port.used(RECEIVE), 0, "nothing is typed");
    let lines = || port.driver.board.lines.lock().unwrap().clone();
    assert_eq!(lines(), []);
    assert_eq!(port.type_in(b"hello"), 5);
    assert_eq!((port.used(RECEIVE), port.received(0)), (1, 4));
    assert_eq!(port.driver.read(DATA), *b"hell");
    // INTA of the first slot.
    assert_eq!(lines(), [(16, true)]);
    port.offer(RECEIVE, &[(DATA, 4, WRITE, 0)]);
    assert_eq!((port.used(RECEIVE), port.received(1)), (2, 1));
    assert_eq!(port.driver.read::<4>(DATA), *b"oell");
}

#[test]
fn typed_bytes_wait_as_far_as_there_is_room() {
    let mut port = Port::new();
    assert_eq!(port.type_in(&[b'a'; 5000]), 4096);
    assert_eq!(port.type_in(b"b"), 0);
    port.offer(RECEIVE, &[(DATA, 8192, WRITE, 0)]);
    assert_eq!(port.received(0), 4096);
    assert_eq!(port.type_in(b"b"), 1);
    // Where there is no console, nothing is taken.
    let image = super::image();
    let disk = Driver::new(super::Disk::open(image.path()).unwrap());
    assert_eq!(disk.q35().type_console(b"b", &disk.board), 0);
}

#[test]
fn drivers_that_break_the_protocol_stop_the_device_until_they_reset_it() {
    let cases: [(&str, u16, &[Descriptor]); 7] = [
        ("a loop", TRANSMIT, &[(DATA, 4, NEXT, 0)]),
        ("a link to nowhere", TRANSMIT, &[(DATA, 4, NEXT, SIZE)]),
        (
            "a readable part behind",
            TRANSMIT,
            &[(DATA, 4, WRITE | NEXT, 1), (DATA, 4, 0, 0)],
        ),
        ("an address outside", TRANSMIT, &[(RAM - 1, 4, 0, 0)]),
        (
            "more than is taken at once",
            TRANSMIT,
            &[(0, 0x8_0000, NEXT, 1), (0, 0x8_0001, 0, 0)],
        ),
        ("no room", RECEIVE, &[(DATA, 4, 0, 0)]),
        ("room outside", RECEIVE, &[(RAM - 1, 4, WRITE, 0)]),
    ];
    let mut port = Port::new();
    for (why, queue, chain) in cases {
        port.type_in(b"typed");
        port.offer(queue, chain);
        port.stopped(why);
    }
}

#[test]
fn memory_that_the_guest_keeps_private_is_neither_printed_nor_written() {
    let mut port = Port::new();
    let private = DATA >> 12;
    port.driver.write(DATA, b"secret");
    port.driver.board.private.lock().unwrap().insert(private);
    port.offer(TRANSMIT, &[(DATA, 6, 0, 0)]);
    assert_eq!(port.driver.status() & NEEDS_RESET, NEEDS_RESET);
    port.begin();
    port.type_in(b"typed");
    port.offer(RECEIVE, &[(DATA, 6, WRITE, 0)]);
    assert_eq!(port.driver.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(port.console.printed(), 0);
    port.driver.board.private.lock().unwrap().clear();
    assert_eq!(port.driver.read(DATA), *b"secret");
    port.begin();
    port.send(b"open");
    assert_eq!(port.console.text(), "open");
}
