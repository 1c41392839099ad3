//! A driver for the console in machine code, for the first processor mode there is: 16 bits, segments, an
//! interrupt vector table and the PIC of a PC.

use kvm_ops::Gpa;

use crate::{MESSAGE, VECTOR};

/// The device, which a segment reaches.
pub(crate) const DEVICE: Gpa = Gpa::new(0xd_0000);
/// The RAM, which ends below it.
pub(crate) const RAM: u64 = 0x8_0000;
/// Written to the debug-exit port at the end.
pub(crate) const DONE: u8 = 7;

/// The code's address.
const ORIGIN: u16 = 0x7c00;
/// The byte that the interrupt handler leaves the device's pending interrupts in.
const PENDING: u16 = 0x6000;
/// The pages of the queues, and what lies in each.
const RECEIVE: u16 = 0x2000;
const TRANSMIT: u16 = 0x3000;
const DRIVER_RING: u16 = 0x400;
const DEVICE_RING: u16 = 0x600;
const BUFFER: u16 = 0x800;
const ENTRIES: u32 = 4;
const WRITE: u32 = 2;

#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn here(&self) -> u16 {
        ORIGIN + self.0.len() as u16
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// mov al, value; out port, al
    fn out(&mut self, port: u8, value: u8) {
        self.put(&[0xb0, value, 0xe6, port]);
    }

    /// mov dword es:[at], value
    fn register(&mut self, at: u16, value: u32) {
        self.put(&[0x26, 0x66, 0xc7, 0x06]);
        self.put(&at.to_le_bytes()).put(&value.to_le_bytes());
    }

    /// mov eax, es:[at]; cmp eax, value; jne target
    fn expect(&mut self, at: u16, value: u32, target: u16) {
        self.put(&[0x26, 0x66, 0xa1]).put(&at.to_le_bytes());
        self.put(&[0x66, 0x3d]).put(&value.to_le_bytes());
        let next = self.here() + 4;
        let distance = target.wrapping_sub(next);
        self.put(&[0x0f, 0x85]).put(&distance.to_le_bytes());
    }

    /// mov dword [at], value
    fn dword(&mut self, at: u16, value: u32) {
        self.put(&[0x66, 0xc7, 0x06]);
        self.put(&at.to_le_bytes()).put(&value.to_le_bytes());
    }

    /// mov word [at], value
    fn word(&mut self, at: u16, value: u16) {
        self.put(&[0xc7, 0x06]);
        self.put(&at.to_le_bytes()).put(&value.to_le_bytes());
    }

    /// mov byte [at], value
    fn byte(&mut self, at: u16, value: u8) {
        self.put(&[0xc6, 0x06]).put(&at.to_le_bytes()).put(&[value]);
    }

    /// Sets one queue up with one descriptor, which is available at once.
    fn queue(&mut self, number: u32, page: u16, len: u32, flags: u32) {
        self.dword(page, u32::from(page + BUFFER));
        self.dword(page + 4, 0);
        self.dword(page + 8, len);
        self.dword(page + 12, flags);
        self.dword(page + DRIVER_RING, 1 << 16);
        self.word(page + DRIVER_RING + 4, 0);
        for at in [0, 4, 8] {
            self.dword(page + DEVICE_RING + at, 0);
        }
        self.register(0x030, number);
        self.register(0x038, ENTRIES);
        for (at, gpa) in [
            (0x080, page),
            (0x090, page + DRIVER_RING),
            (0x0a0, page + DEVICE_RING),
        ] {
            self.register(at, gpa.into());
            self.register(at + 4, 0);
        }
        self.register(0x044, 1);
    }
}

/// Sends the message, waits for the interrupt, and prints the reply.
pub(crate) fn code() -> Vec<u8> {
    let mut code = Code::default();
    code.put(&[0xe9, 0, 0]); // jmp main, whose address comes below

    let fail = code.here();
    code.put(&[0xba, 0xf8, 0x03, 0xb0, b'?', 0xee]); // mov dx, 0x3f8; mov al, '?'; out dx, al
    code.out(0xf4, 1);
    code.put(&[0xf4]); // hlt

    let handler = code.here();
    code.put(&[0x66, 0x50]); // push eax
    code.put(&[0x26, 0x66, 0xa1, 0x60, 0x00]); // mov eax, es:[InterruptStatus]
    code.put(&[0x26, 0x66, 0xa3, 0x64, 0x00]); // mov es:[InterruptACK], eax
    code.put(&[0xa2]).put(&PENDING.to_le_bytes()); // mov [PENDING], al
    code.out(0x20, 0x20); // end of interrupt
    code.put(&[0x66, 0x58, 0xcf]); // pop eax; iret

    let main = code.here() - ORIGIN - 3;
    code.0[1..3].copy_from_slice(&main.to_le_bytes());
    code.put(&[0xfa, 0xfc]); // cli; cld
    code.put(&[0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0]); // xor ax, ax; mov ds, ax; mov ss, ax
    code.put(&[0xbc, 0x00, 0x70]); // mov sp, 0x7000
    let segment = (DEVICE.get() >> 4) as u16;
    code.put(&[0xb8]).put(&segment.to_le_bytes()); // mov ax, segment
    code.put(&[0x8e, 0xc0]); // mov es, ax
    code.byte(PENDING, 0);
    code.word(u16::from(VECTOR) * 4, handler);
    code.word(u16::from(VECTOR) * 4 + 2, 0);
    // The PIC: vectors from VECTOR's eight on, and only the device's line.
    for (port, value) in [
        (0x20, 0x11),
        (0x21, VECTOR & !7),
        (0x21, 4),
        (0x21, 1),
        (0x21, !(1 << (VECTOR & 7))),
    ] {
        code.out(port, value);
    }

    code.expect(0x000, u32::from_le_bytes(*b"virt"), fail);
    code.expect(0x008, 3, fail);
    for status in [0, 1, 3] {
        code.register(0x070, status);
    }
    for (half, features) in [(0, 0), (1, 1)] {
        code.register(0x024, half);
        code.register(0x020, features);
    }
    code.register(0x070, 0xb);
    code.expect(0x070, 0xb, fail);
    for (at, byte) in (TRANSMIT + BUFFER..).zip(MESSAGE) {
        code.byte(at, *byte);
    }
    code.queue(0, RECEIVE, 0x100, WRITE);
    code.queue(1, TRANSMIT, MESSAGE.len() as u32, 0);
    code.register(0x070, 0xf);
    code.register(0x050, 1);

    code.put(&[0xfa, 0x80, 0x3e]).put(&PENDING.to_le_bytes()); // wait: cli; cmp byte [PENDING], 1
    code.put(&[0x01, 0x74, 0x04]); // je reply
    code.put(&[0xfb, 0xf4, 0xeb, 0xf4]); // sti; hlt; jmp wait
    let len = RECEIVE + DEVICE_RING + 8;
    code.put(&[0x8b, 0x0e]).put(&len.to_le_bytes()); // reply: mov cx, [used length]
    code.put(&[0xbe]).put(&(RECEIVE + BUFFER).to_le_bytes()); // mov si, buffer
    code.put(&[0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.put(&[0xac, 0xee, 0xe2, 0xfc]); // next: lodsb; out dx, al; loop next
    code.out(0xf4, DONE);
    code.put(&[0xf4]); // hlt
    assert!(code.here() < 0x8000 - 1 + 0x400, "room");
    code.0
}
