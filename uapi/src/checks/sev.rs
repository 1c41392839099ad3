//! Commands of SEV and SEV-ES.

use super::table;

table! {
    /// INIT, before the checks of [`init_any`].
    init "KVM_SEV_INIT" {
        1 TYPE EINVAL "the VM is of the default type";
    }
}

table! {
    /// ES_INIT, before the checks of [`init_any`].
    es_init "KVM_SEV_ES_INIT" {
        1 ENABLED ENOTTY "SEV-ES is enabled";
        2 TYPE EINVAL "the VM is of the default type";
    }
}

table! {
    /// INIT2, before the checks of [`init_any`].
    init2 "KVM_SEV_INIT2" {
        1 ONCE EINVAL "the VM is not initialised";
        2 TYPE EINVAL "the VM is of a SEV type";
        3 COPY EFAULT "the structure can be read";
    }
}

table! {
    /// What INIT, ES_INIT and INIT2 check alike.
    init_any "KVM_SEV_INIT, ES_INIT, INIT2" {
        1 NO_VCPU EINVAL "no vCPU was created";
        2 FLAGS EINVAL "flags are 0";
        3 FEATURES EINVAL "VMSA features are within those of the host, and none for SEV";
        4 GHCB EINVAL "the GHCB version is at most 2, and 0 for SEV";
        5 SNP_GHCB EINVAL "the GHCB version of an SNP guest is not 1";
        6 ONCE EINVAL "the VM is no SEV guest yet";
        7 RANGE ENOTTY "the technology has ASIDs";
        8 ASID EBUSY "an ASID is free";
        9 MEMORY ENOMEM "there is memory";
    }
}

table! {
    /// LAUNCH_START.
    launch_start "KVM_SEV_LAUNCH_START" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 DH_LEN EINVAL "a certificate has 1 to 16384 bytes";
        3 DH EFAULT "the certificate can be read";
        4 SESSION_LEN EINVAL "a session has 1 to 16384 bytes";
        4 SESSION EFAULT "the session can be read";
        5 SEV_FD EBADF "sev_fd is /dev/sev";
        6 COPY_BACK EFAULT "the handle can be written";
    }
}

table! {
    /// LAUNCH_UPDATE_DATA.
    launch_update_data "KVM_SEV_LAUNCH_UPDATE_DATA" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 RANGE EINVAL "the range is not empty, does not wrap, and is no larger than memory";
        4 PINNED ENOMEM "the memory can be pinned for writing, within RLIMIT_MEMLOCK";
        5 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// LAUNCH_UPDATE_VMSA.
    launch_update_vmsa "KVM_SEV_LAUNCH_UPDATE_VMSA" {
        1 ES ENOTTY "the VM is a SEV-ES guest";
        2 SIGNAL EINTR "no signal is pending";
        3 PROTECTED EINVAL "no vCPU is protected yet";
        4 DEBUGGED EINVAL "no vCPU is debugged";
        4 DR7 EINVAL "no vCPU's DR7 has more than its fixed bit";
        5 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// LAUNCH_SECRET.
    launch_secret "KVM_SEV_LAUNCH_SECRET" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 RANGE EINVAL "the guest's range is not empty, does not wrap, and is no larger than memory";
        3 PINNED ENOMEM "the guest's memory can be pinned for writing, within RLIMIT_MEMLOCK";
        4 TRANS_LEN EINVAL "the packet has 1 to 16384 bytes";
        4 TRANS EFAULT "the packet can be read";
        5 HDR_LEN EINVAL "the header has 1 to 16384 bytes";
        5 HDR EFAULT "the header can be read";
        6 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// LAUNCH_MEASURE and GET_ATTESTATION_REPORT.
    launch_measure "KVM_SEV_LAUNCH_MEASURE" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 LEN EINVAL "a buffer has at most 16384 bytes";
        4 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
        5 BUFFER EFAULT "the buffer can be written";
        6 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// LAUNCH_FINISH.
    launch_finish "KVM_SEV_LAUNCH_FINISH" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// GUEST_STATUS.
    guest_status "KVM_SEV_GUEST_STATUS" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
        3 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// DBG_DECRYPT and DBG_ENCRYPT.
    dbg "KVM_SEV_DBG_DECRYPT, DBG_ENCRYPT" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 GIVEN EINVAL "length, source and destination are not 0";
        4 WRAP EINVAL "neither range wraps";
        5 PINNED ENOMEM "source and destination can be pinned, within RLIMIT_MEMLOCK";
        6 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// SEND_START. A session of length 0 asks for the length that it takes: `EIO`.
    send_start "KVM_SEV_SEND_START" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 GIVEN EINVAL "the peer's key and the session are given, the session in at most 16384 bytes";
        4 BLOBS EINVAL "the peer's key and both chains have 1 to 16384 bytes";
        4 READABLE EFAULT "the peer's key and both chains can be read";
        5 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
        6 SESSION EFAULT "the session can be written";
        7 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// SEND_UPDATE_DATA. A header or packet of length 0 asks for the lengths that both take: `EIO`.
    send_update_data "KVM_SEV_SEND_UPDATE_DATA" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 GIVEN EINVAL "all addresses and the length of the guest's range are given";
        4 PAGE EINVAL "the guest's range lies in one page";
        5 PINNED ENOMEM "the guest's memory can be pinned, within RLIMIT_MEMLOCK";
        6 MEMORY ENOMEM "header and packet have at most 4 MiB";
        7 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
        8 BUFFERS EFAULT "packet and header can be written";
    }
}

