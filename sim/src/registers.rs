//! The register state of a vCPU that runs no instructions: every group is kept, so that it can be
//! read back and carried to another platform.

use std::collections::BTreeMap;

use kvm_ops::{
    DebugRegs, DescTable, Error, Events, Field, MpState, Msr, Regs, Result, Segment, Sregs, Xcrs,
    Xsave, cr0, rflags,
};

/// Register state, as after power-on (SDM vol. 3, table 11-1).
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(crate) regs: Regs,
    sregs: Sregs,
    pub(crate) xsave: Xsave,
    /// Without the interrupt and the NMI that wait, which other threads post too.
    pub(crate) events: Events,
    pub(crate) debug: DebugRegs,
    pub(crate) xcrs: Xcrs,
    pub(crate) mp_state: MpState,
    msrs: BTreeMap<u32, u64>,
}

// MSRs that are fields of `Sregs`.
const IA32_APIC_BASE: u32 = 0x1b;
/// Bit of IA32_APIC_BASE: x2APIC mode.
pub(crate) const X2APIC_MODE: u64 = 1 << 10;
const IA32_EFER: u32 = 0xc000_0080;
const IA32_FS_BASE: u32 = 0xc000_0100;
const IA32_GS_BASE: u32 = 0xc000_0101;
const SPECIAL: [u32; 4] = [IA32_APIC_BASE, IA32_EFER, IA32_FS_BASE, IA32_GS_BASE];

/// The other MSRs that the platform has, with their value after power-on.
const MSRS: [(u32, u64); 10] = [
    (TSC, 0),
    (0x174, 0),                     // IA32_SYSENTER_CS
    (0x175, 0),                     // IA32_SYSENTER_ESP
    (0x176, 0),                     // IA32_SYSENTER_EIP
    (0x277, 0x0007_0406_0007_0406), // IA32_PAT
    (0xc000_0081, 0),               // IA32_STAR
    (0xc000_0082, 0),               // IA32_LSTAR
    (0xc000_0083, 0),               // IA32_CSTAR
    (0xc000_0084, 0),               // IA32_FMASK
    (0xc000_0102, 0),               // IA32_KERNEL_GS_BASE
];

mod efer {
    pub(super) const LME: u64 = 1 << 8;
    pub(super) const LMA: u64 = 1 << 10;
    /// The bits that the platform has: SCE, LME, LMA, NXE.
    pub(super) const DEFINED: u64 = 1 | LME | LMA | 1 << 11;
}

/// The time-stamp counter. It is the only one of [`MSRS`] that a save area does not hold.
const TSC: u32 = 0x10;

/// True for an MSR of an encrypted vCPU's start state.
pub(crate) fn is_measured(index: u32) -> bool {
    index != TSC && has_msr(index)
}

pub(crate) fn has_msr(index: u32) -> bool {
    SPECIAL.contains(&index) || MSRS.iter().any(|(msr, _)| *msr == index)
}

impl Registers {
    /// `boots` is true for the processor that boots.
    pub(crate) fn power_on(boots: bool) -> Self {
        let data = Segment {
            limit: 0xffff,
            kind: 3,
            present: true,
            s: true,
            ..Segment::default()
        };
        let system = |kind| Segment {
            kind,
            s: false,
            ..data
        };
        let table = DescTable {
            base: 0,
            limit: 0xffff,
        };
        Self {
            regs: Regs {
                rip: 0xfff0,
                rflags: rflags::RESERVED,
                ..Regs::default()
            },
            sregs: Sregs {
                cs: Segment {
                    selector: 0xf000,
                    base: 0xffff_0000,
                    kind: 11,
                    ..data
                },
                ds: data,
                es: data,
                fs: data,
                gs: data,
                ss: data,
                tr: system(11),
                ldt: system(2),
                gdt: table,
                idt: table,
                // Caches off, and ET.
                cr0: cr0::CD | cr0::NW | 1 << 4,
                // Enabled.
                apic_base: 0xfee0_0800 | u64::from(boots) << 8,
                ..Sregs::default()
            },
            xsave: Xsave::initial(),
            events: Events::default(),
            debug: DebugRegs::default(),
            xcrs: Xcrs::default(),
            mp_state: MpState::Runnable,
            msrs: MSRS.into_iter().collect(),
        }
    }

    /// INIT keeps the TSC and other MSRs, extended state and the caching bits of CR0 (SDM vol. 3,
    /// table 11-1).
    pub(crate) fn init(&mut self) {
        let new = Self::power_on(false);
        let kept = cr0::CD | cr0::NW;
        self.sregs = Sregs {
            cr0: new.sregs.cr0 & !kept | self.sregs.cr0 & kept,
            apic_base: self.sregs.apic_base,
            ..new.sregs
        };
        (self.regs, self.events, self.debug) = (new.regs, new.events, new.debug);
        self.mp_state = new.mp_state;
    }

    pub(crate) fn sregs(&self) -> Sregs {
        self.sregs
    }

    /// EFER.LMA is not written: it follows LME and CR0.PG, as in the processor.
    pub(crate) fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        sregs.validate()?;
        if sregs.efer & !efer::DEFINED != 0 {
            return Err(Error::Invalid(Field::Msr, IA32_EFER.into()));
        }
        self.sregs = *sregs;
        self.sregs.efer &= !efer::LMA;
        if sregs.efer & efer::LME != 0 && sregs.cr0 & cr0::PG != 0 {
            self.sregs.efer |= efer::LMA;
        }
        Ok(())
    }

    pub(crate) fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        for msr in msrs {
            msr.value = match msr.index {
                IA32_APIC_BASE => self.sregs.apic_base,
                IA32_EFER => self.sregs.efer,
                IA32_FS_BASE => self.sregs.fs.base,
                IA32_GS_BASE => self.sregs.gs.base,
                index => match self.msrs.get(&index) {
                    Some(value) => *value,
                    None => return Err(Error::Invalid(Field::Msr, index.into())),
                },
            };
        }
        Ok(())
    }

    pub(crate) fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        for &Msr { index, value } in msrs {
            let slot = match index {
                IA32_EFER => {
                    let efer = value;
                    self.set_sregs(&Sregs { efer, ..self.sregs })?;
                    continue;
                }
                IA32_APIC_BASE => Some(&mut self.sregs.apic_base),
                IA32_FS_BASE => Some(&mut self.sregs.fs.base),
                IA32_GS_BASE => Some(&mut self.sregs.gs.base),
                _ => self.msrs.get_mut(&index),
            };
            *slot.ok_or(Error::Invalid(Field::Msr, index.into()))? = value;
        }
        Ok(())
    }
}
