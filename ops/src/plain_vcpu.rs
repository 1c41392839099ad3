//! The vCPU of a normal VM: the port's vCPU under the name of a technology.

use alloc::sync::Arc;
use core::fmt;
use core::marker::PhantomData;

use crate::{
    Answer, CpuId, CpuidEntry, DebugRegs, EncCmd, Error, Events, Exit, GuestDebug, Kick, Life,
    MpState, Msr, OpName, Programs, Regs, Result, Sregs, Step, TableRoot, VcpuId, VcpuOps, Xcrs,
    Xsave,
};

/// A vCPU of a normal VM of technology `T`. Every operation goes to the port's vCPU, which is the
/// processor or answers as it does; runs need a runnable VM, as for every technology.
///
/// It is a type of its own, and not `P`, because the variants of an enum of back ends differ in their
/// types.
pub struct PlainVcpu<P, T> {
    port: P,
    life: Arc<Life>,
    tech: PhantomData<fn() -> T>,
}

impl<P, T> PlainVcpu<P, T> {
    #[inline]
    pub(crate) const fn new(port: P, life: Arc<Life>) -> Self {
        Self {
            port,
            life,
            tech: PhantomData,
        }
    }

    /// The vCPU below, for operations that only its platform offers.
    #[inline]
    pub fn port(&self) -> &P {
        &self.port
    }

    /// The same, to change.
    #[inline]
    pub fn port_mut(&mut self) -> &mut P {
        &mut self.port
    }
}

impl<P: fmt::Debug, T> fmt::Debug for PlainVcpu<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.port.fmt(f)
    }
}

impl<P: VcpuOps, T> VcpuOps for PlainVcpu<P, T> {
    #[inline]
    fn id(&self) -> VcpuId {
        self.port.id()
    }

    #[inline]
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        self.port.vcpu_reset(init_event)
    }

    #[inline]
    fn vcpu_load(&mut self, cpu: CpuId) -> Result<()> {
        self.port.vcpu_load(cpu)
    }

    #[inline]
    fn vcpu_put(&mut self) {
        self.port.vcpu_put()
    }

    fn vcpu_free(self) -> Result<()> {
        self.port.vcpu_free()
    }

    #[inline]
    fn vcpu_run(&mut self) -> Result<Exit> {
        self.life.require(Step::Runnable)?;
        self.port.vcpu_run()
    }

    #[inline]
    fn exit_data(&mut self) -> &mut [u8] {
        self.port.exit_data()
    }

    #[inline]
    fn answer(&mut self, answer: Answer) -> Result<()> {
        self.port.answer(answer)
    }

    #[inline]
    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.port.kick_handle()
    }

    #[inline]
    fn programs(&mut self) -> Option<&mut dyn Programs> {
        self.port.programs()
    }

    fn instructions(&self) -> Option<u64> {
        self.port.instructions()
    }

    fn clock(&self) -> Option<u64> {
        self.port.clock()
    }

    #[inline]
    fn refusal(&self, operation: &'static OpName) -> Error {
        self.port.refusal(operation)
    }

    #[inline]
    fn regs(&self) -> Result<Regs> {
        self.port.regs()
    }

    #[inline]
    fn set_regs(&mut self, regs: &Regs) -> Result<()> {
        self.port.set_regs(regs)
    }

    #[inline]
    fn sregs(&self) -> Result<Sregs> {
        self.port.sregs()
    }

    #[inline]
    fn set_sregs(&mut self, sregs: &Sregs) -> Result<()> {
        self.port.set_sregs(sregs)
    }

    #[inline]
    fn xsave(&self) -> Result<Xsave> {
        self.port.xsave()
    }

    #[inline]
    fn set_xsave(&mut self, xsave: &Xsave) -> Result<()> {
        self.port.set_xsave(xsave)
    }

    #[inline]
    fn events(&self) -> Result<Events> {
        self.port.events()
    }

    #[inline]
    fn set_events(&mut self, events: &Events) -> Result<()> {
        self.port.set_events(events)
    }

    #[inline]
    fn debug_regs(&self) -> Result<DebugRegs> {
        self.port.debug_regs()
    }

    #[inline]
    fn set_debug_regs(&mut self, regs: &DebugRegs) -> Result<()> {
        self.port.set_debug_regs(regs)
    }

    #[inline]
    fn msrs(&self, msrs: &mut [Msr]) -> Result<()> {
        self.port.msrs(msrs)
    }

    #[inline]
    fn set_msrs(&mut self, msrs: &[Msr]) -> Result<()> {
        self.port.set_msrs(msrs)
    }

    #[inline]
    fn xcrs(&self) -> Result<Xcrs> {
        self.port.xcrs()
    }

    #[inline]
    fn set_xcrs(&mut self, xcrs: &Xcrs) -> Result<()> {
        self.port.set_xcrs(xcrs)
    }

    #[inline]
    fn mp_state(&self) -> Result<MpState> {
        self.port.mp_state()
    }

    #[inline]
    fn set_mp_state(&mut self, state: MpState) -> Result<()> {
        self.port.set_mp_state(state)
    }

    #[inline]
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<()> {
        self.port.set_cpuid(entries)
    }

    #[inline]
    fn cpuid_leaf(&self, leaf: u32, subleaf: u32) -> Result<[u32; 4]> {
        self.port.cpuid_leaf(leaf, subleaf)
    }

    #[inline]
    fn inject_irq(&mut self, vector: u8) -> Result<()> {
        self.port.inject_irq(vector)
    }

    #[inline]
    fn inject_nmi(&mut self) -> Result<()> {
        self.port.inject_nmi()
    }

    #[inline]
    fn enable_irq_window(&mut self) -> Result<()> {
        self.port.enable_irq_window()
    }

    #[inline]
    fn set_guest_debug(&mut self, debug: GuestDebug) -> Result<()> {
        self.port.set_guest_debug(debug)
    }

    #[inline]
    fn load_mmu_pgd(&mut self, root: TableRoot) -> Result<()> {
        self.port.load_mmu_pgd(root)
    }

    #[inline]
    fn write_tsc_offset(&mut self, offset: u64) -> Result<()> {
        self.port.write_tsc_offset(offset)
    }

    #[inline]
    fn write_tsc_multiplier(&mut self, khz: u32) -> Result<()> {
        self.port.write_tsc_multiplier(khz)
    }

    #[inline]
    fn setup_mce(&mut self, mcg_cap: u64) -> Result<()> {
        self.port.setup_mce(mcg_cap)
    }

    #[inline]
    fn vcpu_mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        self.port.vcpu_mem_enc_op(cmd)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    fn methods(text: &str, from: &str) -> Vec<std::string::String> {
        let body = &text[text.find(from).unwrap()..];
        let end = body.find("\n}").unwrap();
        let lines = body[..end].lines();
        lines
            .filter_map(|line| line.trim_start().strip_prefix("fn "))
            .map(|rest| rest.split('(').next().unwrap().into())
            .collect()
    }

    #[test]
    fn every_method_of_the_trait_is_forwarded() {
        let declared = methods(include_str!("vcpu_ops.rs"), "pub trait VcpuOps");
        let forwarded = methods(include_str!("plain_vcpu.rs"), "VcpuOps for PlainVcpu");
        assert!(declared.len() > 30);
        assert_eq!(declared, forwarded);
    }
}
