//! Between the kernel's register structures and the neutral ones.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ops::{DescTable, Regs, Segment, SegmentName};

/// Writes both directions of a conversion between structures with equally named fields.
macro_rules! same_fields {
    ($($field:ident),*) => {
        pub(crate) fn from_kvm_regs(r: &kvm_regs) -> Regs {
            Regs { $($field: r.$field),* }
        }

        pub(crate) fn to_kvm_regs(r: &Regs) -> kvm_regs {
            kvm_regs { $($field: r.$field),* }
        }
    };
}
same_fields!(
    rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags
);

pub(crate) fn from_kvm_segment(s: &kvm_segment) -> Segment {
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

pub(crate) fn to_kvm_segment(s: &Segment) -> kvm_segment {
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

pub(crate) fn from_kvm_dtable(t: &kvm_dtable) -> DescTable {
    DescTable {
        base: t.base,
        limit: t.limit,
    }
}

pub(crate) fn to_kvm_dtable(t: DescTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

/// The place of a segment register in `struct kvm_sregs`.
pub(crate) fn segment_mut(sregs: &mut kvm_sregs, name: SegmentName) -> &mut kvm_segment {
    match name {
        SegmentName::Cs => &mut sregs.cs,
        SegmentName::Ds => &mut sregs.ds,
        SegmentName::Es => &mut sregs.es,
        SegmentName::Fs => &mut sregs.fs,
        SegmentName::Gs => &mut sregs.gs,
        SegmentName::Ss => &mut sregs.ss,
        SegmentName::Tr => &mut sregs.tr,
        SegmentName::Ldtr => &mut sregs.ldt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let each = [
            Segment {
                base: u64::MAX,
                ..none
            },
            Segment {
                limit: u32::MAX,
                ..none
            },
            Segment {
                selector: 0xfff8,
                ..none
            },
            Segment { kind: 11, ..none },
            Segment {
                present: true,
                ..none
            },
            Segment { dpl: 3, ..none },
            Segment { db: true, ..none },
            Segment { s: true, ..none },
            Segment { l: true, ..none },
            Segment { g: true, ..none },
            Segment { avl: true, ..none },
            Segment {
                unusable: true,
                ..none
            },
        ];
        for segment in each {
            let kvm = to_kvm_segment(&segment);
            assert_eq!(from_kvm_segment(&kvm), segment);
            assert_ne!(kvm, to_kvm_segment(&none));
        }
    }

    #[test]
    fn every_segment_name_has_a_place_of_its_own() {
        let mut sregs = kvm_sregs::default();
        for (i, name) in SegmentName::ALL.into_iter().enumerate() {
            segment_mut(&mut sregs, name).selector = i as u16 + 1;
        }
        for (i, name) in SegmentName::ALL.into_iter().enumerate() {
            assert_eq!(segment_mut(&mut sregs, name).selector, i as u16 + 1);
        }
    }
}
