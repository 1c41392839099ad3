//! The module's handling of CPUID, RDMSR and WRMSR of a TD.
//!
//! A processor model needs this part of the two exits too: to decide if an access leaves the TD at all, and for the
//! result of one that does.

use super::cpuid::xsave_size;
use super::msr::{self, MsrAccess, bitmap_bit};
use super::tables::{self, Action, CPUID, Quad};
use super::xsave;
use crate::config::PlatformConfig;
use crate::meta::vcpu_store::{class, management};
use crate::meta::vmcs;
use crate::td::{CTLS_ENUM_TOPOLOGY, Td};
use crate::vcpu::{Vcpu, VcpuContext};
use std::sync::atomic::Ordering::Acquire;

/// Result of CPUID in a TD.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuidAnswer {
    /// EAX, EBX, ECX and EDX; the upper halves of the registers become 0.
    Values([u32; 4]),
    /// #VE: the guest asks its host, or answers itself.
    VirtualizationException,
}

/// Result of RDMSR or WRMSR in a TD.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MsrAnswer {
    /// The access does not leave the TD: the processor executes it on the vCPU's own MSR.
    Direct,
    /// The module completes it; a read gives this value, a write 0.
    Completed(u64),
    /// #VE.
    VirtualizationException,
    /// #GP(0).
    GeneralProtection,
}

/// A vCPU as it executes one of the instructions.
pub(crate) struct Virtual<'a> {
    pub(crate) cfg: &'a PlatformConfig,
    pub(crate) td: &'a Td,
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) ctx: &'a mut VcpuContext,
    /// The VM that executes it; 0 is L1.
    pub(crate) vm: u8,
}

const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// The last basic leaf, which also answers those beyond it.
const LAST_LEAF: u32 = 0x23;
const EXTENDED: u32 = 0x8000_0000;
const HYPERVISOR: core::ops::RangeInclusive<u32> = 0x4000_0000..=0x4FFF_FFFF;

const IA32_TSX_CTRL: (u8, u32) = (class::MSR, 0x122);
const IA32_XSS: (u8, u32) = (class::MSR, 0xDA0);
const XCR0: (u8, u32) = (class::STATE, 0x20);

fn with_bit(value: u32, bit: u32, set: bool) -> u32 {
    value & !(1 << bit) | u32::from(set) << bit
}

