//! The system file, `/dev/kvm`.

mod attributes;
pub(crate) mod capabilities;
pub(crate) mod cpuid;
pub(crate) mod lists;

use kvm_ops_uapi::checks::{any, create_vm};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::run::MMAP_SIZE;
use kvm_ops_uapi::system::API_VERSION;
use kvm_ops_uapi::{Errno, U64};

use crate::arg;
use crate::refusal::{Result, ensure};
use crate::vm::Vm;
use crate::{File, Kernel, Process};

pub(crate) fn ioctl(
    kernel: &Kernel,
    process: &dyn Process,
    ioctl: Option<Ioctl>,
    argument: u64,
) -> Result<i64> {
    match ioctl.ok_or(any::KNOWN_ON_SYSTEM)? {
        ioctl::KVM_GET_API_VERSION if argument == 0 => Ok(API_VERSION.into()),
        ioctl::KVM_GET_VCPU_MMAP_SIZE if argument == 0 => Ok(MMAP_SIZE as i64),
        ioctl::KVM_GET_API_VERSION | ioctl::KVM_GET_VCPU_MMAP_SIZE => Err(Errno::EINVAL.into()),
        ioctl::KVM_CREATE_VM => create_vm(kernel, process, argument),
        ioctl::KVM_CHECK_EXTENSION => Ok(capabilities::of_system(kernel, argument)),
        ioctl::KVM_GET_SUPPORTED_CPUID => cpuid::get_supported(kernel, process, argument),
        ioctl::KVM_GET_MSR_INDEX_LIST => lists::msr_indices(kernel, process, argument),
        ioctl::KVM_GET_MSR_FEATURE_INDEX_LIST => lists::feature_indices(kernel, process, argument),
        ioctl::KVM_GET_MSRS => lists::get_features(kernel, process, argument),
        ioctl::KVM_X86_GET_MCE_CAP_SUPPORTED => {
            arg::write(process, argument, &U64::new(MCE_FEATURES), ADDRESS)?;
            Ok(0)
        }
        ioctl::KVM_HAS_DEVICE_ATTR => attributes::has(kernel, process, argument),
        ioctl::KVM_GET_DEVICE_ATTR => attributes::get(kernel, process, argument),
        _ => Err(any::KNOWN_ON_SYSTEM.into()),
    }
}

/// Calls whose one check is their argument.
use kvm_ops_uapi::checks::device_attr::ADDRESS;

/// The most banks of the machine-check architecture, and its features: IA32_MCG_CTL, and recovery.
pub(crate) const MAX_MCE_BANKS: u64 = 32;
pub(crate) const MCE_FEATURES: u64 = 1 << 8 | 1 << 24;

fn create_vm(kernel: &Kernel, process: &dyn Process, kind: u64) -> Result<i64> {
    use create_vm::{DESCRIPTOR, MEMORY, TYPE};
    let number = process.reserve().map_err(|_| DESCRIPTOR)?;
    let may_be =
        ensure(kernel.has_type(kind), TYPE).and_then(|()| kernel.faults().allocate(MEMORY));
    if let Err(refusal) = may_be {
        process.release(number);
        return Err(refusal);
    }
    let vm = Vm::new(kernel.clone(), kind, process.address_space());
    process.install(number, File::vm(vm));
    Ok(number.into())
}
