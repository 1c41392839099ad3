//! `KVM_MEMORY_ENCRYPT_OP` on an Intel host.

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::{encrypt_sev, encrypt_tdx, encrypt_tdx_vcpu};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::tdx::{self as uapi, TdxCmd};

use super::engine::Failed;
use super::{init, limits, region, vcpu};
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::vm::Vm;
use crate::{Process, arg};

/// What a command works on.
pub(super) struct Call<'a> {
    pub(super) vm: &'a Vm,
    pub(super) process: &'a dyn Process,
    pub(super) flags: u32,
    /// The address of the command's structure, or a value.
    pub(super) data: u64,
}

/// On a VM file. CAPABILITIES takes no lock, and is not written back.
pub(crate) fn command(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    use encrypt_tdx::{COPY, COPY_BACK, HW_ERROR, KNOWN, SIGNAL, TD};
    ensure(vm.kind() == vm_type::TDX, TD)?;
    let limits = vm.kernel().td_limits().ok_or(TD)?;
    let mut cmd: TdxCmd = arg::read(process, argument, COPY)?;
    ensure(cmd.hw_error.get() == 0, HW_ERROR)?;
    let call = Call {
        vm,
        process,
        flags: cmd.flags.get(),
        data: cmd.data.get(),
    };
    if cmd.id.get() == uapi::CAPABILITIES {
        return limits::capabilities(limits, &call);
    }
    ensure(!process.signal_pending(), SIGNAL)?;
    let mut state = vm.lock();
    let done = match cmd.id.get() {
        uapi::INIT_VM => init::init_vm(&mut state, limits, &call),
        uapi::FINALIZE_VM => init::finalize(&mut state, &call),
        _ => return Err(KNOWN.into()),
    };
    drop(state);
    if let Err(Failed { hw_error, .. }) = &done {
        cmd.hw_error = U64::new(*hw_error);
    }
    arg::write(process, argument, &cmd, COPY_BACK)?;
    done.map(|()| 0).map_err(|failed| failed.refusal)
}

/// On a vCPU file, where nothing is written back.
pub(crate) fn vcpu_command(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    use encrypt_tdx_vcpu::{COPY, HW_ERROR, KNOWN, STATE, TD};
    ensure(!file.vm.kernel().is_amd(), encrypt_sev::ENABLED)?;
    ensure(file.vm.kind() == vm_type::TDX, TD)?;
    let cmd: TdxCmd = arg::read(process, argument, COPY)?;
    ensure(cmd.hw_error.get() == 0, HW_ERROR)?;
    let mut vcpu = file.state();
    let mut state = file.vm.lock();
    ensure(state.td.is_building(), STATE)?;
    let call = Call {
        vm: &file.vm,
        process,
        flags: cmd.flags.get(),
        data: cmd.data.get(),
    };
    match cmd.id.get() {
        uapi::INIT_VCPU => vcpu::init(&mut state, (&file.vcpu, &mut vcpu), &call)?,
        uapi::INIT_MEM_REGION => region::add(&mut state, &file.vcpu, &call)?,
        uapi::GET_CPUID => vcpu::get_cpuid(&state, &call)?,
        _ => return Err(KNOWN.into()),
    }
    Ok(0)
}
