#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

use kvm_ops_core::{Gpa, Host, PlainTech, PlainVcpu, PlainVm, Result, Tech, VmPort};

/// The pages that VMX needs for real mode: the top of the 4 GiB space below the firmware's largest
/// ROM (16 MiB), where Linux VMMs put them too. Three pages of TSS follow one page of identity map.
const IDENTITY_MAP: Gpa = Gpa::new(0xfeff_c000);
const TSS: Gpa = Gpa::new(0xfeff_d000);

/// A normal VM on Intel VT-x.
pub type VmxVm<H> = PlainVm<H, Vmx>;

/// A vCPU of [`VmxVm`].
pub type VmxVcpu<H> = PlainVcpu<<<H as Host>::Vm as VmPort>::Vcpu, Vmx>;

/// The part of a normal VM that is VMX's.
#[derive(Clone, Copy, Debug)]
pub enum Vmx {}

impl PlainTech for Vmx {
    const TECH: Tech = Tech::Vmx;

    /// A processor without "unrestricted guest" runs real mode in virtual-8086 mode, with a TSS and
    /// an identity-mapped page table that guests must not use (Linux api.rst, KVM_SET_TSS_ADDR and
    /// KVM_SET_IDENTITY_MAP_ADDR). Both must be placed before the first vCPU.
    fn set_up<P: VmPort>(port: &P) -> Result<()> {
        port.set_identity_map_addr(IDENTITY_MAP)?;
        port.set_tss_addr(TSS)
    }
}
