//! Multiprocessing state.

/// The multiprocessing state of a vCPU (`struct kvm_mp_state`). Only
/// [`Runnable`](MpState::Runnable) vCPUs execute instructions.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MpState {
    /// The vCPU runs.
    #[default]
    Runnable,
    /// An application processor that waits for INIT.
    Uninitialized,
    /// INIT came; the vCPU waits for SIPI.
    InitReceived,
    /// HLT was executed; the vCPU waits for an interrupt.
    Halted,
    /// SIPI came; the vCPU is about to start.
    SipiReceived,
    /// An SEV-ES or SNP vCPU that waits in the AP reset hold.
    ApResetHold,
}

impl MpState {
    /// Every state with its number in the kernel's interface (`KVM_MP_STATE_*`).
    pub const ALL: [(MpState, u32); 6] = [
        (Self::Runnable, 0),
        (Self::Uninitialized, 1),
        (Self::InitReceived, 2),
        (Self::Halted, 3),
        (Self::SipiReceived, 4),
        (Self::ApResetHold, 9),
    ];
}
