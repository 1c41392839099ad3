#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

use kvm_ops_core::{Host, PlainTech, PlainVcpu, PlainVm, Result, Tech, VmPort};

/// A normal VM on AMD-V.
pub type SvmVm<H> = PlainVm<H, Svm>;

/// A vCPU of [`SvmVm`].
pub type SvmVcpu<H> = PlainVcpu<<<H as Host>::Vm as VmPort>::Vcpu, Svm>;

/// The part of a normal VM that is SVM's.
#[derive(Clone, Copy, Debug)]
pub enum Svm {}

impl PlainTech for Svm {
    const TECH: Tech = Tech::Svm;

    /// SVM runs real mode as it is (paged real mode, APM vol. 2, 15.19): nothing is set up.
    fn set_up<P: VmPort>(_port: &P) -> Result<()> {
        Ok(())
    }
}
