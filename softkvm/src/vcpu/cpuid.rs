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
    let cr4 = cr4(&state.cpu);
    let same = || with_dynamic_bits(&state.cpuid, cr4) == with_dynamic_bits(&list, cr4);
    ensure(!state.has_run || same(), AFTER_RUN)?;
    if let Cpu::Processor(vcpu) = &mut state.cpu {
        vcpu.set_cpuid(&entries(&list))?;
    }
    state.cpuid = list;
    Ok(0)
}

/// CR4, or 0 of a vCPU whose registers nobody sees.
fn cr4(cpu: &Cpu) -> u64 {
    cpu.sregs().map_or(0, |sregs| sregs.cr4.get())
}

/// The list with the bits that follow CR4: OSXSAVE in leaf 1, OSPKE in leaf 7.
fn with_dynamic_bits(list: &[CpuidEntry2], cr4: u64) -> Vec<CpuidEntry2> {
    /// Leaf, the bit in ECX of the feature and of its use, the bit in CR4.
    const BITS: [(u32, u32, u32, u32); 2] = [(1, 26, 27, 18), (7, 3, 4, 22)];
    let mut list = list.to_vec();
    for (leaf, feature, used, enabled) in BITS {
        let found = list
            .iter_mut()
            .find(|entry| entry.function == leaf && entry.index == 0);
        if let Some(entry) = found {
            let ecx = entry.ecx.get();
            let is_used = ecx >> feature & 1 != 0 && cr4 >> enabled & 1 != 0;
            entry.ecx = U32::new(ecx & !(1 << used) | u32::from(is_used) << used);
        }
    }
    list
}

/// The list, as back ends have it.
pub(super) fn entries(list: &[CpuidEntry2]) -> Vec<CpuidEntry> {
    list.iter().map(entry).collect()
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
    let list = {
        let state = file.state();
        with_dynamic_bits(&state.cpuid, cr4(&state.cpu))
    };
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
