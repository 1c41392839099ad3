//! Contexts that move or are copied inside a host.
//!
//! Both VMs are claimed before either is locked, and only who holds both claims locks two VMs, so no
//! order of calls deadlocks.

use std::sync::Arc;

use kvm_ops::SevParams;
use kvm_ops_uapi::checks::{copy, move_};

use super::Sev;
use super::engine::Engine;
use crate::refusal::{Result, ensure};
use crate::vm::{State, Vm, lent};
use crate::{Descriptor, Process};

/// The VM behind a descriptor that an argument names.
fn vm_of(process: &dyn Process, argument: u64) -> Option<Arc<Vm>> {
    match process.descriptor(argument as i32) {
        Descriptor::File(file) => file.as_vm().cloned(),
        _ => None,
    }
}

/// A back end for a VM that is to take a context: it knows the VM's slots and vCPUs.
fn vacant(vm: &Vm, to: &mut State, from: &Sev) -> Result<Engine> {
    let tech = from.tech().ok_or(move_::SOURCE)?;
    let params = SevParams {
        arrives: true,
        ..SevParams::default()
    };
    let mut engine = Engine::new(vm.kernel().host(), tech, params, to.irqchip(), &to.irq)?;
    for (number, slot) in to.slots.iter() {
        lent::set_slot(&mut engine.vm, number, slot)?;
    }
    for (id, vcpu) in &to.vcpus {
        let own = engine.create_vcpu(*id, vcpu.links())?;
        engine.waiting.insert(*id, own);
    }
    Ok(engine)
}

pub(crate) fn move_from(vm: &Arc<Vm>, process: &dyn Process, fd: u64) -> Result<i64> {
    use move_::{DESTINATION, FILE, HOST, IDLE, MEMORY, OTHER, SIGNAL, SOURCE, TYPE, VCPUS};
    ensure(vm.kernel().is_amd(), HOST)?;
    let source = vm_of(process, fd).ok_or(FILE)?;
    ensure(!Arc::ptr_eq(vm, &source), OTHER)?;
    let _claims = (vm.claim().ok_or(IDLE)?, source.claim().ok_or(IDLE)?);
    ensure(!process.signal_pending(), SIGNAL)?;
    let (mut to, mut from) = (vm.lock(), source.lock());
    ensure(vm.kind() == source.kind(), TYPE)?;
    ensure(!to.sev.is_active(), DESTINATION)?;
    ensure(from.sev.is_active() && !from.sev.is_snp(), SOURCE)?;
    let all_protected = from.vcpus.keys().all(|id| from.sev.is_protected(*id));
    let fits = from.vcpus.len() == to.vcpus.len() && all_protected;
    ensure(!from.sev.is_es() || fits, VCPUS)?;
    vm.kernel().faults().allocate(MEMORY)?;

    let mut engine = vacant(vm, &mut to, &from.sev)?;
    from.sev.engine(SOURCE)?.move_to(&mut engine)?;
    // The kernel moves neither sev_fd nor that the VM may run.
    to.sev = Sev {
        protected: match from.sev.is_es() {
            true => to.vcpus.keys().copied().collect(),
            false => Default::default(),
        },
        owner: from.sev.owner.take(),
        launched: from.sev.launched,
        engine: Some(engine),
        ..Sev::default()
    };
    from.sev = Sev::default();
    source.die();
    Ok(0)
}

pub(crate) fn copy_from(vm: &Arc<Vm>, process: &dyn Process, fd: u64) -> Result<i64> {
    use copy::{FILE, HOST, IDLE, MEMORY, MIRROR, OTHER, SIGNAL, SOURCE};
    ensure(vm.kernel().is_amd(), HOST)?;
    let source = vm_of(process, fd).ok_or(FILE)?;
    ensure(!Arc::ptr_eq(vm, &source), OTHER)?;
    let _claims = (vm.claim().ok_or(IDLE)?, source.claim().ok_or(IDLE)?);
    ensure(!process.signal_pending(), SIGNAL)?;
    let (mut mirror, mut from) = (vm.lock(), source.lock());
    ensure(!mirror.sev.is_active() && mirror.vcpus.is_empty(), MIRROR)?;
    let owns = from.sev.is_active() && !from.sev.is_snp() && !from.sev.is_mirror();
    ensure(owns, SOURCE)?;
    vm.kernel().faults().allocate(MEMORY)?;

    let mut engine = vacant(vm, &mut mirror, &from.sev)?;
    from.sev.engine(SOURCE)?.copy_to(&mut engine)?;
    mirror.sev = Sev {
        sev_fd: from.sev.sev_fd,
        owner: Some(Arc::clone(&source)),
        initialised_here: true,
        engine: Some(engine),
        ..Sev::default()
    };
    Ok(0)
}
