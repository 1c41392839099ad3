//! `KVM_GET_SUPPORTED_CPUID`: an x86-64 processor of either vendor with SSE2, long mode and NX, and
//! the leaf that tells of memory encryption.

use kvm_ops::sim::SimHost;
use kvm_ops::{Host, PspPort, Vendor};
use kvm_ops_uapi::system::{Cpuid2, CpuidEntry2, MAX_CPUID_ENTRIES, vm_type};
use kvm_ops_uapi::{Errno, U32};
use zerocopy::IntoBytes;

use crate::refusal::Result;
use crate::{Kernel, Process, Refusal};

/// Bits of guest-physical and linear addresses.
const ADDRESS_BITS: u32 = 48 << 8 | 52;

fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry2 {
    CpuidEntry2 {
        function: U32::new(function),
        eax: U32::new(eax),
        ebx: U32::new(ebx),
        ecx: U32::new(ecx),
        edx: U32::new(edx),
        ..CpuidEntry2::default()
    }
}

/// The registers of leaf 0, from the vendor's twelve letters.
fn vendor_leaf(last: u32, name: &[u8; 12]) -> [u32; 4] {
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    [last, word(0), word(8), word(4)]
}

pub(crate) fn supported(host: &SimHost, vm_types: u32) -> Vec<CpuidEntry2> {
    let amd = host.vendor() == Vendor::Amd;
    let name = if amd {
        b"AuthenticAMD"
    } else {
        b"GenuineIntel"
    };
    // Family 19h model 11h; family 6 model 8fh.
    let signature = if amd { 0x00a1_0f11 } else { 0x0008_06f8 };
    // x2APIC, CMPXCHG16B, hypervisor; FPU to SSE2 without machine checks.
    let (ecx, edx) = (1 << 31 | 1 << 21 | 1 << 13, 0x0783_fb7f);
    let mut list = vec![
        entry(0, vendor_leaf(0xd, name)),
        entry(1, [signature, 0x0001_0800, ecx, edx]),
        entry(
            0x8000_0000,
            vendor_leaf(if amd { 0x8000_001f } else { 0x8000_0008 }, name),
        ),
        // LAHF; SYSCALL, NX, large pages, long mode.
        entry(
            0x8000_0001,
            [signature, 0, 1, 1 << 29 | 1 << 26 | 1 << 20 | 1 << 11],
        ),
        entry(0x8000_0008, [ADDRESS_BITS, 0, 0, 0]),
    ];
    if amd {
        let bit = |number: u64, bit: u32| (vm_types >> number & 1) << bit;
        let eax = bit(vm_type::SEV, 1) | bit(vm_type::SEV_ES, 3) | bit(vm_type::SNP, 4);
        let c_bit = host.psp().map_or(0, |psp| psp.c_bit());
        list.push(entry(0x8000_001f, [eax, c_bit, 0, 0]));
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
