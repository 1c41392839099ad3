//! A hypervisor without an operating system below it. Each part uses one crate of the project that
//! promises `no_std`, so that all their code is compiled and linked for such a target.
#![no_std]

extern crate alloc;

mod host;
mod processor;

pub use host::Metal;
pub use processor::halts_after;

use alloc::string::String;
use kvm_ops::{Error, Exit, Kind, Tech, VcpuId, VcpuOps, Vendor, VmConfig, create};
use kvm_ops_guest::instructions::Tdcall;
use kvm_ops_guest::tdx::{TdError, TdGuest};
use kvm_ops_guest::{GpaRange, RangeError};
use kvm_ops_tdvf::{Order, Tdvf, TdvfError};

/// Runs a normal VM on this machine until it halts, and returns its output.
pub fn console(host: &Metal) -> Result<String, Error> {
    let mut vm = create(host, &VmConfig::normal())?;
    vm.finalize()?;
    let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    let mut text = String::new();
    while let Exit::IoOut { .. } = vcpu.vcpu_run()? {
        text.extend(vcpu.exit_data().iter().map(|byte| char::from(*byte)));
    }
    vcpu.vcpu_free()?;
    let _ = vm.destroy();
    Ok(text)
}

/// The confidential VMs that this machine creates: none, because it has neither port.
pub fn confidential(vendor: Vendor) -> usize {
    let host = Metal::new(vendor);
    let kinds = [Tech::Tdx, Tech::Sev, Tech::SevEs, Tech::SevSnp].map(Kind::Of);
    kinds
        .into_iter()
        .filter(|kind| create(&host, &VmConfig::new(*kind)).is_ok())
        .count()
}

/// The MRTD of a TD that starts with this firmware.
pub fn mrtd(firmware: &[u8]) -> Result<[u8; 48], TdvfError> {
    Ok(Tdvf::parse(firmware)?.mrtd(Order::SinglePass))
}

/// The reason for which memory is not shared.
#[derive(Debug)]
pub enum Unshared {
    /// The range is not one of pages.
    Range(RangeError),
    /// The module or the host refused.
    Td(TdError),
}

/// Makes memory of this TD shared.
pub fn share(td: &mut TdGuest<Tdcall>, gpa: u64, pages: u64) -> Result<(), Unshared> {
    let range = GpaRange::pages(gpa, pages).map_err(Unshared::Range)?;
    // Nothing maps the range, so nothing caches a translation of it.
    td.share(range, |_| ()).map_err(Unshared::Td)
}
