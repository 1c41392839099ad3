//! Commands of `/dev/sev`, in the order of Linux' `drivers/crypto/ccp/sev-dev.c`.

use super::table;

table! {
    /// `SEV_ISSUE_CMD`, before the checks of each command.
    issue "SEV_ISSUE_CMD" {
        1 NUMBER EINVAL "the ioctl is SEV_ISSUE_CMD";
        2 COPY EFAULT "the structure can be read";
        3 KNOWN EINVAL "the command is known";
        4 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// FACTORY_RESET.
    factory_reset "SEV_FACTORY_RESET" {
        1 WRITABLE EPERM "the file is open for writing";
        2 IDLE EBUSY "no SEV or SEV-ES guest exists";
    }
}

table! {
    /// PLATFORM_STATUS.
    platform_status "SEV_PLATFORM_STATUS" {
        1 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// PEK_GEN and PDH_GEN.
    key_gen "SEV_PEK_GEN, PDH_GEN" {
        1 WRITABLE EPERM "the file is open for writing";
    }
}

table! {
    /// PEK_CSR.
    pek_csr "SEV_PEK_CSR" {
        1 WRITABLE EPERM "the file is open for writing";
        2 COPY EFAULT "the structure can be read";
        3 LEN EFAULT "the buffer has at most 16384 bytes";
        4 COPY_BACK EFAULT "the structure can be written";
        5 BUFFER EFAULT "the buffer can be written";
    }
}

table! {
    /// PEK_CERT_IMPORT.
    pek_cert_import "SEV_PEK_CERT_IMPORT" {
        1 WRITABLE EPERM "the file is open for writing";
        2 COPY EFAULT "the structure can be read";
        3 PEK_LEN EINVAL "the key's certificate has 1 to 16384 bytes";
        3 PEK EFAULT "the key's certificate can be read";
        4 OCA_LEN EINVAL "the owner's certificate has 1 to 16384 bytes";
        4 OCA EFAULT "the owner's certificate can be read";
    }
}

table! {
    /// PDH_CERT_EXPORT.
    pdh_cert_export "SEV_PDH_CERT_EXPORT" {
        1 WRITABLE EPERM "the file is open for writing, or the platform is initialised";
        1 COPY EFAULT "the structure can be read";
        2 LEN EFAULT "the buffers have at most 16384 bytes";
        3 COPY_BACK EFAULT "the structure can be written";
        4 BUFFERS EFAULT "the buffers can be written";
    }
}

table! {
    /// GET_ID.
    get_id "SEV_GET_ID" {
        1 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// GET_ID2.
    get_id2 "SEV_GET_ID2" {
        1 COPY EFAULT "the structure can be read";
        2 MEMORY ENOMEM "there is memory for the buffer's length";
        3 COPY_BACK EFAULT "the structure can be written";
        4 BUFFER EFAULT "the buffer can be written";
    }
}

table! {
    /// SNP_PLATFORM_STATUS.
    snp_platform_status "SNP_PLATFORM_STATUS" {
        1 GIVEN EINVAL "the address of the structure is not 0";
        2 COPY_BACK EFAULT "the structure can be written";
    }
}

table! {
    /// SNP_SET_CONFIG.
    snp_set_config "SNP_SET_CONFIG" {
        1 GIVEN EINVAL "the address of the structure is not 0";
        2 WRITABLE EPERM "the file is open for writing";
        3 COPY EFAULT "the structure can be read";
    }
}

table! {
    /// SNP_VLEK_LOAD.
    snp_vlek_load "SNP_VLEK_LOAD" {
        1 GIVEN EINVAL "the address of the structure is not 0";
        2 WRITABLE EPERM "the file is open for writing";
        3 COPY EFAULT "the structure can be read";
        4 VERSION EINVAL "the length is the structure's and the version is 0";
        5 BLOB EFAULT "the wrapped key can be read";
    }
}
