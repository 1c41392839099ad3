//! Values that control registers can have: by their own rules, and by what the guest's CPUID offers.

use kvm_ops::cr0;
use kvm_ops_uapi::state::Sregs;
use kvm_ops_uapi::system::CpuidEntry2;

/// A register of a leaf's answer.
#[derive(Clone, Copy)]
enum Output {
    Ebx,
    Ecx,
    Edx,
}
use Output::{Ebx, Ecx, Edx};

/// A feature in CPUID: leaf, register, bit.
type Feature = (u32, Output, u32);

/// Bits of CR4 that every guest may set: VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT.
const CR4_ALWAYS: u64 = 0x7ff;

/// Bits of CR4, and the features that they need.
const CR4_NEEDS: [(u64, Feature); 10] = [
    (1 << 11, (7, Ecx, 2)),  // UMIP
    (1 << 12, (7, Ecx, 16)), // LA57
    (1 << 13, (1, Ecx, 5)),  // VMXE
    (1 << 16, (7, Ebx, 0)),  // FSGSBASE
    (1 << 17, (1, Ecx, 17)), // PCIDE
    (1 << 18, (1, Ecx, 26)), // OSXSAVE
    (1 << 20, (7, Ebx, 7)),  // SMEP
    (1 << 21, (7, Ebx, 20)), // SMAP
    (1 << 22, (7, Ecx, 3)),  // PKE
    (1 << 24, (7, Ecx, 31)), // PKS
];

/// Bits of EFER that every guest may set: SCE and LMSLE.
const EFER_ALWAYS: u64 = 1 | 1 << 13;

/// Bits of EFER, and the features that they need.
const EFER_NEEDS: [(u64, Feature); 5] = [
    (EFER_LME, (0x8000_0001, Edx, 29)),
    (EFER_LMA, (0x8000_0001, Edx, 29)),
    (1 << 11, (0x8000_0001, Edx, 20)), // NXE
    (1 << 12, (0x8000_0001, Ecx, 2)),  // SVME
    (1 << 14, (0x8000_0001, Edx, 25)), // FFXSR
];

pub(super) const EFER_LME: u64 = 1 << 8;
pub(super) const EFER_LMA: u64 = 1 << 10;
pub(super) const CR4_PAE: u64 = 1 << 5;

/// The guest's CPUID has the feature.
fn has(cpuid: &[CpuidEntry2], (leaf, output, bit): Feature) -> bool {
    let found = cpuid
        .iter()
        .find(|entry| entry.function == leaf && entry.index == 0);
    found.is_some_and(|entry| {
        let value = match output {
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        };
        value.get() >> bit & 1 != 0
    })
}

/// Only bits are set that are always there, or whose feature is.
fn allows(value: u64, always: u64, needs: &[(u64, Feature)], cpuid: &[CpuidEntry2]) -> bool {
    let offered = needs.iter().filter(|(_, feature)| has(cpuid, *feature));
    value & !offered.fold(always, |bits, (bit, _)| bits | bit) == 0
}

/// The rules between control registers that an entry would fail by (`kvm_is_valid_sregs`), and what the guest's CPUID offers.
pub(super) fn are_valid(sregs: &Sregs, cpuid: &[CpuidEntry2]) -> bool {
    let (value, cr4, efer) = (sregs.cr0.get(), sregs.cr4.get(), sregs.efer.get());
    let long = efer & EFER_LME != 0 && value & cr0::PG != 0;
    let modes = if long {
        cr4 & CR4_PAE != 0 && efer & EFER_LMA != 0
    } else {
        efer & EFER_LMA == 0 && sregs.cs.l == 0
    };
    let offered =
        allows(cr4, CR4_ALWAYS, &CR4_NEEDS, cpuid) && allows(efer, EFER_ALWAYS, &EFER_NEEDS, cpuid);
    modes && cr0::is_valid(value) && offered && sregs.cr8.get() < 16
}
