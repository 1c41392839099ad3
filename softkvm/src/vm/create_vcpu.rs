//! `KVM_CREATE_VCPU` and the boot vCPU.

use std::sync::Arc;

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::checks::create_vcpu::{
    COUNT, DESCRIPTOR, ID, MAX_ID, MEMORY, TD_INITIALIZED, TD_SPLIT_IRQCHIP, UNUSED,
};
use kvm_ops_uapi::state::mp_state;
use kvm_ops_uapi::system::vm_type;

use super::{MAX_VCPU_ID, State, Vm};
use crate::refusal::{Result, ensure};
use crate::vcpu::{Cpu, Links, Vcpu};
use crate::{File, Process};

pub(super) fn create(vm: &Arc<Vm>, process: &dyn Process, id: u64) -> Result<i64> {
    ensure(id < MAX_VCPU_ID.into(), ID)?;
    let id = id as u32;
    let mut state = vm.lock();
    ensure(state.vcpus.len() < vm.max_vcpus() as usize, COUNT)?;
    ensure(!state.vcpus.contains_key(&id), UNUSED)?;
    ensure(id < state.max_vcpu_id.unwrap_or(MAX_VCPU_ID), MAX_ID)?;
    if vm.kind() == vm_type::TDX {
        ensure(state.td.is_building(), TD_INITIALIZED)?;
        ensure(state.irqchip.is_split(), TD_SPLIT_IRQCHIP)?;
    }

    let starts = !state.irqchip.has_apics() || id == state.boot_id;
    let starts_as = if starts {
        mp_state::RUNNABLE
    } else {
        mp_state::UNINITIALIZED
    };
    vm.kernel().faults().allocate(MEMORY)?;
    let other = state.vcpus.values().next();
    let other = other.map(|vcpu| &**vcpu.run_area());
    let area = process.run_area(other).map_err(|_| MEMORY)?;
    let number = process.reserve().map_err(|_| DESCRIPTOR)?;
    let links = Links {
        area,
        irq: Arc::clone(vm.irq()),
        msrs: Arc::clone(vm.msrs()),
        hypercall_fix: Arc::clone(vm.quirks().hypercall_fix()),
        counts: Arc::default(),
    };
    let mut cpu = match processor(vm, &mut state, id, starts_as, &links) {
        Ok(cpu) => cpu,
        Err(refusal) => {
            process.release(number);
            return Err(refusal);
        }
    };
    if let Some(clock) = cpu.clock() {
        let tsc = state.synchronise_tsc(None, clock, None);
        cpu.set_tsc(tsc);
    }
    let vcpu = Arc::new(Vcpu::new(id, cpu, links));
    state.vcpus.insert(id, Arc::clone(&vcpu));
    process.install(number, File::vcpu(Arc::clone(vm), vcpu));
    Ok(number.into())
}

/// The vCPU of the back end that executes its code. A guest of SEV has none before it is initialised, and a TD's
/// comes with INIT_VCPU.
fn processor(vm: &Vm, state: &mut State, id: u32, starts_as: u32, links: &Links) -> Result<Cpu> {
    let boot = state.boot_id;
    if !vm.is_plain() || state.sev.is_active() {
        return match state.sev.create_vcpu(id, links)? {
            Some(vcpu) => Cpu::processor(vcpu, boot),
            None => Ok(Cpu::held(starts_as)),
        };
    }
    let vcpu = state.machine(vm.kernel())?.create_vcpu(id, links)?;
    Cpu::processor(vcpu, boot)
}

/// `KVM_SET_BOOT_CPU_ID`: before the first vCPU.
pub(super) fn set_boot_id(vm: &Vm, id: u64) -> Result<i64> {
    let mut state = vm.lock();
    if !state.vcpus.is_empty() {
        return Err(Errno::EBUSY.into());
    }
    if id >= state.max_vcpu_id.unwrap_or(MAX_VCPU_ID).into() {
        return Err(Errno::EINVAL.into());
    }
    state.boot_id = id as u32;
    Ok(0)
}
