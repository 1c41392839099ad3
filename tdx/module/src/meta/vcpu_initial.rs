//! The fields of a vCPU after TDH.VP.INIT.

use super::vcpu_store::{VcpuStore, class, management, per_vm};
use super::vmcs;
use crate::platform::Platform;
use crate::td::Td;
use crate::vcpu::Vcpu;
use crate::virt::cpuid::XFAM_LBR;
use crate::virt::msr;
use std::sync::atomic::Ordering::Acquire;

/// An address or value that has not been set.
pub(crate) const UNSET: u64 = u64::MAX;

/// Encoding and value of the fields that are not 0 and the same in the VMCS of every VM.
#[rustfmt::skip]
const ALL_VMS: &[(u32, u64)] = &[
    (0x0002, 0xFFFF), // posted-interrupt notification vector
    (0x2000, UNSET), (0x2002, UNSET), // I/O bitmaps
    (0x2006, UNSET), (0x2008, UNSET), (0x200A, UNSET), // MSR areas
    (0x200E, UNSET), // PML address
    (0x2014, UNSET), // APIC access
    (0x2016, UNSET), // posted-interrupt descriptor
    (0x2024, UNSET), // EPTP list
    (0x2026, UNSET), (0x2028, UNSET), // VMREAD and VMWRITE bitmaps
    (0x202E, UNSET), (0x2036, UNSET), (0x203E, UNSET), // ENCLS, ENCLV and PCONFIG exiting
    (0x2804, 0x0007_0406_0007_0406), // PAT
    (0x2806, 0x901), // EFER: SCE, LME, NXE
    (0x280A, UNSET), (0x280C, UNSET), (0x280E, UNSET), (0x2810, UNSET), // PDPTEs
    (0x4000, PIN_CONTROLS),
    (0x4004, 1 << 18), // #MC
    (0x4800, 0xFFFF_FFFF), (0x4802, 0xFFFF_FFFF), (0x4804, 0xFFFF_FFFF), // limits of ES, CS, SS,
    (0x4806, 0xFFFF_FFFF), (0x4808, 0xFFFF_FFFF), (0x480A, 0xFFFF_FFFF), // DS, FS, GS,
    (0x480C, 0xFFFF), (0x480E, 0xFFFF), (0x4810, 0xFFFF), // LDTR, TR and GDTR
    (0x4814, 0xC093), (0x4816, 0xC09B), (0x4818, 0xC093), // access rights
    (0x481A, 0xC093), (0x481C, 0xC093), (0x481E, 0xC093),
    (0x4820, 0x1_0082), (0x4822, 0x8B),
    (0x6800, 0x21), // CR0: PE, NE
    (0x6804, msr::CR4_FIXED0),
    (0x681A, 0x400), // DR7
    (0x681E, RESET_RIP),
    (0x6820, 2), // RFLAGS
];

/// The word of the XSAVE header that says which components the buffer has room for, and in which format.
const XCOMP_BV: (u8, u32) = (class::XBUFF, 65);
pub(crate) const COMPACTED: u64 = 1 << 63;

/// Sets the fields that change once L1 has run: its VMCS is up to date and launched, and XSAVES has saved the TD's
/// state components into the vCPU's buffer. Without a processor model all are in their initial state: its header says so.
pub(crate) fn note_first_run(td: &Td, f: &mut VcpuStore) {
    f.set(XCOMP_BV, COMPACTED | td.config().xfam);
    for code in ENTERED {
        f.set_of_vm(code, 0, 1);
    }
}

/// Flags of a vCPU's VMCSs on the processor that has entered it: launched, with addresses and other fields of this
/// processor and module in place.
const ENTERED: [u32; 3] = [
    per_vm::LAUNCHED,
    per_vm::LP_HPAS_UPDATED,
    per_vm::MODULE_FIELDS_UPDATED,
];

/// RIP of a vCPU after reset.
pub(crate) const RESET_RIP: u64 = 0xFFFF_FFF0;
/// External interrupts and NMIs exit.
const PIN_CONTROLS: u64 = 0x29;
const PROTECTED_MODE: u64 = 1;
const CR0_L1_SHADOW: u64 = 0x8000_0021;
const CR4_L1_SHADOW: u64 = 0x40;
const USER_WAIT_AND_PAUSE: u64 = 1 << 26;
const SECONDARY_L1: u64 = 0x173C_B3FA;
const SECONDARY_L2: u64 = 0x1738_B3FA;

