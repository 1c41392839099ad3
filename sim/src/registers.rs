//! The registers of a vCPU that runs no instructions: held, so that what an embedder sets can be
//! read back and carried to another platform.

use std::collections::BTreeMap;

use kvm_ops::{DescTable, Error, Field, Regs, Result, Segment, SegmentName};

/// Register state, as after power-on (SDM vol. 3, table 11-1).
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    pub(crate) regs: Regs,
    segments: [Segment; 8],
    pub(crate) idt: DescTable,
    pub(crate) gdt: DescTable,
    pub(crate) dr7: u64,
    msrs: BTreeMap<u32, u64>,
    pub(crate) nmi_masked: bool,
    pub(crate) interrupt_shadow: u32,
}

const IA32_EFER: u32 = 0xc000_0080;

/// The MSRs that the platform has, with their value after power-on.
const MSRS: [(u32, u64); 13] = [
    (0x10, 0),                      // IA32_TIME_STAMP_COUNTER
    (0x1b, 0xfee0_0800),            // IA32_APIC_BASE, enabled
    (0x174, 0),                     // IA32_SYSENTER_CS
    (0x175, 0),                     // IA32_SYSENTER_ESP
    (0x176, 0),                     // IA32_SYSENTER_EIP
    (0x277, 0x0007_0406_0007_0406), // IA32_PAT
    (IA32_EFER, 0),
    (0xc000_0081, 0), // IA32_STAR
    (0xc000_0082, 0), // IA32_LSTAR
    (0xc000_0083, 0), // IA32_CSTAR
    (0xc000_0084, 0), // IA32_FMASK
    (0xc000_0100, 0), // IA32_FS_BASE
    (0xc000_0102, 0), // IA32_KERNEL_GS_BASE
];

/// EFER bits that exist: SCE, LME, LMA, NXE.
const EFER_BITS: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;

pub(crate) fn has_msr(index: u32) -> bool {
    MSRS.iter().any(|(msr, _)| *msr == index)
}

impl Registers {
    pub(crate) fn power_on() -> Self {
        let data = Segment {
            limit: 0xffff,
            kind: 3,
            present: true,
            s: true,
            ..Segment::default()
        };
        let mut segments = [data; 8];
        let code = &mut segments[SegmentName::Cs as usize];
        (code.selector, code.base, code.kind) = (0xf000, 0xffff_0000, 11);
        for (name, kind) in [(SegmentName::Tr, 11), (SegmentName::Ldtr, 2)] {
            segments[name as usize] = Segment {
                kind,
                s: false,
                ..data
            };
        }
        Self {
            regs: Regs {
                rip: 0xfff0,
                rflags: 2,
                ..Regs::default()
            },
            segments,
            idt: DescTable {
                base: 0,
                limit: 0xffff,
            },
            gdt: DescTable {
                base: 0,
                limit: 0xffff,
            },
            dr7: 0x400,
            msrs: MSRS.into_iter().collect(),
            nmi_masked: false,
            interrupt_shadow: 0,
        }
    }

    /// INIT keeps the TSC and the MSRs (SDM vol. 3, table 11-1).
    pub(crate) fn init(&mut self) {
        let msrs = std::mem::take(&mut self.msrs);
        *self = Self {
            msrs,
            ..Self::power_on()
        };
        self.msrs.insert(IA32_EFER, 0);
    }

    pub(crate) fn segment(&self, name: SegmentName) -> Segment {
        self.segments[name as usize]
    }

    pub(crate) fn set_segment(&mut self, name: SegmentName, value: Segment) {
        self.segments[name as usize] = value;
    }

    pub(crate) fn msr(&self, index: u32) -> Result<u64> {
        self.msrs
            .get(&index)
            .copied()
            .ok_or(Error::Invalid(Field::Msr, index.into()))
    }

    pub(crate) fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        if index == IA32_EFER && value & !EFER_BITS != 0 {
            return Err(Error::Invalid(Field::Msr, value));
        }
        match self.msrs.get_mut(&index) {
            Some(msr) => {
                *msr = value;
                Ok(())
            }
            None => Err(Error::Invalid(Field::Msr, index.into())),
        }
    }

    pub(crate) fn set_efer(&mut self, value: u64) -> Result<()> {
        self.set_msr(IA32_EFER, value)
    }
}
