//! Files, VMs, vCPUs, interrupt chips, capabilities.

use super::table;

table! {
    /// The start of every ioctl on a VM, vCPU or device file.
    any "KVM ioctl" {
        1 CREATOR EIO "the caller's address space is the creator's";
        1 ALIVE EIO "the VM is not dead";
        2 VCPU_TYPE EINVAL "on a vCPU file, the number's type byte is 0xae";
        3 KNOWN_ON_VM ENOTTY "a VM or device file knows the number";
        3 KNOWN_ON_SYSTEM EINVAL "the system file knows the number";
        3 KNOWN_ON_VCPU EINVAL "a vCPU file knows the number";
        3 KNOWN_ON_GMEM ENOTTY "a guest_memfd knows no number";
    }
}

table! {
    /// `KVM_CREATE_VM`, the argument is the type.
    create_vm "KVM_CREATE_VM" {
        1 DESCRIPTOR EMFILE "a descriptor is free";
        2 TYPE EINVAL "the type is below 32 and in KVM_CAP_VM_TYPES";
        3 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// `KVM_CREATE_VCPU`, the argument is the vCPU's number.
    create_vcpu "KVM_CREATE_VCPU" {
        1 ID EINVAL "the number is below 4 times the build's limit";
        2 COUNT EINVAL "fewer vCPUs exist than the VM's limit";
        3 UNUSED EEXIST "the number is unused";
        4 MAX_ID EINVAL "the number is below KVM_CAP_MAX_VCPU_ID as enabled";
        5 TD_INITIALIZED EIO "a TD is initialised";
        5 TD_SPLIT_IRQCHIP EINVAL "a TD has a split irqchip";
        6 DESCRIPTOR EMFILE "a descriptor is free";
        6 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_SPLIT_IRQCHIP`; the argument is the number of reserved GSIs.
    split_irqchip "KVM_CAP_SPLIT_IRQCHIP" {
        1 GSIS EINVAL "at most 4096 GSIs are reserved";
        2 NONE_YET EEXIST "no irqchip exists";
        3 NO_VCPU EEXIST "no vCPU exists";
    }
}

table! {
    /// `KVM_CREATE_IRQCHIP`.
    create_irqchip "KVM_CREATE_IRQCHIP" {
        1 NONE_YET EEXIST "no irqchip exists";
        2 NOT_TD ENOTTY "the VM is no TD";
        3 NO_VCPU EINVAL "no vCPU exists";
    }
}

table! {
    /// `KVM_ENABLE_CAP` on a VM.
    enable_cap "KVM_ENABLE_CAP" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are 0";
        3 KNOWN EINVAL "the capability can be enabled on a VM";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_EXIT_HYPERCALL`.
    exit_hypercall "KVM_CAP_EXIT_HYPERCALL" {
        1 MASK EINVAL "the mask is within 1 << 12";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_DISABLE_QUIRKS2`.
    disable_quirks "KVM_CAP_DISABLE_QUIRKS2" {
        1 KNOWN EINVAL "the quirks are within those that KVM_CHECK_EXTENSION tells";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_MAX_VCPU_ID`.
    max_vcpu_id "KVM_CAP_MAX_VCPU_ID" {
        1 LIMIT EINVAL "the limit is not above the build's";
        2 BOOT EINVAL "the limit is not below the boot vCPU's number";
        3 ONCE EINVAL "no other limit was enabled";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_X86_USER_SPACE_MSR`.
    user_space_msr "KVM_CAP_X86_USER_SPACE_MSR" {
        1 MASK EINVAL "the mask is within 7";
    }
}

table! {
    /// `KVM_X86_SET_MSR_FILTER`. Ranges are checked one after the other, and those without MSRs not at all.
    msr_filter "KVM_X86_SET_MSR_FILTER" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are within 1";
        3 RANGES EINVAL "a range has an MSR, or others are allowed";
        4 RANGE_FLAGS EINVAL "a range's flags are within 3";
        5 ACCESS EINVAL "a range decides of reads or of writes";
        6 COUNT EINVAL "a range has at most 12288 MSRs";
        7 BITMAP EFAULT "a range's bitmap can be read";
    }
}

table! {
    /// `KVM_HAS_DEVICE_ATTR` and `KVM_GET_DEVICE_ATTR` on the system file.
    device_attr "KVM_GET_DEVICE_ATTR" {
        1 COPY EFAULT "the structure can be read";
        2 KNOWN ENXIO "flags are 0, and group and attribute are known";
        3 ADDRESS EFAULT "the value can be written";
    }
}

table! {
    /// `KVM_HAS_DEVICE_ATTR`, `KVM_GET_DEVICE_ATTR` and `KVM_SET_DEVICE_ATTR` on a vCPU file.
    vcpu_attr "KVM_GET_DEVICE_ATTR (vCPU)" {
        1 COPY EFAULT "the structure can be read";
        2 GROUP ENXIO "the group is that of the TSC";
        3 KNOWN ENXIO "the attribute is the offset";
        4 ADDRESS EFAULT "the value can be written, or read";
    }
}

table! {
    /// `KVM_GET_ONE_REG` and `KVM_SET_ONE_REG`, which reads the value in front of check 6.
    one_reg "KVM_GET_ONE_REG" {
        1 COPY EFAULT "the structure can be read";
        2 ARCH EINVAL "the register is one of x86";
        3 RESERVED EINVAL "reserved bits are 0";
        4 KIND EINVAL "the register is an MSR, or one of KVM's that the guest has";
        5 SIZE EINVAL "the size is 64 bits";
        6 MSR EINVAL "there is such an MSR, and it can have the value";
        7 VALUE EFAULT "the value can be written, or read";
    }
}

table! {
    /// `KVM_GET_REG_LIST`. No guest here has registers that are listed, so that any room is enough.
    reg_list "KVM_GET_REG_LIST" {
        1 COPY EFAULT "the number of entries can be read";
        2 COPY_BACK EFAULT "the number of entries can be written";
    }
}

table! {
    /// `KVM_SET_CPUID2`.
    set_cpuid2 "KVM_SET_CPUID2" {
        1 COPY EFAULT "the structure can be read";
        2 COUNT E2BIG "there are at most 256 entries";
        3 ENTRIES EFAULT "the entries can be read";
        4 AFTER_RUN EINVAL "the vCPU has not run, or the list is the same";
    }
}

table! {
    /// `KVM_RUN`.
    run "KVM_RUN" {
        1 ARGUMENT EINVAL "the argument is 0";
        2 UNINITIALIZED_EXIT EINTR "a vCPU that waits for its start was not asked to return";
        3 SYNC_REGS EINVAL "the masks of synchronised registers are known";
        4 COMPLETION EINVAL "the answer to the last exit is one";
        5 IMMEDIATE_EXIT EINTR "no immediate exit is asked";
        6 MP_STATE EINVAL "a vCPU that waits for its start can be started";
        6 INITIALIZED EINVAL "the VM and the vCPU are initialised";
    }
}

table! {
    /// `KVM_TPR_ACCESS_REPORTING`.
    tpr_access "KVM_TPR_ACCESS_REPORTING" {
        1 COPY EFAULT "the structure can be read";
        2 FLAGS EINVAL "flags are 0";
        3 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// `KVM_SET_VAPIC_ADDR`.
    vapic_addr "KVM_SET_VAPIC_ADDR" {
        1 APIC EINVAL "the vCPU has a local APIC";
        2 COPY EFAULT "the address can be read";
        3 MEMORY EINVAL "the address is 0 or a slot's";
    }
}

table! {
    /// `KVM_KVMCLOCK_CTRL`.
    kvmclock_ctrl "KVM_KVMCLOCK_CTRL" {
        1 ACTIVE EINVAL "the guest uses kvmclock";
    }
}

table! {
    /// `KVM_SET_GUEST_DEBUG`.
    guest_debug "KVM_SET_GUEST_DEBUG" {
        1 COPY EFAULT "the structure can be read";
        2 PROTECTED EINVAL "the guest's registers are no secret";
        3 PENDING EBUSY "no exception waits where one is to be injected";
    }
}

table! {
    /// `KVM_SET_SREGS2`.
    set_sregs2 "KVM_SET_SREGS2" {
        1 COPY EFAULT "the structure can be read";
        2 READABLE EINVAL "the guest's registers are no secret";
        3 FLAGS EINVAL "flags are within PDPTRS_VALID";
        4 PAE EINVAL "the table's entries come with PAE paging";
        5 CONSISTENT EINVAL "control registers, EFER and segments fit each other";
    }
}

table! {
    /// `KVM_SET_TSC_KHZ` on a vCPU.
    vcpu_tsc_khz "KVM_SET_TSC_KHZ (vCPU)" {
        1 PROTECTED EINVAL "the guest's TSC is no firmware's";
        2 RANGE EINVAL "the frequency is below 2^32 kHz";
    }
}

table! {
    /// `KVM_GET_STATS_FD` on a VM or a vCPU.
    stats_fd "KVM_GET_STATS_FD" {
        1 DESCRIPTOR EMFILE "a descriptor is free";
    }
}

table! {
    /// `KVM_SET_SIGNAL_MASK`, unless the argument is 0, which takes the mask away.
    signal_mask "KVM_SET_SIGNAL_MASK" {
        1 COPY EFAULT "the structure can be read";
        2 LENGTH EINVAL "the set has 8 bytes";
        3 SET EFAULT "the set can be read";
    }
}
