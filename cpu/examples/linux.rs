//! Boots a Linux bzImage at its 64-bit entry, with a serial console on standard output.
//!
//! `cargo run --release -p kvm-ops-cpu --example linux -- BZIMAGE [INITRD] [COMMAND LINE]`
//!
//! The machine has memory, a serial port and the processor's own APIC and timer; everything else
//! reads as ones. It ends when the guest halts for good, reboots (port 64H), or faults three times.

mod common;

use std::io::Write;
use std::ptr::NonNull;

use common::cpu_seconds;
use kvm_ops_cpu::{
    Access, Bus, Cause, CodePages, Cpu, CpuidTable, Frame, Mapping, Segment, Stopped,
};

const MEMORY: usize = 512 << 20;
const ZERO_PAGE: usize = 0x7000;
const COMMAND_LINE: usize = 0x2_0000;
const TABLES: usize = 0x9000;
const GDT: usize = 0x8000;
const KERNEL: usize = 0x100_0000;
const INITRD: usize = 0x1000_0000;

/// Memory and a serial port.
struct Pc {
    memory: NonNull<u8>,
    len: usize,
    latch: bool,
}

// SAFETY: the memory is this value's alone.
unsafe impl Send for Pc {}

impl Bus for Pc {
    fn map(&mut self, gpa: u64, _: Access) -> Mapping {
        if gpa >= self.len as u64 {
            return Mapping::Device;
        }
        // SAFETY: the page is inside of the leaked memory; this program touches it again only
        // after the processor is gone.
        Mapping::Frame(unsafe { Frame::new(self.memory.add(gpa as usize), true) })
    }

    fn read(&mut self, _: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        true
    }

    fn write(&mut self, _: u64, _: &[u8]) -> bool {
        true
    }

    fn port_in(&mut self, port: u16, _: u8) -> Option<u32> {
        Some(match port {
            // Transmitter empty; no interrupt pending; carrier and clear to send.
            0x3fd => 0x60,
            0x3fa => 1,
            0x3fe => 0xb0,
            0x3f8..=0x3ff => 0,
            _ => u32::MAX,
        })
    }

    fn port_out(&mut self, port: u16, _: u8, value: u32) -> Option<()> {
        match port {
            0x3f8 if !self.latch => {
                let mut out = std::io::stdout();
                let _ = out.write_all(&[value as u8]).and_then(|()| out.flush());
            }
            0x3fb => self.latch = value & 0x80 != 0,
            // Pulse of the keyboard controller's reset line.
            0x64 if value == 0xfe => return None,
            _ => {}
        }
        Some(())
    }
}

fn put(memory: &mut [u8], at: usize, data: &[u8]) {
    memory[at..at + data.len()].copy_from_slice(data);
}

fn word(image: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]])
}

