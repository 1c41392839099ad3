//! `KVM_SET_CPUID2` and `KVM_GET_CPUID2`.

use kvm_ops::{CpuidEntry, VcpuOps};
use kvm_ops_uapi::checks::set_cpuid2::{AFTER_RUN, COPY, COUNT, ENTRIES};
use kvm_ops_uapi::system::{CPUID_FLAG_SIGNIFICANT_INDEX, Cpuid2, CpuidEntry2, MAX_CPUID_ENTRIES};
use kvm_ops_uapi::{Errno, U32};

use super::Cpu;
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

pub(super) fn set(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let head: Cpuid2 = arg::read(process, argument, COPY)?;
    ensure(head.nent.get() <= MAX_CPUID_ENTRIES, COUNT)?;
    let at = argument.wrapping_add(size_of::<Cpuid2>() as u64);
    let list = arg::read_list(process, at, head.nent.get() as usize, ENTRIES)?;
    let mut state = file.state();
    ensure(!state.has_run || state.cpuid == list, AFTER_RUN)?;
    if let Cpu::Processor(vcpu) = &mut state.cpu {
        let entries: Vec<CpuidEntry> = list.iter().map(entry).collect();
        vcpu.set_cpuid(&entries)?;
    }
    state.cpuid = list;
    Ok(0)
}

fn entry(from: &CpuidEntry2) -> CpuidEntry {
    CpuidEntry {
        leaf: from.function.get(),
        subleaf: from.index.get(),
        subleaf_significant: from.flags.get() & CPUID_FLAG_SIGNIFICANT_INDEX != 0,
        regs: [from.eax, from.ebx, from.ecx, from.edx].map(U32::get),
    }
}

/// The number of entries is written also if there is no room for them.
pub(super) fn get(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut head: Cpuid2 = arg::read(process, argument, COPY)?;
    let list = file.state().cpuid.clone();
    let room = head.nent.get() as usize;
    head.nent = U32::new(list.len() as u32);
    if room >= list.len() {
        let at = argument.wrapping_add(size_of::<Cpuid2>() as u64);
        arg::write(process, at, &list[..], ENTRIES)?;
    }
    arg::write(process, argument, &head, COPY)?;
    if room < list.len() {
        return Err(Errno::E2BIG.into());
    }
    Ok(0)
}
