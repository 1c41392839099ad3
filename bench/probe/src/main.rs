//! Calls back-end operations directly and through `AnyVm`, each in a separate function, so that
//! tests/zero_cost.rs can compare their code. Also prints the sizes of the types.

mod ports;

use std::hint::black_box;
use std::mem::size_of;

use kvm_ops::kit::NullVcpu;
use kvm_ops::{
    AnyVm, Gfn, Gpa, Host, MemSlot, Privacy, Result, SharedMask, Step, Tech, VcpuId, Vendor, VmId,
    VmOps, VmParams, VmPort,
};

use crate::ports::Ports;

/// A machine with ports that are opaque to the compiler, so that every back end is compiled whole.
#[derive(Clone, Debug)]
struct Machine;

/// Its VM: a few words, some of which an operation reads.
#[derive(Debug)]
struct Port {
    first: u32,
    last: u32,
}

impl Host for Machine {
    type Vm = Port;
    type Seam = Ports;
    type Psp = Ports;
    type Pages = Ports;

    fn name(&self) -> &'static str {
        "probe"
    }

    fn vendor(&self) -> Vendor {
        black_box(Vendor::Intel)
    }

    fn next_vm_id(&self) -> VmId {
        VmId(1)
    }

    fn create_vm(&self, _: Tech, params: &VmParams) -> Result<Port> {
        Ok(Port {
            first: params.vcpus,
            last: params.vcpus + 9,
        })
    }

    fn seam(&self) -> Option<&Ports> {
        black_box(Some(ports::get()))
    }

    fn psp(&self) -> Option<&Ports> {
        black_box(Some(ports::get()))
    }

    fn pages(&self) -> Option<&Ports> {
        black_box(Some(ports::get()))
    }
}

impl VmPort for Port {
    type Vcpu = NullVcpu;

    fn create_vcpu(&self, _: VcpuId) -> Result<NullVcpu> {
        kvm_ops::not_offered!("a vCPU of the probe")
    }

    fn set_memory_slot(&self, _: &MemSlot) -> Result<()> {
        Ok(())
    }

    fn delete_memory_slot(&self, _: &MemSlot) -> Result<()> {
        Ok(())
    }

    fn dirty_log(&self, _: &MemSlot, _: &mut [u64]) -> Result<()> {
        Ok(())
    }

    fn set_tss_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn set_identity_map_addr(&self, _: Gpa) -> Result<()> {
        Ok(())
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        (self.first..=self.last).contains(&index)
    }

    fn deliver_interrupt(&self, _: VcpuId, _: u8) -> Result<()> {
        Ok(())
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

macro_rules! probes {
    ($list:ident, $Vm:ty, $($name:ident: |$vm:ident: $vm_ty:ty $(, $arg:ident: $arg_ty:ty)*| -> $ret:ty $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            fn $name($vm: $vm_ty $(, $arg: $arg_ty)*) -> $ret $body
        )*

        /// Keeps the functions from being removed.
        fn $list() {
            $( black_box($name as *const ()); )*
        }
    };
}

type Any = AnyVm<Machine>;

probes! { any, Any,
    any_id: |vm: &Any| -> VmId { vm.id() }
    any_step: |vm: &Any| -> Step { vm.step() }
    any_tech: |vm: &Any| -> Tech { vm.tech() }
    any_shared_mask: |vm: &Any| -> SharedMask { vm.shared_mask() }
    any_has_emulated_msr: |vm: &Any, index: u32| -> bool { vm.has_emulated_msr(index) }
    any_vm_finalize: |vm: &mut Any| -> Result<()> { vm.vm_finalize() }
    any_set_memory_slot: |vm: &Any, slot: &MemSlot| -> Result<()> { vm.set_memory_slot(slot) }
    any_deliver_interrupt: |vm: &Any, vcpu: VcpuId, vector: u8| -> Result<()> {
        vm.deliver_interrupt(vcpu, vector)
    }
    any_pre_fault_memory: |vm: &Any, first: Gfn, pages: u64| -> Result<u64> {
        vm.pre_fault_memory(first, pages)
    }
    any_set_memory_attributes: |vm: &Any, first: Gfn, pages: u64, to: Privacy| -> Result<u64> {
        vm.set_memory_attributes(first, pages, to)
    }
}

#[cfg(feature = "vmx")]
type Vmx = kvm_ops::vmx::VmxVm<Machine>;

#[cfg(feature = "vmx")]
probes! { direct, Vmx,
    direct_id: |vm: &Vmx| -> VmId { vm.id() }
    direct_step: |vm: &Vmx| -> Step { vm.step() }
    direct_tech: |vm: &Vmx| -> Tech { vm.tech() }
    direct_shared_mask: |vm: &Vmx| -> SharedMask { vm.shared_mask() }
    direct_has_emulated_msr: |vm: &Vmx, index: u32| -> bool { vm.has_emulated_msr(index) }
    direct_vm_finalize: |vm: &mut Vmx| -> Result<()> { vm.vm_finalize() }
    direct_set_memory_slot: |vm: &Vmx, slot: &MemSlot| -> Result<()> { vm.set_memory_slot(slot) }
    direct_deliver_interrupt: |vm: &Vmx, vcpu: VcpuId, vector: u8| -> Result<()> {
        vm.deliver_interrupt(vcpu, vector)
    }
    direct_pre_fault_memory: |vm: &Vmx, first: Gfn, pages: u64| -> Result<u64> {
        vm.pre_fault_memory(first, pages)
    }
    direct_set_memory_attributes: |vm: &Vmx, first: Gfn, pages: u64, to: Privacy| -> Result<u64> {
        vm.set_memory_attributes(first, pages, to)
    }
}

fn main() {
    any();
    #[cfg(feature = "vmx")]
    direct();

    // The compiler must assume a VM of any technology.
    let vm = kvm_ops::create(&Machine, &kvm_ops::VmConfig::normal());
    black_box(&vm);

    println!("any {}", size_of::<Any>());
    #[cfg(feature = "vmx")]
    println!("vmx {}", size_of::<kvm_ops::vmx::VmxVm<Machine>>());
    #[cfg(feature = "tdx")]
    println!("tdx {}", size_of::<kvm_ops::tdx::TdxVm<Machine>>());
    #[cfg(feature = "svm")]
    println!("svm {}", size_of::<kvm_ops::svm::SvmVm<Machine>>());
    #[cfg(feature = "sev")]
    println!("sev {}", size_of::<kvm_ops::sev::SevVm<Machine>>());
}
