//! CPUID by table.

use alloc::collections::BTreeMap;

use crate::exec::xstate::{
    AVX, HIGH, HIGH_BYTES, PKRU, PKRU_AT, PKRU_BYTES, SSE, X87, area_bytes, compact,
};
use crate::state::{CR4_OSXSAVE, CR4_PKE, Core};

/// Registers that CPUID returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The answers to CPUID. Changing them hides features from software; it does not take
/// instructions away.
///
/// Bits that depend on the processor's state (OSXSAVE, OSPKE, APIC ids, the enabled XSAVE size)
/// are filled in when CPUID is executed.
#[derive(Clone, Debug)]
pub struct CpuidTable {
    leaves: BTreeMap<(u32, u32), CpuidLeaf>,
}

const fn leaf(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidLeaf {
    CpuidLeaf { eax, ebx, ecx, edx }
}

/// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH,
/// MMX, FXSR, SSE, SSE2.
const FEATURES_EDX: u32 = 0x078b_fbff;
/// Leaf 0x80000001, ECX: misaligned SSE mode.
const MISALIGNED_SSE: u32 = 1 << 7;
/// SSE3, PCLMULQDQ, SSSE3, FMA, CX16, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC deadline, AES,
/// XSAVE, AVX, F16C, RDRAND, hypervisor.
const FEATURES_ECX: u32 = 1 << 0
    | 1 << 1
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 17
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | 1 << 22
    | 1 << 23
    | 1 << 24
    | 1 << 25
    | 1 << 26
    | 1 << 28
    | 1 << 29
    | 1 << 30
    | 1 << 31;
/// FSGSBASE, TSC_ADJUST, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, no FPU selectors, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
const STRUCTURED_EBX: u32 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 10
    | 1 << 13
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 23
    | 1 << 24
    | 1 << 29;
/// UMIP, PKU, LA57, RDPID, MOVDIRI, MOVDIR64B, PKS.
const STRUCTURED_ECX: u32 = 1 << 2 | 1 << 3 | 1 << 16 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 31;
/// SERIALIZE.
const STRUCTURED_EDX: u32 = 1 << 14;

impl CpuidTable {
    /// The features that this processor has, under the vendor name of Intel.
    pub fn intel() -> Self {
        Self::with_vendor(*b"GenuineIntel")
    }

    /// The features that this processor has, under the vendor name of AMD.
    pub fn amd() -> Self {
        Self::with_vendor(*b"AuthenticAMD")
    }

    /// A table without a leaf.
    pub const fn empty() -> Self {
        Self {
            leaves: BTreeMap::new(),
        }
    }

    fn with_vendor(vendor: [u8; 12]) -> Self {
        let word =
            |i: usize| u32::from_le_bytes([vendor[i], vendor[i + 1], vendor[i + 2], vendor[i + 3]]);
        let (ebx, edx, ecx) = (word(0), word(4), word(8));
        let mut t = Self {
            leaves: BTreeMap::new(),
        };
        t.set(0, 0, leaf(0x16, ebx, ecx, edx));
        t.set(
            1,
            0,
            leaf(0x0008_06f8, 0x0001_0800, FEATURES_ECX, FEATURES_EDX),
        );
        t.set(2, 0, leaf(0x00ff_ff01, 0, 0, 0));
        t.set(
            7,
            0,
            leaf(0, STRUCTURED_EBX, STRUCTURED_ECX, STRUCTURED_EDX),
        );
        let all = X87 | SSE | AVX | PKRU;
        t.set(
            0xd,
            0,
            leaf(all as u32, HIGH as u32, area_bytes(all) as u32, 0),
        );
        // XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES.
        t.set(0xd, 1, leaf(0b1111, 0, 0, 0));
        t.set(0xd, 2, leaf(HIGH_BYTES as u32, HIGH as u32, 0, 0));
        t.set(0xd, 9, leaf(PKRU_BYTES as u32, PKRU_AT as u32, 0, 0));
        // TSC at 1 GHz over a crystal of 25 MHz; the APIC timer counts the crystal.
        t.set(0x15, 0, leaf(1, 40, 25_000_000, 0));
        t.set(0x16, 0, leaf(1000, 1000, 25, 0));
        t.set(0x8000_0000, 0, leaf(0x8000_0008, ebx, ecx, edx));
        // LAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
        // AMD repeats features of leaf 1 in EDX, and has the misaligned SSE mode (ECX bit 7).
        let (amd, misaligned) = if vendor == *b"AuthenticAMD" {
            (FEATURES_EDX & 0x0183_f3ff, MISALIGNED_SSE)
        } else {
            (0, 0)
        };
        t.set(
            0x8000_0001,
            0,
            leaf(0, 0, 1 | 1 << 5 | 1 << 8 | misaligned, 0x2c10_0800 | amd),
        );
        let name = b"kvm-ops software processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        for (i, part) in name.chunks_exact(16).enumerate() {
            let word =
                |n: usize| u32::from_le_bytes([part[n], part[n + 1], part[n + 2], part[n + 3]]);
            t.set(
                0x8000_0002 + i as u32,
                0,
                leaf(word(0), word(4), word(8), word(12)),
            );
        }
        // Invariant TSC.
        t.set(0x8000_0007, 0, leaf(0, 0, 0, 1 << 8));
        // WBNOINVD.
        t.set(0x8000_0008, 0, leaf(46 | 57 << 8, 1 << 9, 0, 0));
        t
    }

    /// MXCSR has the bit by which operands in memory need not be aligned.
    pub(crate) fn has_misaligned_sse(&self) -> bool {
        self.get(0x8000_0001, 0).ecx & MISALIGNED_SSE != 0
    }

    /// Sets a leaf. Leaves without subleaves are at subleaf 0.
    pub fn set(&mut self, function: u32, index: u32, value: CpuidLeaf) {
        self.leaves.insert((function, index), value);
    }

    /// A leaf of the table; zeros if the table lacks it.
    pub fn get(&self, function: u32, index: u32) -> CpuidLeaf {
        self.leaves
            .get(&(function, index))
            .copied()
            .unwrap_or_default()
    }

    /// The leaves of the table, as function, subleaf and value, in this order.
    pub fn leaves(&self) -> impl Iterator<Item = (u32, u32, CpuidLeaf)> + '_ {
        let leaves = self.leaves.iter();
        leaves.map(|((function, index), leaf)| (*function, *index, *leaf))
    }

    /// A bit of a leaf; register 0 is EAX.
    pub(crate) fn has(&self, leaf: u32, register: usize, bit: u32) -> bool {
        let leaf = self.get(leaf, 0);
        let registers = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
        registers[register & 3] >> bit & 1 != 0
    }

    /// True under AMD's name, some of whose instructions have other modes.
    pub(crate) fn is_amd(&self) -> bool {
        self.get(0, 0).ebx == u32::from_le_bytes(*b"Auth")
    }

    pub(crate) fn physical_bits(&self) -> u8 {
        (self.get(0x8000_0008, 0).eax as u8).clamp(32, 52)
    }
}

