//! TDG.VP.ENTER: L1 runs one of its L2 VMs.

use super::super::exits::REASON_EPT_VIOLATION;
use super::super::tdcall::{Done, invalid};
use super::super::{Guest, Next, TdExit};
use crate::l2::translate::translate;
use crate::l2::vmcs::{DEBUG_EXIT_BEFORE_ENTRY, NONE, PerVm, Vmcs};
use crate::l2::{guest_state, preemption};
use crate::status::{Code, Operand, Status};
use crate::vcpu::Event;

/// RCX: kind of INVEPT 1:0, which has nothing to act on here, and VM 53:52.
const RCX_RESERVED: u64 = !(3 << VM_SHIFT | 3);
const VM_SHIFT: u32 = 52;

impl Guest<'_> {
    /// TDG.VP.ENTER
    pub(in super::super) fn enter_l2(&mut self) -> Result<Done, Status> {
        let (rcx, gpa) = (self.ctx.gprs.rcx, self.ctx.gprs.rdx);
        if gpa % guest_state::ALIGNMENT != 0 || !self.td.is_valid_private_gpa(gpa) {
            return Err(invalid(Operand::RDX));
        }
        let vm = (rcx >> VM_SHIFT & 3) as usize;
        if rcx & RCX_RESERVED != 0 || !(1..=self.td.num_l2_vms()).contains(&vm) {
            return Err(invalid(Operand::RCX));
        }
        if self.ctx.per_vm(PerVm::VapicGpa, vm) == NONE {
            return Err(invalid(Operand::L2_VAPIC_GPA));
        }
        if self.ctx.has_deliverable_interrupt() {
            return Err(Code::PENDING_INTERRUPT.status());
        }
        if self.ctx.per_vm(PerVm::DebugControls, vm) & DEBUG_EXIT_BEFORE_ENTRY != 0 {
            let exit = TdExit::new(Code::TD_EXIT_BEFORE_L2_ENTRY, 0);
            return Ok(Done::Other(Next::Leave(Box::new(exit))));
        }
        if self.ctx.per_vm(PerVm::StateGpa, vm) != gpa {
            self.ctx.set_per_vm(PerVm::StateGpa, vm, gpa);
            self.ctx.set_per_vm(PerVm::StateHpa, vm, NONE);
        }
        let (p, td) = (self.p, self.td);
        if let Err(gpa) = translate(p, td, &mut self.ctx, vm) {
            let exit = TdExit::new(Code::SUCCESS, REASON_EPT_VIOLATION);
            return Ok(Done::Other(Next::Leave(Box::new(TdExit {
                r8: gpa & !0xFFF,
                ..exit
            }))));
        }
        if guest_state::load(p, td, &mut self.ctx, vm).is_err() {
            return Ok(Done::Other(self.poisoned()));
        }
        self.ctx.curr_vm = vm as u8;
        preemption::arm(p, &mut self.ctx, vm);
        Ok(Done::Other(self.run_l2()))
    }

    /// The VM that runs goes on, with the event of its entry fields.
    pub(super) fn run_l2(&mut self) -> Next {
        match pending_entry_event(&self.ctx) {
            Some(event) => Next::Inject(event),
            None => Next::Done { length: 0 },
        }
    }
}

/// The event that the entry fields of the VM's VMCS ask for.
pub(crate) fn pending_entry_event(ctx: &crate::vcpu::VcpuContext) -> Option<Event> {
    let vm = ctx.vm();
    let event = Event::from_info(
        ctx.vmcs(vm, Vmcs::EntryInterruption),
        ctx.vmcs(vm, Vmcs::EntryError),
    )?;
    let cr2 = if event.is_exception(14) { ctx.cr2 } else { 0 };
    Some(Event { cr2, ..event })
}
