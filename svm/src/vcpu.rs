//! The vCPU of a normal VM on AMD-V.

use kvm_ops::{Host, PlainVcpu, VmPort};

use crate::SvmVm;

/// A vCPU of [`SvmVm`].
pub type SvmVcpu<H> = PlainVcpu<<<H as Host>::Vm as VmPort>::Vcpu, SvmVm<H>>;
