//! Registers, as the interface has them and as back ends have them.

use kvm_ops_uapi::state as uapi;
use kvm_ops_uapi::{U16, U32, U64};

/// A function each way for a structure of numbers with equal names.
macro_rules! both_ways {
    ($from:ident, $to:ident: $Uapi:ty => $Own:ty { $($field:ident)* }) => {
        pub(super) fn $from(from: &$Uapi) -> $Own {
            type Own = $Own;
            Own { $($field: from.$field.get(),)* }
        }

        pub(super) fn $to(from: &$Own) -> $Uapi {
            type Uapi = $Uapi;
            Uapi { $($field: U64::new(from.$field),)* }
        }
    };
}

both_ways!(from_regs, to_regs: uapi::Regs => kvm_ops::Regs {
    rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags
});

fn from_segment(from: &uapi::Segment) -> kvm_ops::Segment {
    kvm_ops::Segment {
        base: from.base.get(),
        limit: from.limit.get(),
        selector: from.selector.get(),
        kind: from.kind,
        present: from.present != 0,
        dpl: from.dpl,
        db: from.db != 0,
        s: from.s != 0,
        l: from.l != 0,
        g: from.g != 0,
        avl: from.avl != 0,
        unusable: from.unusable != 0 || from.present == 0,
    }
}

fn to_segment(from: &kvm_ops::Segment) -> uapi::Segment {
    uapi::Segment {
        base: U64::new(from.base),
        limit: U32::new(from.limit),
        selector: U16::new(from.selector),
        kind: from.kind,
        present: from.present.into(),
        dpl: from.dpl,
        db: from.db.into(),
        s: from.s.into(),
        l: from.l.into(),
        g: from.g.into(),
        avl: from.avl.into(),
        unusable: from.unusable.into(),
        padding: 0,
    }
}

fn from_table(from: &uapi::Dtable) -> kvm_ops::DescTable {
    kvm_ops::DescTable {
        base: from.base.get(),
        limit: from.limit.get(),
    }
}

fn to_table(from: &kvm_ops::DescTable) -> uapi::Dtable {
    uapi::Dtable {
        base: U64::new(from.base),
        limit: U16::new(from.limit),
        ..uapi::Dtable::default()
    }
}

pub(super) fn from_sregs(from: &uapi::Sregs) -> kvm_ops::Sregs {
    kvm_ops::Sregs {
        cs: from_segment(&from.cs),
        ds: from_segment(&from.ds),
        es: from_segment(&from.es),
        fs: from_segment(&from.fs),
        gs: from_segment(&from.gs),
        ss: from_segment(&from.ss),
        tr: from_segment(&from.tr),
        ldt: from_segment(&from.ldt),
        gdt: from_table(&from.gdt),
        idt: from_table(&from.idt),
        cr0: from.cr0.get(),
        cr2: from.cr2.get(),
        cr3: from.cr3.get(),
        cr4: from.cr4.get(),
        cr8: from.cr8.get(),
        efer: from.efer.get(),
        apic_base: from.apic_base.get(),
        interrupt_bitmap: from.interrupt_bitmap.map(U64::get),
    }
}

pub(super) fn to_sregs(from: &kvm_ops::Sregs) -> uapi::Sregs {
    uapi::Sregs {
        cs: to_segment(&from.cs),
        ds: to_segment(&from.ds),
        es: to_segment(&from.es),
        fs: to_segment(&from.fs),
        gs: to_segment(&from.gs),
        ss: to_segment(&from.ss),
        tr: to_segment(&from.tr),
        ldt: to_segment(&from.ldt),
        gdt: to_table(&from.gdt),
        idt: to_table(&from.idt),
        cr0: U64::new(from.cr0),
        cr2: U64::new(from.cr2),
        cr3: U64::new(from.cr3),
        cr4: U64::new(from.cr4),
        cr8: U64::new(from.cr8),
        efer: U64::new(from.efer),
        apic_base: U64::new(from.apic_base),
        interrupt_bitmap: from.interrupt_bitmap.map(U64::new),
    }
}

pub(super) fn from_debug_regs(from: &uapi::DebugRegs) -> kvm_ops::DebugRegs {
    kvm_ops::DebugRegs {
        db: from.db.map(U64::get),
        dr6: from.dr6.get(),
        dr7: from.dr7.get(),
    }
}

pub(super) fn to_debug_regs(from: &kvm_ops::DebugRegs) -> uapi::DebugRegs {
    uapi::DebugRegs {
        db: from.db.map(U64::new),
        dr6: U64::new(from.dr6),
        dr7: U64::new(from.dr7),
        ..uapi::DebugRegs::default()
    }
}

pub(super) fn to_xcrs(from: &kvm_ops::Xcrs) -> uapi::Xcrs {
    let mut xcrs = uapi::Xcrs {
        nr_xcrs: U32::new(1),
        ..uapi::Xcrs::default()
    };
    xcrs.xcrs[0].value = U64::new(from.xcr0);
    xcrs
}