impl Virtual<'_> {
    fn has_topology(&self) -> bool {
        self.td.td_ctls.load(Acquire) & CTLS_ENUM_TOPOLOGY != 0
    }

    /// The x2APIC id the vCPU was given at its TDH.VP.INIT.
    fn x2apic_id(&self) -> u32 {
        let index = self.vcpu.index.load(Acquire) as usize;
        let ids = crate::arena::lock(&self.td.x2apic_ids);
        ids.get(index).copied().unwrap_or(0)
    }

    /// CPUID with these EAX and ECX, at a privilege level of 0 to 3.
    pub(crate) fn cpuid(&self, leaf: u32, subleaf: u32, cpl: u8) -> CpuidAnswer {
        let leaf = self.effective_leaf(leaf);
        let Some(row) = tables::cpuid_index(leaf, subleaf) else {
            return CpuidAnswer::VirtualizationException;
        };
        let r = &CPUID[row];
        let is_topology = matches!(r.leaf, 0xB | 0x1F);
        if r.faulting || self.asks_for_ve(row, cpl) || is_topology && !self.has_topology() {
            return CpuidAnswer::VirtualizationException;
        }
        let config = self.td.config();
        let mut v = config.cpuid.get(row).copied().unwrap_or([0; 4]);
        self.put_state_in(r.leaf, r.subleaf, &mut v);
        CpuidAnswer::Values(v)
    }

    fn effective_leaf(&self, leaf: u32) -> u32 {
        let last_extended = self.cfg.native_cpuid(EXTENDED, 0)[0];
        let beyond = leaf > last_extended || (LAST_LEAF + 1..EXTENDED).contains(&leaf);
        if beyond && !HYPERVISOR.contains(&leaf) {
            LAST_LEAF
        } else {
            leaf
        }
    }

    /// The guest has asked for a #VE, for all leaves or for this one.
    fn asks_for_ve(&self, row: usize, cpl: u8) -> bool {
        const CPUID_CONTROL: u8 = 0x21;
        let f = &self.ctx.store;
        let control = f.get((CPUID_CONTROL, row as u32));
        let (all, this) = match cpl {
            0 => (management::CPUID_SUPERVISOR_VE, 1),
            _ => (management::CPUID_USER_VE, 2),
        };
        f.management(all) != 0 || control & this != 0
    }

    /// The parts of a leaf that follow from the vCPU's state.
    fn put_state_in(&self, leaf: u32, subleaf: u32, v: &mut Quad) {
        const OSXSAVE: (u32, u32) = (27, 18);
        const OSPKE: (u32, u32) = (4, 22);
        const SYSCALL: u32 = 11;
        let f = &self.ctx.store;
        let cr4 = |bit: u32| f.vmcs(self.vm, vmcs::CR4) >> bit & 1 != 0;
        match (leaf, subleaf) {
            (1, _) => {
                let id = match self.has_topology() {
                    true => self.x2apic_id(),
                    false => self.vcpu.index.load(Acquire),
                };
                v[EBX] = v[EBX] & 0x00FF_FFFF | id << 24;
                v[ECX] = with_bit(v[ECX], OSXSAVE.0, cr4(OSXSAVE.1));
            }
            (7, 0) => {
                const HLE_AND_RTM: u32 = 1 << 4 | 1 << 11;
                const CPUID_CLEAR: u64 = 1 << 1;
                v[ECX] = with_bit(v[ECX], OSPKE.0, cr4(OSPKE.1));
                if self.td.config().flags.tsx && f.get(IA32_TSX_CTRL) & CPUID_CLEAR != 0 {
                    v[EBX] &= !HLE_AND_RTM;
                }
            }
            (0xD, 0) => v[EBX] = xsave_size(self.cfg, f.get(XCR0)),
            // In the compacted format, with the supervisor's components. The machine of the recordings has no size here.
            (0xD, 1) if self.cfg.native_cpuid(0xD, 1)[EBX] != 0 => {
                v[EBX] = xsave::layout(self.cfg, f.get(XCR0) | f.get(IA32_XSS)).1;
            }
            (0xB | 0x1F, _) => v[EDX] = self.x2apic_id(),
            (0x8000_0001, _) => v[EDX] = with_bit(v[EDX], SYSCALL, self.is_64_bit()),
            _ => {}
        }
    }

    /// The code segment is one of 64 bits.
    fn is_64_bit(&self) -> bool {
        const LONG: u32 = 13;
        self.ctx.store.vmcs(self.vm, vmcs::CS_ACCESS_RIGHTS) >> LONG & 1 != 0
    }

    /// RDMSR or WRMSR of an address; a write of `value`.
    pub(crate) fn msr(&mut self, address: u32, access: MsrAccess, value: u64) -> MsrAnswer {
        if self.msr_exits(address, access) {
            self.msr_exit(address, access, value)
        } else {
            MsrAnswer::Direct
        }
    }

    /// The access leaves the TD.
    pub(crate) fn msr_exits(&self, address: u32, access: MsrAccess) -> bool {
        bitmap_bit(address, access).is_none_or(|bit| {
            let config = self.td.config();
            let word = config.msr_bitmaps.get(bit / 64).copied();
            word.unwrap_or(u64::MAX) >> (bit % 64) & 1 != 0
        })
    }

    /// An access that has left the TD.
    pub(crate) fn msr_exit(&mut self, address: u32, access: MsrAccess, value: u64) -> MsrAnswer {
        let row = bitmap_bit(address, access).and_then(|_| tables::msr(address));
        let Some(row) = row else {
            return MsrAnswer::VirtualizationException;
        };
        let special = match access {
            MsrAccess::Read => self.read_special(address),
            MsrAccess::Write => self.write_special(address, value),
        };
        let (_, action) = match access {
            MsrAccess::Read => row.read,
            MsrAccess::Write => row.write,
        };
        special.unwrap_or_else(|| self.act(address, action))
    }

    fn act(&self, address: u32, action: Action) -> MsrAnswer {
        let flags = self.td.config().flags;
        let exists = match address {
            0x1F8..=0x1FA => flags.dca,
            0x981..=0x984 => flags.tme,
            0x87 => flags.pconfig,
            0x6E0 => flags.tsc_deadline,
            _ => true,
        };
        match action {
            Action::Gp => MsrAnswer::GeneralProtection,
            Action::GpOrVe if !exists => MsrAnswer::GeneralProtection,
            _ => MsrAnswer::VirtualizationException,
        }
    }

    /// Reads with a special rule.
    fn read_special(&self, address: u32) -> Option<MsrAnswer> {
        const FULL_WRITE: u64 = 1 << 16;
        const PERFMON_AVAILABLE: u64 = 1 << 7;
        const PEBS_UNAVAILABLE: u64 = 1 << 12;
        const UNCORE_PMI: u64 = 1 << 13;
        let config = self.td.config();
        Some(MsrAnswer::Completed(match address {
            0x1D9 => self.ctx.store.vmcs(self.vm, vmcs::DEBUGCTL) & !UNCORE_PMI,
            0x1A0 => self.cfg.native_msr(address) & !PERFMON_AVAILABLE | PEBS_UNAVAILABLE,
            msr::PERF_CAPABILITIES if config.attributes & crate::td::ATTR_PERFMON != 0 => {
                self.cfg.native_msr(address) & !FULL_WRITE
            }
            msr::PERF_CAPABILITIES => 0,
            super::cpuid::IA32_ARCH_CAPABILITIES => config.arch_capabilities,
            0xBD => 1,
            0x802 if self.has_topology() => u64::from(self.x2apic_id()),
            // Of the VMX capabilities, those that have a "true" variant are left to the host.
            0x480..=0x493 if self.vm != 0 || !has_virtual_capability(address) => {
                return Some(MsrAnswer::VirtualizationException);
            }
            0x480..=0x493 => msr::vmx_capability(self.cfg, config.attributes, config.xfam, address),
            _ => return None,
        }))
    }

    /// Writes with a special rule.
    fn write_special(&mut self, address: u32, value: u64) -> Option<MsrAnswer> {
        match address {
            0xDA0 => Some(self.write_xss(value)),
            0x1D9 => Some(self.write_debugctl(value)),
            0xC000_0080 => Some(self.write_efer(value)),
            _ => None,
        }
    }

    fn write_xss(&mut self, value: u64) -> MsrAnswer {
        let supported = self.cfg.xfam_fixed0 & !super::cpuid::XCR0_COMPONENTS;
        if value & !(supported & self.td.config().xfam) != 0 {
            return MsrAnswer::GeneralProtection;
        }
        self.ctx.store.set(IA32_XSS, value);
        MsrAnswer::Completed(0)
    }

    fn write_debugctl(&mut self, value: u64) -> MsrAnswer {
        const DEFINED: u64 = 0xFFC7;
        const BTF: u64 = 1 << 1;
        const TR: u64 = 1 << 6;
        const BTS: u64 = 1 << 7;
        const UNCORE_PMI: u64 = 1 << 13;
        const FREEZE_WHILE_SMM: u64 = 1 << 14;
        const RTM_DEBUG: u64 = 1 << 15;
        const TRAP_FLAG: u64 = 1 << 8;
        const PENDING_SINGLE_STEP: u64 = 1 << 14;
        let config = self.td.config();
        let perfmon = config.attributes & crate::td::ATTR_PERFMON != 0;
        let lacking = value & FREEZE_WHILE_SMM != 0 && !perfmon
            || value & RTM_DEBUG != 0 && !config.flags.tsx;
        if value & !DEFINED != 0 || lacking {
            return MsrAnswer::GeneralProtection;
        }
        if value & TR != 0 && value & BTS == 0 {
            return MsrAnswer::VirtualizationException;
        }
        let f = &mut self.ctx.store;
        let old = f.vmcs(self.vm, vmcs::DEBUGCTL);
        if (old ^ value) & BTF != 0 && f.vmcs(self.vm, vmcs::RFLAGS) & TRAP_FLAG != 0 {
            let pending = f.vmcs(self.vm, vmcs::PENDING_DEBUG) & !PENDING_SINGLE_STEP;
            let single_step = if old & BTF != 0 {
                PENDING_SINGLE_STEP
            } else {
                0
            };
            f.set_vmcs(self.vm, vmcs::PENDING_DEBUG, pending | single_step);
        }
        let new = value & !UNCORE_PMI | old & UNCORE_PMI;
        f.set_vmcs(self.vm, vmcs::DEBUGCTL, new);
        MsrAnswer::Completed(0)
    }

    /// Only system-call extensions are the guest's to choose, in an L2 VM also long mode.
    fn write_efer(&mut self, value: u64) -> MsrAnswer {
        const SCE: u64 = 1;
        const LME: u64 = 1 << 8;
        const LMA: u64 = 1 << 10;
        let free = if self.vm == 0 { SCE } else { SCE | LME };
        let old = self.ctx.store.vmcs(self.vm, vmcs::EFER);
        if (old ^ value) & !(free | LMA) != 0 {
            return MsrAnswer::VirtualizationException;
        }
        let new = value & !LMA | old & LMA;
        self.ctx.store.set_vmcs(self.vm, vmcs::EFER, new);
        MsrAnswer::Completed(0)
    }
}

/// The MSR has a VIRTUAL_IA32_VMX_* field.
fn has_virtual_capability(address: u32) -> bool {
    crate::meta::table::Table::Td
        .find((0x16, address))
        .is_some()
}
