//! The registers of a vCPU for a processor model: what VM entry loads and VM exit saves.

use crate::meta::vcpu_store::{VcpuStore, class};
use crate::meta::vmcs;
use crate::platform::{LpError, Platform};
use crate::regs::Regs;
use crate::vcpu::VcpuContext;

use super::virtual_apic::VirtualApic;

/// A segment register, LDTR or TR, as the VMCS keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)] // the parts of a segment register
pub struct SegmentState {
    pub selector: u16,
    pub base: u64,
    pub limit: u32,
    /// Access rights (SDM vol. 3, 25.4.1); bit 16 is "unusable".
    pub rights: u32,
}

/// Registers of a vCPU of L1 beside the general-purpose ones. CR0 and CR4 are as the guest reads them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[allow(missing_docs)] // the fields are the registers
pub struct ProcessorState {
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR.
    pub segments: [SegmentState; 8],
    pub gdtr: (u64, u16),
    pub idtr: (u64, u16),
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0 to DR3.
    pub breakpoints: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// What holds events back (SDM vol. 3, 25.4.2): STI in bit 0, MOV SS in bit 1, an NMI whose handler runs in bit 3.
    pub interruptibility: u32,
    /// Values of the MSRs of [`ProcessorState::MSRS`], in their order.
    pub msrs: [u64; ProcessorState::MSRS.len()],
    /// The virtual APIC page, and the guest interrupt status that follows from it.
    pub virtual_apic: VirtualApic,
}

/// Place of an MSR: in the VMCS, or in a class of TDVPS.
#[derive(Clone, Copy)]
enum MsrPlace {
    Vmcs(u32),
    Tdvps(u32),
}

use MsrPlace::{Tdvps, Vmcs};

const MSR_PLACES: [MsrPlace; ProcessorState::MSRS.len()] = [
    Vmcs(0x482A),
    Vmcs(0x6824),
    Vmcs(0x6826),
    Vmcs(0x2804),
    Tdvps(0x2081),
    Tdvps(0x2082),
    Tdvps(0x2084),
    Tdvps(0x2102),
    Tdvps(0x2103),
];

/// Encodings of the first segment register's parts; the others follow in steps of 2.
const SELECTOR: u32 = 0x0800;
const LIMIT: u32 = 0x4800;
const RIGHTS: u32 = 0x4814;
const BASE: u32 = 0x6806;
const GDTR: (u32, u32) = (0x6816, 0x4810);
const IDTR: (u32, u32) = (0x6818, 0x4812);
const DR7: u32 = 0x681A;
const INTERRUPTIBILITY: u32 = 0x4824;
const DR6: (u8, u32) = (class::STATE, 6);
const XCR0: (u8, u32) = (class::STATE, 0x20);

impl ProcessorState {
    /// IA32_SYSENTER_CS, _ESP, _EIP, IA32_PAT, IA32_STAR, IA32_LSTAR, IA32_FMASK, IA32_KERNEL_GS_BASE, IA32_TSC_AUX.
    pub const MSRS: [u32; 9] = [
        0x174,
        0x175,
        0x176,
        0x277,
        0xC000_0081,
        0xC000_0082,
        0xC000_0084,
        0xC000_0102,
        0xC000_0103,
    ];

    fn load(ctx: &VcpuContext) -> Self {
        let f = &ctx.store;
        let get = |encoding| f.vmcs(0, encoding);
        let table = |(base, limit)| (get(base), get(limit) as u16);
        ProcessorState {
            rip: ctx.rip,
            rflags: get(vmcs::RFLAGS),
            segments: core::array::from_fn(|i| {
                let at = |first: u32| get(first + 2 * i as u32);
                SegmentState {
                    selector: at(SELECTOR) as u16,
                    base: at(BASE),
                    limit: at(LIMIT) as u32,
                    rights: at(RIGHTS) as u32,
                }
            }),
            gdtr: table(GDTR),
            idtr: table(IDTR),
            cr0: seen(f, vmcs::CR0, vmcs::CR0_MASK, vmcs::CR0_SHADOW),
            cr2: ctx.cr2,
            cr3: get(vmcs::CR3),
            cr4: seen(f, vmcs::CR4, vmcs::CR4_MASK, vmcs::CR4_SHADOW),
            efer: get(vmcs::EFER),
            xcr0: f.get(XCR0),
            breakpoints: core::array::from_fn(|i| f.get((class::STATE, i as u32))),
            dr6: f.get(DR6),
            dr7: get(DR7),
            interruptibility: get(INTERRUPTIBILITY) as u32,
            msrs: MSR_PLACES.map(|place| match place {
                Vmcs(encoding) => get(encoding),
                Tdvps(code) => f.get((class::MSR, code)),
            }),
            virtual_apic: VirtualApic::load(ctx),
        }
    }

