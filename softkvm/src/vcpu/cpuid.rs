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
    let now = now(&state.cpu);
    let same = || current(&state.cpuid, now) == current(&list, now);
    ensure(!state.has_run || same(), AFTER_RUN)?;
    if let Cpu::Processor(vcpu) = &mut state.cpu {
        vcpu.set_cpuid(&entries(&list))?;
    }
    state.cpuid = list;
    Ok(0)
}

/// What the bits and sizes follow that change as the guest runs.
#[derive(Clone, Copy)]
struct Now {
    cr4: u64,
    xcr0: u64,
}

/// They are 0 of a vCPU whose registers are secret.
fn now(cpu: &Cpu) -> Now {
    Now {
        cr4: cpu.sregs().map_or(0, |sregs| sregs.cr4.get()),
        xcr0: cpu.xcrs().map_or(0, |xcrs| xcrs.xcr0),
    }
}

/// The list as it is now: OSXSAVE in leaf 1 and OSPKE in leaf 7 follow CR4, and the size of the XSAVE area in leaf 0xd
/// follows XCR0.
fn current(list: &[CpuidEntry2], now: Now) -> Vec<CpuidEntry2> {
    /// Leaf, the bit in ECX of the feature and of its use, the bit in CR4.
    const BITS: [(u32, u32, u32, u32); 2] = [(1, 26, 27, 18), (7, 3, 4, 22)];
    let mut current = list.to_vec();
    for (leaf, feature, used, enabled) in BITS {
        if let Some(entry) = find(&mut current, leaf, 0) {
            let ecx = entry.ecx.get();
            let is_used = ecx >> feature & 1 != 0 && now.cr4 >> enabled & 1 != 0;
            entry.ecx = U32::new(ecx & !(1 << used) | u32::from(is_used) << used);
        }
    }
    for subleaf in [0, 1] {
        if let Some(entry) = find(&mut current, XSAVE, subleaf)
            && (subleaf == 0 || entry.eax.get() & COMPACTED != 0)
        {
            entry.ebx = U32::new(area(list, now.xcr0, subleaf == 1));
        }
    }
    current
}

fn find(list: &mut [CpuidEntry2], leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry2> {
    list.iter_mut()
        .find(|entry| entry.function == leaf && entry.index == subleaf)
}

/// The leaf of XSAVE areas. Of subleaf 1, EAX: XSAVEC and XSAVES, which write the compacted form.
const XSAVE: u32 = 0xd;
const COMPACTED: u32 = 1 << 1 | 1 << 3;
/// Bytes of the legacy region and the header.
const BASE: u32 = 576;

/// Bytes of the XSAVE area of the components in a mask, of which the list tells size (EAX), place (EBX), and whether its place
/// in the compacted form is aligned to 64 bytes (ECX bit 1).
fn area(list: &[CpuidEntry2], mask: u64, compacted: bool) -> u32 {
    let parts = list.iter().filter(|entry| {
        let number = entry.index.get();
        entry.function == XSAVE && (2..63).contains(&number) && mask >> number & 1 != 0
    });
    parts.fold(BASE, |end, part| {
        let at = match (compacted, part.ecx.get() & 2 != 0) {
            (false, _) => part.ebx.get(),
            (true, false) => end,
            (true, true) => end.next_multiple_of(64),
        };
        end.max(at.saturating_add(part.eax.get()))
    })
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

pub(super) fn get(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut head: Cpuid2 = arg::read(process, argument, COPY)?;
    let list = {
        let state = file.state();
        current(&state.cpuid, now(&state.cpu))
    };
    if (head.nent.get() as usize) < list.len() {
        return Err(Errno::E2BIG.into());
    }
    let at = argument.wrapping_add(size_of::<Cpuid2>() as u64);
    arg::write(process, at, &list[..], ENTRIES)?;
    head.nent = U32::new(list.len() as u32);
    arg::write(process, argument, &head, COPY)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(index: u32, size: u32, place: u32, ecx: u32) -> CpuidEntry2 {
        CpuidEntry2 {
            function: U32::new(XSAVE),
            index: U32::new(index),
            eax: U32::new(size),
            ebx: U32::new(place),
            ecx: U32::new(ecx),
            ..CpuidEntry2::default()
        }
    }

    #[test]
    fn the_size_of_an_xsave_area_is_that_of_its_components() {
        let list = [
            part(0, 7, 0, 0),
            part(1, COMPACTED, 0, 0),
            part(2, 256, 576, 0),
            part(5, 70, 1088, 0),
            part(9, 8, 2688, 2),
        ];
        for (mask, standard, compacted) in [
            (1, 576, 576),
            (3, 576, 576),
            (7, 832, 832),
            (0x27, 1158, 902),
            (0x227, 2696, 968),
            (0x203, 2696, 584),
        ] {
            assert_eq!(area(&list, mask, false), standard, "{mask:#x}");
            assert_eq!(area(&list, mask, true), compacted, "{mask:#x}");
        }
        let sizes = |xcr0| {
            let list = current(&list, Now { cr4: 0, xcr0 });
            [list[0].ebx.get(), list[1].ebx.get()]
        };
        assert_eq!(sizes(7), [832, 832]);
        assert_eq!(sizes(0x27), [1158, 902]);
    }

    #[test]
    fn without_compacted_areas_their_size_stays_as_it_was_set() {
        let list = [part(1, 1, 5, 0), part(2, 256, 576, 0)];
        let list = current(&list, Now { cr4: 0, xcr0: 7 });
        assert_eq!(list[0].ebx.get(), 5);
    }
}
