//! A TD from its creation to its end, in named steps.

use kvm_ops_core::{
    Backend, FreeReport, Gpa, Host, InitialPage, InitialPageKind, MemSlot, SlotId, VcpuId, VmOps,
    VmParams,
};
use kvm_ops_tdx::TdxVm;

use super::TestHost;

/// The parameters of most tests.
pub fn params() -> VmParams {
    VmParams::new(4)
}

/// A slot over all that tests use.
pub fn slot(host: &TestHost) -> MemSlot {
    MemSlot::new(SlotId(0), Gpa::new(0), host.memory())
}

pub fn create(host: &TestHost) -> TdxVm<TestHost> {
    TdxVm::create(host, host.next_vm_id(), &params()).expect("create")
}

/// A TD with parameters and a slot.
pub fn initialized(host: &TestHost) -> TdxVm<TestHost> {
    let mut vm = create(host);
    vm.vm_init().expect("vm_init");
    vm.set_memory_slot(&slot(host)).expect("set_memory_slot");
    vm
}

/// A TD with a vCPU that may run.
pub fn runnable(host: &TestHost) -> TdxVm<TestHost> {
    let mut vm = initialized(host);
    vm.create_vcpu(VcpuId(0)).expect("create_vcpu");
    vm.vm_finalize().expect("vm_finalize");
    vm
}

pub fn initial_page(gpa: u64, kind: InitialPageKind) -> InitialPage<'static> {
    InitialPage {
        gpa: Gpa::new(gpa),
        contents: &[0x5a; 4096],
        kind,
    }
}

/// The whole teardown, as the framework's owner of VMs takes it.
pub fn destroy(mut vm: TdxVm<TestHost>) -> FreeReport {
    let released = vm
        .mmu_release_hkid()
        .and_then(|key| vm.drain_private(key).map_err(|(error, _)| error));
    match released {
        Ok(drained) => vm.vm_free(drained),
        Err(error) => vm.vm_abandon(error),
    }
}

/// One report of several VMs.
pub fn sum(reports: impl IntoIterator<Item = FreeReport>) -> FreeReport {
    let mut reports = reports.into_iter();
    let mut sum = reports.next().unwrap();
    for report in reports {
        sum.pages_freed += report.pages_freed;
        sum.keys_freed += report.keys_freed;
        sum.leaks.extend(report.leaks);
    }
    sum
}
