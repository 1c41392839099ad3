//! Conversions between the kernel's register structures and the neutral ones.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    kvm_debugregs, kvm_dtable, kvm_guest_debug, kvm_regs, kvm_segment, kvm_sregs, kvm_xcr,
    kvm_xcrs,
};
use kvm_ops::{DebugRegs, DescTable, GuestDebug, Regs, Segment, Sregs, Xcrs, cr0};

/// DR7 without breakpoints: bit 10 reads as one.
const DR7_NONE: u64 = 0x400;

mod efer {
    pub(super) const LME: u64 = 1 << 8;
    pub(super) const LMA: u64 = 1 << 10;
}

/// Writes both directions of a conversion between structures with equally named fields; those
/// after the semicolon are converted by the functions named.
macro_rules! both_ways {
    ($from:ident, $to:ident: $Kvm:ident <=> $Neutral:ident {
        $($same:ident),*; $($field:ident: $field_from:ident, $field_to:ident),*
    }) => {
        pub(crate) fn $from(kvm: &$Kvm) -> $Neutral {
            $Neutral { $($same: kvm.$same,)* $($field: $field_from(&kvm.$field)),* }
        }

        pub(crate) fn $to(neutral: &$Neutral) -> $Kvm {
            $Kvm { $($same: neutral.$same,)* $($field: $field_to(&neutral.$field)),* }
        }
    };
}

both_ways!(from_kvm_regs, to_kvm_regs: kvm_regs <=> Regs {
    rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags;
});

both_ways!(from_kvm_sregs, to_kvm_sregs_unchecked: kvm_sregs <=> Sregs {
    cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap;
    cs: from_segment, to_segment, ds: from_segment, to_segment, es: from_segment, to_segment,
    fs: from_segment, to_segment, gs: from_segment, to_segment, ss: from_segment, to_segment,
    tr: from_segment, to_segment, ldt: from_segment, to_segment,
    gdt: from_table, to_table, idt: from_table, to_table
});

/// EFER.LMA is not written but follows LME and CR0.PG, as in the processor.
pub(crate) fn to_kvm_sregs(sregs: &Sregs) -> kvm_sregs {
    let mut kvm = to_kvm_sregs_unchecked(sregs);
    kvm.efer &= !efer::LMA;
    if kvm.efer & efer::LME != 0 && kvm.cr0 & cr0::PG != 0 {
        kvm.efer |= efer::LMA;
    }
    kvm
}

fn from_segment(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        kind: s.type_,
        present: s.present != 0,
        dpl: s.dpl,
        db: s.db != 0,
        s: s.s != 0,
        l: s.l != 0,
        g: s.g != 0,
        avl: s.avl != 0,
        unusable: s.unusable != 0,
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: s.present.into(),
        dpl: s.dpl,
        db: s.db.into(),
        s: s.s.into(),
        l: s.l.into(),
        g: s.g.into(),
        avl: s.avl.into(),
        unusable: s.unusable.into(),
        padding: 0,
    }
}

fn from_table(t: &kvm_dtable) -> DescTable {
    DescTable {
        base: t.base,
        limit: t.limit,
    }
}

