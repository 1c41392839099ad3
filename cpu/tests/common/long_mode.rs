//! 64-bit code at CPL 0.

use std::sync::Arc;

use kvm_ops_cpu::{CodePages, Cpu, CpuidTable, Segment};

use super::{Ram, TestBus};

pub const CODE: u64 = 0x8000;
pub const HANDLER: u64 = 0x9000;
pub const IDT: u64 = 0x2000;
const GDT: u64 = 0x1000;
const PML4: u64 = 0x10000;
pub const STACK: u64 = 0x7000;

/// 64-bit code at CPL 0 with an interrupt table whose gates all lead to `handler`.
pub fn machine(code: &[u8], handler: &[u8]) -> (Cpu, Arc<Ram>) {
    let ram = memory(code, handler);
    let cpu = processor(&ram, &CodePages::new(256));
    (cpu, ram)
}

/// Memory with that code, tables and gates.
pub fn memory(code: &[u8], handler: &[u8]) -> Arc<Ram> {
    let ram = Ram::new(0x10_0000);
    ram.write(CODE, code);
    ram.write(HANDLER, handler);
    ram.write_u64(PML4, 0x11003);
    ram.write_u64(0x11000, 0x12003);
    ram.write_u64(0x12000, 0x83);
    ram.write_u64(GDT + 8, 0x00af_9b00_0000_ffff);
    ram.write_u64(GDT + 16, 0x00cf_9300_0000_ffff);
    for vector in 0..64 {
        ram.write_u64(IDT + vector * 16, HANDLER | 8 << 16 | 0x8e << 40);
    }
    ram
}

/// A processor at the start of the code.
pub fn processor(ram: &Arc<Ram>, pages: &Arc<CodePages>) -> Cpu {
    let bus = TestBus::new(ram);
    let mut cpu = Cpu::new(Box::new(bus), Arc::clone(pages), CpuidTable::intel());
    let mut r = cpu.registers();
    let flat = |selector, rights| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        rights,
    };
    r.segments = [flat(0x10, 0xc093); 6];
    r.segments[1] = flat(0x8, 0xa09b);
    r.gdtr.base = GDT;
    r.gdtr.limit = 0x17;
    r.idtr.base = IDT;
    r.idtr.limit = 0x3ff;
    r.cr0 = 0x8001_0033;
    r.cr3 = PML4;
    r.cr4 = 0x20;
    r.efer = 0x501;
    r.rip = CODE;
    r.gpr[4] = STACK;
    cpu.set_registers(&r);
    // The APIC in x2APIC mode, software-enabled.
    for (msr, value) in [(0x1b, 0xfee0_0d00), (0x80f, 0x1ff)] {
        cpu.write_msr(msr, value).expect("an APIC register");
    }
    cpu
}
