//! The enums of back ends to compare, all made by [`backend_enum!`].
//!
//! The chain's enums are `repr(u8)`: otherwise the compiler would store the tag of one in unused
//! values of the next, and LLVM would build one jump table for all three.

use kvm_ops_core::backend_enum;

use crate::designs::model::{Vcpu, called as c, inlined as i};

backend_enum! {
    /// One back end.
    pub enum InlinedOne { Vmx(i::VmxVm) }

    /// Its vCPU.
    pub enum InlinedOneVcpu { Vmx(Vcpu<i::VmxVm>) }

    /// The back ends of an Intel host.
    pub enum InlinedIntel { Vmx(i::VmxVm), Tdx(i::TdxVm) }

    /// Its vCPU.
    pub enum InlinedIntelVcpu { Vmx(Vcpu<i::VmxVm>), Tdx(Vcpu<i::TdxVm>) }

    /// The back ends of an AMD host.
    pub enum InlinedAmd { Svm(i::SvmVm), Sev(i::SevVm) }

    /// Its vCPU.
    pub enum InlinedAmdVcpu { Svm(Vcpu<i::SvmVm>), Sev(Vcpu<i::SevVm>) }

    /// All four side by side.
    pub enum InlinedFlat { Vmx(i::VmxVm), Tdx(i::TdxVm), Svm(i::SvmVm), Sev(i::SevVm) }

    /// Its vCPU.
    pub enum InlinedFlatVcpu { Vmx(Vcpu<i::VmxVm>), Tdx(Vcpu<i::TdxVm>), Svm(Vcpu<i::SvmVm>), Sev(Vcpu<i::SevVm>) }

    /// Vendor first, then technology.
    pub enum InlinedNested { Intel(InlinedIntel), Amd(InlinedAmd) }

    /// Its vCPU.
    pub enum InlinedNestedVcpu { Intel(InlinedIntelVcpu), Amd(InlinedAmdVcpu) }

    /// TDX, or the back ends of AMD.
    #[repr(u8)]
    pub enum InlinedChainRest { Tdx(i::TdxVm), Rest(InlinedAmd) }

    /// Its vCPU.
    pub enum InlinedChainRestVcpu { Tdx(Vcpu<i::TdxVm>), Rest(InlinedAmdVcpu) }

    /// VMX, or the others: one compare after another.
    #[repr(u8)]
    pub enum InlinedChain { Vmx(i::VmxVm), Rest(InlinedChainRest) }

    /// Its vCPU.
    pub enum InlinedChainVcpu { Vmx(Vcpu<i::VmxVm>), Rest(InlinedChainRestVcpu) }

    /// One back end.
    pub enum CalledOne { Vmx(c::VmxVm) }

    /// Its vCPU.
    pub enum CalledOneVcpu { Vmx(Vcpu<c::VmxVm>) }

    /// The back ends of an Intel host.
    pub enum CalledIntel { Vmx(c::VmxVm), Tdx(c::TdxVm) }

    /// Its vCPU.
    pub enum CalledIntelVcpu { Vmx(Vcpu<c::VmxVm>), Tdx(Vcpu<c::TdxVm>) }

    /// The back ends of an AMD host.
    pub enum CalledAmd { Svm(c::SvmVm), Sev(c::SevVm) }

    /// Its vCPU.
    pub enum CalledAmdVcpu { Svm(Vcpu<c::SvmVm>), Sev(Vcpu<c::SevVm>) }

    /// All four side by side.
    pub enum CalledFlat { Vmx(c::VmxVm), Tdx(c::TdxVm), Svm(c::SvmVm), Sev(c::SevVm) }

    /// Its vCPU.
    pub enum CalledFlatVcpu { Vmx(Vcpu<c::VmxVm>), Tdx(Vcpu<c::TdxVm>), Svm(Vcpu<c::SvmVm>), Sev(Vcpu<c::SevVm>) }

    /// Vendor first, then technology.
    pub enum CalledNested { Intel(CalledIntel), Amd(CalledAmd) }

    /// Its vCPU.
    pub enum CalledNestedVcpu { Intel(CalledIntelVcpu), Amd(CalledAmdVcpu) }

    /// TDX, or the back ends of AMD.
    #[repr(u8)]
    pub enum CalledChainRest { Tdx(c::TdxVm), Rest(CalledAmd) }

    /// Its vCPU.
    pub enum CalledChainRestVcpu { Tdx(Vcpu<c::TdxVm>), Rest(CalledAmdVcpu) }

    /// VMX, or the others: one compare after another.
    #[repr(u8)]
    pub enum CalledChain { Vmx(c::VmxVm), Rest(CalledChainRest) }

    /// Its vCPU.
    pub enum CalledChainVcpu { Vmx(Vcpu<c::VmxVm>), Rest(CalledChainRestVcpu) }
}
