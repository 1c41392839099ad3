//! The frame of `KVM_MEMORY_ENCRYPT_OP`, regions, and contexts that move inside a host.

use super::table;

table! {
    /// `KVM_MEMORY_ENCRYPT_OP` on AMD hosts, before the command. A null pointer is a probe: 0.
    encrypt_sev "KVM_MEMORY_ENCRYPT_OP (SEV)" {
        1 ENABLED ENOTTY "SEV is enabled, and the file a VM's";
        2 COPY EFAULT "the structure can be read";
        3 MIRROR EINVAL "a mirror gets one of its four commands";
        4 SNP EPERM "an SNP guest gets a command of SNP's";
        5 KNOWN EINVAL "the command is implemented";
        6 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// `KVM_MEMORY_ENCRYPT_OP` on VM files of Intel hosts, before the command.
    encrypt_tdx "KVM_MEMORY_ENCRYPT_OP (TD)" {
        1 TD ENOTTY "the VM is a TD";
        2 COPY EFAULT "the structure can be read";
        3 HW_ERROR EINVAL "hw_error is 0";
        4 SIGNAL EINTR "no signal is pending";
        5 KNOWN EINVAL "the command is implemented on VM files";
        6 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// `KVM_MEMORY_ENCRYPT_OP` on vCPU files of Intel hosts, before the command.
    encrypt_tdx_vcpu "KVM_MEMORY_ENCRYPT_OP (TD vCPU)" {
        1 TD EINVAL "the VM is a TD";
        2 COPY EFAULT "the structure can be read";
        3 HW_ERROR EINVAL "hw_error is 0";
        4 STATE EINVAL "the TD has its key and is not finalised";
        5 KNOWN EINVAL "the command is implemented on vCPU files";
    }
}

table! {
    /// `KVM_MEMORY_ENCRYPT_REG_REGION`.
    reg_region "KVM_MEMORY_ENCRYPT_REG_REGION" {
        1 COPY EFAULT "the structure can be read";
        2 SEV ENOTTY "the VM is a SEV guest";
        3 MIRROR EINVAL "the VM is no mirror";
        4 MEMORY ENOMEM "there is memory";
        5 RANGE EINVAL "the range is not empty, does not wrap, and is no larger than memory";
        6 PINNED ENOMEM "the memory can be pinned, within RLIMIT_MEMLOCK";
    }
}

table! {
    /// `KVM_MEMORY_ENCRYPT_UNREG_REGION`.
    unreg_region "KVM_MEMORY_ENCRYPT_UNREG_REGION" {
        1 COPY EFAULT "the structure can be read";
        2 MIRROR EINVAL "the VM is no mirror";
        3 SEV ENOTTY "the VM is a SEV guest";
        4 KNOWN EINVAL "a region has exactly this address and size";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM`, on the destination.
    move_ "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM" {
        1 HOST EINVAL "the host is an AMD host";
        2 FILE EBADF "the argument is a VM's descriptor";
        3 OTHER EINVAL "source and destination are two VMs";
        4 IDLE EBUSY "neither is in such a call";
        5 SIGNAL EINTR "no signal is pending";
        6 TYPE EINVAL "both VMs are of one type";
        6 DESTINATION EINVAL "the destination is no SEV guest";
        6 SOURCE EINVAL "the source is a SEV guest and no SNP guest";
        7 VCPUS EINVAL "a SEV-ES source has as many vCPUs, each protected, as the destination";
        8 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// `KVM_ENABLE_CAP` of `KVM_CAP_VM_COPY_ENC_CONTEXT_FROM`, on the mirror.
    copy "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM" {
        1 HOST EINVAL "the host is an AMD host";
        2 FILE EBADF "the argument is a VM's descriptor";
        3 OTHER EINVAL "source and mirror are two VMs";
        4 IDLE EBUSY "neither is in such a call";
        5 SIGNAL EINTR "no signal is pending";
        6 MIRROR EINVAL "the mirror is no SEV guest and has no vCPU";
        6 SOURCE EINVAL "the source is a SEV guest, no SNP guest and no mirror";
        7 MEMORY ENOMEM "there is memory";
    }
}
