//! Resetting a vCPU, for which KVM has no call.
//!
//! The kernel gives every new vCPU the state after power-on. So the state to reset to is read
//! from a new vCPU of a VM made for that purpose, with the same number, irqchip and CPUID: the
//! kernel's own answer, whatever its version knows of registers. What INIT leaves alone (SDM
//! vol. 3, table "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT") is not
//! written.

use kvm_bindings::{
    KVM_CAP_XSAVE2, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, Xsave, kvm_mp_state,
    kvm_vcpu_events,
};
use kvm_ioctls::{Cap, VcpuFd};
use kvm_ops::{Call, Error, Field, Host, Irqchip, Result, Tech, VcpuOps, VmPort, control};

use crate::KvmVcpu;
use crate::error::sys;

/// IA32_APIC_BASE: this is the processor that boots.
const APIC_BASE_BSP: u64 = 1 << 8;
/// Where the local APIC's page has its ID register.
const APIC_ID: std::ops::Range<usize> = 0x20..0x24;
/// EDX after a reset of a processor without CPUID, as KVM has it.
const NO_SIGNATURE: u64 = 0x600;
/// Bytes of `struct kvm_xsave` without its flexible tail.
const XSAVE_BYTES: usize = 4096;

/// Hyper-V's clocks, which run by themselves and cannot be written: HV_X64_MSR_VP_RUNTIME and
/// HV_X64_MSR_TIME_REF_COUNT.
const CLOCKS: [u32; 2] = [0x4000_0010, 0x4000_0020];

/// The power-on state, or that after INIT.
pub(crate) fn reset(vcpu: &mut KvmVcpu, init: bool) -> Result<()> {
    vcpu.finish_exit()?;
    let params = vcpu.vm_params().clone();
    let host = vcpu.host().clone();
    // Slots are not copied: the new vCPU never runs.
    let vm = host.create_vm(Tech::normal(host.vendor()), &params)?;
    let mut fresh = vm.create_vcpu(vcpu.id())?;
    let cpuid = vcpu.cpuid()?;
    fresh.set_cpuid(&cpuid)?;
    let signature = cpuid.iter().find(|entry| entry.leaf == 1);
    let signature = signature.map_or(NO_SIGNATURE, |entry| entry.regs[0].into());

    let (from, to) = (fresh.fd(), vcpu.fd());
    let mut sregs = from.get_sregs().map_err(sys(Call::Sregs))?;
    let bsp = sregs.apic_base & APIC_BASE_BSP != 0;
    if init {
        let old = to.get_sregs().map_err(sys(Call::Sregs))?;
        let kept = control::cr0::CD | control::cr0::NW;
        sregs.cr0 = sregs.cr0 & !kept | old.cr0 & kept;
        sregs.apic_base = old.apic_base;
    }
    to.set_sregs(&sregs).map_err(sys(Call::Sregs))?;
    let mut regs = from.get_regs().map_err(sys(Call::Regs))?;
    regs.rdx = signature;
    to.set_regs(&regs).map_err(sys(Call::Regs))?;
    let debug = from.get_debug_regs().map_err(sys(Call::DebugRegs))?;
    to.set_debug_regs(&debug).map_err(sys(Call::DebugRegs))?;
    // Written last, and reported after all else is as it should be.
    let mut refused = Ok(());
    if !init {
        copy_fpu(&vm, from, to)?;
        refused = copy_msrs(host.msrs(), &fresh, vcpu);
    }
    copy_apic(vcpu, from, init, bsp)?;
    let nothing = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    vcpu.fd()
        .set_vcpu_events(&nothing)
        .map_err(sys(Call::VcpuEvents))?;
    refused
}

/// x87, SSE and all that XSAVE knows.
fn copy_fpu(vm: &crate::KvmVm, from: &VcpuFd, to: &VcpuFd) -> Result<()> {
    if vm.fd().check_extension(Cap::Xcrs) {
        let xcrs = from.get_xcrs().map_err(sys(Call::Fpu))?;
        to.set_xcrs(&xcrs).map_err(sys(Call::Fpu))?;
    }
    // Also where XSAVE follows: that marks x87 and SSE as "in their first state" and leaves the old
    // bytes where KVM_GET_FPU would still find them.
    let fpu = from.get_fpu().map_err(sys(Call::Fpu))?;
    to.set_fpu(&fpu).map_err(sys(Call::Fpu))?;
    let bytes = usize::try_from(vm.fd().check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(0);
    if bytes == 0 && vm.fd().check_extension(Cap::Xsave) {
        let xsave = from.get_xsave().map_err(sys(Call::Fpu))?;
        // SAFETY: a kernel without KVM_CAP_XSAVE2 reads no more than the structure.
        unsafe { to.set_xsave(&xsave) }.map_err(sys(Call::Fpu))?;
    } else if bytes > 0 {
        let tail = bytes.saturating_sub(XSAVE_BYTES).div_ceil(size_of::<u32>());
        let mut xsave = Xsave::new(tail).map_err(|_| Error::NoMemory)?;
        // SAFETY: KVM_CAP_XSAVE2 answered how many bytes the kernel writes and reads, and the
        // structure with its tail has at least as many. Both VMs have the same features, because
        // the process asks for larger ones (arch_prctl) for all its VMs.
        unsafe {
            from.get_xsave2(&mut xsave).map_err(sys(Call::Fpu))?;
            to.set_xsave2(&xsave).map_err(sys(Call::Fpu))?;
        }
    }
    Ok(())
}

/// Writes what differs. An MSR that cannot be read is one that the vCPU does not have. One that
/// cannot be written stays, and the first such is the error.
fn copy_msrs(list: &[u32], from: &KvmVcpu, to: &mut KvmVcpu) -> Result<()> {
    let mut result = Ok(());
    for &index in list.iter().filter(|index| !CLOCKS.contains(index)) {
        let (Ok(wanted), Ok(present)) = (from.get_msr(index), to.get_msr(index)) else {
            continue;
        };
        if wanted != present && to.set_msr(index, wanted).is_err() {
            tracing::warn!(msr = format_args!("{index:#x}"), "not reset");
            result = result.and(Err(Error::Invalid(Field::Msr, index.into())));
        }
    }
    result
}

/// The local APIC and what the vCPU waits for, where KVM has the APIC. Elsewhere every vCPU starts
/// at the reset vector at once, and holding back all but the first is the embedder's to do.
fn copy_apic(vcpu: &KvmVcpu, from: &VcpuFd, init: bool, bsp: bool) -> Result<()> {
    if vcpu.vm_params().irqchip == Irqchip::None {
        return Ok(());
    }
    let to = vcpu.fd();
    let mut apic = from.get_lapic().map_err(sys(Call::Lapic))?;
    if init {
        // INIT keeps the APIC's mode, in which the ID has another format, and the ID.
        let old = to.get_lapic().map_err(sys(Call::Lapic))?;
        apic.regs[APIC_ID].copy_from_slice(&old.regs[APIC_ID]);
    }
    to.set_lapic(&apic).map_err(sys(Call::Lapic))?;
    let state = match (init, bsp) {
        (true, false) => kvm_mp_state {
            mp_state: KVM_MP_STATE_INIT_RECEIVED,
        },
        (true, true) => kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        },
        (false, _) => from.get_mp_state().map_err(sys(Call::MpState))?,
    };
    to.set_mp_state(state).map_err(sys(Call::MpState))
}
