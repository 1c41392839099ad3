//! `KVM_MEMORY_ENCRYPT_OP` on an AMD host.

use std::sync::{Arc, MutexGuard};

use kvm_ops_uapi::U32;
use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::checks::encrypt_sev::{COPY, COPY_BACK, ENABLED, KNOWN, MIRROR, SNP};
use kvm_ops_uapi::sev::{self as uapi, SevCmd};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::engine::Failed;
use super::{debug, init, launch, local, migrate, snp};
use crate::refusal::{Result, ensure};
use crate::vcpu::{State as VcpuState, Vcpu};
use crate::vm::{State, Vm};
use crate::{Process, arg};

/// What a command works on.
pub(super) struct Call<'a> {
    pub(super) vm: &'a Vm,
    pub(super) process: &'a dyn Process,
    /// The address of the command's structure.
    pub(super) data: u64,
    pub(super) sev_fd: i32,
    /// The vCPUs, for a command that encrypts their registers.
    vcpus: Vec<MutexGuard<'a, VcpuState>>,
}

impl Call<'_> {
    /// Reads the command's structure.
    pub(super) fn read<T: FromBytes + FromZeros + IntoBytes>(&self, check: Check) -> Result<T> {
        arg::read(self.process, self.data, check)
    }

    /// Checks that nobody debugs a guest whose registers are to be encrypted.
    pub(super) fn check_debugging(&self, checks: (Check, Check)) -> Result<()> {
        let mut vcpus = self.vcpus.iter();
        vcpus.try_for_each(|vcpu| vcpu.check_debugging(checks))
    }

    /// Writes the command's structure back.
    pub(super) fn write<T: IntoBytes + Immutable>(&self, value: &T, check: Check) -> Result<()> {
        arg::write(self.process, self.data, value, check)
    }
}

/// A command without a structure.
pub(super) fn bare(
    state: &mut State,
    call: &Call<'_>,
    id: u32,
    (sev, sev_fd): (Check, Check),
) -> Answer {
    ensure(state.sev.is_active(), sev)?;
    state.sev.require_fd(call.process, sev_fd)?;
    state.sev.engine(sev)?.command(id, &mut [])?;
    Ok(Sent::Yes)
}

/// The first of SNP's own commands.
const FIRST_SNP: u32 = 100;

pub(crate) fn command(vm: &Arc<Vm>, process: &dyn Process, argument: u64) -> Result<i64> {
    ensure(vm.kernel().has_sev(), ENABLED)?;
    if argument == 0 {
        return Ok(0);
    }
    let mut cmd: SevCmd = arg::read(process, argument, COPY)?;
    let id = cmd.id.get();
    // vCPUs are locked in front of their VM.
    let encrypts = matches!(id, uapi::LAUNCH_UPDATE_VMSA | uapi::SNP_LAUNCH_FINISH);
    let vcpus: Vec<Arc<Vcpu>> = match encrypts {
        true => vm.lock().vcpus.values().cloned().collect(),
        false => Vec::new(),
    };
    let locked = vcpus.iter().map(|vcpu| vcpu.lock()).collect();
    let mut state = vm.lock();
    let for_mirrors = uapi::MIRROR_COMMANDS.contains(&id);
    ensure(!state.sev.is_mirror() || for_mirrors, MIRROR)?;
    local::check_staged(&state, id)?;
    ensure(!state.sev.is_snp() || id >= FIRST_SNP, SNP)?;
    let run = handler(id).ok_or(KNOWN)?;

    let call = Call {
        vm,
        process,
        data: cmd.data.get(),
        sev_fd: cmd.sev_fd.get() as i32,
        vcpus: locked,
    };
    let done = run(&mut state, &call);
    match &done {
        Ok(Sent::Yes) => cmd.error = U32::ZERO,
        Err(Failed {
            status: Some(status),
            ..
        }) => cmd.error = U32::new(*status),
        _ => {}
    }
    drop(state);
    arg::write(process, argument, &cmd, COPY_BACK)?;
    match done {
        Ok(_) => Ok(0),
        Err(failed) => Err(failed.refusal),
    }
}

/// Tells whether firmware was asked, on which the kernel's status word depends.
pub(super) enum Sent {
    Yes,
    No,
}

pub(super) type Answer = Result<Sent, Failed>;
type Handler = fn(&mut State, &Call<'_>) -> Answer;

/// The commands that are served.
fn handler(id: u32) -> Option<Handler> {
    Some(match id {
        uapi::INIT => init::init,
        uapi::ES_INIT => init::es_init,
        uapi::INIT2 => init::init2,
        uapi::LAUNCH_START => launch::start,
        uapi::LAUNCH_UPDATE_DATA => launch::update_data,
        uapi::LAUNCH_UPDATE_VMSA => launch::update_vmsa,
        uapi::LAUNCH_SECRET => launch::secret,
        uapi::LAUNCH_MEASURE => launch::measure,
        uapi::LAUNCH_FINISH => launch::finish,
        uapi::SEND_START => migrate::send_start,
        uapi::SEND_UPDATE_DATA => migrate::send_update_data,
        uapi::SEND_FINISH => migrate::send_finish,
        uapi::SEND_CANCEL => migrate::send_cancel,
        uapi::RECEIVE_START => migrate::receive_start,
        uapi::RECEIVE_UPDATE_DATA => migrate::receive_update_data,
        uapi::RECEIVE_FINISH => migrate::receive_finish,
        uapi::GUEST_STATUS => launch::status,
        uapi::GET_ATTESTATION_REPORT => launch::attestation,
        uapi::DBG_DECRYPT => debug::decrypt,
        uapi::DBG_ENCRYPT => debug::encrypt,
        uapi::LOCAL_SEND => local::send,
        uapi::LOCAL_RECEIVE => local::receive,
        uapi::SNP_LAUNCH_START => snp::start,
        uapi::SNP_LAUNCH_UPDATE => snp::update,
        uapi::SNP_LAUNCH_FINISH => snp::finish,
        uapi::SNP_ENABLE_REQ_CERTS => snp::enable_req_certs,
        _ => return None,
    })
}
