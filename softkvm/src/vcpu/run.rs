//! `KVM_RUN`: the checks in front of the guest's code. The software machine's processors are not driven
//! yet, so a run that passes them ends as the kernel ends one whose instruction it cannot fetch.

use kvm_ops_uapi::checks::run::{
    ARGUMENT, IMMEDIATE_EXIT, INITIALIZED, SYNC_REGS, UNINITIALIZED_EXIT,
};
use kvm_ops_uapi::run::{EXIT_OFFSET, exit_reason};
use kvm_ops_uapi::state::mp_state;
use kvm_ops_uapi::system::vm_type;

use crate::RunArea;
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};

// Offsets in the run page.
const IMMEDIATE: u64 = 1;
const EXIT_REASON: u64 = 8;
const VALID_REGS: u64 = 288;
const DIRTY_REGS: u64 = 296;

/// KVM_INTERNAL_ERROR_EMULATION.
const EMULATION: u32 = 1;

fn word(area: &dyn RunArea, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    area.read(offset, &mut bytes);
    u64::from_le_bytes(bytes)
}

pub(super) fn run(file: &VcpuFile, argument: u64) -> Result<i64> {
    ensure(argument == 0, ARGUMENT)?;
    let area = file.vcpu.run_area();
    let mut immediate = [0];
    area.read(IMMEDIATE, &mut immediate);
    let mut registers = file.vcpu.lock();
    if registers.mp_state == mp_state::UNINITIALIZED {
        // Nothing can wake it, so the wait is over at once.
        ensure(immediate == [0], UNINITIALIZED_EXIT)?;
        return Err(kvm_ops_uapi::Errno::EAGAIN.into());
    }
    // No registers are synchronised: KVM_CAP_SYNC_REGS is 0.
    let masks = word(&**area, VALID_REGS) | word(&**area, DIRTY_REGS);
    ensure(masks == 0, SYNC_REGS)?;
    ensure(immediate == [0], IMMEDIATE_EXIT)?;
    let is_sev_type = matches!(
        file.vm.kind(),
        vm_type::SEV | vm_type::SEV_ES | vm_type::SNP
    );
    ensure(
        !is_sev_type || file.vm.lock().sev.was_initialised_here(),
        INITIALIZED,
    )?;
    let is_td = file.vm.kind() == vm_type::TDX;
    ensure(
        !is_td || file.vm.lock().td.can_run(file.vcpu.id),
        INITIALIZED,
    )?;
    registers.has_run = true;
    area.write(EXIT_REASON, &exit_reason::INTERNAL_ERROR.to_le_bytes());
    area.write(EXIT_OFFSET as u64, &EMULATION.to_le_bytes());
    area.write(EXIT_OFFSET as u64 + 4, &0u32.to_le_bytes());
    Ok(0)
}
