//! The registers with which a vCPU starts.

use crate::control::cr0;
use crate::{DescTable, Error, Gpa, Regs, Result, Segment, SegmentName, VcpuOps};

use super::layout::{GDT, STACK_TOP};

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// At the reset vector, 16 bytes below 4 GiB, as after power-on (SDM vol. 3, 10.1.4).
    Reset,
    /// In real mode, at an address below 1 MiB.
    Real(Gpa),
    /// In protected mode with flat segments and no paging.
    Flat32 {
        /// Where.
        entry: u32,
        /// The selector of the code segment in [`gdt`].
        code: u16,
        /// What RSI holds: Linux's boot parameters.
        rsi: u64,
    },
}

/// The selectors that Linux demands at its 32-bit and 64-bit entry (boot.rst, `__BOOT_CS` and
/// `__BOOT_DS`), and one for the code that comes before a 64-bit entry.
pub(super) const STUB_CS: u16 = 0x08;
pub(super) const BOOT_CS: u16 = 0x10;
pub(super) const BOOT_DS: u16 = 0x18;

/// CR0.ET, which every processor since the 486 has set.
const CR0_ET: u64 = 1 << 4;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Type fields of descriptors, accessed already: the processor need not write them.
const CODE: u8 = 0xb;
const DATA: u8 = 0x3;

const DATA_SEGMENTS: [SegmentName; 5] = [
    SegmentName::Ds,
    SegmentName::Es,
    SegmentName::Fs,
    SegmentName::Gs,
    SegmentName::Ss,
];

/// The descriptor table in memory: null, 32-bit code, code of the entry (`long`: 64-bit), data.
pub(super) fn gdt(long: bool) -> [u64; 4] {
    let flat = |kind| Segment {
        limit: u32::MAX,
        kind,
        present: true,
        db: true,
        s: true,
        g: true,
        ..Segment::default()
    };
    let entry = Segment {
        db: !long,
        l: long,
        ..flat(CODE)
    };
    [
        0,
        descriptor(&flat(CODE)),
        descriptor(&entry),
        descriptor(&flat(DATA)),
    ]
}

/// A flat code or data segment as its descriptor (SDM vol. 3, 3.4.5): the base is 0 and the limit
/// counts pages.
fn descriptor(segment: &Segment) -> u64 {
    let bit = |value: bool, at: u32| u64::from(value) << at;
    0xffff
        | u64::from(segment.kind) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl) << 45
        | bit(segment.present, 47)
        | 0xf << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
}

/// Sets the registers.
pub(super) fn set<V: VcpuOps>(vcpu: &mut V, start: &Start) -> Result<()> {
    let real = |selector: u16, base: u64, kind| Segment {
        base,
        limit: 0xffff,
        selector,
        kind,
        present: true,
        s: true,
        ..Segment::default()
    };
    let mut regs = Regs {
        rflags: RFLAGS_FIXED,
        ..Regs::default()
    };
    match *start {
        Start::Reset => {
            vcpu.set_segment(SegmentName::Cs, &real(0xf000, 0xffff_0000, CODE))?;
            regs.rip = 0xfff0;
        }
        Start::Real(entry) => {
            let entry = entry.get();
            // Code of the first 64 KiB runs in segment 0, so that its addresses are offsets, as a
            // boot sector expects. Code above runs in the segment that starts with it.
            let base = if entry <= 0xffff { 0 } else { entry & !0xf };
            let selector =
                u16::try_from(base >> 4).map_err(|_| Error::Invalid(crate::Field::Gpa, entry))?;
            vcpu.set_segment(SegmentName::Cs, &real(selector, base, CODE))?;
            for name in DATA_SEGMENTS {
                vcpu.set_segment(name, &real(selector, base, DATA))?;
            }
            vcpu.set_segment(SegmentName::Ss, &real(0, 0, DATA))?;
            regs.rip = entry - base;
            // Grows down from where boot sectors are loaded.
            regs.rsp = 0x7c00;
        }
        Start::Flat32 { entry, code, rsi } => {
            vcpu.set_cr0(cr0::PE | CR0_ET)?;
            vcpu.set_gdt(DescTable {
                base: GDT.get(),
                limit: 4 * 8 - 1,
            })?;
            vcpu.set_idt(DescTable::default())?;
            let flat = |selector, kind| Segment {
                limit: u32::MAX,
                selector,
                kind,
                present: true,
                db: true,
                s: true,
                g: true,
                ..Segment::default()
            };
            vcpu.set_segment(SegmentName::Cs, &flat(code, CODE))?;
            for name in DATA_SEGMENTS {
                vcpu.set_segment(name, &flat(BOOT_DS, DATA))?;
            }
            regs.rip = entry.into();
            regs.rsi = rsi;
            regs.rsp = STACK_TOP;
        }
    }
    vcpu.set_regs(&regs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_that_linux_uses() {
        // Linux arch/x86/boot/pm.c: GDT_ENTRY(0xc09b, 0, 0xfffff) and so on.
        assert_eq!(
            gdt(false),
            [
                0,
                0x00cf_9b00_0000_ffff,
                0x00cf_9b00_0000_ffff,
                0x00cf_9300_0000_ffff
            ]
        );
        assert_eq!(gdt(true)[2], 0x00af_9b00_0000_ffff);
    }
}
