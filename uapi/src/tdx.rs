//! TDX: `KVM_MEMORY_ENCRYPT_OP` on Intel hosts.

use crate::layout::layout;
use crate::system::CpuidEntry2;
use crate::{U32, U64};

/// VM: what the host's TDX module and KVM allow. [`TdxCapabilities`], then entries.
pub const CAPABILITIES: u32 = 0;
/// VM: the TD's parameters. [`TdxInitVm`], then entries.
pub const INIT_VM: u32 = 1;
/// vCPU: `data` is the initial value of RCX.
pub const INIT_VCPU: u32 = 2;
/// vCPU: adds private pages with contents. [`TdxInitMemRegion`].
pub const INIT_MEM_REGION: u32 = 3;
/// VM: the measurement is complete.
pub const FINALIZE_VM: u32 = 4;
/// vCPU: the CPUID values that the TD sees. [`Cpuid2`](crate::system::Cpuid2), then entries.
pub const GET_CPUID: u32 = 5;

/// The name of a command after `KVM_TDX_`.
pub const fn command_name(id: u32) -> Option<&'static str> {
    Some(match id {
        CAPABILITIES => "CAPABILITIES",
        INIT_VM => "INIT_VM",
        INIT_VCPU => "INIT_VCPU",
        INIT_MEM_REGION => "INIT_MEM_REGION",
        FINALIZE_VM => "FINALIZE_VM",
        GET_CPUID => "GET_CPUID",
        _ => return None,
    })
}

/// `KVM_TDX_MEASURE_MEMORY_REGION`: INIT_MEM_REGION extends the measurement by the contents.
pub const MEASURE_MEMORY_REGION: u32 = 1;

/// The most CPUID entries that INIT_VM takes.
pub const MAX_CPUID_ENTRIES: u32 = 256;

/// Answers of user space to `KVM_EXIT_TDX`, in the TD's R10.
pub mod tdvmcall_status {
    /// Done.
    pub const SUCCESS: u64 = 0;
    /// Call again.
    pub const RETRY: u64 = 1;
    /// A bad argument.
    pub const INVALID_OPERAND: u64 = 0x8000_0000_0000_0000;
    /// The function is not there.
    pub const SUBFUNC_UNSUPPORTED: u64 = 0x8000_0000_0000_0003;
}

/// Functions that leave to user space as `KVM_EXIT_TDX`.
pub mod tdvmcall {
    /// The features of the VMM.
    pub const GET_TD_VM_CALL_INFO: u64 = 0x1_0000;
    /// A quote for the TDREPORT in shared memory.
    pub const GET_QUOTE: u64 = 0x1_0002;
    /// The vector by which the VMM tells of events.
    pub const SETUP_EVENT_NOTIFY_INTERRUPT: u64 = 0x1_0004;
}

layout! {
    /// `struct kvm_tdx_cmd`: the argument of every command. `hw_error` is zero going in.
    TdxCmd 24 { 0 id: U32, 4 flags: U32, 8 data: U64, 16 hw_error: U64, }
}

layout! {
    /// The fixed part of `struct kvm_tdx_capabilities`.
    TdxCapabilities 2056 {
        0 supported_attrs: U64, 8 supported_xfam: U64, 16 kernel_tdvmcallinfo_1_r11: U64,
        24 user_tdvmcallinfo_1_r11: U64, 32 kernel_tdvmcallinfo_1_r12: U64,
        40 user_tdvmcallinfo_1_r12: U64, 48 reserved: [U64; 250], 2048 nent: U32, 2052 padding: U32,
    }
}

layout! {
    /// The fixed part of `struct kvm_tdx_init_vm`.
    TdxInitVm 264 {
        0 attributes: U64, 8 xfam: U64, 16 mrconfigid: [u8; 48], 64 mrowner: [u8; 48],
        112 mrownerconfig: [u8; 48], 160 reserved: [U64; 12], 256 nent: U32, 260 padding: U32,
    }
}

layout! {
    /// `struct kvm_tdx_init_mem_region`. What is left to do is written back.
    TdxInitMemRegion 24 { 0 source_addr: U64, 8 gpa: U64, 16 nr_pages: U64, }
}

/// Bytes of the lists in [`TdxCapabilities`] and [`TdxInitVm`], for each entry.
pub const ENTRY: usize = size_of::<CpuidEntry2>();