/// Places kernel, zero page, command line and page tables (the kernel's boot protocol, x86).
fn load(memory: &mut [u8], image: &[u8], initrd: &[u8], command_line: &str) -> Result<u64, String> {
    if image.len() < 0x300 || &image[0x202..0x206] != b"HdrS" {
        return Err("not a bzImage".into());
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let kernel = image
        .get((sectors + 1) * 512..)
        .ok_or("the bzImage is cut")?;
    put(memory, KERNEL, kernel);
    put(memory, INITRD, initrd);
    put(memory, COMMAND_LINE, command_line.as_bytes());
    let header_end = 0x202 + usize::from(image[0x201]);
    put(memory, ZERO_PAGE + 0x1f1, &image[0x1f1..header_end]);
    memory[ZERO_PAGE + 0x210] = 0xff;
    put(
        memory,
        ZERO_PAGE + 0x228,
        &(COMMAND_LINE as u32).to_le_bytes(),
    );
    if !initrd.is_empty() {
        put(memory, ZERO_PAGE + 0x218, &(INITRD as u32).to_le_bytes());
        put(
            memory,
            ZERO_PAGE + 0x21c,
            &(initrd.len() as u32).to_le_bytes(),
        );
    }
    let map = [(0u64, 0x9_f000u64), (0x10_0000, MEMORY as u64 - 0x10_0000)];
    memory[ZERO_PAGE + 0x1e8] = map.len() as u8;
    for (i, (start, len)) in map.into_iter().enumerate() {
        let at = ZERO_PAGE + 0x2d0 + i * 20;
        put(memory, at, &start.to_le_bytes());
        put(memory, at + 8, &len.to_le_bytes());
        put(memory, at + 16, &1u32.to_le_bytes());
    }
    // 1 GiB of identity map.
    put(memory, TABLES, &(TABLES as u64 + 0x1003).to_le_bytes());
    put(memory, TABLES + 0x1000, &0x83u64.to_le_bytes());
    for (i, entry) in [0x00af_9b00_0000_ffffu64, 0x00cf_9300_0000_ffff]
        .into_iter()
        .enumerate()
    {
        put(memory, GDT + 0x10 + i * 8, &entry.to_le_bytes());
    }
    if word(image, 0x236) & 1 == 0 {
        return Err("the kernel has no 64-bit entry".into());
    }
    Ok(KERNEL as u64 + 0x200)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let image = std::fs::read(
        args.next()
            .ok_or("usage: linux BZIMAGE [INITRD] [COMMAND LINE]")?,
    )?;
    let initrd = match args.next().filter(|p| !p.is_empty()) {
        Some(path) => std::fs::read(path)?,
        None => Vec::new(),
    };
    let default = "console=ttyS0 earlyprintk=serial panic=-1 reboot=k tsc=reliable";
    let command_line = args.next().unwrap_or_else(|| default.into());
    let memory = Vec::leak(vec![0u8; MEMORY + 4096]);
    let memory = &mut memory[..];
    let skew = memory.as_ptr().align_offset(4096);
    let memory = &mut memory[skew..skew + MEMORY];
    let entry = load(memory, &image, &initrd, &command_line)?;
    let host = NonNull::new(memory.as_mut_ptr()).ok_or("no memory")?;
    let bus = Pc {
        memory: host,
        len: MEMORY,
        latch: false,
    };
    let mut cpu = Cpu::new(
        Box::new(bus),
        CodePages::new(MEMORY >> 12),
        CpuidTable::intel(),
    );
    let mut r = cpu.registers();
    let flat = |selector, rights| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    r.segments = [flat(0x18, 0xc093); 6];
    r.segments[1] = flat(0x10, 0xa09b);
    r.gdtr.base = GDT as u64;
    r.gdtr.limit = 0x1f;
    r.cr0 = 0x8000_0011;
    r.cr3 = TABLES as u64;
    r.cr4 = 0x20;
    r.efer = 0x500;
    r.rip = entry;
    r.gpr[6] = ZERO_PAGE as u64;
    cpu.set_registers(&r);
    let start = cpu_seconds();
    let end = run(&mut cpu);
    let seconds = cpu_seconds() - start;
    println!("\n{end}");
    let millions = cpu.retired() as f64 / 1e6;
    println!(
        "{} instructions, {seconds:.2} s of processor time, {:.0} M/s",
        cpu.retired(),
        millions / seconds
    );
    for (name, count) in cpu.missing() {
        println!("not implemented: {name}, {count} times");
    }
    Ok(())
}

fn run(cpu: &mut Cpu) -> String {
    loop {
        match cpu.run(1_000_000_000) {
            Stopped::Budget | Stopped::Paused => {}
            Stopped::Halted => match cpu.deadline() {
                Some(at) if cpu.rflags() & 0x200 != 0 => cpu.advance_to(at),
                _ => return format!("halted at {:#x}", cpu.rip()),
            },
            Stopped::Exit(exit) if matches!(exit.cause, Cause::Io(io) if io.port == 0x64) => {
                return "the guest restarted the machine".into();
            }
            Stopped::Exit(exit) => {
                return format!("{:x?} at {:#x}\n{:x?}", exit, cpu.rip(), cpu.registers());
            }
            Stopped::WaitsForStart => return "waits for a start-up interrupt".into(),
            Stopped::Alone => return "asks to be alone".into(),
        }
    }
}
