//! Slots, guest_memfd, attributes, pre-faults.

use super::table;

table! {
    /// `KVM_SET_USER_MEMORY_REGION2`, and `KVM_SET_USER_MEMORY_REGION`.
    region "KVM_SET_USER_MEMORY_REGION2" {
        1 COPY EFAULT "the structure can be read";
        2 OLD_FLAGS EINVAL "flags of the old ioctl are within 3";
        3 SLOT EINVAL "the slot's number is below 32764";
        4 FLAGS EINVAL "flags are known, and allowed for this VM and with each other";
        5 SIZE EINVAL "the size is whole pages";
        6 GPA EINVAL "the guest address is a page's";
        7 HVA EINVAL "the user address is a page's, canonical, and its range is in user space";
        8 OFFSET EINVAL "the offset in the file is whole pages, and with the size does not wrap";
        9 ADDRESS_SPACE EINVAL "the VM has the address space";
        10 WRAP EINVAL "guest address and size do not wrap";
        11 PAGES EINVAL "there are at most 2^31 - 1 pages";
        12 DELETED EINVAL "a slot that is deleted exists";
        13 CHANGED EINVAL "a slot that exists only moves, or changes its dirty log";
        14 OVERLAP EEXIST "no other slot's guest range is touched";
        15 MEMORY ENOMEM "there is memory";
        16 DESCRIPTOR EBADF "the guest_memfd's descriptor is open";
        16 FILE EINVAL "the file is a guest_memfd of this VM, and large enough";
        17 RANGE EINVAL "the MMU has the guest addresses";
        18 BOUND EEXIST "no other slot uses the range of the file";
    }
}

table! {
    /// `KVM_CREATE_GUEST_MEMFD`.
    gmem "KVM_CREATE_GUEST_MEMFD" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are within KVM_CAP_GUEST_MEMFD_FLAGS of the VM";
        3 SIZE EINVAL "the size is positive and whole pages";
        4 DESCRIPTOR EMFILE "a descriptor is free";
        4 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// `mmap` of a guest_memfd.
    gmem_mmap "mmap of a guest_memfd" {
        1 ALLOWED ENODEV "the file was made with the flag MMAP";
        2 SHARED EINVAL "the mapping is MAP_SHARED";
    }
}

table! {
    /// `fallocate` of a guest_memfd.
    gmem_fallocate "fallocate of a guest_memfd" {
        1 MODE EOPNOTSUPP "the mode is KEEP_SIZE, with or without PUNCH_HOLE";
        2 PAGES EINVAL "offset and length are whole pages";
        3 SIZE EINVAL "an allocation ends within the file";
    }
}

table! {
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    attributes "KVM_SET_MEMORY_ATTRIBUTES" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are 0";
        3 KNOWN EINVAL "the VM supports the attributes";
        4 SIZE EINVAL "the size is not 0, and the range does not wrap";
        5 PAGES EINVAL "address and size are whole pages";
        6 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// `KVM_PRE_FAULT_MEMORY`. Checks from 4 on are made for each step, and are the answer only if
    /// the first step fails.
    pre_fault "KVM_PRE_FAULT_MEMORY" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are 0";
        3 RANGE EINVAL "the range is whole pages, not empty, and does not wrap";
        4 SIGNAL EINTR "no signal is pending";
        5 LAUNCHED EOPNOTSUPP "the launch of an SNP guest or a TD has ended";
        6 SHARED_BIT EINVAL "the address has no shared bit";
        7 SLOT ENOENT "a slot is there";
        8 FILE EFAULT "a private page has an open file, a shared one memory";
    }
}

table! {
    /// `KVM_GET_DIRTY_LOG` and `KVM_CLEAR_DIRTY_LOG`.
    dirty_log "KVM_GET_DIRTY_LOG" {
        1 COPY EFAULT "the structure can be read";
        2 SLOT EINVAL "address space and slot are in range";
        3 FIRST EINVAL "the first page to clear is a multiple of 64";
        4 LOGGED ENOENT "the slot exists, and has a log";
        5 RANGE EINVAL "the pages to clear are in the slot, and a multiple of 64 or up to its end";
        6 BITMAP EFAULT "the bitmap can be written, or read";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    dirty_log_protect "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2" {
        1 FLAGS EINVAL "the flags are known, and INITIALLY_SET only comes with ENABLE";
    }
}
