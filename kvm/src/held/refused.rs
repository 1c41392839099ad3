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
        (Call::SevInit2 | Call::SevInit | Call::SevEsInit, libc::EBUSY) => {
            told(call, errno, Error::NoKeyId)
        }
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
        Call::SevInit => "INIT",
        Call::SevEsInit => "ES_INIT",
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
        Call::SevSendStart => "SEND_START",
        Call::SevSendUpdateData => "SEND_UPDATE_DATA",
        Call::SevSendFinish => "SEND_FINISH",
        Call::SevSendCancel => "SEND_CANCEL",
        Call::SevReceiveStart => "RECEIVE_START",
        Call::SevReceiveUpdateData => "RECEIVE_UPDATE_DATA",
        Call::SevReceiveFinish => "RECEIVE_FINISH",
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
        Call::SevInit2 | Call::SevInit | Call::SevEsInit => checks::init_any::ALL,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The calls of a launch, with the tables of their checks.
    const CALLS: &[(Call, &[&[Check]])] = &[
        (Call::SevInit, &[checks::init::ALL, checks::init_any::ALL]),
        (
            Call::SevEsInit,
            &[checks::es_init::ALL, checks::init_any::ALL],
        ),
        (Call::SevInit2, &[checks::init2::ALL, checks::init_any::ALL]),
        (Call::SevLaunchStart, &[checks::launch_start::ALL]),
        (
            Call::SevLaunchUpdateData,
            &[checks::launch_update_data::ALL],
        ),
        (
            Call::SevLaunchUpdateVmsa,
            &[checks::launch_update_vmsa::ALL],
        ),
        (Call::SevLaunchSecret, &[checks::launch_secret::ALL]),
        (Call::SevLaunchMeasure, &[checks::launch_measure::ALL]),
        (Call::SevLaunchFinish, &[checks::launch_finish::ALL]),
        (Call::SevGuestStatus, &[checks::guest_status::ALL]),
        (Call::SevSendStart, &[checks::send_start::ALL]),
        (Call::SevSendUpdateData, &[checks::send_update_data::ALL]),
        (Call::SevReceiveStart, &[checks::receive_start::ALL]),
        (
            Call::SevReceiveUpdateData,
            &[checks::receive_update_data::ALL],
        ),
        (Call::SevReceiveFinish, &[checks::receive_finish::ALL]),
        (
            Call::SnpEnableReqCerts,
            &[checks::snp_enable_req_certs::ALL],
        ),
        (Call::SnpLaunchStart, &[checks::snp_launch_start::ALL]),
        (Call::SnpLaunchUpdate, &[checks::snp_launch_update::ALL]),
        (Call::SnpLaunchFinish, &[checks::snp_launch_finish::ALL]),
        (Call::RegisterRegion, &[checks::reg_region::ALL]),
        (Call::UnregisterRegion, &[checks::unreg_region::ALL]),
        (Call::TdxCapabilities, &[checks::tdx_capabilities::ALL]),
        (Call::TdxInitVm, &[checks::tdx_init_vm::ALL]),
        (Call::TdxInitVcpu, &[checks::tdx_init_vcpu::ALL]),
        (Call::TdxInitMemRegion, &[checks::tdx_init_mem_region::ALL]),
        (Call::TdxFinalizeVm, &[checks::tdx_finalize_vm::ALL]),
    ];

    fn is_tdx(call: Call) -> bool {
        call.to_string().starts_with("KVM_TDX_")
    }

    fn of(call: Call, errno: i32) -> HeldFailure {
        match is_tdx(call) {
            true => by_module(call, errno, 0),
            false => refused(call, errno, 0),
        }
    }

    #[test]
    fn each_check_of_each_call_becomes_an_error_that_names_the_call_or_the_shortage() {
        for (call, tables) in CALLS {
            for check in tables.iter().copied().flatten() {
                let failure = of(*call, check.errno.0);
                let named = match failure.error {
                    Error::Sys(found, errno) => (found, errno) == (*call, check.errno.0),
                    // An ASID or a KeyID, memory, and the module's own moments.
                    Error::NoKeyId => {
                        ["an ASID is free", "a KeyID is free"].contains(&check.condition)
                    }
                    Error::NoMemory => check.errno.0 == libc::ENOMEM,
                    _ => false,
                };
                assert!(named, "{check}: {failure:?}");
                assert_eq!(failure.call, None, "no firmware was asked");
            }
        }
    }

    #[test]
    fn a_demand_is_told_exactly_if_no_other_check_gives_the_errno() {
        for (call, tables) in CALLS {
            let rows = || tables.iter().copied().flatten();
            for check in rows() {
                let same = rows().filter(|other| other.errno == check.errno).count();
                let expected = match same {
                    1 => check.demand,
                    _ => "",
                };
                assert_eq!(of(*call, check.errno.0).cause, expected, "{check}");
            }
        }
        assert_eq!(of(Call::SevInit2, libc::EPERM).cause, "", "no such check");
    }

    #[test]
    fn firmwares_statuses_are_named_and_a_busy_module_is_busy() {
        let failure = refused(Call::SevLaunchStart, libc::EIO, 7);
        assert_eq!(failure.error, Error::Firmware(7));
        assert_eq!(
            failure.call.unwrap().to_string(),
            "LAUNCH_START answered POLICY_FAILURE (0x7)"
        );
        // Firmware was not asked, or what failed was not firmware.
        for (errno, status) in [(libc::EIO, 0), (libc::EINVAL, 7)] {
            let failure = refused(Call::SevLaunchStart, errno, status);
            assert_eq!(failure.error, Error::Sys(Call::SevLaunchStart, errno));
        }
        let word = 0x8000_0200_0000_0092;
        let failure = by_module(Call::TdxInitVm, libc::EIO, word);
        assert_eq!(failure.error, Error::Firmware(word));
        let text = failure.call.unwrap().to_string();
        assert_eq!(text, "KVM_TDX_INIT_VM answered status 0x8000020000000092");
        for (call, errno, error) in [
            (Call::TdxFinalizeVm, libc::EBUSY, Error::Busy),
            (Call::TdxInitVm, libc::EAGAIN, Error::Again),
            (
                Call::TdxInitVm,
                libc::EBUSY,
                Error::Sys(Call::TdxInitVm, libc::EBUSY),
            ),
        ] {
            assert_eq!(by_module(call, errno, 0).error, error);
        }
    }
}
