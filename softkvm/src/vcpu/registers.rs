//! Registers, as user space sets and reads them.

use std::mem::offset_of;

use kvm_ops::cr0;
use kvm_ops_uapi::checks::set_sregs2;
use kvm_ops_uapi::state::{MpState, Regs, SREGS2_PDPTRS_VALID, Sregs, Sregs2};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::{Errno, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::State;
use super::controls::{CR4_PAE, EFER_LMA, are_valid};
use super::cpu::TSC;
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::system::lists::each_msr;
use crate::{Process, Refusal, arg};

/// The group of registers is the guest's secret: types 3 and 4 once it is measured, type 5 always, for no TD
/// is under debug.
pub(super) fn require_readable(file: &VcpuFile) -> Result<()> {
    match is_secret(file) {
        true => Err(Errno::EINVAL.into()),
        false => Ok(()),
    }
}

fn is_secret(file: &VcpuFile) -> bool {
    match file.vm.kind() {
        vm_type::TDX => true,
        _ => file.vm.has_protected_state() && file.vm.lock().sev.is_protected(file.vcpu.id),
    }
}

/// The same for extended state, which the kernel never marks as an SNP guest's secret.
pub(super) fn require_fpu(file: &VcpuFile) -> Result<()> {
    match file.vm.kind() {
        vm_type::SNP => Ok(()),
        _ => require_readable(file),
    }
}

pub(super) fn read<T: FromBytes + FromZeros + IntoBytes>(
    process: &dyn Process,
    address: u64,
) -> Result<T> {
    let mut value = T::new_zeroed();
    let read = process.read(address, value.as_mut_bytes());
    read.map_err(|_| Errno::EFAULT)?;
    Ok(value)
}

pub(super) fn write<T: IntoBytes + Immutable>(
    process: &dyn Process,
    address: u64,
    value: &T,
) -> Result<i64> {
    let written = process.write(address, value.as_bytes());
    written
        .map(|()| 0)
        .map_err(|_| Refusal::from(Errno::EFAULT))
}

pub(super) fn get_regs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let regs = file.state().cpu.regs()?;
    write(process, argument, &regs)
}

pub(super) fn set_regs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut regs: Regs = read(process, argument)?;
    require_readable(file)?;
    // Bit 1 is always set.
    regs.rflags = U64::new(regs.rflags.get() | 2);
    file.state().cpu.set_regs(regs)?;
    Ok(0)
}

pub(super) fn get_sregs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let sregs = file.state().cpu.sregs()?;
    write(process, argument, &sregs)
}

pub(super) fn set_sregs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let sregs: Sregs = read(process, argument)?;
    require_readable(file)?;
    let mut state = file.state();
    if !are_valid(&sregs, &state.cpuid) {
        return Err(Errno::EINVAL.into());
    }
    state.cpu.set_sregs(sregs)?;
    Ok(0)
}

/// Sregs2 is Sregs with the entries of the page-directory-pointer table in place of the bitmap of interrupts. The
/// processor reads them from memory, so none are given.
fn extended(from: &Sregs) -> Sregs2 {
    let mut to = Sregs2::default();
    let shared = offset_of!(Sregs2, flags);
    to.as_mut_bytes()[..shared].copy_from_slice(&from.as_bytes()[..shared]);
    to
}

pub(super) fn get_sregs2(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let sregs = file.state().cpu.sregs()?;
    write(process, argument, &extended(&sregs))
}

/// Interrupts that wait stay, and entries that are given are dropped for those in memory.
pub(super) fn set_sregs2(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    use set_sregs2::{CONSISTENT, COPY, FLAGS, PAE, READABLE};
    let given: Sregs2 = arg::read(process, argument, COPY)?;
    require_readable(file).map_err(|_| READABLE)?;
    ensure(given.flags.get() & !SREGS2_PDPTRS_VALID == 0, FLAGS)?;
    let is_pae = given.cr0.get() & cr0::PG != 0
        && given.cr4.get() & CR4_PAE != 0
        && given.efer.get() & EFER_LMA == 0;
    ensure(given.flags.get() == 0 || is_pae, PAE)?;
    let mut state = file.state();
    let mut sregs = state.cpu.sregs()?;
    let shared = offset_of!(Sregs2, flags);
    sregs.as_mut_bytes()[..shared].copy_from_slice(&given.as_bytes()[..shared]);
    ensure(are_valid(&sregs, &state.cpuid), CONSISTENT)?;
    state.cpu.set_sregs(sregs).map_err(|_| CONSISTENT)?;
    Ok(0)
}

pub(super) fn get_mp_state(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mp_state = U32::new(file.state().cpu.mp_state()?);
    write(process, argument, &MpState { mp_state })
}

pub(super) fn set_mp_state(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let state: MpState = read(process, argument)?;
    file.state().cpu.set_mp_state(state.mp_state.get())?;
    Ok(0)
}

/// An MSR as user space reads it. `None` if there is none.
pub(super) fn msr(file: &VcpuFile, state: &State, index: u32) -> Option<u64> {
    // A guest that became SEV-ES late: its secret registers read as zero, and writes are ignored.
    let meaningless = (file.vm.is_plain() && state.cpu.is_protected()).then_some(0);
    match file.vm.kind() {
        vm_type::TDX => state.cpu.td_msr(index),
        _ => state.cpu.msr(index).or(meaningless),
    }
}

/// False for an MSR that there is not, or a value that it cannot have.
pub(super) fn set_msr(file: &VcpuFile, state: &mut State, index: u32, mut value: u64) -> bool {
    if file.vm.kind() == vm_type::TDX {
        return state.cpu.set_td_msr(index, value);
    }
    if index == TSC
        && let Some(clock) = state.cpu.clock()
    {
        let khz = state.tsc_khz;
        value = file.vm.lock().synchronise_tsc(Some(value), clock, khz);
    }
    let meaningless = file.vm.is_plain() && state.cpu.is_protected();
    state.cpu.set_msr(index, value) || meaningless
}

pub(super) fn get_msrs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let state = file.state();
    each_msr(process, argument, |entry| {
        let value = msr(file, &state, entry.index.get());
        value.map(|value| entry.data = U64::new(value)).is_some()
    })
}

pub(super) fn set_msrs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut state = file.state();
    each_msr(process, argument, |entry| {
        set_msr(file, &mut state, entry.index.get(), entry.data.get())
    })
}
