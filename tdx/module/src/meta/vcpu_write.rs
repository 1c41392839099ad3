//! Writing the fields of a vCPU.

use super::place::Place;
use super::table::{AddressKind, Agent, Table};
use super::vcpu::{VcpuFields, is_l2_msr_bitmaps};
use super::vcpu_initial::{UNSET, ZERO_PAGE};
use super::vcpu_store::{class, management, per_vm};
use super::{Write, locate, not_valid, not_writable, vmcs};
use crate::call::{Leaf, shared_operand};
use crate::guest::extended_state::XSTATE_BV;
use crate::regs::Regs;
use crate::status::{Code, Operand};
use crate::virt::msr;
use crate::virt::xsave;
use std::sync::atomic::Ordering::Acquire;

const PAGE: u64 = 4096;
/// Size of a posted-interrupt descriptor.
const DESCRIPTOR: u64 = 64;

impl VcpuFields<'_> {
    /// Writes bits of an element and returns what it was, as far as the agent may read it.
    pub(crate) fn write(&mut self, write: Write) -> Leaf<u64> {
        let place = locate(super::vcpu::context(self.td), write.id)?;
        let field = place.field();
        let allowed = field.write_mask(self.agent);
        let old = self.value(&place);
        let mut current = old;
        if field.address != AddressKind::None && current >> 63 != 0 {
            // An address that has not been set: its fixed bits are not the value's.
            current &= allowed;
        }
        if write.mask & allowed == field.element_mask() {
            current = 0;
        }
        let new = write.merge(current, allowed)?;
        self.check_address(&place, new)?;
        self.store(&place, new, write.mask & allowed)?;
        Ok(old & field.element_mask() & field.read_mask(self.agent))
    }

    fn check_address(&self, place: &Place, new: u64) -> Leaf {
        let valid = match place.field().address {
            AddressKind::SharedHpa => {
                let is_descriptor = place.field().code == vmcs::POSTED_INTERRUPT_DESCRIPTOR;
                let size = if is_descriptor { DESCRIPTOR } else { PAGE };
                shared_operand(self.p, new, size, Operand::R8).is_ok()
            }
            AddressKind::PrivateGpa => self.td.is_valid_private_gpa(new),
            _ => true,
        };
        if valid { Ok(()) } else { not_valid() }
    }

    /// Stores a value that the masks allow, if it is a valid one; `selected` are the bits that were written.
    pub(crate) fn store(&mut self, place: &Place, new: u64, selected: u64) -> Leaf {
        match place.table {
            Table::Vmcs => self.store_l1(place, new),
            Table::L2Vmcs => self.store_l2(place, new, selected),
            _ => self.store_tdvps(place, new),
        }
    }

    fn store_l1(&mut self, place: &Place, new: u64) -> Leaf {
        let mut new = new;
        match place.field().code {
            vmcs::RSP => self.ctx.gprs.rsp = new,
            vmcs::RIP => self.ctx.rip = new,
            vmcs::CR0 | vmcs::CR4 => new = self.control_register(place, new)?,
            vmcs::CR3 => self.check_cr3(new)?,
            vmcs::DEBUGCTL => new = self.debugctl(new)?,
            vmcs::PIN_CONTROLS => {
                self.check_pin_controls(new)?;
                self.ctx.store.set_of_vm(per_vm::PIN_CONTROLS, 0, new);
            }
            vmcs::NOTIFICATION_VECTOR => {
                if new > 0xFF {
                    return not_valid();
                }
                self.ctx
                    .store
                    .set_of_vm(per_vm::NOTIFICATION_VECTOR, 0, new);
            }
            vmcs::POSTED_INTERRUPT_DESCRIPTOR => {
                let code = per_vm::POSTED_INTERRUPT_DESCRIPTOR;
                self.ctx.store.set_of_vm(code, 0, new);
            }
            vmcs::SECONDARY_CONTROLS => {
                self.check_pml(0, new)?;
                self.ctx.store.set_of_vm(per_vm::SECONDARY_CONTROLS, 0, new);
            }
            vmcs::INSTRUCTION_TIMEOUT => {
                self.ctx
                    .store
                    .set_of_vm(per_vm::INSTRUCTION_TIMEOUT, 0, new);
            }
            vmcs::SHARED_EPTP => self.ctx.store.set_of_vm(per_vm::SHARED_EPTP, 0, new),
            _ => {}
        }
        self.ctx.store.set_at(place, new);
        Ok(())
    }

    /// CR0 or CR4 of an L1: the module's bits must have the value the guest reads, and keep their real one.
    fn control_register(&self, place: &Place, new: u64) -> Leaf<u64> {
        let (mask, shadow) = match place.field().code {
            vmcs::CR0 => (vmcs::CR0_MASK, vmcs::CR0_SHADOW),
            _ => (vmcs::CR4_MASK, vmcs::CR4_SHADOW),
        };
        let f = &self.ctx.store;
        let (mask, shadow) = (f.vmcs(place.vm, mask), f.vmcs(place.vm, shadow));
        keep_owned(new, f.at(place), mask, shadow)
    }

    fn l2_control_register(&self, place: &Place, new: u64) -> Leaf<u64> {
        let (mask, shadow) = match place.field().code {
            vmcs::CR0 => (management::BASE_L2_CR0_MASK, management::BASE_L2_CR0_SHADOW),
            _ => (management::BASE_L2_CR4_MASK, management::BASE_L2_CR4_SHADOW),
        };
        let f = &self.ctx.store;
        keep_owned(new, f.at(place), f.management(mask), f.management(shadow))
    }

    /// Reserved bits clear, LAM bits ignored, all else a private address.
    fn check_cr3(&self, new: u64) -> Leaf {
        const RESERVED: u64 = 0x1FF << 52 | 1 << 63;
        const LAM: u64 = 3 << 61;
        let address = if self.has_lam() { new & !LAM } else { new };
        if new & RESERVED != 0 || !self.td.is_valid_private_gpa(address) {
            return not_valid();
        }
        Ok(())
    }

    /// Linear address masking: CPUID 7.1 EAX bit 26.
    fn has_lam(&self) -> bool {
        self.p.cfg.native_cpuid(7, 1)[0] >> 26 & 1 != 0
    }

    /// Branch tracing needs its buffer, unless the TD is debugged; uncore events are the processor's.
    fn debugctl(&self, new: u64) -> Leaf<u64> {
        const TR: u64 = 1 << 6;
        const BTS: u64 = 1 << 7;
        const UNCORE_PMI: u64 = 1 << 13;
        if new & TR != 0 && new & BTS == 0 && !self.td.is_debug() {
            return not_valid();
        }
        Ok(new & !UNCORE_PMI)
    }

    fn check_pin_controls(&self, new: u64) -> Leaf {
        const PROCESS_POSTED_INTERRUPTS: u64 = 1 << 7;
        if new & PROCESS_POSTED_INTERRUPTS == 0 {
            return Ok(());
        }
        let f = &self.ctx.store;
        let missing = [
            (vmcs::NOTIFICATION_VECTOR, 0xFFFF),
            (vmcs::POSTED_INTERRUPT_DESCRIPTOR, UNSET),
        ]
        .into_iter()
        .find(|(encoding, unset)| f.vmcs(0, *encoding) == *unset);
        match missing {
            Some((encoding, _)) => Err(Code::TD_VMCS_FIELD_NOT_INITIALIZED.detail(encoding)),
            None => Ok(()),
        }
    }

    /// Page-modification logging is for debugging, and needs its buffer.
    fn check_pml(&self, vm: u8, new: u64) -> Leaf {
        const ENABLE_PML: u64 = 1 << 17;
        let buffer = self.ctx.store.vmcs(vm, vmcs::PML_ADDRESS);
        if new & ENABLE_PML != 0 && (!self.td.is_debug() || buffer >> 63 != 0) {
            return not_valid();
        }
        Ok(())
    }

    fn store_l2(&mut self, place: &Place, new: u64, selected: u64) -> Leaf {
        let vm = place.vm;
        let mut new = new;
        match place.field().code {
            vmcs::CR0_MASK => return self.set_guest_mask(place, per_vm::CR0_MASK, new),
            vmcs::CR0_SHADOW => return self.set_guest_mask(place, per_vm::CR0_SHADOW, new),
            vmcs::CR4_MASK => return self.set_guest_mask(place, per_vm::CR4_MASK, new),
            vmcs::CR4_SHADOW => return self.set_guest_mask(place, per_vm::CR4_SHADOW, new),
            vmcs::CR0 | vmcs::CR4 => new = self.l2_control_register(place, new)?,
            vmcs::CR3 => self.check_cr3(new)?,
            vmcs::DEBUGCTL => new = self.debugctl(new)?,
            vmcs::EPTP => self.check_l2_eptp(new)?,
            vmcs::VIRTUAL_APIC => {
                self.ctx.store.set_of_vm(per_vm::VAPIC_GPA, vm, new);
                self.ctx.store.set_of_vm(per_vm::VAPIC_HPA, vm, UNSET);
                return Ok(());
            }
            vmcs::SHARED_EPTP => {
                self.ctx.store.set_of_vm(per_vm::SHARED_EPTP, vm, new);
                self.apply_shared_eptp_if_enabled(vm, new);
                return Ok(());
            }
            vmcs::PLE_GAP => new = self.ple(per_vm::PLE_GAP, vm, new)?,
            vmcs::PLE_WINDOW => new = self.ple(per_vm::PLE_WINDOW, vm, new)?,
            vmcs::PRIMARY_CONTROLS | vmcs::TERTIARY_CONTROLS => {
                self.check_controls(place, new, selected)?;
            }
            vmcs::SECONDARY_CONTROLS => {
                self.check_controls(place, new, selected)?;
                self.check_pml(vm, new)?;
            }
            _ => {}
        }
        self.ctx.store.set_at(place, new);
        Ok(())
    }

    /// A mask or read shadow of CR0 or CR4: the L1's own is kept apart, the VMCS gets it and the module's.
    fn set_guest_mask(&mut self, place: &Place, code: u32, new: u64) -> Leaf {
        let vm = place.vm;
        self.ctx.store.set_of_vm(code, vm, new);
        let is_cr0 = matches!(place.field().code, vmcs::CR0_MASK | vmcs::CR0_SHADOW);
        let (mask, shadow, vmcs_mask, vmcs_shadow, base_mask, base_shadow) = if is_cr0 {
            (
                per_vm::CR0_MASK,
                per_vm::CR0_SHADOW,
                vmcs::CR0_MASK,
                vmcs::CR0_SHADOW,
                management::BASE_L2_CR0_MASK,
                management::BASE_L2_CR0_SHADOW,
            )
        } else {
            (
                per_vm::CR4_MASK,
                per_vm::CR4_SHADOW,
                vmcs::CR4_MASK,
                vmcs::CR4_SHADOW,
                management::BASE_L2_CR4_MASK,
                management::BASE_L2_CR4_SHADOW,
            )
        };
        let f = &mut self.ctx.store;
        let (mask, shadow) = (f.of_vm(mask, vm), f.of_vm(shadow, vm));
        let (base_mask, base_shadow) = (f.management(base_mask), f.management(base_shadow));
        f.set_vmcs(vm, vmcs_mask, base_mask | mask);
        let seen = base_mask & !mask & base_shadow | mask & shadow;
        f.set_vmcs(vm, vmcs_shadow, seen);
        Ok(())
    }

    /// Supervisor shadow stacks need CET.
    fn check_l2_eptp(&self, new: u64) -> Leaf {
        const SUPERVISOR_SHADOW_STACK: u64 = 1 << 7;
        const CET_S: u64 = 1 << 12;
        if new & SUPERVISOR_SHADOW_STACK != 0 && self.td.config().xfam & CET_S == 0 {
            return not_valid();
        }
        Ok(())
    }

    fn apply_shared_eptp_if_enabled(&mut self, vm: u8, eptp: u64) {
        if self.ctx.store.of_vm(per_vm::L2_CTLS, vm) & L2_CTLS_SHARED_EPTP != 0 {
            self.ctx.store.set_vmcs(vm, vmcs::SHARED_EPTP, eptp);
        }
    }

    /// Times a guest gives are in its own TSC's ticks, the VMCS's in native ones.
    fn ple(&mut self, code: u32, vm: u8, new: u64) -> Leaf<u64> {
        if self.agent != Agent::Guest {
            return Ok(new);
        }
        self.ctx.store.set_of_vm(code, vm, new);
        let native = self.td.config().tsc.native_at(new);
        match native.filter(|n| *n >> 32 == 0) {
            Some(native) => Ok(native),
            None => not_valid(),
        }
    }

    /// Execution controls: what the capability MSR demands and allows, in the bits that are written.
    fn check_controls(&self, place: &Place, new: u64, selected: u64) -> Leaf {
        let address = match place.field().code {
            vmcs::PRIMARY_CONTROLS => 0x48E,
            vmcs::SECONDARY_CONTROLS => 0x48B,
            _ => 0x492,
        };
        let capability = if self.agent == Agent::HostOfDebug {
            self.p.cfg.native_msr(address)
        } else {
            let config = self.td.config();
            msr::vmx_capability(&self.p.cfg, config.attributes, config.xfam, address)
        };
        let (must, may) = match place.field().code {
            vmcs::TERTIARY_CONTROLS => (0, capability),
            _ => (capability & 0xFFFF_FFFF, capability >> 32),
        };
        if selected & (new & !may | !new & must) != 0 {
            return not_valid();
        }
        Ok(())
    }

    /// Sets a field as the processor does at a VM exit, without the module's rules. False for fields that
    /// are the module's own.
    pub(crate) fn save(&mut self, place: &Place, value: u64) -> bool {
        match (place.table, place.field().class, place.field().code) {
            (Table::Vmcs, _, vmcs::RSP) => self.ctx.gprs.rsp = value,
            (Table::Vmcs, _, vmcs::RIP) => self.ctx.rip = value,
            (Table::Vcpu, class::GPR, code) => self.set_gpr(code, value),
            (Table::Vcpu, class::STATE, CR2) => self.ctx.cr2 = value,
            (Table::Vcpu, class::STATE | class::MSR | class::XBUFF | class::VAPIC, _)
            | (Table::Vmcs | Table::L2Vmcs, ..) => self.ctx.store.set_at(place, value),
            _ => return false,
        }
        true
    }

    fn set_gpr(&mut self, number: u32, value: u64) {
        let mut gprs = self.ctx.gprs.to_array();
        if let Some(gpr) = gprs.get_mut(number as usize) {
            *gpr = value;
        }
        self.ctx.gprs = Regs::from_array(gprs);
    }

    fn store_tdvps(&mut self, place: &Place, new: u64) -> Leaf {
        let field = place.field();
        match field.class {
            class::GPR => {
                self.set_gpr(field.code, new);
                return Ok(());
            }
            class::STATE if field.code == CR2 => {
                self.ctx.cr2 = new;
                return Ok(());
            }
            class::XBUFF => return self.store_xbuff(place, new),
            class::MANAGEMENT => return self.store_management(place, new),
            of if is_l2_msr_bitmaps(of) => {
                self.ctx.store.set((of + 1, place.element), new);
                let config = self.td.config();
                let own = config.msr_bitmaps.get(place.element as usize).copied();
                self.ctx.store.set_at(place, new | own.unwrap_or(u64::MAX));
                return Ok(());
            }
            _ => {}
        }
        self.ctx.store.set_at(place, new);
        Ok(())
    }

    /// A word of the state components. Of the header an import brings the components that are not in their initial state; the rest
    /// follows from XFAM. (What the published module does with the header of an import is not recorded.)
    fn store_xbuff(&mut self, place: &Place, new: u64) -> Leaf {
        let mut new = new;
        if self.agent == Agent::Migration && place.element as usize == XSTATE_BV {
            new &= self.td.config().xfam;
        } else if self.is_protected_xbuff(place.element) {
            return not_writable();
        }
        self.ctx.store.set_at(place, new);
        self.ctx.xbuff_changed = true;
        Ok(())
    }

    /// The XSAVE header, and the control word of the PT component: the module loads them.
    fn is_protected_xbuff(&self, word: u32) -> bool {
        const HEADER: core::ops::RangeInclusive<u32> = 0x40..=0x47;
        const PT: usize = 8;
        let (offsets, _) = xsave::layout(&self.p.cfg, self.td.config().xfam);
        HEADER.contains(&word) || offsets[PT] != 0 && word == offsets[PT] / 8
    }

    fn store_management(&mut self, place: &Place, new: u64) -> Leaf {
        let vm = place.element as u8;
        match place.field().code {
            0x0B => self.ctx.pend_nmi = new as u8,
            // The module's own, whatever their masks say.
            0x0C | 0x0F | 0x41 | 0x42 => return not_writable(),
            per_vm::L2_CTLS => {
                self.ctx.store.set_at(place, new);
                self.l2_ctls(vm, new);
            }
            per_vm::TSC_DEADLINE => {
                self.tsc_deadline(vm, new)?;
                self.ctx.store.set_at(place, new);
            }
            _ => self.ctx.store.set_at(place, new),
        }
        Ok(())
    }

    fn is_l2_vm(&self, vm: u8) -> bool {
        (1..=self.td.l2_vms.load(Acquire)).contains(&vm)
    }

    fn l2_ctls(&mut self, vm: u8, new: u64) {
        if !self.is_l2_vm(vm) {
            return;
        }
        let shadow = self.ctx.store.of_vm(per_vm::SHARED_EPTP, vm);
        let zero_page = self
            .td
            .private_pa(&self.p.cfg, self.td.tdcx[ZERO_PAGE].load(Acquire));
        let eptp = match new & L2_CTLS_SHARED_EPTP != 0 && shadow != UNSET {
            true => shadow,
            false => zero_page,
        };
        self.ctx.store.set_vmcs(vm, vmcs::SHARED_EPTP, eptp);
    }

    /// A deadline in the TD's time becomes one in native time, 0 for none.
    fn tsc_deadline(&mut self, vm: u8, new: u64) -> Leaf {
        if !self.is_l2_vm(vm) {
            return Ok(());
        }
        let (tsc, now) = (self.td.config().tsc, self.p.machine.tsc());
        let native = if new == UNSET {
            0
        } else if new <= tsc.at(now) {
            now
        } else {
            // Times more than 2⁶³ ticks ahead count as past.
            tsc.native_at(new)
                .filter(|native| *native != 0 && native.wrapping_sub(now) as i64 > 0)
                .ok_or(Code::OPERAND_INVALID.status())?
        };
        self.ctx
            .store
            .set_of_vm(per_vm::SHADOW_TSC_DEADLINE, vm, native);
        Ok(())
    }
}

/// The code of CR2 in its class.
const CR2: u32 = 0x28;
/// L2_CTLS: the L2 VM uses its shared EPT.
const L2_CTLS_SHARED_EPTP: u64 = 1;

/// A control register's new value: the bits of `mask` must be as `shadow` says, and stay as they are.
fn keep_owned(new: u64, old: u64, mask: u64, shadow: u64) -> Leaf<u64> {
    if (new ^ shadow) & mask != 0 {
        return not_valid();
    }
    Ok(new & !mask | old & mask)
}
