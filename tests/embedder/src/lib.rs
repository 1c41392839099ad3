//! A hypervisor outside of kvm-ops with a back end of its own, beside the library's.

mod enclave;

pub use enclave::{EnclaveVcpu, EnclaveVm};

use kvm_ops::sim::SimHost;
use kvm_ops::vmx::{VmxVcpu, VmxVm};
use kvm_ops::{AnyVcpu, AnyVm, backend_enum};

backend_enum! {
    /// The library's back end for normal VMs, and one of our own.
    #[derive(Debug)]
    pub enum OurVm {
        Vmx(VmxVm<SimHost>),
        Enclave(EnclaveVm),
    }

    /// Their vCPUs.
    pub enum OurVcpu {
        Vmx(VmxVcpu<SimHost>),
        Enclave(EnclaveVcpu),
    }
}

/// A second declaration in the same crate, in a module of its own.
pub mod nested {
    use super::*;

    backend_enum! {
        /// An enum may also hold the library's whole choice as one variant.
        #[derive(Debug)]
        pub enum NestedVm {
            Library(AnyVm<SimHost>),
            Enclave(EnclaveVm),
        }

        /// Their vCPUs.
        pub enum NestedVcpu {
            Library(AnyVcpu<SimHost>),
            Enclave(EnclaveVcpu),
        }
    }
}
