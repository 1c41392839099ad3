//! The main.c of this project: one enum, and for each operation a `match` that sends it to the
//! technology that holds the VM.

use kvm_ops_core::{Host, backend_enum};

#[cfg(feature = "sev")]
use kvm_ops_sev::{SevVcpu, SevVm};
#[cfg(feature = "svm")]
use kvm_ops_svm::{SvmVcpu, SvmVm};
#[cfg(feature = "tdx")]
use kvm_ops_tdx::{TdxVcpu, TdxVm};
#[cfg(feature = "vmx")]
use kvm_ops_vmx::{VmxVcpu, VmxVm};

backend_enum! {
    #![cfg(any(feature = "vmx", feature = "tdx"))]

    /// A VM that an Intel host can hold: the two arms of Linux's `vmx/main.c`.
    #[derive(Debug)]
    pub enum IntelVm<H: Host> {
        #[cfg(feature = "vmx")]
        Vmx(VmxVm<H>),
        #[cfg(feature = "tdx")]
        Tdx(TdxVm<H>),
    }

    /// A vCPU of [`IntelVm`].
    pub enum IntelVcpu<H: Host> {
        #[cfg(feature = "vmx")]
        Vmx(VmxVcpu<H>),
        #[cfg(feature = "tdx")]
        Tdx(TdxVcpu<H>),
    }

    #![cfg(any(feature = "svm", feature = "sev"))]

    /// A VM that an AMD host can hold.
    #[derive(Debug)]
    pub enum AmdVm<H: Host> {
        #[cfg(feature = "svm")]
        Svm(SvmVm<H>),
        #[cfg(feature = "sev")]
        Sev(SevVm<H>),
    }

    /// A vCPU of [`AmdVm`].
    pub enum AmdVcpu<H: Host> {
        #[cfg(feature = "svm")]
        Svm(SvmVcpu<H>),
        #[cfg(feature = "sev")]
        Sev(SevVcpu<H>),
    }

    /// A VM of any technology that this build has. [`create`](crate::create) chooses which, once.
    ///
    /// Vendor first, then technology: two compares, the first of which a real host's processor
    /// always predicts, because a host has one vendor's VMs. Four arms in one enum would be a jump
    /// table, an indirect branch ([the benchmarks](crate::manual::benchmarks)). With one vendor's features the outer enum
    /// has one variant and costs nothing.
    #[derive(Debug)]
    pub enum AnyVm<H: Host> {
        #[cfg(any(feature = "vmx", feature = "tdx"))]
        Intel(IntelVm<H>),
        #[cfg(any(feature = "svm", feature = "sev"))]
        Amd(AmdVm<H>),
    }

    /// A vCPU of any technology that this build has.
    pub enum AnyVcpu<H: Host> {
        #[cfg(any(feature = "vmx", feature = "tdx"))]
        Intel(IntelVcpu<H>),
        #[cfg(any(feature = "svm", feature = "sev"))]
        Amd(AmdVcpu<H>),
    }
}

/// Lets a back end's own VM become an [`AnyVm`] in one step.
macro_rules! through_vendor {
    ($($feature:literal: $Vm:ident => $Vendor:ident;)*) => {
        $(
            #[cfg(feature = $feature)]
            impl<H: Host> From<$Vm<H>> for AnyVm<H> {
                #[inline]
                fn from(vm: $Vm<H>) -> Self {
                    $Vendor::from(vm).into()
                }
            }
        )*
    };
}

through_vendor! {
    "vmx": VmxVm => IntelVm;
    "tdx": TdxVm => IntelVm;
    "svm": SvmVm => AmdVm;
    "sev": SevVm => AmdVm;
}
