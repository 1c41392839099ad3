//! `KVM_SET_GUEST_DEBUG`: single steps and breakpoints that leave to user space.

use kvm_ops::sim::Debugger;
use kvm_ops::{Events, Exception, VcpuOps};
use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::checks::guest_debug::{COPY, PENDING, PROTECTED};
use kvm_ops_uapi::state::GuestDebug;
use kvm_ops_uapi::state::guest_debug::{
    BLOCKIRQ, ENABLE, INJECT_BP, INJECT_DB, SINGLESTEP, USE_HW_BP, USE_SW_BP,
};
use kvm_ops_uapi::system::vm_type;

use super::{Cpu, State};
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::{Process, arg, machine};

/// The vectors of #DB and #BP.
const DB: u8 = 1;
const BP: u8 = 3;
/// The bit of DR7 that is always set.
const DR7_FIXED: u64 = 1 << 10;

/// `None` for a guest that is not debugged: then the other bits do not count.
fn debugger(args: &GuestDebug) -> Option<Debugger> {
    let has = |bit: u32| args.control.get() & bit != 0;
    let [d0, d1, d2, d3, _, _, _, dr7] = args.debugreg.map(|register| register.get());
    has(ENABLE).then(|| Debugger {
        step: has(SINGLESTEP),
        int3: has(USE_SW_BP),
        breakpoints: has(USE_HW_BP).then_some(([d0, d1, d2, d3], dr7)),
        hold_events: has(BLOCKIRQ),
    })
}

pub(super) fn set(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: GuestDebug = arg::read(process, argument, COPY)?;
    let mut state = file.state();
    let secret = file.vm.kind() == vm_type::TDX || state.cpu.is_protected();
    ensure(!secret, PROTECTED)?;
    let control = args.control.get();
    if control & (INJECT_DB | INJECT_BP) != 0 {
        let vector = if control & INJECT_DB != 0 { DB } else { BP };
        inject(state.cpu.require_processor()?, vector)?;
    }
    state.debugger = debugger(&args);
    state.apply_debugger();
    Ok(0)
}

fn inject(vcpu: &mut machine::Processor, vector: u8) -> Result<()> {
    let waiting = vcpu.events()?;
    ensure(waiting.exception.is_none(), PENDING)?;
    vcpu.set_events(&Events {
        exception: Some(Exception::new(vector, None)),
        ..waiting
    })?;
    Ok(())
}

impl State {
    /// Tells the processor of the debugger. Code of a vCPU that is held is not executed.
    pub(super) fn apply_debugger(&mut self) {
        if let Cpu::Processor(vcpu) = &mut self.cpu
            && let Some(port) = machine::port_mut(vcpu)
        {
            port.set_debugger(self.debugger.unwrap_or_default());
        }
    }

    /// Checks that the registers can be encrypted: nobody debugs the guest, and it has no breakpoints.
    pub(crate) fn check_debugging(&self, (debugged, dr7): (Check, Check)) -> Result<()> {
        ensure(self.debugger.is_none(), debugged)?;
        let own = match &self.cpu {
            Cpu::Processor(vcpu) => vcpu.debug_regs().map_or(DR7_FIXED, |regs| regs.dr7),
            Cpu::Held(_) => DR7_FIXED,
        };
        ensure(own & !DR7_FIXED == 0, dr7)
    }
}