table! {
    /// SEND_FINISH and SEND_CANCEL.
    send_end "KVM_SEV_SEND_FINISH, SEND_CANCEL" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// RECEIVE_START.
    receive_start "KVM_SEV_RECEIVE_START" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 GIVEN EINVAL "the peer's key and the session are given";
        4 BLOBS EINVAL "the peer's key and the session have at most 16384 bytes";
        4 READABLE EFAULT "the peer's key and the session can be read";
        5 SEV_FD EBADF "sev_fd is /dev/sev";
        6 COPY_BACK EFAULT "the handle can be written";
    }
}

table! {
    /// RECEIVE_UPDATE_DATA.
    receive_update_data "KVM_SEV_RECEIVE_UPDATE_DATA" {
        1 SEV EINVAL "the VM is a SEV guest";
        2 COPY EFAULT "the structure can be read";
        3 GIVEN EINVAL "all addresses and lengths are given";
        4 PAGE EINVAL "the guest's range lies in one page";
        5 BLOBS EINVAL "header and packet have at most 16384 bytes";
        5 READABLE EFAULT "header and packet can be read";
        6 PINNED ENOMEM "the guest's memory can be pinned for writing, within RLIMIT_MEMLOCK";
        7 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// RECEIVE_FINISH.
    receive_finish "KVM_SEV_RECEIVE_FINISH" {
        1 SEV ENOTTY "the VM is a SEV guest";
        2 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// LOCAL_SEND, which is no command of the kernel's.
    local_send "KVM_SEV_LOCAL_SEND" {
        1 SEV ENOTTY "the VM is a SEV or SEV-ES guest";
        2 LAUNCHED EINVAL "its launch has begun";
        3 RANDOM EAGAIN "there are random numbers";
        4 COPY_BACK EFAULT "the token can be written";
        5 IDLE EBUSY "the guest is in no move";
        6 STAGED EPERM "the command of a staged guest is DBG_DECRYPT or DBG_ENCRYPT";
    }
}

table! {
    /// LOCAL_RECEIVE, which is no command of the kernel's.
    local_receive "KVM_SEV_LOCAL_RECEIVE" {
        1 SEV ENOTTY "the VM is a SEV or SEV-ES guest";
        2 FRESH EPERM "its launch has not begun";
        3 COPY EFAULT "the structure can be read";
        4 TOKEN ENOENT "a guest is staged under the token";
        5 FITS EINVAL "the guest is of this VM's kind, and with SEV-ES has as many vCPUs, all measured";
        6 COPY_BACK EFAULT "the handle can be written";
    }
}
