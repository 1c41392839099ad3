//! Commands of SNP.

use super::table;

table! {
    /// SNP_LAUNCH_START.
    snp_launch_start "KVM_SEV_SNP_LAUNCH_START" {
        1 SNP ENOTTY "the VM is an SNP guest";
        2 COPY EFAULT "the structure can be read";
        3 ONCE EINVAL "the launch has not started";
        4 FLAGS EINVAL "flags are 0";
        5 POLICY EINVAL "the policy is within the bits that the host takes";
        6 RESERVED EINVAL "bit 17 of the policy is set";
        7 SEV_FD EBADF "sev_fd is /dev/sev";
    }
}

table! {
    /// SNP_LAUNCH_UPDATE. Checks from 7 on are the answer only at the first page, and always as EIO.
    snp_launch_update "KVM_SEV_SNP_LAUNCH_UPDATE" {
        1 SNP EINVAL "the VM is an SNP guest whose launch has started";
        2 COPY EFAULT "the structure can be read";
        3 LEN EINVAL "the length is whole pages, and not 0";
        3 FLAGS EINVAL "flags are 0";
        3 TYPE EINVAL "the type of the pages is known";
        4 SOURCE EINVAL "the source of pages with contents is a page's address, and not 0";
        5 SLOT EINVAL "a slot with a file is there";
        6 COPY_BACK EFAULT "the structure can be written";
        7 FIRST_PAGE EIO "the first page can be added: source readable, attribute private, firmware agrees";
    }
}

table! {
    /// SNP_LAUNCH_FINISH.
    snp_launch_finish "KVM_SEV_SNP_LAUNCH_FINISH" {
        1 SNP ENOTTY "the VM is an SNP guest";
        2 STARTED EINVAL "the launch has started";
        3 COPY EFAULT "the structure can be read";
        4 FLAGS EINVAL "flags are 0";
        5 SIGNAL EINTR "no signal is pending";
        6 PROTECTED EINVAL "no vCPU is protected yet";
        7 DEBUGGED EINVAL "no vCPU is debugged";
        7 DR7 EINVAL "no vCPU's DR7 has more than its fixed bit";
        8 ID_BLOCK EFAULT "the ID block and its authentication can be read";
        9 SEV_FD EBADF "the remembered sev_fd is /dev/sev";
    }
}

table! {
    /// SNP_ENABLE_REQ_CERTS.
    snp_enable_req_certs "KVM_SEV_SNP_ENABLE_REQ_CERTS" {
        1 NO_VCPU EINVAL "no vCPU exists";
        2 SNP EINVAL "the VM is an SNP guest";
    }
}
