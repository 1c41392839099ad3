//! What a host keeps of a TD's vCPU.

/// The host's part of a TD's vCPU, beside what firmware has: it goes along when the TD goes on at another host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TdVcpuState {
    /// Nanoseconds of the TD's time.
    pub clock: u64,
    /// `None` where the machine emulates no local APIC for TDs.
    pub apic: Option<TdApic>,
}

/// The registers of a TD vCPU's local APIC that its host emulates, and interrupts on their way to the guest. The guest has
/// task priority, requests and interrupts in service in its virtual APIC page, which firmware keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TdApic {
    /// The registers, each 4 bytes at 16 times its number, as `KVM_GET_LAPIC` lays them out.
    pub registers: [u8; TdApic::REGISTERS],
    /// IA32_TSC_DEADLINE: 0 unless it is armed.
    pub tsc_deadline: u64,
    /// Interrupts that were posted and that the guest has not taken over, a bit for each vector.
    pub posted: [u64; 4],
    /// An NMI was sent, and firmware does not have it yet.
    pub nmi: bool,
    /// When the vCPU left the TD, its virtual APIC page had an interrupt that ends a halt.
    pub deliverable: bool,
}

impl TdApic {
    /// Bytes of the registers.
    pub const REGISTERS: usize = 1024;
}
