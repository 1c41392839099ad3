//! The registers with which a vCPU starts.

use kvm_ops::{
    DescTable, Error, Field, Gpa, Regs, Result, Segment, SegmentName, Sregs, VcpuOps, cr0, rflags,
};

use crate::layout::{GDT, STACK_TOP};
use crate::traps;

/// The start of the first vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// At the reset vector, 16 bytes below 4 GiB, as after power-on (SDM vol. 3, 10.1.4).
    Reset,
    /// In real mode, at an address below 1 MiB.
    Real(Gpa),
    /// In protected mode with flat segments and no paging.
    Flat32 {
        /// The address.
        entry: u32,
        /// The selector of the code segment in [`gdt`].
        code: u16,
        /// The value of RSI: Linux's boot parameters.
        rsi: u64,
    },
}

/// The start of a vCPU whose registers are part of its measured start.
#[derive(Clone, Copy, Debug)]
pub(crate) enum MeasuredStart {
    /// In 64-bit code.
    Long(LongMode),
    /// As after power-on, in real mode at this address.
    #[cfg(feature = "sev")]
    Reset { entry: u32 },
}

/// The start in 64-bit code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LongMode {
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
    pub(crate) cr3: u64,
    /// The place of [`gdt`].
    pub(crate) gdt: Gpa,
    pub(crate) rax: u64,
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rdx: u64,
    pub(crate) rcx: u64,
    pub(crate) r8: u64,
}

/// The selectors that Linux demands at its 32-bit and 64-bit entry (boot.rst, `__BOOT_CS` and
/// `__BOOT_DS`), and one for the code that comes before a 64-bit entry.
pub(crate) const STUB_CS: u16 = 0x08;
pub(crate) const BOOT_CS: u16 = 0x10;
pub(crate) const BOOT_DS: u16 = 0x18;

/// CR0.ET, which every processor since the 486 has set.
const CR0_ET: u64 = 1 << 4;

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

/// A flat 32-bit segment of this kind.
fn flat(kind: u8) -> Segment {
    Segment {
        limit: u32::MAX,
        kind,
        present: true,
        db: true,
        s: true,
        g: true,
        ..Segment::default()
    }
}

/// The descriptor table in memory: null, 32-bit code, code of the entry (`long`: 64-bit), data.
pub(crate) fn gdt(long: bool) -> [u64; 4] {
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

/// Sets the registers: one call for each of the two groups.
pub(crate) fn set<V: VcpuOps>(vcpu: &mut V, start: &Start) -> Result<()> {
    let mut sregs = vcpu.sregs()?;
    let regs = place(&mut sregs, start)?;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}

/// Sets the registers of a start that is measured.
pub(crate) fn set_measured<V: VcpuOps>(vcpu: &mut V, start: &MeasuredStart) -> Result<()> {
    match start {
        MeasuredStart::Long(start) => set_long(vcpu, start),
        #[cfg(feature = "sev")]
        MeasuredStart::Reset { entry } => set_reset(vcpu, *entry),
    }
}

/// Sets the registers of power-on with another entry. RDX has the processor's signature, as KVM sets it.
#[cfg(feature = "sev")]
fn set_reset<V: VcpuOps>(vcpu: &mut V, entry: u32) -> Result<()> {
    let [signature, ..] = vcpu.cpuid_leaf(1, 0)?;
    let mut sregs = vcpu.sregs()?;
    let regs = place(&mut sregs, &Start::Reset)?;
    sregs.cs.base = u64::from(entry) & !0xffff;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&Regs {
        rip: u64::from(entry) & 0xffff,
        rdx: signature.into(),
        ..regs
    })
}

/// Sets the registers of a start in 64-bit mode.
fn set_long<V: VcpuOps>(vcpu: &mut V, start: &LongMode) -> Result<()> {
    const CR0_NE: u64 = 1 << 5;
    const CR0_MP: u64 = 1 << 1;
    const CR4_PAE: u64 = 1 << 5;
    /// OSFXSR and OSXMMEXCPT.
    const CR4_SSE: u64 = 0b11 << 9;
    /// LME and LMA.
    const EFER_LONG: u64 = 0b101 << 8;
    let mut sregs = vcpu.sregs()?;
    sregs.cr0 = cr0::PE | CR0_MP | CR0_ET | CR0_NE | cr0::PG;
    sregs.cr3 = start.cr3;
    sregs.cr4 = CR4_PAE | CR4_SSE;
    sregs.efer = EFER_LONG;
    sregs.gdt = DescTable {
        base: start.gdt.get(),
        limit: 4 * 8 - 1,
    };
    sregs.cs = Segment {
        selector: BOOT_CS,
        db: false,
        l: true,
        ..flat(CODE)
    };
    for name in DATA_SEGMENTS {
        *sregs.segment_mut(name) = Segment {
            selector: BOOT_DS,
            ..flat(DATA)
        };
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&Regs {
        rip: start.rip,
        rsp: start.rsp,
        rax: start.rax,
        rdi: start.rdi,
        rsi: start.rsi,
        rdx: start.rdx,
        rcx: start.rcx,
        r8: start.r8,
        rflags: rflags::RESERVED,
        ..Regs::default()
    })
}

