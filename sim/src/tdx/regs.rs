//! The registers of a call, which the port, the guest's side and the module each have a type for.

use kvm_ops::SeamRegs;
use kvm_ops_guest::tdx::Regs as GuestRegs;
use soft_tdx_module::Regs;

/// Copies the registers that all three have.
macro_rules! copied {
    ($from:ident => $To:ident { $($more:tt)* }) => {
        $To {
            rcx: $from.rcx,
            rdx: $from.rdx,
            rbx: $from.rbx,
            rsi: $from.rsi,
            rdi: $from.rdi,
            r8: $from.r8,
            r9: $from.r9,
            r10: $from.r10,
            r11: $from.r11,
            r12: $from.r12,
            r13: $from.r13,
            r14: $from.r14,
            r15: $from.r15,
            $($more)*
        }
    };
}

/// The registers with which a host calls the module.
pub(super) fn from_host(rax: u64, regs: &SeamRegs) -> Regs {
    copied!(regs => Regs { rax, ..Regs::default() })
}

/// The registers that the module returns to the host beside RAX.
pub(super) fn to_host(regs: &Regs) -> SeamRegs {
    copied!(regs => SeamRegs {})
}

/// The registers with which a guest calls the module.
pub(super) fn from_guest(regs: &GuestRegs) -> Regs {
    copied!(regs => Regs { rax: regs.rax, ..Regs::default() })
}

/// The registers that the module returns to the guest.
pub(super) fn to_guest(regs: &Regs) -> GuestRegs {
    copied!(regs => GuestRegs { rax: regs.rax })
}
