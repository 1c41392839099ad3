//! A driver for the console, as a guest program: the same on every kind of VM of the software platform.

use kvm_ops::{Gpa, Privacy};

use crate::linear::Cpu;
use crate::{DEVICE, MESSAGE, VECTOR};

/// The pages of a queue: descriptors, rings, and its one buffer.
const RECEIVE: Gpa = Gpa::new(0x10_0000);
const TRANSMIT: Gpa = Gpa::new(0x10_1000);
const DRIVER_RING: u64 = 0x400;
const DEVICE_RING: u64 = 0x600;
const BUFFER: u64 = 0x800;
const BUFFER_BYTES: u32 = 0x100;
const ENTRIES: u32 = 4;
/// A descriptor that the device writes.
const WRITE: u16 = 2;

fn register(cpu: &Cpu, at: u64, value: u32) -> Option<()> {
    let gpa = cpu.shared(Gpa::new(DEVICE.get() + at));
    cpu.write(gpa, &value.to_le_bytes())
}

fn get(cpu: &Cpu, at: u64) -> Option<u32> {
    let gpa = cpu.shared(Gpa::new(DEVICE.get() + at));
    Some(u32::from_le_bytes(cpu.read(gpa, 4)?.try_into().ok()?))
}

fn memory(cpu: &Cpu, page: Gpa, at: u64) -> Gpa {
    cpu.shared(Gpa::new(page.get() + at))
}

/// Sets one queue up with one descriptor, which is available at once.
fn queue(cpu: &Cpu, number: u32, page: Gpa, len: u32, flags: u16) -> Option<()> {
    let buffer = page.get() + BUFFER;
    let words = [u64::to_le_bytes(buffer), {
        let rest = u64::from(len) | u64::from(flags) << 32;
        rest.to_le_bytes()
    }];
    cpu.write(memory(cpu, page, 0), &words.concat())?;
    // Flags, index 1, and descriptor 0 in the first entry.
    cpu.write(memory(cpu, page, DRIVER_RING), &[0, 0, 1, 0, 0, 0])?;
    cpu.write(memory(cpu, page, DEVICE_RING), &[0; 12])?;
    register(cpu, 0x030, number)?;
    register(cpu, 0x038, ENTRIES)?;
    for (at, gpa) in [
        (0x080, page.get()),
        (0x090, page.get() + DRIVER_RING),
        (0x0a0, page.get() + DEVICE_RING),
    ] {
        register(cpu, at, gpa as u32)?;
        register(cpu, at + 4, (gpa >> 32) as u32)?;
    }
    register(cpu, 0x044, 1)
}

/// Negotiates as virtio 1.2, 3.1.1 has it, up to the queues.
fn begin(cpu: &Cpu) -> Option<()> {
    let id = [get(cpu, 0)?, get(cpu, 4)?, get(cpu, 8)?];
    (id == [u32::from_le_bytes(*b"virt"), 2, 3]).then_some(())?;
    for status in [0, 1, 3] {
        register(cpu, 0x070, status)?;
    }
    register(cpu, 0x014, 1)?;
    let offered = get(cpu, 0x010)?;
    for (half, features) in [(0, 0), (1, offered)] {
        register(cpu, 0x024, half)?;
        register(cpu, 0x020, features)?;
    }
    register(cpu, 0x070, 0xb)?;
    (get(cpu, 0x070)? == 0xb).then_some(())
}

/// Sends the message, waits for the interrupt, and prints the reply.
pub(crate) fn talk(cpu: &Cpu) -> Option<()> {
    cpu.share(RECEIVE, 2)?;
    begin(cpu)?;
    cpu.write(memory(cpu, TRANSMIT, BUFFER), MESSAGE)?;
    queue(cpu, 0, RECEIVE, BUFFER_BYTES, WRITE)?;
    queue(cpu, 1, TRANSMIT, MESSAGE.len() as u32, 0)?;
    register(cpu, 0x070, 0xf)?;
    register(cpu, 0x050, 1)?;
    (cpu.halt()? == VECTOR).then_some(())?;
    let pending = get(cpu, 0x060)?;
    register(cpu, 0x064, pending)?;
    (pending == 1 && get(cpu, 0x060)? == 0).then_some(())?;
    let used = cpu.read(memory(cpu, RECEIVE, DEVICE_RING), 12)?;
    let len = u32::from_le_bytes(used[8..12].try_into().ok()?);
    let reply = cpu.read(memory(cpu, RECEIVE, BUFFER), len as usize)?;
    cpu.print(&reply)
}

/// Sets a queue up in memory that it keeps private, and prints the device's status.
pub(crate) fn keep_private(cpu: &Cpu) -> Option<()> {
    begin(cpu)?;
    register(cpu, 0x030, 1)?;
    register(cpu, 0x038, ENTRIES)?;
    for (at, part) in [(0x080, 0), (0x090, DRIVER_RING), (0x0a0, DEVICE_RING)] {
        register(cpu, at, (TRANSMIT.get() + part) as u32)?;
    }
    register(cpu, 0x044, 1)?;
    (cpu.halt()? == VECTOR).then_some(())?;
    cpu.print(&[get(cpu, 0x070)? as u8])
}

/// Length of the private buffer.
pub(crate) const PRIVATE_BYTES: u32 = 16;

/// Shares the rings, and has the device read a buffer that it keeps private.
pub(crate) fn private_buffer(cpu: &Cpu) -> Option<()> {
    cpu.share(TRANSMIT, 1)?;
    begin(cpu)?;
    queue(cpu, 1, TRANSMIT, PRIVATE_BYTES, 0)?;
    cpu.write(memory(cpu, TRANSMIT, 0), &RECEIVE.get().to_le_bytes())?;
    register(cpu, 0x070, 0xf)?;
    register(cpu, 0x050, 1)?;
    (cpu.halt()? == VECTOR).then_some(())?;
    cpu.print(&[get(cpu, 0x070)? as u8])
}

/// The same with the message in the buffer.
pub(crate) fn private_message(cpu: &Cpu) -> Option<()> {
    cpu.write(cpu.address(RECEIVE, Privacy::Private), MESSAGE)?;
    private_buffer(cpu)
}
