//! What differs between two outcomes.

use std::fmt::Write;

use kvm_ops_cpu::Segment;

use crate::machine::{HANDLERS, Outcome, Stop, TABLES};

const NAMES: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
const PAGE_FAULT: u64 = 14;
/// Of an entry of the page tables.
const ACCESSED: u8 = 1 << 5;

/// A sentence for the first differences; `None` if the outcomes are equal.
pub(crate) fn difference(ours: &Outcome, kvm: &Outcome) -> Option<String> {
    let mut text = String::new();
    let mut note = |name: &str, ours: u64, kvm: u64| {
        if ours != kvm {
            let _ = write!(text, "{name} {ours:#x}, KVM {kvm:#x}; ");
        }
    };
    if ours.stop != kvm.stop {
        return Some(format!("{:?}, KVM {:?}", ours.stop, kvm.stop));
    }
    // A processor in shutdown has no state that could be relied on, and KVM moves RIP before or after the answer of a port.
    if ours.stop != Stop::Halted {
        return None;
    }
    let (a, b) = (&ours.registers, &kvm.registers);
    note("rip", a.rip, b.rip);
    note("rflags", a.rflags, b.rflags);
    for (n, (ours, kvm)) in a.gpr.iter().zip(&b.gpr).enumerate() {
        note(&format!("gpr{n}"), *ours, *kvm);
    }
    note("cr0", a.cr0, b.cr0);
    note("cr3", a.cr3, b.cr3);
    note("cr4", a.cr4, b.cr4);
    note("efer", a.efer, b.efer);
    note("xcr0", a.xcr0, b.xcr0);
    note("dr6", a.dr6, b.dr6);
    note("dr7", a.dr7, b.dr7);
    for n in 0..4 {
        note(&format!("dr{n}"), a.breakpoints[n], b.breakpoints[n]);
    }
    let page_fault = a.rip == HANDLERS + PAGE_FAULT * 16 + 1;
    // A host may use CR2 for faults of its own.
    if page_fault {
        note("cr2", a.cr2, b.cr2);
    }
    for (name, ours, kvm) in [("gdtr", a.gdtr, b.gdtr), ("idtr", a.idtr, b.idtr)] {
        note(&format!("{name}.base"), ours.base, kvm.base);
        note(
            &format!("{name}.limit"),
            ours.limit.into(),
            kvm.limit.into(),
        );
    }
    let all = |r: &kvm_ops_cpu::Registers| r.segments.into_iter().chain([r.ldtr, r.tr]);
    for (name, (ours, kvm)) in NAMES.iter().zip(all(a).zip(all(b))) {
        note(name, ours.selector.into(), kvm.selector.into());
        if usable(&ours) || usable(&kvm) {
            note(&format!("{name}.base"), ours.base, kvm.base);
            note(
                &format!("{name}.limit"),
                ours.limit.into(),
                kvm.limit.into(),
            );
            note(
                &format!("{name}.rights"),
                ours.rights.into(),
                kvm.rights.into(),
            );
        }
    }
    for (index, (ours, kvm)) in crate::machine::MSRS
        .iter()
        .zip(ours.msrs.iter().zip(&kvm.msrs))
    {
        note(&format!("msr {index:#x}"), *ours, *kvm);
    }
    if let Some(at) = first_byte(ours, kvm, page_fault) {
        let at = at & !7;
        note(
            &format!("[{at:#x}]"),
            word(&ours.memory, at),
            word(&kvm.memory, at),
        );
    }
    (!text.is_empty()).then(|| text.trim_end_matches("; ").to_owned())
}

/// The first byte of memory that differs.
fn first_byte(ours: &Outcome, kvm: &Outcome, page_fault: bool) -> Option<usize> {
    // Most memories are equal, which is told fast.
    if ours.memory == kvm.memory {
        return None;
    }
    let mut bytes = ours.memory.iter().zip(&kvm.memory).enumerate();
    let (at, _) = bytes.find(|(at, (ours, kvm))| {
        // A walk that ends in a fault may have marked the entries above, or not (SDM 3, section 5.8).
        let loose = page_fault && TABLES.contains(&(*at as u64)) && at.is_multiple_of(8);
        (*ours ^ *kvm) & !(if loose { ACCESSED } else { 0 }) != 0
    })?;
    Some(at)
}

/// What else is in a segment register that is not usable is each vendor's own.
fn usable(segment: &Segment) -> bool {
    segment.rights & 1 << 16 == 0 && segment.rights & 1 << 7 != 0
}

fn word(memory: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(memory[at..at + 8].try_into().expect("eight bytes"))
}
