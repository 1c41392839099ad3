//! Exit information of an L2 VM's VMCS.

use super::vmcs::Vmcs;
use crate::guest::VmExit;
use crate::regs::Regs;
use crate::status::Code;
use crate::vcpu::{Event, VcpuContext};

/// Bit 31 of interruption and IDT-vectoring information.
pub(crate) const VALID: u64 = 1 << 31;
/// "Error code valid".
const ERROR_VALID: u64 = 1 << 11;

/// The fields a TD exit shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitInfo {
    pub(crate) reason: u16,
    pub(crate) qualification: u64,
    pub(crate) interruption: u64,
}

pub(crate) fn of(ctx: &VcpuContext) -> ExitInfo {
    let vm = ctx.vm();
    ExitInfo {
        reason: ctx.vmcs(vm, Vmcs::ExitReason) as u16,
        qualification: ctx.vmcs(vm, Vmcs::Qualification),
        interruption: ctx.vmcs(vm, Vmcs::ExitInterruption),
    }
}

/// Records an exit, as the processor does. The code segment says whether the VM is in 64-bit mode, the stack
/// segment at which privilege level it is.
pub(crate) fn record(ctx: &mut VcpuContext, e: &VmExit, mode_64bit: bool) {
    const LONG: u64 = 1 << 13;
    const DEFAULT_SIZE: u64 = 1 << 14;
    const PRIVILEGE_LEVEL: u64 = 3 << 5;
    const LONG_MODE_ACTIVE: u64 = 1 << 10;
    let vm = ctx.vm();
    let cs = ctx.vmcs(vm, Vmcs::CsAccessRights) & !(LONG | DEFAULT_SIZE);
    let mode = if mode_64bit { LONG } else { DEFAULT_SIZE };
    let efer = ctx.vmcs(vm, Vmcs::Efer) | LONG_MODE_ACTIVE;
    let ss = ctx.vmcs(vm, Vmcs::SsAccessRights) & !PRIVILEGE_LEVEL;
    let cpl = u64::from(e.cpl & 3) << 5;
    let delivered = ctx.vmcs(vm, Vmcs::EntryInterruption) & !VALID;
    for (field, value) in [
        (Vmcs::CsAccessRights, cs | mode),
        (Vmcs::SsAccessRights, ss | cpl),
        (Vmcs::Efer, efer),
        (Vmcs::EntryInterruption, delivered),
        (Vmcs::ExitReason, u64::from(e.reason)),
        (Vmcs::Qualification, e.qualification),
        (Vmcs::GuestPhysicalAddress, e.gpa),
        (Vmcs::GuestLinearAddress, e.gla),
        (Vmcs::ExitInterruption, e.info),
        (Vmcs::ExitError, e.error),
        (Vmcs::IdtVectoring, e.idt_vectoring),
        (Vmcs::IdtError, e.idt_error),
        (Vmcs::ExitLength, u64::from(e.ilen)),
        (Vmcs::ExitInstruction, u64::from(e.iinfo)),
    ] {
        ctx.set_vmcs(vm, field, value);
    }
}

/// Registers of L1 after TDG.VP.ENTER.
pub(crate) fn l1_registers(ctx: &VcpuContext, code: Code, extended: u64) -> Regs {
    let vm = ctx.vm();
    let f = |field| ctx.vmcs(vm, field);
    let pair = |low, high| f(low) & 0xFFFF_FFFF | f(high) << 32;
    let cs = f(Vmcs::CsSelector) & 0xFFFF
        | (f(Vmcs::CsAccessRights) & 0xFFFF) << 16
        | f(Vmcs::CsLimit) << 32;
    Regs {
        rax: code.detail(f(Vmcs::ExitReason) as u32).0,
        rcx: f(Vmcs::Qualification),
        rdx: f(Vmcs::GuestLinearAddress),
        rsi: cs,
        rdi: f(Vmcs::CsBase),
        rbp: ctx.gprs.rbp,
        r8: f(Vmcs::GuestPhysicalAddress),
        r9: pair(Vmcs::ExitInterruption, Vmcs::ExitError),
        r10: pair(Vmcs::IdtVectoring, Vmcs::IdtError),
        r11: pair(Vmcs::ExitInstruction, Vmcs::ExitLength),
        r12: f(Vmcs::SsAccessRights) >> 5 & 3,
        r13: extended,
        ..Regs::default()
    }
}

/// The next entry delivers an exception.
pub(crate) fn raise(ctx: &mut VcpuContext, exception: Event) {
    const RESUME_FLAG: u64 = 1 << 16;
    let vm = ctx.vm();
    ctx.set_vmcs(vm, Vmcs::EntryInterruption, exception.to_info());
    let error = u64::from(exception.error.unwrap_or(0));
    ctx.set_vmcs(vm, Vmcs::EntryError, error);
    let rflags = ctx.vmcs(vm, Vmcs::Rflags) | RESUME_FLAG;
    ctx.set_vmcs(vm, Vmcs::Rflags, rflags);
}

/// An event whose delivery the exit interrupted is delivered with the next entry.
pub(crate) fn redeliver(ctx: &mut VcpuContext) {
    const INFORMATION: u64 = 0x8000_0FFF;
    let vm = ctx.vm();
    let vectoring = ctx.vmcs(vm, Vmcs::IdtVectoring);
    if vectoring & VALID == 0 {
        return;
    }
    ctx.set_vmcs(vm, Vmcs::EntryInterruption, vectoring & INFORMATION);
    if vectoring & ERROR_VALID != 0 {
        let error = ctx.vmcs(vm, Vmcs::IdtError);
        ctx.set_vmcs(vm, Vmcs::EntryError, error);
    }
    let length = ctx.vmcs(vm, Vmcs::ExitLength);
    ctx.set_vmcs(vm, Vmcs::EntryLength, length);
    ctx.set_vmcs(vm, Vmcs::IdtVectoring, vectoring & !VALID);
}

/// The entry fields hold an exception that L1's exception bitmap for the VM selects.
pub(crate) fn l1_intercepts_entry(ctx: &VcpuContext) -> bool {
    const HARDWARE_EXCEPTION: u64 = 3;
    const PAGE_FAULT: u64 = 14;
    let vm = ctx.vm();
    let f = |field| ctx.vmcs(vm, field);
    let info = f(Vmcs::EntryInterruption);
    let vector = info & 0xFF;
    if info & VALID == 0
        || info >> 8 & 7 != HARDWARE_EXCEPTION
        || vector > 31
        || f(Vmcs::ExceptionBitmap) >> vector & 1 == 0
    {
        return false;
    }
    // The module compares the exit's error code, not the one about to be delivered.
    vector != PAGE_FAULT || f(Vmcs::ExitError) & f(Vmcs::PageFaultMask) == f(Vmcs::PageFaultMatch)
}

/// Turns the event of the entry fields into the exit it would have caused.
pub(crate) fn entry_to_exit(ctx: &mut VcpuContext) {
    let vm = ctx.vm();
    let info = ctx.vmcs(vm, Vmcs::EntryInterruption);
    let error = ctx.vmcs(vm, Vmcs::EntryError);
    ctx.set_vmcs(vm, Vmcs::ExitInterruption, info);
    ctx.set_vmcs(vm, Vmcs::ExitError, error);
    ctx.set_vmcs(vm, Vmcs::EntryInterruption, info & !VALID);
    ctx.set_vmcs(vm, Vmcs::ExitReason, 0);
    ctx.set_vmcs(vm, Vmcs::Qualification, 0);
}