/// Places segments, tables and control registers in `sregs`, and returns the general registers.
fn place(sregs: &mut Sregs, start: &Start) -> Result<Regs> {
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
        rflags: rflags::RESERVED,
        ..Regs::default()
    };
    match *start {
        Start::Reset => {
            sregs.cs = real(0xf000, 0xffff_0000, CODE);
            regs.rip = 0xfff0;
        }
        Start::Real(entry) => {
            let entry = entry.get();
            // Code of the first 64 KiB runs in segment 0, so that its addresses are offsets, as a
            // boot sector expects. Code above runs in the segment that starts with it.
            let base = if entry <= 0xffff { 0 } else { entry & !0xf };
            let selector =
                u16::try_from(base >> 4).map_err(|_| Error::Invalid(Field::Gpa, entry))?;
            sregs.cs = real(selector, base, CODE);
            for name in DATA_SEGMENTS {
                *sregs.segment_mut(name) = real(selector, base, DATA);
            }
            sregs.ss = real(0, 0, DATA);
            regs.rip = entry - base;
            // Grows down from the place where boot sectors are loaded.
            regs.rsp = 0x7c00;
        }
        Start::Flat32 { entry, code, rsi } => {
            sregs.cr0 = cr0::PE | CR0_ET;
            sregs.gdt = DescTable {
                base: GDT.get(),
                limit: 4 * 8 - 1,
            };
            sregs.idt = traps::idt(code == STUB_CS);
            sregs.cs = Segment {
                selector: code,
                ..flat(CODE)
            };
            for name in DATA_SEGMENTS {
                *sregs.segment_mut(name) = Segment {
                    selector: BOOT_DS,
                    ..flat(DATA)
                };
            }
            regs.rip = entry.into();
            regs.rsi = rsi;
            regs.rsp = STACK_TOP;
        }
    }
    Ok(regs)
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::testing::{Set, TestHost};
    use kvm_ops::{Host, Tech, VcpuId, VmParams, VmPort};

    fn started(start: &Start) -> Result<Set> {
        let vm = TestHost::default().create_vm(Tech::Vmx, &VmParams::new(1))?;
        let mut vcpu = vm.create_vcpu(VcpuId(0))?;
        set(&mut vcpu, start)?;
        Ok(vcpu.set.clone())
    }

    #[test]
    fn reset_starts_16_bytes_below_4_gib() {
        let set = started(&Start::Reset).unwrap();
        let cs = set.sregs.segment(SegmentName::Cs);
        assert_eq!(cs.base + set.regs.rip, 0xffff_fff0);
        assert_eq!((cs.selector, set.regs.rflags), (0xf000, 2));
    }

    #[test]
    fn real_mode_reaches_each_address_below_1_mib_and_none_above() {
        for entry in [0, 0x7c00, 0xffff, 0x1_0000, 0x1_2345, 0xf_ffff] {
            let set = started(&Start::Real(Gpa::new(entry))).unwrap();
            let cs = set.sregs.segment(SegmentName::Cs);
            assert_eq!(cs.base + set.regs.rip, entry);
            assert_eq!(cs.base, u64::from(cs.selector) << 4);
            assert_eq!(set.sregs.segment(SegmentName::Ds).base, cs.base);
            assert!(set.regs.rip <= 0xffff);
        }
        for entry in [0x10_0000, u64::MAX] {
            assert!(started(&Start::Real(Gpa::new(entry))).is_err());
        }
    }

    #[test]
    fn protected_mode_starts_with_flat_segments_and_the_boot_parameters() {
        let start = Start::Flat32 {
            entry: 0x10_0000,
            code: BOOT_CS,
            rsi: 0x4000,
        };
        let set = started(&start).unwrap();
        assert_eq!((set.regs.rip, set.regs.rsi), (0x10_0000, 0x4000));
        assert_eq!(set.sregs.cr0 & cr0::PE, cr0::PE);
        assert_eq!(set.sregs.gdt.base, GDT.get());
        let segments = DATA_SEGMENTS.map(|name| (name, BOOT_DS));
        for (name, selector) in [(SegmentName::Cs, BOOT_CS)].into_iter().chain(segments) {
            let segment = set.sregs.segment(name);
            assert_eq!((segment.base, segment.limit), (0, u32::MAX), "{name:?}");
            assert_eq!(segment.selector, selector);
            // A reload from the table would load the same.
            let descriptor = gdt(false)[usize::from(selector) / 8];
            assert_eq!(super::descriptor(segment), descriptor);
        }
    }

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
