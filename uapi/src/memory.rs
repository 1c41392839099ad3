//! Slots, guest_memfd, memory attributes, dirty logs, pre-faults.

use crate::layout::layout;
use crate::{U32, U64};

/// Flags of a slot.
pub mod slot_flags {
    /// Writes are recorded.
    pub const LOG_DIRTY_PAGES: u32 = 1;
    /// Writes leave as MMIO.
    pub const READONLY: u32 = 2;
    /// Private pages come from a guest_memfd.
    pub const GUEST_MEMFD: u32 = 4;
}

/// Flags of `KVM_CREATE_GUEST_MEMFD`.
pub mod gmem_flags {
    /// The file can be mapped.
    pub const MMAP: u64 = 1;
    /// Its pages start as shared.
    pub const INIT_SHARED: u64 = 2;
}

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// Numbers of slots that user space may use, in each address space.
pub const USER_SLOTS: u32 = 32764;

/// The most pages of one slot.
pub const SLOT_MAX_PAGES: u64 = (1 << 31) - 1;

layout! {
    /// `struct kvm_userspace_memory_region`.
    UserspaceMemoryRegion 32 {
        0 slot: U32, 4 flags: U32, 8 guest_phys_addr: U64, 16 memory_size: U64,
        24 userspace_addr: U64,
    }
}

layout! {
    /// `struct kvm_userspace_memory_region2`. The upper half of `slot` is the address space.
    UserspaceMemoryRegion2 160 {
        0 slot: U32, 4 flags: U32, 8 guest_phys_addr: U64, 16 memory_size: U64,
        24 userspace_addr: U64, 32 guest_memfd_offset: U64, 40 guest_memfd: U32, 44 pad1: U32,
        48 pad2: [U64; 14],
    }
}

layout! {
    /// `struct kvm_create_guest_memfd`.
    CreateGuestMemfd 64 { 0 size: U64, 8 flags: U64, 16 reserved: [U64; 6], }
}

layout! {
    /// `struct kvm_memory_attributes`.
    MemoryAttributes 32 { 0 address: U64, 8 size: U64, 16 attributes: U64, 24 flags: U64, }
}

layout! {
    /// `struct kvm_pre_fault_memory`. What is left to do is written back.
    PreFaultMemory 64 { 0 gpa: U64, 8 size: U64, 16 flags: U64, 24 padding: [U64; 5], }
}

layout! {
    /// `struct kvm_dirty_log`.
    DirtyLog 16 { 0 slot: U32, 4 padding: U32, 8 dirty_bitmap: U64, }
}

/// Flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
pub mod dirty_log_flags {
    /// `KVM_GET_DIRTY_LOG` leaves the log as it is, and `KVM_CLEAR_DIRTY_LOG` clears it.
    pub const ENABLE: u64 = 1;
    /// All pages of a log are dirty at first.
    pub const INITIALLY_SET: u64 = 2;
    /// Both.
    pub const ALL: u64 = ENABLE | INITIALLY_SET;
}

layout! {
    /// `struct kvm_clear_dirty_log`.
    ClearDirtyLog 24 { 0 slot: U32, 4 num_pages: U32, 8 first_page: U64, 16 dirty_bitmap: U64, }
}
