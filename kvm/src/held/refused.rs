//! From an errno of a command, and firmware's status, to a failure that names what failed.

use kvm_ops::{Call, Error, FirmwareCall, HeldFailure};
use kvm_ops_uapi::checks::{self, Check};
use kvm_ops_uapi::status::Status;

use crate::error::from_errno;

/// The failure of a call. `status` is what firmware answered, 0 if it was not asked.
pub(super) fn refused(call: Call, errno: i32, status: u32) -> HeldFailure {
    match (call, errno) {
        (_, libc::EIO) if status != 0 => HeldFailure {
            call: Some(FirmwareCall {
                name: name(call),
                status: status.into(),
                status_name: Status(status).name(),
                operand: None,
            }),
            ..Error::Firmware(status.into()).into()
        },
        // No ASID is free, or the limit of the control group is reached.
        (Call::SevInit2, libc::EBUSY) => told(call, errno, Error::NoKeyId),
        _ => told(call, errno, from_errno(call, errno)),
    }
}

/// The failure of a call for a TD. `status` is what the TDX module answered to the SEAMCALL that failed, 0 if none did
/// or the kernel does not tell. It never tells which SEAMCALL it was, so the command is named.
pub(super) fn by_module(call: Call, errno: i32, status: u64) -> HeldFailure {
    match (call, errno) {
        (Call::TdxInitVm, libc::ENOSPC) => told(call, errno, Error::NoKeyId),
        (_, libc::EAGAIN) => told(call, errno, Error::Again),
        (_, libc::EBUSY) if call != Call::TdxInitVm => told(call, errno, Error::Busy),
        _ if status != 0 => HeldFailure {
            call: Some(FirmwareCall {
                name: name(call),
                status,
                status_name: None,
                operand: None,
            }),
            ..Error::Firmware(status).into()
        },
        _ => told(call, errno, from_errno(call, errno)),
    }
}

/// A failure without firmware, with the kernel's demand if that is known.
fn told(call: Call, errno: i32, error: Error) -> HeldFailure {
    HeldFailure {
        cause: demand(call, errno),
        ..error.into()
    }
}

/// The name of a call that asks firmware, without the kernel's prefix.
const fn name(call: Call) -> &'static str {
    match call {
        Call::SevInit2 => "INIT2",
        Call::SevLaunchStart => "LAUNCH_START",
        Call::SevLaunchUpdateData => "LAUNCH_UPDATE_DATA",
        Call::SevLaunchUpdateVmsa => "LAUNCH_UPDATE_VMSA",
        Call::SevLaunchSecret => "LAUNCH_SECRET",
        Call::SevLaunchMeasure => "LAUNCH_MEASURE",
        Call::SevLaunchFinish => "LAUNCH_FINISH",
        Call::SevGuestStatus => "GUEST_STATUS",
        Call::SevDbgDecrypt => "DBG_DECRYPT",
        Call::SevDbgEncrypt => "DBG_ENCRYPT",
        Call::SevAttestationReport => "ATTESTATION_REPORT",
        Call::SnpLaunchStart => "SNP_LAUNCH_START",
        Call::SnpLaunchUpdate => "SNP_LAUNCH_UPDATE",
        Call::SnpLaunchFinish => "SNP_LAUNCH_FINISH",
        Call::TdxInitVm => "KVM_TDX_INIT_VM",
        Call::TdxFinalizeVm => "KVM_TDX_FINALIZE_VM",
        _ => "KVM_MEMORY_ENCRYPT_OP",
    }
}

/// The demand of the kernel that was not met, if only one check of the call gives that errno. Several checks give
/// EINVAL, and nothing tells them apart.
fn demand(call: Call, errno: i32) -> &'static str {
    let name = call.to_string();
    let also = match call {
        Call::SevInit2 => checks::init_any::ALL,
        _ => &[],
    };
    let own = checks::TABLES.iter().find(|table| table[0].call == name);
    let mut rows = own
        .copied()
        .unwrap_or_default()
        .iter()
        .chain(also)
        .filter(|check: &&Check| check.errno.0 == errno);
    match (rows.next(), rows.next()) {
        (Some(check), None) => check.demand,
        _ => "",
    }
}
