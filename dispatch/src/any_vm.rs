//! The main.c of this project: one enum, and for each operation a `match` that sends it to the
//! technology that holds the VM.

use kvm_ops_core::{Host, VcpuOps, VmOps, backend_enum, enum_dispatch};

#[cfg(feature = "sev")]
use kvm_ops_sev::{SevVcpu, SevVm};
#[cfg(feature = "svm")]
use kvm_ops_svm::{SvmVcpu, SvmVm};
#[cfg(feature = "tdx")]
use kvm_ops_tdx::{TdxVcpu, TdxVm};
#[cfg(feature = "vmx")]
use kvm_ops_vmx::{VmxVcpu, VmxVm};

backend_enum! {
    /// A VM of any technology that this build has. [`create`](crate::create) chooses which, once.
    #[enum_dispatch(VmOps)]
    #[derive(Debug)]
    pub enum AnyVm<H: Host> {
        #[cfg(feature = "vmx")]
        Vmx(VmxVm<H>),
        #[cfg(feature = "tdx")]
        Tdx(TdxVm<H>),
        #[cfg(feature = "svm")]
        Svm(SvmVm<H>),
        #[cfg(feature = "sev")]
        Sev(SevVm<H>),
    }

    /// A vCPU of any technology that this build has.
    #[enum_dispatch(VcpuOps)]
    pub enum AnyVcpu<H: Host> {
        #[cfg(feature = "vmx")]
        Vmx(VmxVcpu<H>),
        #[cfg(feature = "tdx")]
        Tdx(TdxVcpu<H>),
        #[cfg(feature = "svm")]
        Svm(SvmVcpu<H>),
        #[cfg(feature = "sev")]
        Sev(SevVcpu<H>),
    }
}
