//! `KVM_ENABLE_CAP` on a VM.

use std::sync::Arc;

use kvm_ops_uapi::cap;
use kvm_ops_uapi::checks::enable_cap::{COPY, FLAGS, KNOWN};
use kvm_ops_uapi::checks::{apic_bus_cycles, exit_hypercall, max_vcpu_id, x2apic_api};
use kvm_ops_uapi::irq::x2apic_flags;
use kvm_ops_uapi::vm::{EnableCap, HC_MAP_GPA_RANGE};

use super::{MAX_VCPU_ID, State, Vm, dirty_log, irqchip, msr};
use crate::refusal::{Result, ensure};
use crate::{Process, arg, sev};

pub(super) fn enable(vm: &Arc<Vm>, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: EnableCap = arg::read(process, argument, COPY)?;
    ensure(args.flags.get() == 0, FLAGS)?;
    let value = args.args[0].get();
    match args.cap.get() {
        cap::SPLIT_IRQCHIP => irqchip::split(&mut vm.lock(), value),
        cap::EXIT_HYPERCALL => exit_hypercall(&mut vm.lock(), value),
        cap::DISABLE_QUIRKS => vm.quirks().disable(value),
        cap::DISABLE_QUIRKS2 => vm.quirks().disable_known(value),
        cap::MAX_VCPU_ID => max_vcpu_id(&mut vm.lock(), value),
        cap::EXCEPTION_PAYLOAD => {
            vm.lock().event_parts.payload = value != 0;
            Ok(0)
        }
        cap::X86_TRIPLE_FAULT_EVENT => {
            vm.lock().event_parts.triple_fault = value != 0;
            Ok(0)
        }
        cap::X86_APIC_BUS_CYCLES_NS => apic_bus_cycle(vm, value),
        cap::MANUAL_DIRTY_LOG_PROTECT2 => dirty_log::protect(&mut vm.lock(), value),
        cap::X86_USER_SPACE_MSR => msr::leave_for(vm, value),
        cap::X2APIC_API => x2apic_api(vm, value),
        cap::VM_MOVE_ENC_CONTEXT_FROM => sev::move_from(vm, process, value),
        cap::VM_COPY_ENC_CONTEXT_FROM => sev::copy_from(vm, process, value),
        _ => Err(KNOWN.into()),
    }
}

fn exit_hypercall(state: &mut State, mask: u64) -> Result<i64> {
    ensure(mask & !(1 << HC_MAP_GPA_RANGE) == 0, exit_hypercall::MASK)?;
    state.hypercall_exits = mask;
    Ok(0)
}

/// The length of a tick of local APICs' timers. Counts of 32 bits, divided by up to 128, are below 2^64 ns.
fn apic_bus_cycle(vm: &Vm, nanoseconds: u64) -> Result<i64> {
    use apic_bus_cycles::{IRQCHIP, NO_VCPU, RANGE};
    let longest = u64::from(u32::MAX) * 128;
    ensure(
        nanoseconds != 0 && longest.checked_mul(nanoseconds).is_some(),
        RANGE,
    )?;
    let state = vm.lock();
    ensure(state.has_apics(), IRQCHIP)?;
    ensure(state.vcpus.is_empty(), NO_VCPU)?;
    vm.irq().set_apic_bus_cycle(nanoseconds);
    Ok(0)
}

/// Destinations of messages have 32 bits from now on; broadcasts always did.
fn x2apic_api(vm: &Vm, flags: u64) -> Result<i64> {
    ensure(flags & !x2apic_flags::ALL == 0, x2apic_api::FLAGS)?;
    if flags & x2apic_flags::USE_32BIT_IDS != 0 {
        vm.irq().set_x2apic_format();
    }
    Ok(0)
}

fn max_vcpu_id(state: &mut State, limit: u64) -> Result<i64> {
    use max_vcpu_id::{BOOT, LIMIT, ONCE};
    ensure(limit <= MAX_VCPU_ID.into(), LIMIT)?;
    let limit = limit as u32;
    ensure(limit >= state.boot_id, BOOT)?;
    ensure(state.max_vcpu_id.is_none_or(|old| old == limit), ONCE)?;
    state.max_vcpu_id = Some(limit);
    Ok(0)
}
