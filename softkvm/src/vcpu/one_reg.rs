//! `KVM_GET_ONE_REG` and `KVM_SET_ONE_REG`: MSRs by the numbers that all architectures of KVM share.

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::{one_reg, reg_list};
use kvm_ops_uapi::state::one_reg::{
    ARCH_MASK, KIND_MASK, MSR as MSR_KIND, RESERVED_MASK, SIZE_64, SIZE_MASK, X86,
};
use kvm_ops_uapi::state::{OneReg, RegList};

use super::registers;
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

/// The number of an MSR, and the address of its value. No guest here has registers of KVM's own.
fn msr(process: &dyn Process, argument: u64) -> Result<(u32, u64)> {
    use one_reg::{ARCH, COPY, KIND, RESERVED, SIZE};
    let args: OneReg = arg::read(process, argument, COPY)?;
    let id = args.id.get();
    ensure(id & ARCH_MASK == X86, ARCH)?;
    ensure(id & RESERVED_MASK == 0, RESERVED)?;
    ensure(id & KIND_MASK == MSR_KIND, KIND)?;
    ensure(id & SIZE_MASK == SIZE_64, SIZE)?;
    Ok((id as u32, args.addr.get()))
}

pub(super) fn get(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let (index, address) = msr(process, argument)?;
    let value = registers::msr(file, &file.state(), index).ok_or(one_reg::MSR)?;
    arg::write(process, address, &U64::new(value), one_reg::VALUE)?;
    Ok(0)
}

pub(super) fn set(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let (index, address) = msr(process, argument)?;
    let value: U64 = arg::read(process, address, one_reg::VALUE)?;
    let set = registers::set_msr(file, &mut file.state(), index, value.get());
    ensure(set, one_reg::MSR)?;
    Ok(0)
}

/// `KVM_GET_REG_LIST` has no MSRs, which lists of their own name.
pub(super) fn list(process: &dyn Process, argument: u64) -> Result<i64> {
    let _: RegList = arg::read(process, argument, reg_list::COPY)?;
    let none = RegList::default();
    arg::write(process, argument, &none, reg_list::COPY_BACK)?;
    Ok(0)
}
