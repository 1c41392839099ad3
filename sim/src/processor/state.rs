//! The formats of registers: the framework's and the processor's.

use kvm_ops::{DescTable, Regs, Segment, Sregs, cr0};
use kvm_ops_cpu::{Registers, Segment as CpuSegment, TableRegister};

/// EFER.LME and EFER.LMA.
pub(crate) const LME: u64 = 1 << 8;
pub(crate) const LMA: u64 = 1 << 10;

/// Unusable, in the access rights of a VMCS.
const UNUSABLE: u32 = 1 << 16;

fn segment(from: &CpuSegment) -> Segment {
    let bit = |n: u32| from.rights >> n & 1 != 0;
    Segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        kind: (from.rights & 15) as u8,
        s: bit(4),
        dpl: (from.rights >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
    }
}

/// A segment that is not present is unusable, as KVM on VMX has it.
fn cpu_segment(from: &Segment) -> CpuSegment {
    let bit = |value: bool, n: u32| u32::from(value) << n;
    CpuSegment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        rights: u32::from(from.kind & 15)
            | bit(from.s, 4)
            | u32::from(from.dpl & 3) << 5
            | bit(from.present, 7)
            | bit(from.avl, 12)
            | bit(from.l, 13)
            | bit(from.db, 14)
            | bit(from.g, 15)
            | if from.unusable { UNUSABLE } else { 0 },
    }
}

pub(crate) fn regs(from: &Registers) -> Regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = from.gpr;
    Regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: from.rip,
        rflags: from.rflags,
    }
}

pub(crate) fn load_regs(to: &mut Registers, from: &Regs) {
    to.gpr = [
        from.rax, from.rcx, from.rdx, from.rbx, from.rsp, from.rbp, from.rsi, from.rdi, from.r8,
        from.r9, from.r10, from.r11, from.r12, from.r13, from.r14, from.r15,
    ];
    (to.rip, to.rflags) = (from.rip, from.rflags);
}

/// The linear address of the next instruction.
pub(crate) fn linear_rip(from: &Registers) -> u64 {
    const L: u32 = 1 << 13;
    let [_, code, ..] = &from.segments;
    match from.efer & LMA != 0 && code.rights & L != 0 {
        true => from.rip,
        false => code.base.wrapping_add(from.rip) & u64::from(u32::MAX),
    }
}

/// All but the base of the local APIC and the interrupts that wait.
pub(crate) fn sregs(from: &Registers) -> Sregs {
    let [es, cs, ss, ds, fs, gs] = from.segments.each_ref().map(segment);
    let table = |table: &TableRegister| DescTable {
        base: table.base,
        limit: table.limit,
    };
    Sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: segment(&from.tr),
        ldt: segment(&from.ldtr),
        gdt: table(&from.gdtr),
        idt: table(&from.idtr),
        cr0: from.cr0,
        cr2: from.cr2,
        cr3: from.cr3,
        cr4: from.cr4,
        cr8: from.cr8.into(),
        efer: from.efer,
        ..Sregs::default()
    }
}

/// EFER.LMA is not written: it follows LME and CR0.PG, as in the processor.
pub(crate) fn load_sregs(to: &mut Registers, from: &Sregs) {
    let table = |table: &DescTable| TableRegister {
        base: table.base,
        limit: table.limit,
    };
    to.segments = [&from.es, &from.cs, &from.ss, &from.ds, &from.fs, &from.gs].map(cpu_segment);
    to.tr = cpu_segment(&from.tr);
    to.ldtr = cpu_segment(&from.ldt);
    (to.gdtr, to.idtr) = (table(&from.gdt), table(&from.idt));
    (to.cr0, to.cr2, to.cr3, to.cr4) = (from.cr0, from.cr2, from.cr3, from.cr4);
    to.cr8 = (from.cr8 & 15) as u8;
    let active = from.efer & LME != 0 && from.cr0 & cr0::PG != 0;
    to.efer = from.efer & !LMA | if active { LMA } else { 0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_of_a_segment_has_its_place_in_both_formats() {
        for bit in (0..=7).chain(12..=16) {
            let one = CpuSegment {
                selector: 8,
                base: 0x1000,
                limit: 0xfff,
                rights: 1 << bit,
            };
            assert_eq!(cpu_segment(&segment(&one)), one, "bit {bit}");
        }
        // The access rights of a flat 64-bit code segment (SDM vol. 3, table 25-2).
        let code = Segment {
            limit: u32::MAX,
            kind: 11,
            s: true,
            present: true,
            l: true,
            g: true,
            ..Segment::default()
        };
        assert_eq!(cpu_segment(&code).rights, 0xa09b);
    }
}