/// The masks of CR0 and CR4 bits that belong to the module, in an L1.
fn control_register_masks(p: &Platform, td: &Td) -> (u64, u64) {
    let config = td.config();
    let fixed1 = |address| msr::vmx_capability(&p.cfg, config.attributes, config.xfam, address);
    let cr0 = !fixed1(msr::CR0_FIXED1) | msr::CR0_FIXED0 | PROTECTED_MODE;
    let cr4 = !fixed1(msr::CR4_FIXED1) | msr::CR4_FIXED0;
    (cr0, cr4)
}

/// Fills the store of a vCPU whose pages and index are known.
pub(crate) fn initialise(p: &Platform, td: &Td, vcpu: &Vcpu, f: &mut VcpuStore) {
    let l2_vms = td.l2_vms.load(Acquire);
    *f = VcpuStore::new(l2_vms);
    for vm in 0..=l2_vms {
        vmcs_of(p, td, vcpu, f, vm);
        per_vm_fields(p, td, f, vm);
    }
    let (cr0, cr4) = control_register_masks(p, td);
    let base = [
        (management::BASE_L2_CR0_MASK, cr0 & !PROTECTED_MODE),
        (management::BASE_L2_CR0_SHADOW, msr::CR0_FIXED0),
        (management::BASE_L2_CR4_MASK, cr4),
        (management::BASE_L2_CR4_SHADOW, msr::CR4_FIXED0),
        // The first entry of the SEAM database.
        (0x32, 1),
    ];
    for (code, value) in base {
        f.set_management(code, value);
    }
    const DR6: (u8, u32) = (class::STATE, 6);
    const XCR0: (u8, u32) = (class::STATE, 0x20);
    const FMASK: (u8, u32) = (class::MSR, 0x2084);
    const LBR_DEPTH: (u8, u32) = (class::MSR, 0x14CF);
    f.set(DR6, 0xFFFF_0FF0);
    f.set(XCR0, 1);
    f.set(XCOMP_BV, COMPACTED);
    f.set(FMASK, 0x2_0200);
    if td.config().xfam >> XFAM_LBR & 1 != 0 {
        f.set(LBR_DEPTH, 32);
    }
}

