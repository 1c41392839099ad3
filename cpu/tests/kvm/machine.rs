//! The machine of a case: its memory and its registers before the first instruction.

use std::sync::Arc;

use kvm_ops_cpu::{Registers, Segment, TableRegister};

use crate::cases::Case;
use crate::common::Ram;

pub(crate) const MEMORY: usize = 0x1_8000;
const GDT: u64 = 0x1000;
/// Descriptor under test, of 16 bytes.
pub(crate) const TESTED: u16 = 0x38;
const TSS: u64 = 0x2000;
const IDT: u64 = 0x3000;
/// Sixteen bytes of HLT a vector.
pub(crate) const HANDLERS: u64 = 0x4000;
pub(crate) const CODE: u64 = 0x5000;
/// Where far branches and returns lead: HLT.
pub(crate) const ELSEWHERE: u64 = 0x5800;
const KERNEL_STACK: u64 = 0x7000;
pub(crate) const STACK: u64 = 0x8000;
/// Operands in memory.
pub(crate) const DATA: u64 = 0x9000;
const PML4: u64 = 0x1_0000;
/// The page tables.
pub(crate) const TABLES: std::ops::Range<u64> = PML4..0x1_5000;
const SMALL: u64 = 0x1_3000;
/// Linear address of the page under test, its entry in the last table, the directory entry of its 2 MiB, and its frame.
pub(crate) const PAGE: u64 = 0x20_0000;
pub(crate) const PAGE_ENTRY: u64 = 0x1_4000;
pub(crate) const DIRECTORY_ENTRY: u64 = 0x1_2008;
pub(crate) const FRAME: u64 = 0xa000;

/// MSRs that are compared.
pub(crate) const MSRS: [u32; 9] = [
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
];

/// Why a case stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    Halted,
    TripleFault,
    Port { port: u16, bytes: u8, write: bool },
    Budget,
}

/// What can be seen after a case.
pub(crate) struct Outcome {
    pub(crate) stop: Stop,
    pub(crate) registers: Registers,
    pub(crate) msrs: [u64; MSRS.len()],
    pub(crate) memory: Vec<u8>,
}

/// Memory before the case.
pub(crate) fn fill(ram: &Ram, case: &Case) {
    // Every byte that a stray branch may reach is HLT.
    ram.write(0, &[0xf4; MEMORY]);
    for table in [PML4, 0x1_1000, 0x1_2000, SMALL, PAGE_ENTRY] {
        ram.write(table, &[0; 4096]);
    }
    ram.write_u64(PML4, 0x1_1007);
    ram.write_u64(0x1_1000, 0x1_2007);
    ram.write_u64(0x1_2000, SMALL | 7);
    ram.write_u64(DIRECTORY_ENTRY, PAGE_ENTRY | 7);
    ram.write_u64(PAGE_ENTRY, FRAME | 7);
    for page in 0..MEMORY as u64 / 4096 {
        // Code, stack and operands are the user's at CPL 3.
        let user = case.cpl == 3 && matches!(page << 12, CODE | 0x7000 | DATA);
        ram.write_u64(SMALL + page * 8, page << 12 | 3 | u64::from(user) << 2);
    }
    ram.write(GDT, &[0; 4096]);
    for (selector, descriptor) in [
        (0x08, 0x00af_9b00_0000_ffff),
        (0x10, 0x00cf_9300_0000_ffff),
        (0x18, 0x00af_fb00_0000_ffff),
        (0x20, 0x00cf_f300_0000_ffff),
        (0x28, 0x0000_8b00_2000_0067),
    ] {
        ram.write_u64(GDT + selector, descriptor);
    }
    ram.write(TSS, &[0; 0x68]);
    ram.write(TSS + 4, &KERNEL_STACK.to_le_bytes());
    ram.write(TSS + 0x24, &(KERNEL_STACK - 0x800).to_le_bytes());
    // The permission bitmap begins behind the limit: there is none.
    ram.write(TSS + 0x66, &[0x68, 0]);
    ram.write(IDT, &[0; 4096]);
    for vector in 0..256 {
        let handler = HANDLERS + vector * 16;
        ram.write_u64(IDT + vector * 16, handler | 8 << 16 | 0x8e << 40);
    }
    ram.write(CODE, &case.code);
    for (at, bytes) in &case.memory {
        ram.write(*at, bytes);
    }
}

/// Address of the gate of a vector.
pub(crate) fn gate(vector: u64) -> u64 {
    IDT + vector * 16
}

/// Address of the descriptor under test.
pub(crate) fn tested() -> u64 {
    GDT + u64::from(TESTED)
}

/// Registers before the case.
pub(crate) fn registers(case: &Case) -> Registers {
    let flat = |selector, rights| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    let (code, data) = match case.cpl {
        0 => (flat(0x8, 0xa09b), flat(0x10, 0xc093)),
        _ => (flat(0x1b, 0xa0fb), flat(0x23, 0xc0f3)),
    };
    let mut segments = [data; 6];
    segments[1] = code;
    let mut gpr = case.gpr;
    gpr[4] = STACK;
    Registers {
        gpr,
        rip: CODE,
        rflags: case.rflags | 2,
        segments,
        ldtr: Segment {
            selector: 0,
            base: 0,
            limit: 0,
            rights: 1 << 16 | 0x82,
        },
        tr: Segment {
            selector: 0x28,
            base: TSS,
            limit: 0x67,
            rights: 0x8b,
        },
        gdtr: TableRegister {
            base: GDT,
            limit: 0x4f,
        },
        idtr: TableRegister {
            base: IDT,
            limit: 0xfff,
        },
        cr0: case.cr0,
        cr2: 0,
        cr3: PML4,
        cr4: case.cr4,
        cr8: 0,
        efer: case.efer,
        xcr0: 1,
        breakpoints: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
    }
}

/// Memory of a case, at first without content.
pub(crate) fn ram() -> Arc<Ram> {
    Ram::new(MEMORY)
}
