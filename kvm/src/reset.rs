//! Resetting a vCPU, for which KVM has no call.
//!
//! The kernel gives every new vCPU the state after power-on. So the state to reset to is read
//! from a new vCPU of a VM made for that purpose, with the same number, irqchip and CPUID: the
//! kernel's own answer, whatever registers its version knows. Registers that INIT leaves alone (SDM
//! vol. 3, table "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT") are not
//! written.

use kvm_bindings::{KVM_CAP_XCRS, KVM_CAP_XSAVE};
use kvm_ioctls::VcpuFd;
use kvm_ops::{
    Call, Error, Events, Field, Host, Irqchip, MpState, Result, Tech, VcpuOps, VmPort, cr0,
};

use crate::KvmVcpu;
use crate::error::sys;
use crate::msrs;

/// IA32_APIC_BASE: this is the processor that boots.
const APIC_BASE_BSP: u64 = 1 << 8;
/// The ID register in the local APIC's page.
const APIC_ID: std::ops::Range<usize> = 0x20..0x24;
/// EDX after a reset of a processor without CPUID, as KVM has it.
const NO_SIGNATURE: u64 = 0x600;

/// Hyper-V's clocks, which run by themselves and cannot be written: HV_X64_MSR_VP_RUNTIME and
/// HV_X64_MSR_TIME_REF_COUNT.
const CLOCKS: [u32; 2] = [0x4000_0010, 0x4000_0020];

/// The power-on state, or that after INIT.
pub(crate) fn reset(vcpu: &mut KvmVcpu, init: bool) -> Result<()> {
    tracing::debug!(vcpu = vcpu.id().0, init, "reset");
    vcpu.finish_exit()?;
    let params = vcpu.vm().params.clone();
    let host = vcpu.vm().host.clone();
    // Slots are not copied: the new vCPU never runs.
    let vm = host.create_vm(Tech::normal(host.vendor()), &params)?;
    let mut fresh = vm.create_vcpu(vcpu.id())?;
    let cpuid = vcpu.cpuid()?;
    fresh.set_cpuid(&cpuid)?;
    let signature = cpuid.iter().find(|entry| entry.leaf == 1);
    let signature = signature.map_or(NO_SIGNATURE, |entry| entry.regs[0].into());

    let mut sregs = fresh.sregs()?;
    let bsp = sregs.apic_base & APIC_BASE_BSP != 0;
    if init {
        let old = vcpu.sregs()?;
        let kept = cr0::CD | cr0::NW;
        sregs.cr0 = sregs.cr0 & !kept | old.cr0 & kept;
        sregs.apic_base = old.apic_base;
    }
    vcpu.set_sregs(&sregs)?;
    let mut regs = fresh.regs()?;
    regs.rdx = signature;
    vcpu.set_regs(&regs)?;
    vcpu.set_debug_regs(&fresh.debug_regs()?)?;
    // Reported after everything else is reset.
    let mut refused = Ok(());
    if !init {
        copy_fpu(&fresh, vcpu)?;
        refused = copy_msrs(host.msrs(), fresh.fd(), vcpu.fd());
    }
    copy_apic(vcpu, &fresh, init, bsp)?;
    vcpu.set_events(&Events::default())?;
    refused
}

/// x87, SSE and all that XSAVE knows.
fn copy_fpu(from: &KvmVcpu, to: &mut KvmVcpu) -> Result<()> {
    if from.vm().host.check(KVM_CAP_XCRS) != 0 {
        to.set_xcrs(&from.xcrs()?)?;
    }
    // XSAVE alone would mark x87 and SSE as being in their initial state and leave the old bytes,
    // which KVM_GET_FPU would still return.
    let fpu = from.fd().get_fpu().map_err(sys(Call::Fpu))?;
    to.fd().set_fpu(&fpu).map_err(sys(Call::Fpu))?;
    if from.vm().host.check(KVM_CAP_XSAVE) != 0 {
        to.set_xsave(&from.xsave()?)?;
    }
    Ok(())
}

/// Writes what differs. An MSR that cannot be written stays, and the first such is the error.
fn copy_msrs(list: &[u32], from: &VcpuFd, to: &VcpuFd) -> Result<()> {
    let list = || list.iter().copied().filter(|index| !CLOCKS.contains(index));
    let (wanted, present) = (
        msrs::get_present(from, list())?,
        msrs::get_present(to, list())?,
    );
    let mut result = Ok(());
    for msr in wanted {
        let old = present.iter().find(|old| old.index == msr.index);
        if old.is_some_and(|old| old.value != msr.value) && msrs::set(to, &[msr]).is_err() {
            tracing::warn!(msr = format_args!("{:#x}", msr.index), "not reset");
            result = result.and(Err(Error::Invalid(Field::Msr, msr.index.into())));
        }
    }
    result
}

/// The local APIC and the multiprocessing state, if KVM has the APIC. Otherwise every vCPU starts at
/// the reset vector at once, and the embedder holds back all but the first.
fn copy_apic(vcpu: &mut KvmVcpu, fresh: &KvmVcpu, init: bool, bsp: bool) -> Result<()> {
    if vcpu.vm().params.irqchip == Irqchip::None {
        return Ok(());
    }
    let mut apic = fresh.fd().get_lapic().map_err(sys(Call::Lapic))?;
    if init {
        // INIT keeps the APIC's mode, in which the ID has another format, and the ID.
        let old = vcpu.fd().get_lapic().map_err(sys(Call::Lapic))?;
        apic.regs[APIC_ID].copy_from_slice(&old.regs[APIC_ID]);
    }
    vcpu.fd().set_lapic(&apic).map_err(sys(Call::Lapic))?;
    vcpu.set_mp_state(match (init, bsp) {
        (true, false) => MpState::InitReceived,
        (true, true) => MpState::Runnable,
        (false, _) => fresh.mp_state()?,
    })
}
