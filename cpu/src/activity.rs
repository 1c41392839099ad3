//! The state of a processor beside its registers: what it waits for, and what holds events back.

use crate::cpu::Cpu;
use crate::exit::Controls;

/// What a processor waits for, and what holds its events back: the activity and interruptibility
/// state of a VMCS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// HLT was executed, and no event came since.
    pub halted: bool,
    /// INIT came, and no start-up interrupt since.
    pub waiting: bool,
    /// A triple fault stopped the processor for good.
    pub shutdown: bool,
    /// No interrupt is taken before the next instruction: after STI and MOV SS.
    pub shadow: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are held back until IRET.
    pub nmi_blocked: bool,
}

impl Cpu {
    /// What the processor waits for, and what holds its events back.
    pub fn activity(&self) -> Activity {
        let c = &self.core;
        Activity {
            halted: c.halted,
            waiting: c.waiting,
            shutdown: c.shutdown,
            shadow: c.shadow,
            nmi_pending: c.nmi_pending,
            nmi_blocked: c.nmi_blocked,
        }
    }

    /// Loads that state.
    pub fn set_activity(&mut self, to: Activity) {
        let c = &mut self.core;
        c.halted = to.halted;
        c.waiting = to.waiting;
        c.shutdown = to.shutdown;
        c.shadow = to.shadow;
        c.nmi_pending = to.nmi_pending;
        c.nmi_second &= to.nmi_pending;
        c.nmi_blocked = to.nmi_blocked;
        c.attention = true;
    }

    /// The instructions that exit.
    pub fn controls(&self) -> Controls {
        self.core.controls
    }

    /// Takes the local APIC away: its page is the bus' again, and its MSRs do not exist.
    pub fn remove_apic(&mut self) {
        self.core.apic.absent = true;
        self.core.flush_all();
    }

    /// Connects a PC's interrupt controller to LINT0 of the local APIC, as firmware does ("virtual
    /// wire mode"). The host injects its interrupts while [`takes_pic`](Self::takes_pic).
    pub fn connect_pic(&mut self) {
        self.core.apic.connect_pic();
    }

    /// True if the local APIC lets a PC's interrupt controller through to the processor.
    pub fn takes_pic(&self) -> bool {
        self.core.apic.passes_pic()
    }

    /// The names under which other processors reach the local APIC.
    pub fn apic_address(&self) -> crate::apic::ApicAddress {
        self.core.apic.address()
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.core.apic.base()
    }

    /// Loads IA32_APIC_BASE; unlike WRMSR, from any mode to any other. False for a value that the
    /// register can not hold; nothing changes then.
    pub fn set_apic_base(&mut self, value: u64) -> bool {
        let bits = self.core.phys_bits;
        let done = self.core.apic.load_base(value, bits).is_some();
        self.core.flush_all();
        done
    }

    /// The address of the local APIC's page, while the APIC is in its memory-mapped mode.
    pub fn apic_page(&self) -> Option<u64> {
        self.core.apic.page()
    }

    /// Reads registers of the local APIC from its page: 1 to 8 bytes at an offset below 4096.
    pub fn read_apic_page(&mut self, offset: usize, data: &mut [u8]) {
        let now = self.core.clock();
        self.core.apic.read_page(offset & 0xfff, data, now);
    }

    /// Writes a register of the local APIC in its page.
    pub fn write_apic_page(&mut self, offset: usize, data: &[u8]) {
        let now = self.core.clock();
        self.core.attention = true;
        let effect = self.core.apic.write_page(offset & 0xfff, data, now);
        self.core.apply(effect);
    }

    /// The answer to CPUID, with the bits that depend on the processor's state.
    pub fn cpuid(&self, function: u32, index: u32) -> crate::CpuidLeaf {
        self.core.cpuid_leaf(function, index)
    }

    /// Bits that CR4 can have.
    pub const fn cr4_bits() -> u64 {
        crate::registers::CR4_KNOWN
    }

    /// Writes XCR0. False for a value that XSETBV refuses; nothing changes then.
    pub fn set_xcr0(&mut self, value: u64) -> bool {
        self.core.set_xcr0(value)
    }

    /// Takes other answers to CPUID.
    pub fn set_cpuid(&mut self, table: crate::CpuidTable) {
        self.core.phys_bits = table.physical_bits();
        self.core.cpuid = table;
        self.core.flush_all();
    }

    /// True if the processor has the MSR, or one of its kind: what [`read_msr`](Self::read_msr) and
    /// [`write_msr`](Self::write_msr) refuse is a mode, a bank or a value then, and not the number.
    pub fn knows_msr(&self, index: u32) -> bool {
        self.core.knows_msr(index)
    }

    /// True if the processor has the MSR, whatever the mode of its local APIC.
    pub fn has_msr(index: u32) -> bool {
        crate::msr::exists(index)
    }
}
