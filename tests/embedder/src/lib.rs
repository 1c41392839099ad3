//! A hypervisor outside of kvm-ops with a back end of its own, beside the library's.

mod enclave;

pub use enclave::{EnclaveVcpu, EnclaveVm};

use kvm_ops::sim::SimHost;
use kvm_ops::vmx::{VmxVcpu, VmxVm};
use kvm_ops::{AnyVcpu, AnyVm, VcpuOps, VmOps, backend_enum, enum_dispatch};

backend_enum! {
    /// The library's back end for normal VMs, and one of our own.
    #[enum_dispatch(VmOps)]
    #[derive(Debug)]
    pub enum OurVm {
        Vmx(VmxVm<SimHost>),
        Enclave(EnclaveVm),
    }

    /// Their vCPUs.
    #[enum_dispatch(VcpuOps)]
    pub enum OurVcpu {
        Vmx(VmxVcpu<SimHost>),
        Enclave(EnclaveVcpu),
    }

    /// An enum may also hold the library's whole choice as one variant.
    #[enum_dispatch(VmOps)]
    #[derive(Debug)]
    pub enum NestedVm {
        Library(AnyVm<SimHost>),
        Enclave(EnclaveVm),
    }

    /// Their vCPUs.
    #[enum_dispatch(VcpuOps)]
    pub enum NestedVcpu {
        Library(AnyVcpu<SimHost>),
        Enclave(EnclaveVcpu),
    }
}
