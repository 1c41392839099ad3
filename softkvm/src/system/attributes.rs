//! `KVM_HAS_DEVICE_ATTR` and `KVM_GET_DEVICE_ATTR` on the system file: what SEV offers.

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::device_attr::{ADDRESS, COPY, KNOWN};
use kvm_ops_uapi::system::{
    ATTR_SEV_VMSA_FEATURES, ATTR_SNP_POLICY_BITS, ATTR_SNP_REQ_CERTS, DeviceAttr, GROUP_SEV,
    vm_type,
};

use crate::refusal::Result;
use crate::sev::{POLICY_BITS, VMSA_FEATURES};
use crate::{Kernel, Process, arg};

fn value(kernel: &Kernel, attribute: &DeviceAttr) -> Result<u64> {
    let known = attribute.flags.get() == 0 && attribute.group.get() == GROUP_SEV;
    let answer = match attribute.attr.get() {
        _ if !known || !kernel.is_amd() => None,
        ATTR_SEV_VMSA_FEATURES if kernel.has_type(vm_type::SEV_ES) => Some(VMSA_FEATURES),
        ATTR_SEV_VMSA_FEATURES => Some(0),
        ATTR_SNP_POLICY_BITS if kernel.has_type(vm_type::SNP) => Some(POLICY_BITS),
        ATTR_SNP_POLICY_BITS => Some(0),
        ATTR_SNP_REQ_CERTS => Some(kernel.has_type(vm_type::SNP).into()),
        _ => None,
    };
    answer.ok_or(KNOWN.into())
}

pub(super) fn has(kernel: &Kernel, process: &dyn Process, argument: u64) -> Result<i64> {
    let attribute = arg::read(process, argument, COPY)?;
    value(kernel, &attribute).map(|_| 0)
}

pub(super) fn get(kernel: &Kernel, process: &dyn Process, argument: u64) -> Result<i64> {
    let attribute: DeviceAttr = arg::read(process, argument, COPY)?;
    let value = value(kernel, &attribute)?;
    arg::write(process, attribute.addr.get(), &U64::new(value), ADDRESS)?;
    Ok(0)
}
