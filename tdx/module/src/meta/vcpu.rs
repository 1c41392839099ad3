//! Reading the fields of a vCPU.

use super::place::{Context, Place};
use super::table::{Agent, Table};
use super::vcpu_store::{class, management, per_vm};
use super::{Read, vmcs};
use crate::call::Leaf;
use crate::platform::Platform;
use crate::td::Td;
use crate::vcpu::{Vcpu, VcpuContext};
use std::sync::atomic::Ordering::Acquire;

/// A vCPU whose fields are accessed, and by whom.
pub(crate) struct VcpuFields<'a> {
    pub(crate) p: &'a Platform,
    pub(crate) td: &'a Td,
    pub(crate) vcpu: &'a Vcpu,
    pub(crate) ctx: &'a mut VcpuContext,
    pub(crate) agent: Agent,
}

/// The context of a vCPU's fields.
pub(crate) fn context(td: &Td) -> Context {
    Context::Vcpu {
        l2_vms: td.l2_vms.load(Acquire),
    }
}

impl VcpuFields<'_> {
    /// Reads an element.
    pub(crate) fn read(&self, id: u64) -> Leaf<Read> {
        super::read(context(self.td), self.agent, id, |place| {
            Ok(self.value(place))
        })
    }

    /// The value of an element, as the agent sees it.
    pub(crate) fn value(&self, place: &Place) -> u64 {
        match place.table {
            Table::Vmcs => self.l1_vmcs(place),
            Table::L2Vmcs => self.l2_vmcs(place),
            _ => self.tdvps(place),
        }
    }

    fn is_guest(&self) -> bool {
        self.agent == Agent::Guest
    }

    fn l1_vmcs(&self, place: &Place) -> u64 {
        let exit = &self.ctx.exit;
        // The next entry is the other host's.
        if self.agent == Agent::Migration
            && let Some(event) = self.ctx.vectoring
        {
            match place.field().code {
                vmcs::ENTRY_INTERRUPTION_INFO => return event.to_info(),
                vmcs::ENTRY_ERROR_CODE => return u64::from(event.error.unwrap_or(0)),
                _ => {}
            }
        }
        match place.field().code {
            vmcs::RSP => self.ctx.gprs.rsp,
            vmcs::RIP => self.ctx.rip,
            vmcs::EXIT_REASON => u64::from(exit.reason),
            vmcs::EXIT_QUALIFICATION => exit.qualification,
            vmcs::EXIT_GPA => exit.gpa,
            vmcs::EXIT_GLA => exit.gla,
            vmcs::EXIT_INTERRUPTION_INFO => exit.info,
            vmcs::EXIT_INTERRUPTION_ERROR => exit.error,
            vmcs::IDT_VECTORING_INFO => exit.idt_vectoring,
            vmcs::IDT_VECTORING_ERROR => exit.idt_error,
            vmcs::EXIT_INSTRUCTION_LENGTH => u64::from(exit.ilen),
            vmcs::EXIT_INSTRUCTION_INFO => u64::from(exit.iinfo),
            vmcs::CR0 if self.agent == Agent::Migration => {
                self.as_guest_reads(place, vmcs::CR0_MASK, vmcs::CR0_SHADOW)
            }
            vmcs::CR4 if self.agent == Agent::Migration => {
                self.as_guest_reads(place, vmcs::CR4_MASK, vmcs::CR4_SHADOW)
            }
            _ => self.ctx.store.at(place),
        }
    }

    /// A control register with the module's bits as the guest sees them: another module may own others.
    fn as_guest_reads(&self, place: &Place, mask: u32, shadow: u32) -> u64 {
        let f = &self.ctx.store;
        let (mask, shadow) = (f.vmcs(0, mask), f.vmcs(0, shadow));
        f.at(place) & !mask | shadow & mask
    }

    fn l2_vmcs(&self, place: &Place) -> u64 {
        let (f, vm) = (&self.ctx.store, place.vm);
        let stored = f.at(place);
        let of_guest = |code| {
            if self.is_guest() {
                f.of_vm(code, vm)
            } else {
                stored
            }
        };
        // An L1 sees the bits that belong to the module as the module first set them.
        let below = |mask, shadow| match self.is_guest() {
            true => stored & !f.management(mask) | f.management(mask) & f.management(shadow),
            false => stored,
        };
        match place.field().code {
            vmcs::CR0_MASK => of_guest(per_vm::CR0_MASK),
            vmcs::CR0_SHADOW => of_guest(per_vm::CR0_SHADOW),
            vmcs::CR4_MASK => of_guest(per_vm::CR4_MASK),
            vmcs::CR4_SHADOW => of_guest(per_vm::CR4_SHADOW),
            vmcs::CR0 => below(management::BASE_L2_CR0_MASK, management::BASE_L2_CR0_SHADOW),
            vmcs::CR4 => below(management::BASE_L2_CR4_MASK, management::BASE_L2_CR4_SHADOW),
            vmcs::PLE_GAP => of_guest(per_vm::PLE_GAP),
            vmcs::PLE_WINDOW => of_guest(per_vm::PLE_WINDOW),
            vmcs::VIRTUAL_APIC => f.of_vm(per_vm::VAPIC_GPA, vm),
            vmcs::SHARED_EPTP => f.of_vm(per_vm::SHARED_EPTP, vm),
            _ => stored,
        }
    }

    fn tdvps(&self, place: &Place) -> u64 {
        let field = place.field();
        let i = place.element as usize;
        match field.class {
            class::GPR => {
                let gprs = self.ctx.gprs.to_array();
                gprs.get(field.code as usize).copied().unwrap_or(0)
            }
            class::VE_INFO if field.code == VE_VALID => match self.ctx.ve_info {
                Some(_) => 0xFFFF_FFFF,
                None => 0,
            },
            class::STATE => self.state(place),
            class::MANAGEMENT => self.management(place),
            class::EPF => self.ctx.zero_step_gpas.get(i).copied().unwrap_or(0),
            other if self.is_guest() && is_l2_msr_bitmaps(other) => {
                self.ctx.store.get((other + 1, place.element))
            }
            _ => self.ctx.store.at(place),
        }
    }

    fn state(&self, place: &Place) -> u64 {
        const CR2: u32 = 0x28;
        const DETAILS: u32 = 0x100;
        match place.field().code {
            CR2 => self.ctx.cr2,
            DETAILS => u64::from(self.ctx.has_deliverable_interrupt()),
            _ => self.ctx.store.at(place),
        }
    }

    fn management(&self, place: &Place) -> u64 {
        let (vcpu, ctx) = (self.vcpu, &self.ctx);
        let i = place.element as usize;
        match place.field().code {
            0x00 => vcpu.state() as u64,
            0x02 => u64::from(vcpu.index.load(Acquire)),
            0x03 => u64::from(vcpu.pages.load(Acquire)),
            0x04 => vcpu.assoc_lp.load(Acquire) as u32 as u64,
            0x06 => vcpu.epoch.load(Acquire),
            0x0A => ctx.tsc_at_exit,
            0x0B => u64::from(ctx.pend_nmi),
            0x0C => self.td.config().xfam,
            0x0D => ctx.zero_step_gpas.len() as u64,
            0x0F => ctx.last_td_exit,
            0x10 => match vcpu.page_pa(i) {
                0 => 0,
                pa => self.td.private_pa(&self.p.cfg, pa),
            },
            0x30 => ctx.host_priority_since.unwrap_or(0),
            0x31 => u64::from(ctx.host_priority_since.is_some()),
            0x41 => u64::from(ctx.curr_vm),
            _ => ctx.store.at(place),
        }
    }
}

pub(crate) const VE_VALID: u32 = 1;

/// The class of the real MSR bitmaps of an L2 VM.
pub(crate) fn is_l2_msr_bitmaps(of: u8) -> bool {
    (0..3).any(|vm| of == class::L2_MSR_BITMAPS + class::L2_STEP * vm)
}
