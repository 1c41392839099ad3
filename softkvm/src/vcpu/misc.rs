//! Calls that prepare a vCPU: machine checks, and helps for guests that a processor with a virtual APIC does not
//! need.

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::{
    kvmclock_ctrl, setup_mce, signal_mask, tpr_access, vapic_addr, vcpu_tsc_khz,
};
use kvm_ops_uapi::state::{SignalMask, TprAccessCtl};
use kvm_ops_uapi::system::vm_type;

use super::Cpu;
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::system::{MAX_MCE_BANKS, MCE_FEATURES};
use crate::{Process, arg, machine};

/// `KVM_X86_SETUP_MCE`: the low byte of the value is the number of banks.
pub(super) fn setup_mce(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    use setup_mce::{BANKS, COPY, FEATURES};
    /// Bits that tell of numbers: of banks, and of extended registers.
    const COUNTS: u64 = 0xff | 0xff << 16;
    let cap: U64 = arg::read(process, argument, COPY)?;
    let cap = cap.get();
    ensure((1..=MAX_MCE_BANKS).contains(&(cap & 0xff)), BANKS)?;
    ensure(cap & !(MCE_FEATURES | COUNTS) == 0, FEATURES)?;
    // A TD's machine checks are the module's, and nothing executes a vCPU that is held.
    if let Cpu::Processor(vcpu) = &mut file.state().cpu
        && let Some(port) = machine::port_mut(vcpu)
    {
        port.set_mce(cap);
    }
    Ok(0)
}

/// `KVM_TPR_ACCESS_REPORTING`: as on processors that virtualise the task priority, no access ever leaves.
pub(super) fn tpr_access(process: &dyn Process, argument: u64) -> Result<i64> {
    use tpr_access::{COPY, COPY_BACK, FLAGS};
    let args: TprAccessCtl = arg::read(process, argument, COPY)?;
    ensure(args.flags.get() == 0, FLAGS)?;
    arg::write(process, argument, &args, COPY_BACK)?;
    Ok(0)
}

/// `KVM_SET_VAPIC_ADDR`: the place of the task priority for guests whose accesses leave, which they do not.
pub(super) fn vapic_addr(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    use vapic_addr::{APIC, COPY, MEMORY};
    ensure(file.vm.lock().has_apics(), APIC)?;
    let address: U64 = arg::read(process, argument, COPY)?;
    let (address, state) = (address.get(), file.vm.lock());
    ensure(address == 0 || state.slots.at(0, address).is_some(), MEMORY)?;
    Ok(0)
}

/// `KVM_KVMCLOCK_CTRL`: no guest has a kvmclock, for CPUID does not offer it.
pub(super) fn kvmclock_ctrl() -> Result<i64> {
    Err(kvmclock_ctrl::ACTIVE.into())
}

/// `KVM_GET_TSC_KHZ` on a vCPU: the VM's, unless it was told another.
pub(super) fn tsc_khz(file: &VcpuFile) -> Result<i64> {
    let own = file.state().tsc_khz;
    Ok(own.unwrap_or_else(|| file.vm.lock().tsc_khz()).into())
}

/// `KVM_SET_TSC_KHZ` on a vCPU. 0 means the VM's frequency.
pub(super) fn set_tsc_khz(file: &VcpuFile, khz: u64) -> Result<i64> {
    use vcpu_tsc_khz::{PROTECTED, RANGE};
    ensure(file.vm.kind() != vm_type::TDX, PROTECTED)?;
    let khz = u32::try_from(khz).map_err(|_| RANGE)?;
    file.state().tsc_khz = (khz != 0).then_some(khz);
    Ok(0)
}

/// `KVM_SET_SIGNAL_MASK`: the signals that do not end a run, in place of those that the thread blocks.
pub(super) fn signal_mask(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    use signal_mask::{COPY, LENGTH, SET};
    let mut mask = None;
    if argument != 0 {
        let head: SignalMask = arg::read(process, argument, COPY)?;
        ensure(head.len.get() == 8, LENGTH)?;
        let at = argument.wrapping_add(size_of::<SignalMask>() as u64);
        let set: U64 = arg::read(process, at, SET)?;
        mask = Some(set.get());
    }
    file.vcpu.run_area().set_signal_mask(mask);
    Ok(0)
}