    fn store(&self, ctx: &mut VcpuContext) {
        (ctx.rip, ctx.cr2) = (self.rip, self.cr2);
        ctx.has_processor = true;
        self.virtual_apic.store(ctx);
        let f = &mut ctx.store;
        let cr0 = merged(f, self.cr0, vmcs::CR0, vmcs::CR0_MASK);
        let cr4 = merged(f, self.cr4, vmcs::CR4, vmcs::CR4_MASK);
        let words = [
            (vmcs::RFLAGS, self.rflags),
            (GDTR.0, self.gdtr.0),
            (GDTR.1, self.gdtr.1.into()),
            (IDTR.0, self.idtr.0),
            (IDTR.1, self.idtr.1.into()),
            (vmcs::CR0, cr0),
            (vmcs::CR3, self.cr3),
            (vmcs::CR4, cr4),
            (vmcs::EFER, self.efer),
            (DR7, self.dr7),
            (INTERRUPTIBILITY, self.interruptibility.into()),
        ];
        for (encoding, value) in words {
            f.set_vmcs(0, encoding, value);
        }
        for (segment, i) in self.segments.iter().zip((0..).step_by(2)) {
            f.set_vmcs(0, SELECTOR + i, segment.selector.into());
            f.set_vmcs(0, BASE + i, segment.base);
            f.set_vmcs(0, LIMIT + i, segment.limit.into());
            f.set_vmcs(0, RIGHTS + i, segment.rights.into());
        }
        f.set(XCR0, self.xcr0);
        f.set(DR6, self.dr6);
        for (value, code) in self.breakpoints.into_iter().zip(0..) {
            f.set((class::STATE, code), value);
        }
        for (value, place) in self.msrs.into_iter().zip(MSR_PLACES) {
            match place {
                Vmcs(encoding) => f.set_vmcs(0, encoding, value),
                Tdvps(code) => f.set((class::MSR, code), value),
            }
        }
    }
}

/// A control register as the guest reads it.
fn seen(f: &VcpuStore, register: u32, mask: u32, shadow: u32) -> u64 {
    let mask = f.vmcs(0, mask);
    f.vmcs(0, register) & !mask | f.vmcs(0, shadow) & mask
}

/// The real control register, whose masked bits stay.
fn merged(f: &VcpuStore, value: u64, register: u32, mask: u32) -> u64 {
    let mask = f.vmcs(0, mask);
    value & !mask | f.vmcs(0, register) & mask
}

impl Platform {
    /// The registers of the vCPU that a processor is inside of, for a processor model to load after an entry or an
    /// event.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_registers(&self, lp: usize) -> Result<ProcessorState, LpError> {
        let (this, state) = self.lp(lp)?;
        Ok(ProcessorState::load(&self.guest(lp, this, &state)?.ctx))
    }

    /// Saves the registers of the vCPU that a processor is inside of, as a VM exit does: before an event or an access is
    /// played. From then on the module takes the mode of the guest from them, and the event's RIP advances by 0.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn set_guest_registers(
        &self,
        lp: usize,
        gprs: &Regs,
        to: &ProcessorState,
    ) -> Result<(), LpError> {
        let (this, state) = self.lp(lp)?;
        let ctx = &mut self.guest(lp, this, &state)?.ctx;
        ctx.gprs = *gprs;
        to.store(ctx);
        Ok(())
    }

    /// The bits of CR0 and of CR4 that are the module's, on a vCPU that a processor is inside of: a MOV that would change
    /// what the guest reads of them exits (reason 28), any other is the processor's.
    ///
    /// # Errors
    /// The processor cannot execute, or is not inside a TD.
    pub fn guest_control_masks(&self, lp: usize) -> Result<(u64, u64), LpError> {
        let (this, state) = self.lp(lp)?;
        let guest = self.guest(lp, this, &state)?;
        let mask = |encoding| guest.ctx.store.vmcs(0, encoding);
        Ok((mask(vmcs::CR0_MASK), mask(vmcs::CR4_MASK)))
    }
}
