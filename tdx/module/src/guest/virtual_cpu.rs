//! CPUID, RDMSR and WRMSR that leave the TD, and the same questions without executing anything.

use super::{Guest, Next, VmExit};
use crate::meta;
use crate::meta::table::Agent;
use crate::meta::vcpu::VcpuFields;
use crate::pamt::{PageSize, PageType};
use crate::platform::Platform;
use crate::vcpu::Event;
use crate::virt::answer::{CpuidAnswer, MsrAnswer, Virtual};
use crate::virt::msr::MsrAccess;
use std::sync::atomic::Ordering;

impl Guest<'_> {
    pub(super) fn virtual_cpu(&mut self) -> Virtual<'_> {
        let vm = self.ctx.curr_vm;
        Virtual {
            cfg: &self.p.cfg,
            td: self.td,
            vcpu: self.vcpu,
            ctx: &mut self.ctx,
            vm,
        }
    }

    pub(super) fn cpuid(&mut self, e: &VmExit) -> Next {
        let (leaf, subleaf) = (self.ctx.gprs.rax as u32, self.ctx.gprs.rcx as u32);
        match self.virtual_cpu().cpuid(leaf, subleaf, e.cpl) {
            CpuidAnswer::VirtualizationException => self.ve(e, 0),
            CpuidAnswer::Values([a, b, c, d]) => {
                let r = &mut self.ctx.gprs;
                (r.rax, r.rbx) = (a.into(), b.into());
                (r.rcx, r.rdx) = (c.into(), d.into());
                done(e)
            }
        }
    }

    pub(super) fn msr(&mut self, e: &VmExit, access: MsrAccess) -> Next {
        const LOW: u64 = 0xFFFF_FFFF;
        let r = self.ctx.gprs;
        let value = r.rdx << 32 | r.rax & LOW;
        match self.virtual_cpu().msr_exit(r.rcx as u32, access, value) {
            MsrAnswer::VirtualizationException => self.ve(e, 0),
            MsrAnswer::GeneralProtection => Next::Inject(Event::GP),
            MsrAnswer::Direct => done(e),
            MsrAnswer::Completed(value) => {
                if access == MsrAccess::Read {
                    (self.ctx.gprs.rax, self.ctx.gprs.rdx) = (value & LOW, value >> 32);
                }
                done(e)
            }
        }
    }
}

fn done(e: &VmExit) -> Next {
    Next::Done {
        length: u64::from(e.ilen),
    }
}

impl Platform {
    /// Result of CPUID on a vCPU, named by its TDVPR page, in its L1: leaf in EAX, sub-leaf in ECX, at a privilege
    /// level of 0 to 3. `None` if there is no such vCPU, or before its TDH.VP.INIT.
    ///
    /// This is what a VM exit with reason 10 leads to, less the #VE information: a processor model that
    /// executes the guest's code asks here, and plays [`crate::GuestEvent::Exit`] only to have the #VE
    /// delivered. Bits that follow from the vCPU's state (CR4, XCR0, IA32_XSS, IA32_TSX_CTRL, code segment)
    /// are those of its fields, which the model keeps current ([`Platform::set_processor_state`]).
    #[must_use]
    pub fn guest_cpuid(&self, tdvpr: u64, leaf: u32, subleaf: u32, cpl: u8) -> Option<CpuidAnswer> {
        self.with_virtual_cpu(tdvpr, |v| v.cpuid(leaf, subleaf, cpl))
    }

    /// Result of RDMSR of an address on a vCPU in its L1; for WRMSR see [`Platform::guest_msr_exits`]. `None` as
    /// for [`Platform::guest_cpuid`].
    #[must_use]
    pub fn guest_rdmsr(&self, tdvpr: u64, address: u32) -> Option<MsrAnswer> {
        self.with_virtual_cpu(tdvpr, |mut v| v.msr(address, MsrAccess::Read, 0))
    }

    /// An access to an MSR leaves the TD (its bit in the MSR bitmaps is set, or it has none). One that does
    /// not is executed by the processor on the vCPU's own MSR; for the other, a processor model plays the
    /// VM exit (31 for RDMSR, 32 for WRMSR). `None` as for [`Platform::guest_cpuid`].
    #[must_use]
    pub fn guest_msr_exits(&self, tdvpr: u64, address: u32, access: MsrAccess) -> Option<bool> {
        self.with_virtual_cpu(tdvpr, |v| v.msr_exits(address, access))
    }

    /// Value that RDTSC returns on a vCPU: it never leaves the TD. `None` as for [`Platform::guest_cpuid`].
    #[must_use]
    pub fn guest_tsc(&self, tdvpr: u64) -> Option<u64> {
        let now = self.machine.tsc();
        self.with_virtual_cpu(tdvpr, |v| v.td.config().tsc.at(now))
    }

    /// A field of a vCPU as the processor has it, whatever its masks: what VM entry loads. `id` is a
    /// metadata identifier (`0x0024_...` for the VMCS of L1). `None` if there is no such field, or as for
    /// [`Platform::guest_cpuid`].
    #[must_use]
    pub fn processor_state(&self, tdvpr: u64, id: u64) -> Option<u64> {
        self.with_fields(tdvpr, |fields| {
            let place = meta::vcpu::context(fields.td).find(id)?;
            Some(fields.value(&place) & place.field().element_mask())
        })?
    }

    /// Sets a field of a vCPU as the processor does: what a VM exit saves. Bits above the field's size are
    /// dropped. False if there is no such field, if it is the module's own (state, association, addresses,
    /// #VE information), or as for [`Platform::guest_cpuid`].
    ///
    /// The vCPU should run or be about to: the module takes the value for the guest's.
    pub fn set_processor_state(&self, tdvpr: u64, id: u64, value: u64) -> bool {
        let set = self.with_fields(tdvpr, |mut fields| {
            let place = meta::vcpu::context(fields.td).find(id)?;
            let value = value & place.field().element_mask();
            fields.save(&place, value).then_some(())
        });
        set.flatten().is_some()
    }

    fn with_virtual_cpu<R>(&self, tdvpr: u64, ask: impl FnOnce(Virtual<'_>) -> R) -> Option<R> {
        self.with_fields(tdvpr, |fields| {
            ask(Virtual {
                cfg: &self.cfg,
                td: fields.td,
                vcpu: fields.vcpu,
                ctx: fields.ctx,
                vm: 0,
            })
        })
    }

    pub(super) fn with_fields<R>(
        &self,
        tdvpr: u64,
        ask: impl FnOnce(VcpuFields<'_>) -> R,
    ) -> Option<R> {
        let entry = self.pamt.get()?.entry(tdvpr, PageSize::Size4K)?;
        if entry.page_type() != PageType::Tdvpr {
            return None;
        }
        let vcpu = self.vcpus.get(entry.slot())?;
        let td = self.tds.get(vcpu.td_slot.load(Ordering::Acquire))?;
        let mut ctx = vcpu.context();
        ctx.store.is_initialised().then(|| {
            ask(VcpuFields {
                p: self,
                td,
                vcpu,
                ctx: &mut ctx,
                agent: Agent::HostOfDebug,
            })
        })
    }
}
