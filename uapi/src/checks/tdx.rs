//! Commands of TDX.

use super::table;

table! {
    /// CAPABILITIES.
    tdx_capabilities "KVM_TDX_CAPABILITIES" {
        1 FLAGS EINVAL "flags are 0";
        2 NENT EFAULT "the number of entries can be read";
        3 ROOM E2BIG "there is room for every configurable leaf";
        4 MEMORY ENOMEM "there is memory";
        5 SUPPORTED EIO "KVM supports attributes and states of the module";
        6 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// INIT_VM.
    tdx_init_vm "KVM_TDX_INIT_VM" {
        1 ONCE EINVAL "the TD is not initialised";
        2 FLAGS EINVAL "flags are 0";
        3 NENT EFAULT "the number of entries can be read";
        4 COUNT E2BIG "there are at most 256 entries";
        5 COPY EFAULT "structure and entries can be read";
        6 RESERVED EINVAL "reserved fields are 0";
        7 PADDING EINVAL "padding is 0, and the number of entries as before";
        8 NO_VCPU EBUSY "no vCPU exists";
        9 ATTRIBUTES EINVAL "attributes are within the supported ones";
        10 XFAM EINVAL "XFAM is within the supported bits";
        11 WIDTH EINVAL "an entry for leaf 0x80000008 says 48 or 52 bits";
        12 LEAVES EINVAL "every entry is of a configurable leaf, without HLE, RTM and WAITPKG";
        13 KEY_ID ENOSPC "a KeyID is free";
        14 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// INIT_VCPU.
    tdx_init_vcpu "KVM_TDX_INIT_VCPU" {
        1 FLAGS EINVAL "flags are 0";
        2 ONCE EINVAL "the vCPU is not initialised";
        3 X2APIC EINVAL "the vCPU's CPUID has x2APIC";
        4 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// INIT_MEM_REGION. Checks from 6 on are made for each page.
    tdx_init_mem_region "KVM_TDX_INIT_MEM_REGION" {
        1 VCPU EINVAL "the vCPU is initialised";
        2 FINALIZED EINVAL "the TD is not finalised";
        3 FLAGS EINVAL "flags are known";
        4 COPY EFAULT "the structure can be read";
        5 SOURCE EINVAL "the source is a page's address, and not 0";
        5 RANGE EINVAL "the guest range is whole pages, not empty, does not wrap, and is private";
        6 SIGNAL EINTR "no signal is pending";
        7 SLOT EINVAL "a slot with a file is there";
        8 FILE EFAULT "the file is open";
        9 CONTENTS EFAULT "the source can be read";
        10 PRIVATE EINVAL "the attribute of the page is private";
        11 TWICE EIO "the page was not added before";
    }
}

table! {
    /// FINALIZE_VM.
    tdx_finalize_vm "KVM_TDX_FINALIZE_VM" {
        1 STATE EINVAL "the TD has its key and is not finalised";
    }
}

table! {
    /// GET_CPUID.
    tdx_get_cpuid "KVM_TDX_GET_CPUID" {
        1 COPY EFAULT "the number of entries can be read";
        2 ROOM E2BIG "there is room for every leaf";
        3 COPY_BACK EFAULT "the entries can be written";
    }
}