fn to_table(t: &DescTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

pub(crate) fn from_kvm_debug_regs(kvm: &kvm_debugregs) -> DebugRegs {
    DebugRegs {
        db: kvm.db,
        dr6: kvm.dr6,
        dr7: kvm.dr7,
    }
}

pub(crate) fn to_kvm_debug_regs(regs: &DebugRegs) -> kvm_debugregs {
    kvm_debugregs {
        db: regs.db,
        dr6: regs.dr6,
        dr7: regs.dr7,
        ..Default::default()
    }
}

/// XCR0 is the only register of the list; a processor without XSAVE has none, which reads as the
/// value after reset.
pub(crate) fn from_kvm_xcrs(kvm: &kvm_xcrs) -> Xcrs {
    let mut used = kvm.xcrs.iter().take(kvm.nr_xcrs as usize);
    let xcr0 = used.find(|xcr| xcr.xcr == 0);
    xcr0.map_or_else(Xcrs::default, |xcr| Xcrs { xcr0: xcr.value })
}

pub(crate) fn to_kvm_xcrs(xcrs: &Xcrs) -> kvm_xcrs {
    let mut kvm = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    kvm.xcrs[0] = kvm_xcr {
        value: xcrs.xcr0,
        ..Default::default()
    };
    kvm
}

/// With `USE_HW_BP` the debug registers are the debugger's, also without breakpoints in them: KVM
/// hands #DB over only then.
pub(crate) fn to_kvm_guest_debug(debug: &GuestDebug) -> kvm_guest_debug {
    let mut kvm = kvm_guest_debug::default();
    if *debug == GuestDebug::default() {
        return kvm;
    }
    kvm.control = KVM_GUESTDBG_ENABLE;
    if debug.enabled {
        kvm.control |= KVM_GUESTDBG_USE_SW_BP;
    }
    if debug.single_step {
        kvm.control |= KVM_GUESTDBG_SINGLESTEP;
    }
    if debug.enabled || debug.hardware.is_some() {
        kvm.control |= KVM_GUESTDBG_USE_HW_BP;
        let [db @ .., dr7] = debug.hardware.unwrap_or([0, 0, 0, 0, DR7_NONE]);
        kvm.arch.debugreg[..4].copy_from_slice(&db);
        kvm.arch.debugreg[7] = dr7;
    }
    kvm
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::SegmentName;

    #[test]
    fn general_registers_keep_their_places() {
        // The neutral structure is in the kernel's order, so word n of one is word n of the other.
        let regs = Regs {
            rax: 1,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            rsi: 5,
            rdi: 6,
            rsp: 7,
            rbp: 8,
            r8: 9,
            r9: 10,
            r10: 11,
            r11: 12,
            r12: 13,
            r13: 14,
            r14: 15,
            r15: 16,
            rip: 17,
            rflags: 18,
        };
        let kvm = to_kvm_regs(&regs);
        assert_eq!((kvm.rax, kvm.rdx, kvm.r15, kvm.rflags), (1, 4, 16, 18));
        assert_eq!(from_kvm_regs(&kvm), regs);
    }

    #[test]
    fn each_segment_attribute_survives_alone() {
        let none = Segment::default();
        #[rustfmt::skip]
        let each = [
            Segment { base: u64::MAX, ..none },
            Segment { limit: u32::MAX, ..none },
            Segment { selector: 0xfff8, ..none },
            Segment { kind: 11, ..none },
            Segment { present: true, ..none },
            Segment { dpl: 3, ..none },
            Segment { db: true, ..none },
            Segment { s: true, ..none },
            Segment { l: true, ..none },
            Segment { g: true, ..none },
            Segment { avl: true, ..none },
            Segment { unusable: true, ..none },
        ];
        for segment in each {
            let kvm = to_segment(&segment);
            assert_eq!(from_segment(&kvm), segment);
            assert_ne!(kvm, to_segment(&none));
        }
    }

    #[test]
    fn special_registers_keep_their_places() {
        let mut sregs = Sregs {
            cr0: 1,
            cr2: 2,
            cr3: 3,
            cr4: 4,
            cr8: 8,
            efer: 9,
            apic_base: 10,
            interrupt_bitmap: [11, 12, 13, 14],
            gdt: DescTable {
                base: 15,
                limit: 16,
            },
            idt: DescTable {
                base: 17,
                limit: 18,
            },
            ..Sregs::default()
        };
        for (selector, name) in (20..).zip(SegmentName::ALL) {
            sregs.segment_mut(name).selector = selector;
        }
        let kvm = to_kvm_sregs(&sregs);
        assert_eq!(
            (kvm.cr3, kvm.cr8, kvm.apic_base, kvm.idt.base),
            (3, 8, 10, 17)
        );
        assert_eq!(
            (kvm.cs.selector, kvm.tr.selector, kvm.ldt.selector),
            (20, 26, 27)
        );
        assert_eq!(from_kvm_sregs(&kvm), sregs);
    }

    #[test]
    fn lma_is_lme_with_paging() {
        for (lme, pg) in [(false, false), (false, true), (true, false), (true, true)] {
            for lma in [0, efer::LMA] {
                let sregs = Sregs {
                    efer: if lme { efer::LME } else { 0 } | lma | 1,
                    cr0: if pg { cr0::PG } else { 0 } | cr0::PE,
                    ..Sregs::default()
                };
                let kvm = to_kvm_sregs(&sregs);
                assert_eq!(kvm.efer & efer::LMA != 0, lme && pg);
                assert_eq!(kvm.efer & !efer::LMA, sregs.efer & !efer::LMA);
            }
        }
    }

    #[test]
    fn the_debuggers_breakpoints_go_to_their_registers() {
        let off = to_kvm_guest_debug(&GuestDebug::default());
        assert_eq!(off, kvm_guest_debug::default());
        let debug = GuestDebug {
            hardware: Some([1, 2, 3, 4, 0x455]),
            ..GuestDebug::default()
        };
        let kvm = to_kvm_guest_debug(&debug);
        assert_eq!(kvm.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(kvm.arch.debugreg, [1, 2, 3, 4, 0, 0, 0, 0x455]);
    }
}