fn vmcs_of(p: &Platform, td: &Td, vcpu: &Vcpu, f: &mut VcpuStore, vm: u8) {
    let config = td.config();
    let private = |pa| td.private_pa(&p.cfg, pa);
    let tdcx = |i: usize| td.tdcx.get(i).map_or(0, |pa| pa.load(Acquire));
    let zero_page = private(tdcx(ZERO_PAGE));
    let vpid = u64::from(td.hkid()) << 2 | u64::from(vm);
    for (encoding, value) in ALL_VMS {
        f.set_vmcs(vm, *encoding, *value);
    }
    let exit_controls = msr::vmx_capability(&p.cfg, config.attributes, config.xfam, 0x48F);
    let entry_controls = msr::vmx_capability(&p.cfg, config.attributes, config.xfam, 0x490);
    let primary = msr::vmx_capability(&p.cfg, config.attributes, config.xfam, 0x48E);
    let common = [
        (0x0000, vpid & 0xFFFF),
        (vmcs::TSC_OFFSET, config.tsc.offset),
        (vmcs::TSC_MULTIPLIER, config.tsc.multiplier),
        (0x2038, zero_page),
        (0x203A, zero_page),
        (0x2808, perf_global_ctrl(p)),
        (vmcs::PRIMARY_CONTROLS, primary & 0xFFFF_FFFF),
        (0x400C, exit_controls & 0xFFFF_FFFF),
        (0x4012, entry_controls & 0xFFFF_FFFF),
        (vmcs::TD_HKID, u64::from(td.hkid())),
    ];
    for (encoding, value) in common {
        f.set_vmcs(vm, encoding, value);
    }
    let (cr0, cr4) = control_register_masks(p, td);
    let wait = if config.flags.waitpkg {
        0
    } else {
        USER_WAIT_AND_PAUSE
    };
    let own = if vm == 0 {
        [
            (vmcs::MSR_BITMAPS, private(tdcx(2))),
            (vmcs::EPTP, td.root_pa() | config.eptp_controls),
            (vmcs::VE_INFORMATION, private(vcpu.page_pa(0))),
            (vmcs::SHARED_EPTP, zero_page),
            (vmcs::SECONDARY_CONTROLS, SECONDARY_L1 & !wait),
            (vmcs::CR0_MASK, cr0),
            (vmcs::CR4_MASK, cr4),
            (vmcs::CR0_SHADOW, CR0_L1_SHADOW),
            (vmcs::CR4_SHADOW, CR4_L1_SHADOW),
            (vmcs::VIRTUAL_APIC, 0),
        ]
    } else {
        [
            (vmcs::MSR_BITMAPS, private(vcpu.page_pa(l2_page(vm) + 1))),
            (vmcs::EPTP, tdcx(5 + usize::from(vm)) | config.eptp_controls),
            (vmcs::VE_INFORMATION, UNSET),
            (vmcs::SHARED_EPTP, UNSET),
            (vmcs::SECONDARY_CONTROLS, SECONDARY_L2 & !wait),
            (vmcs::CR0_MASK, UNSET),
            (vmcs::CR4_MASK, UNSET),
            (vmcs::CR0_SHADOW, 0x21),
            (vmcs::CR4_SHADOW, msr::CR4_FIXED0),
            (vmcs::VIRTUAL_APIC, UNSET),
        ]
    };
    for (encoding, value) in own {
        f.set_vmcs(vm, encoding, value);
    }
}

/// The page of zeros in TDCS.
pub(crate) const ZERO_PAGE: usize = 4;

/// The first TDVPS page of an L2 VM: its VMCS; MSR bitmaps and their shadow follow.
pub(crate) const fn l2_page(vm: u8) -> usize {
    6 + 3 * (vm as usize - 1)
}

/// All general-purpose counters on, as many as the CPU has.
fn perf_global_ctrl(p: &Platform) -> u64 {
    let counters = p.cfg.native_cpuid(0xA, 0)[0] >> 8 & 0xFF;
    (1u64 << counters.min(63)) - 1
}

fn per_vm_fields(p: &Platform, td: &Td, f: &mut VcpuStore, vm: u8) {
    let unset = [
        per_vm::TSC_DEADLINE,
        per_vm::SHARED_EPTP,
        per_vm::GUEST_STATE_GPA,
        per_vm::GUEST_STATE_HPA,
        per_vm::VAPIC_GPA,
        per_vm::VAPIC_HPA,
    ];
    for code in unset {
        f.set_of_vm(code, vm, UNSET);
    }
    let secondary = if vm == 0 { SECONDARY_L1 } else { SECONDARY_L2 };
    f.set_of_vm(per_vm::SECONDARY_CONTROLS, vm, secondary);
    if vm == 0 {
        let (cr0, cr4) = control_register_masks(p, td);
        let own = [
            (per_vm::CR0_MASK, cr0),
            (per_vm::CR0_SHADOW, CR0_L1_SHADOW),
            (per_vm::CR4_MASK, cr4),
            (per_vm::CR4_SHADOW, CR4_L1_SHADOW),
            (per_vm::POSTED_INTERRUPT_DESCRIPTOR, UNSET),
            (per_vm::PIN_CONTROLS, PIN_CONTROLS),
            (per_vm::NOTIFICATION_VECTOR, 0xFFFF),
        ];
        for (code, value) in own {
            f.set_of_vm(code, vm, value);
        }
        return;
    }
    f.set_of_vm(per_vm::CR0_MASK, vm, UNSET);
    f.set_of_vm(per_vm::CR4_MASK, vm, UNSET);
    let first = class::L2_MSR_BITMAPS + class::L2_STEP * (vm - 1);
    for word in 0..msr::BITMAP_WORDS as u32 {
        f.set((first, word), UNSET);
        f.set((first + 1, word), UNSET);
    }
}
