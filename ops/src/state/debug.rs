//! Debug registers and guest debugging.

/// The debug registers (`struct kvm_debugregs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugRegs {
    /// DR0 to DR3: linear addresses of breakpoints.
    pub db: [u64; 4],
    /// DR6: the status.
    pub dr6: u64,
    /// DR7: the control.
    pub dr7: u64,
}

impl Default for DebugRegs {
    /// The values after reset (SDM vol. 3, table 11-1).
    fn default() -> Self {
        Self {
            db: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
        }
    }
}

/// The events at which a debugger stops the guest (`struct kvm_guest_debug`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Exit on #DB and #BP (KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP).
    pub enabled: bool,
    /// Exit after each instruction (KVM_GUESTDBG_SINGLESTEP).
    pub single_step: bool,
    /// DR0 to DR3 and DR7 of the debugger's hardware breakpoints (KVM_GUESTDBG_USE_HW_BP).
    pub hardware: Option<[u64; 5]>,
}
