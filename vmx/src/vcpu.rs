//! The vCPU of a normal VM on Intel VT-x.

use kvm_ops::{Host, PlainVcpu, VmPort};

use crate::VmxVm;

/// A vCPU of [`VmxVm`].
pub type VmxVcpu<H> = PlainVcpu<<<H as Host>::Vm as VmPort>::Vcpu, VmxVm<H>>;
