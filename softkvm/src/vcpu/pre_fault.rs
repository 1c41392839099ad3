//! `KVM_PRE_FAULT_MEMORY`. There is no table to fill before guest code runs: the call checks that the
//! memory is there, and says how far it is.

use kvm_ops::Gfn;
use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::pre_fault::{
    COPY, FILE, FLAGS, LAUNCHED, RANGE, SHARED_BIT, SIGNAL, SLOT,
};
use kvm_ops_uapi::memory::PreFaultMemory;
use kvm_ops_uapi::system::vm_type;

use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::vm::{Slot, State, Vm};
use crate::{Process, arg};

const PAGE: u64 = 4096;

pub(super) fn pre_fault(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut args: PreFaultMemory = arg::read(process, argument, COPY)?;
    ensure(args.flags.get() == 0, FLAGS)?;
    let (mut gpa, mut size) = (args.gpa.get(), args.size.get());
    let whole = gpa.is_multiple_of(PAGE) && size.is_multiple_of(PAGE);
    ensure(whole && size != 0 && gpa.checked_add(size).is_some(), RANGE)?;
    let (first, mut done) = (gpa, Ok(()));
    while size != 0 {
        done = step(&file.vm, process, gpa);
        if done.is_err() {
            break;
        }
        (gpa, size) = (gpa + PAGE, size - PAGE);
    }
    (args.gpa, args.size) = (U64::new(gpa), U64::new(size));
    arg::write(process, argument, &args, COPY)?;
    if gpa == first {
        done?;
    }
    Ok(0)
}

/// One page.
fn step(vm: &Vm, process: &dyn Process, gpa: u64) -> Result<()> {
    ensure(!process.signal_pending(), SIGNAL)?;
    let state = vm.lock();
    let launched = match vm.kind() {
        vm_type::SNP => state.sev.is_launched(),
        vm_type::TDX => state.td.is_finalized(),
        _ => true,
    };
    ensure(launched, LAUNCHED)?;
    let shared = state.td.shared_bit().unwrap_or(0);
    ensure(gpa & shared == 0, SHARED_BIT)?;
    let slot = state.slots.at(0, gpa).ok_or(SLOT)?;
    ensure(is_backed(&state, slot, process, gpa), FILE)?;
    if let Some(vm) = state.guarded().filter(|_| state.is_private(gpa / PAGE)) {
        vm.pre_fault_memory(Gfn::new(gpa / PAGE), 1)?;
    }
    Ok(())
}

fn is_backed(state: &State, slot: &Slot, process: &dyn Process, gpa: u64) -> bool {
    match &slot.file {
        Some(file) if state.is_private(gpa / PAGE) => file.is_open(),
        None if state.is_private(gpa / PAGE) => false,
        _ => process.read(slot.user_address(gpa), &mut [0]).is_ok(),
    }
}
