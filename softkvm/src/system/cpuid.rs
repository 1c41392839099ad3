//! `KVM_GET_SUPPORTED_CPUID`.

use kvm_ops::sim::SimHost;
use kvm_ops::{CpuidEntry, Host, PspPort, Vendor};
use kvm_ops_uapi::system::{
    CPUID_FLAG_SIGNIFICANT_INDEX, Cpuid2, CpuidEntry2, MAX_CPUID_ENTRIES, vm_type,
};
use kvm_ops_uapi::{Errno, U32};
use zerocopy::IntoBytes;

use crate::refusal::Result;
use crate::{Kernel, Process, Refusal};

/// The leaf that tells of memory encryption.
pub(crate) const ENCRYPTION: u32 = 0x8000_001f;
/// The leaf whose EAX has the widths of addresses: physical ones in bits 7:0, and those of a guest in bits 23:16.
const ADDRESSES: u32 = 0x8000_0008;
/// Bits of physical addresses, which are those of a guest too with second-level tables of four levels: TDs take them
/// from here, and no guest has more than the machine.
const WIDTH: u32 = 48;
/// The leaf whose EAX is the last extended one.
const LAST_EXTENDED: u32 = 0x8000_0000;

/// KVM's own leaves: its name with the last of them, and what it offers to guests (`KVM_FEATURE_*`). Ports need no delay.
const KVM_LEAVES: [(u32, [u32; 4]); 2] = [
    (
        0x4000_0000,
        [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x0000_004d],
    ),
    (0x4000_0001, [1 << 1, 0, 0, 0]),
];

fn entry(from: &CpuidEntry) -> CpuidEntry2 {
    let [eax, ebx, ecx, edx] = from.regs.map(U32::new);
    let flags = match from.subleaf_significant {
        true => CPUID_FLAG_SIGNIFICANT_INDEX,
        false => 0,
    };
    CpuidEntry2 {
        function: U32::new(from.leaf),
        index: U32::new(from.subleaf),
        flags: U32::new(flags),
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry2::default()
    }
}

/// What the processors of the software machine answer, KVM's leaves, and on AMD what encryption there is.
pub(crate) fn supported(host: &SimHost, vm_types: u32) -> Vec<CpuidEntry2> {
    let mut list: Vec<CpuidEntry2> = host.cpuid().iter().map(entry).collect();
    list.extend(KVM_LEAVES.map(|(leaf, regs)| {
        entry(&CpuidEntry {
            leaf,
            regs,
            ..CpuidEntry::default()
        })
    }));
    for leaf in list.iter_mut().filter(|leaf| leaf.function == ADDRESSES) {
        leaf.eax = U32::new(leaf.eax.get() & 0xff00 | WIDTH | WIDTH << 16);
    }
    if host.vendor() == Vendor::Amd {
        for leaf in list
            .iter_mut()
            .filter(|leaf| leaf.function == LAST_EXTENDED)
        {
            leaf.eax = U32::new(ENCRYPTION);
        }
        let bit = |number: u64, bit: u32| (vm_types >> number & 1) << bit;
        let eax = bit(vm_type::SEV, 1) | bit(vm_type::SEV_ES, 3) | bit(vm_type::SNP, 4);
        let c_bit = host.psp().map_or(0, |psp| psp.c_bit());
        list.push(entry(&CpuidEntry {
            leaf: ENCRYPTION,
            regs: [eax, c_bit, 0, 0],
            ..CpuidEntry::default()
        }));
    }
    list
}

pub(super) fn get_supported(kernel: &Kernel, process: &dyn Process, argument: u64) -> Result<i64> {
    let fault = |_| Refusal::from(Errno::EFAULT);
    let mut head = Cpuid2::default();
    process.read(argument, head.as_mut_bytes()).map_err(fault)?;
    let list = kernel.cpuid();
    if head.nent.get().min(MAX_CPUID_ENTRIES) < list.len() as u32 {
        return Err(Errno::E2BIG.into());
    }
    let at = argument.wrapping_add(size_of::<Cpuid2>() as u64);
    process.write(at, list.as_bytes()).map_err(fault)?;
    head.nent = U32::new(list.len() as u32);
    process.write(argument, head.as_bytes()).map_err(fault)?;
    Ok(0)
}
