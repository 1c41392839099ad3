//! Fields of the run page.

use kvm_ops::{Sregs, VcpuOps, rflags};
use kvm_ops_uapi::run::EXIT_OFFSET;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::RunArea;
use crate::machine::Processor;
use crate::refusal::Result;

// Offsets.
const REQUEST_WINDOW: u64 = 0;
const IMMEDIATE_EXIT: u64 = 1;
const EXIT_REASON: u64 = 8;
const READY: u64 = 12;
const IF_FLAG: u64 = 13;
const CR8: u64 = 16;
const APIC_BASE: u64 = 24;
const VALID_REGS: u64 = 288;
const DIRTY_REGS: u64 = 296;
const SYNC: u64 = 304;
/// The page with the data of port accesses.
pub(super) const PORT_DATA: u64 = kvm_ops_uapi::run::PIO_PAGE * 4096;

/// The run page of a vCPU, with names for its fields.
#[derive(Clone, Copy)]
pub(super) struct Page<'a>(pub(super) &'a dyn RunArea);

impl Page<'_> {
    fn byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.0.read(offset, &mut byte);
        byte[0]
    }

    fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn asks_for_window(&self) -> bool {
        self.byte(REQUEST_WINDOW) != 0
    }

    pub(super) fn asks_for_exit(&self) -> bool {
        self.byte(IMMEDIATE_EXIT) != 0
    }

    pub(super) fn cr8(&self) -> u64 {
        self.word(CR8)
    }

    pub(super) fn valid_regs(&self) -> u64 {
        self.word(VALID_REGS)
    }

    pub(super) fn dirty_regs(&self) -> u64 {
        self.word(DIRTY_REGS)
    }

    pub(super) fn clear_dirty_regs(&self) {
        self.0.write(DIRTY_REGS, &[0; 8]);
    }

    /// Reads a group of registers, by its offset in the area for them.
    pub(super) fn sync<T: FromBytes + FromZeros + IntoBytes>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        self.0.read(SYNC + offset as u64, value.as_mut_bytes());
        value
    }

    pub(super) fn set_sync<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) {
        self.0.write(SYNC + offset as u64, value.as_bytes());
    }

    pub(super) fn set_reason(&self, reason: u32) {
        self.0.write(EXIT_REASON, &reason.to_le_bytes());
    }

    /// The structure of the exit, as the caller left it.
    pub(super) fn exit<T: FromBytes + FromZeros + IntoBytes>(&self) -> T {
        let mut value = T::new_zeroed();
        self.0.read(EXIT_OFFSET as u64, value.as_mut_bytes());
        value
    }

    pub(super) fn set_exit<T: IntoBytes + Immutable>(&self, reason: u32, exit: &T) {
        self.set_reason(reason);
        self.0.write(EXIT_OFFSET as u64, exit.as_bytes());
    }

    /// What every run of a TD's vCPU leaves: no interrupt can be injected from here.
    pub(super) fn set_td_state(&self, boots: bool) {
        const X2APIC: u64 = 0xfee0_0c00;
        self.set_secret_state(false, X2APIC, boots);
    }

    /// What every run of a vCPU leaves whose registers are secret. Interrupts can be injected where local APICs
    /// take them.
    pub(super) fn set_secret_state(&self, ready: bool, apic_base: u64, boots: bool) {
        const BSP: u64 = 1 << 8;
        let apic_base = apic_base | if boots { BSP } else { 0 };
        self.0.write(READY, &[ready.into(), 0]);
        self.0.write(CR8, &[0; 8]);
        self.0.write(APIC_BASE, &apic_base.to_le_bytes());
    }

    /// What every run leaves: whether interrupts are enabled and can be injected, the task priority, and
    /// the place of the local APIC.
    pub(super) fn set_state(&self, vcpu: &Processor, sregs: &Sregs, has_apic: bool) -> Result<()> {
        let enabled = vcpu.regs()?.rflags & rflags::IF != 0;
        let ready = has_apic || {
            let events = vcpu.events()?;
            enabled
                && !events.shadow.any()
                && events.interrupt.is_none()
                && events.exception.is_none()
        };
        self.0.write(READY, &[ready.into(), enabled.into(), 0, 0]);
        debug_assert_eq!(READY + 1, IF_FLAG);
        self.0.write(CR8, &sregs.cr8.to_le_bytes());
        self.0.write(APIC_BASE, &sregs.apic_base.to_le_bytes());
        Ok(())
    }
}