impl Core {
    /// CPUID as the instruction answers it.
    pub(crate) fn cpuid_leaf(&self, function: u32, index: u32) -> CpuidLeaf {
        let with_index = matches!(function, 4 | 7 | 0xb | 0xd | 0xf | 0x10 | 0x14 | 0x1f);
        let mut r = self.cpuid.get(function, if with_index { index } else { 0 });
        match function {
            1 => {
                r.ebx = r.ebx & 0x00ff_ffff | self.apic.id() << 24;
                if self.cr4 & CR4_OSXSAVE != 0 {
                    r.ecx |= 1 << 27;
                }
                if self.apic.base() & 1 << 11 == 0 {
                    r.edx &= !(1 << 9);
                }
            }
            7 if index == 0 && self.cr4 & CR4_PKE != 0 => r.ecx |= 1 << 4,
            0 if self.msrs.limits_cpuid() => r.eax = r.eax.min(2),
            0x8000_0001 if self.msrs.disables_nx() => r.edx &= !(1 << 20),
            0xb | 0x1f => r.edx = self.apic.id(),
            0xd if index == 0 => r.ebx = area_bytes(self.fpu.xcr0) as u32,
            0xd if index == 1 => r.ebx = compact::bytes(self.fpu.xcr0) as u32,
            _ => {}
        }
        r
    }
}
