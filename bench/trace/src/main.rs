//! Private faults and runs of a TD's vCPU over ports that do nothing, so that what is counted is the
//! back end. tests/trace_cost.rs builds it with tracing as it is, with every level compiled out, and
//! with macros that expand to nothing, and compares the instructions inside of `kvm_ops_trace_hot`.

extern crate kvm_ops_core as kvm_ops;

mod ports;

use std::hint::black_box;
use std::process::ExitCode;

use kvm_ops::{
    Backend, Error, Exit, Gfn, Gpa, Host, HostRange, MemSlot, PAGE_SIZE, Result, SlotId, VcpuId,
    VcpuOps, VmOps, VmParams,
};
use kvm_ops_tdx::{TdxVcpu, TdxVm};

use ports::Machine;

type Vm = TdxVm<Machine>;
type Vcpu = TdxVcpu<Machine>;

/// The counted path: `faults` private pages, one TDH.MEM.PAGE.AUG each, then `runs` runs of the vCPU,
/// one TDH.VP.ENTER each.
#[unsafe(no_mangle)]
#[inline(never)]
fn kvm_ops_trace_hot(vm: &Vm, vcpu: &mut Vcpu, faults: u64, runs: u64) -> Result<()> {
    let mapped = vm.pre_fault_memory(Gfn::new(0), faults)?;
    if mapped != faults {
        return Err(Error::NotFound(kvm_ops::Field::Gfn, mapped));
    }
    for _ in 0..runs {
        let exit = vcpu.vcpu_run()?;
        if !matches!(exit, Exit::IoOut { port: 0x3f8, .. }) {
            return Err(Error::Invalid(kvm_ops::Field::Port, 0));
        }
    }
    Ok(())
}

fn run(faults: u64, runs: u64) -> Result<()> {
    let host = Machine;
    let mut vm = Vm::create(&host, host.next_vm_id(), &VmParams::new(1))?;
    vm.vm_init()?;
    // SAFETY: no port of this program reaches the memory.
    let range = unsafe { HostRange::new(0x1000_0000, faults * PAGE_SIZE)? };
    vm.set_memory_slot(&MemSlot::new(SlotId(0), Gpa::new(0), range))?;
    let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    vm.vm_finalize()?;
    kvm_ops_trace_hot(black_box(&vm), black_box(&mut vcpu), faults, runs)?;
    let released = vm.mmu_release_hkid()?;
    let drained = vm.drain_private(released).map_err(|(error, _)| error)?;
    match vm.vm_free(drained).leaks.first() {
        Some(leak) => Err(leak.error),
        None => Ok(()),
    }
}

/// The two numbers of the command line, pages and runs.
fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map_while(|word| word.parse().ok());
    let (Some(faults), Some(runs)) = (numbers.next(), numbers.next()) else {
        eprintln!("usage: kvm-ops-trace-cost PAGES RUNS");
        return ExitCode::from(2);
    };
    match run(faults, runs) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
