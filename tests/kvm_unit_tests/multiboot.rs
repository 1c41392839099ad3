//! Loading of a 32-bit ELF image by the Multiboot 1 protocol, and what firmware leaves behind: the
//! interrupt controllers as a BIOS programs them.

use elf::ElfBytes;
use elf::abi::PT_LOAD;
use elf::endian::LittleEndian;
use kvm_ops::sim::SimHost;
use kvm_ops::{DescTable, Gpa, Regs, Segment, VcpuId};
use kvm_ops_machine::Machine;

use crate::list::Entry;

/// Places below 640 KiB that no image uses.
const INFORMATION: u64 = 0x9_0000;
const MEMORY_MAP: u64 = 0x9_0100;
const MODULES: u64 = 0x9_0200;
const COMMAND_LINE: u64 = 0x9_1000;
const ENVIRONMENT: u64 = 0x9_2000;
const FIRMWARE: u64 = 0x9_8000;
/// The handler of every real-mode vector.
const HANDLER: u64 = 0x9_9000;

/// Fields of the information that are valid: memory, command line, modules, memory map.
const FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6;
/// The boot loader's mark in EAX.
const MAGIC: u64 = 0x2bad_b002;

fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// `mov al, VALUE; out PORT, al` for each pair.
fn writes(pairs: &[(u8, u8)]) -> Vec<u8> {
    let code = pairs
        .iter()
        .map(|(port, value)| [0xb0, *value, 0xe6, *port]);
    code.flatten().collect()
}

/// 32-bit code: both 8259A with vectors from 8 and from 0x70, lines 0 to 2 and 11 let through, timer 0 at
/// 18.2 Hz, and a jump to the entry. Only EAX and the flags change.
fn firmware(entry: u32) -> Vec<u8> {
    let mut code = writes(&[
        (0x20, 0x11),
        (0x21, 0x08),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x70),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0x21, 0xf8),
        (0xa1, 0xf7),
        (0x43, 0x34),
        (0x40, 0x00),
        (0x40, 0x00),
    ]);
    code.push(0xb8); // mov eax, MAGIC
    code.extend((MAGIC as u32).to_le_bytes());
    let next = FIRMWARE as u32 + code.len() as u32 + 5;
    code.push(0xe9); // jmp entry
    code.extend(entry.wrapping_sub(next).to_le_bytes());
    code
}

/// 16-bit code: push ax; mov al, 0x20; out 0xa0, al; out 0x20, al; pop ax; iret.
const END_OF_INTERRUPT: [u8; 9] = [0x50, 0xb0, 0x20, 0xe6, 0xa0, 0xe6, 0x20, 0x58, 0xcf];

/// Loads the segments of the file. Returns the entry.
fn load(machine: &Machine<SimHost>, file: &[u8]) -> Result<u32, String> {
    let text = |error: elf::ParseError| error.to_string();
    let elf = ElfBytes::<LittleEndian>::minimal_parse(file).map_err(text)?;
    let segments = elf.segments().ok_or("no program headers")?;
    for segment in segments.iter().filter(|segment| segment.p_type == PT_LOAD) {
        let data = elf.segment_data(&segment).map_err(text)?;
        let at = Gpa::new(segment.p_paddr);
        // Memory is zeros, so the rest of the segment is there.
        let written = machine.memory().write(at, data);
        written.map_err(|error| error.to_string())?;
    }
    u32::try_from(elf.ehdr.e_entry).map_err(|_| "the entry is above 4 GiB".into())
}

fn flat(kind: u8, selector: u16) -> Segment {
    Segment {
        limit: u32::MAX,
        selector,
        kind,
        s: true,
        present: true,
        db: true,
        g: true,
        ..Segment::default()
    }
}

/// Loads an image and lets vCPU 0 start it: 32-bit code, paging off, EBX at the information.
pub(crate) fn boot(
    machine: &mut Machine<SimHost>,
    file: &[u8],
    entry: &Entry,
) -> Result<(), String> {
    let start = load(machine, file)?;
    let upper = entry.memory - (1 << 20);
    let map = [
        (0, 0xa_0000),
        (1 << 20, upper.min((3 << 30) - (1 << 20))),
        (4 << 30, entry.memory.saturating_sub(3 << 30)),
    ];
    let map: Vec<u8> = map
        .iter()
        .filter(|(_, bytes)| *bytes != 0)
        .flat_map(|(base, bytes): &(u64, u64)| {
            [
                words(&[20]),
                [base.to_le_bytes(), bytes.to_le_bytes()].concat(),
                words(&[1]),
            ]
            .concat()
        })
        .collect();
    let environment: String = entry
        .environment
        .split_whitespace()
        .map(|word| format!("{word}\n"))
        .collect();
    let modules = u32::from(!environment.is_empty());
    let mut information = vec![
        FLAGS,
        640,
        (upper.min(3 << 30) >> 10) as u32,
        0,
        COMMAND_LINE as u32,
        modules,
        MODULES as u32,
    ];
    information.extend([0; 4]);
    information.extend([map.len() as u32, MEMORY_MAP as u32]);
    information.extend([0; 9]);
    let end = ENVIRONMENT as u32 + environment.len() as u32;
    let command_line = format!("{}.flat {}\0", entry.name, entry.append);
    let vectors: Vec<u8> = words(&[(HANDLER as u32) >> 4 << 16]).repeat(256);
    for (at, bytes) in [
        (0, vectors),
        (INFORMATION, words(&information)),
        (MEMORY_MAP, map),
        (MODULES, words(&[ENVIRONMENT as u32, end, 0, 0])),
        (COMMAND_LINE, command_line.into_bytes()),
        (ENVIRONMENT, environment.into_bytes()),
        (FIRMWARE, firmware(start)),
        (HANDLER, END_OF_INTERRUPT.to_vec()),
    ] {
        let written = machine.memory().write(Gpa::new(at), &bytes);
        written.map_err(|error| error.to_string())?;
    }
    registers(machine).map_err(|error| error.to_string())?;
    machine.enable_vcpu(VcpuId(0));
    Ok(())
}

fn registers(machine: &mut Machine<SimHost>) -> kvm_ops::Result<()> {
    let vcpu = machine.vcpu_mut(VcpuId(0)).expect("a vCPU");
    let mut sregs = vcpu.sregs()?;
    let data = flat(3, 0x10);
    sregs.cs = flat(11, 8);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = DescTable { base: 0, limit: 0 };
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&Regs {
        rip: FIRMWARE,
        rbx: INFORMATION,
        rflags: 2,
        ..Regs::default()
    })
}
