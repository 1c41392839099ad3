//! The main.c of this project: one enum, and for each operation a `match` that sends it to the
//! technology that holds the VM.

#[cfg(all(feature = "kvm", any(feature = "tdx", feature = "sev")))]
use kvm_ops_core::VmPort;
use kvm_ops_core::{Host, backend_enum};

#[cfg(all(feature = "kvm", any(feature = "tdx", feature = "sev")))]
use kvm_ops_held::{HeldVcpu, HeldVm};
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
        /// A TD that the system below holds, by commands.
        #[cfg(all(feature = "kvm", feature = "tdx"))]
        Held(HeldVm<H>),
    }

    /// A vCPU of [`IntelVm`].
    pub enum IntelVcpu<H: Host> {
        #[cfg(feature = "vmx")]
        Vmx(VmxVcpu<H>),
        #[cfg(feature = "tdx")]
        Tdx(TdxVcpu<H>),
        #[cfg(all(feature = "kvm", feature = "tdx"))]
        Held(HeldVcpu<<<H as Host>::Vm as VmPort>::Vcpu>),
    }

    #![cfg(any(feature = "svm", feature = "sev"))]

    /// A VM that an AMD host can hold.
    #[derive(Debug)]
    pub enum AmdVm<H: Host> {
        #[cfg(feature = "svm")]
        Svm(SvmVm<H>),
        #[cfg(feature = "sev")]
        Sev(SevVm<H>),
        /// An SEV, SEV-ES or SNP guest that the system below holds, by commands.
        #[cfg(all(feature = "kvm", feature = "sev"))]
        Held(HeldVm<H>),
    }

    /// A vCPU of [`AmdVm`].
    pub enum AmdVcpu<H: Host> {
        #[cfg(feature = "svm")]
        Svm(SvmVcpu<H>),
        #[cfg(feature = "sev")]
        Sev(SevVcpu<H>),
        #[cfg(all(feature = "kvm", feature = "sev"))]
        Held(HeldVcpu<<<H as Host>::Vm as VmPort>::Vcpu>),
    }

    /// A VM of any technology that this build has. [`create`](crate::create) chooses which, once.
    ///
    /// Vendor first, then technology: two compares, the first of which a real host's processor
    /// always predicts, because a host has one vendor's VMs. Four arms in one enum would be a jump
    /// table, an indirect branch ([the benchmarks](crate::manual::benchmarks)). With one vendor's features the outer enum
    /// has one variant and costs nothing. The feature `kvm` adds a variant to each vendor, for the VMs that the kernel
    /// holds, and a third compare for those.
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
