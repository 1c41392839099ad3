//! The system file: VM types, CPUID and MSR lists, device attributes.

use crate::layout::layout;
use crate::{U32, U64};

/// What `KVM_GET_API_VERSION` answers.
pub const API_VERSION: u32 = 12;

/// Types of VMs, the argument of `KVM_CREATE_VM`.
pub mod vm_type {
    /// A normal VM, which may become a SEV or SEV-ES guest by INIT or ES_INIT.
    pub const DEFAULT: u64 = 0;
    /// A normal VM with private memory, for tests.
    pub const SW_PROTECTED: u64 = 1;
    /// A SEV guest.
    pub const SEV: u64 = 2;
    /// A SEV-ES guest.
    pub const SEV_ES: u64 = 3;
    /// An SNP guest.
    pub const SNP: u64 = 4;
    /// A trust domain.
    pub const TDX: u64 = 5;
}

/// `KVM_X86_GRP_SEV`: the group of device attributes of the system file.
pub const GROUP_SEV: u32 = 1;
/// VMSA features that INIT2 takes.
pub const ATTR_SEV_VMSA_FEATURES: u64 = 0;
/// Policy bits that SNP_LAUNCH_START takes.
pub const ATTR_SNP_POLICY_BITS: u64 = 1;
/// 1 if SNP_ENABLE_REQ_CERTS is there.
pub const ATTR_SNP_REQ_CERTS: u64 = 2;

/// `KVM_VCPU_TSC_CTRL`: the group of device attributes of a vCPU.
pub const GROUP_TSC: u32 = 0;
/// The guest's TSC minus the host's.
pub const ATTR_TSC_OFFSET: u64 = 0;

/// The most entries that `KVM_SET_CPUID2` takes.
pub const MAX_CPUID_ENTRIES: u32 = 256;

layout! {
    /// `struct kvm_device_attr`.
    DeviceAttr 24 { 0 flags: U32, 4 group: U32, 8 attr: U64, 16 addr: U64, }
}

layout! {
    /// The fixed part of `struct kvm_cpuid2`.
    Cpuid2 8 { 0 nent: U32, 4 padding: U32, }
}

layout! {
    /// `struct kvm_cpuid_entry2`.
    CpuidEntry2 40 {
        0 function: U32, 4 index: U32, 8 flags: U32, 12 eax: U32, 16 ebx: U32, 20 ecx: U32,
        24 edx: U32, 28 padding: [U32; 3],
    }
}

/// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the entry is of one subleaf.
pub const CPUID_FLAG_SIGNIFICANT_INDEX: u32 = 1;

layout! {
    /// The fixed part of `struct kvm_msr_list`; indices of four bytes follow.
    MsrList 4 { 0 nmsrs: U32, }
}

layout! {
    /// The fixed part of `struct kvm_msrs`.
    Msrs 8 { 0 nmsrs: U32, 4 pad: U32, }
}

layout! {
    /// `struct kvm_msr_entry`.
    MsrEntry 16 { 0 index: U32, 4 reserved: U32, 8 data: U64, }
}
