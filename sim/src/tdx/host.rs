//! The TDX side of a host, of its builder and of its VMs.

use std::sync::Arc;

use kvm_ops::guest::GuestProgram;
use kvm_ops::{Error, Field, Hpa, Result, SharedMask, TdPort, TdVcpuState, Tech, VcpuId};
use soft_tdx_module::{Platform, PlatformBuilder};

use super::HostApic;
use super::processor::input_clock;
use super::program::TdProgram;
use crate::vm::VmInner;
use crate::{SimHost, SimHostBuilder, SimVm};

impl SimHost {
    /// The TDX machine of a host that is not built otherwise, to be changed and given to
    /// [`SimHostBuilder::tdx`].
    pub fn default_tdx() -> PlatformBuilder {
        super::default_setup()
    }

    /// The software TDX module below, for faults, traces and counts. `None` on AMD.
    pub fn tdx_platform(&self) -> Option<&Arc<Platform>> {
        self.machine.tdx().map(|tdx| &tdx.platform)
    }
}

impl SimHostBuilder {
    /// The TDX machine: processors, packages, memory, KeyIDs. Ignored on AMD.
    #[must_use]
    pub fn tdx(mut self, builder: PlatformBuilder) -> Self {
        self.tdx = Some(builder);
        self
    }
}

/// The operations for a TD, if the VM is for one.
pub(crate) fn port(vm: &SimVm) -> Option<&dyn TdPort> {
    match vm.inner.tech {
        Tech::Tdx => Some(vm),
        _ => None,
    }
}

/// Forgets the vCPUs of a VM that is closed.
pub(crate) fn vm_closed(vm: &VmInner) {
    if vm.tech == Tech::Tdx
        && let Some(tdx) = vm.machine.tdx()
    {
        tdx.vcpus.remove_all(vm);
    }
}

/// The vCPUs of a TD that execute machine code go on in another VM, at the same time of the guest.
pub(crate) fn hand_over(to: &Arc<VmInner>, from: &VmInner) {
    to.turns.go_on_from(from.turns.clock());
    *to.processors() = std::mem::take(&mut *from.processors());
    if let Some(tdx) = from.machine.tdx() {
        tdx.vcpus.hand_over(to, from);
    }
}

/// The latest time that comes from another host, 146 years. All times that follow from it can be counted.
const LATEST: u64 = 1 << 62;

impl TdPort for SimVm {
    fn td_vcpu_created(&self, vcpu: VcpuId, tdvpr: Hpa) -> Result<()> {
        let Some(tdx) = self.inner.machine.tdx() else {
            return kvm_ops::not_offered!("td_vcpu_created");
        };
        let wake = self.inner.td_wake(vcpu)?;
        let apic = self
            .inner
            .set_td_apic(vcpu, || HostApic::new(vcpu.0, &wake));
        if let Some(apic) = &apic {
            let address = apic.address();
            self.inner.processors().set(vcpu.0, address, &wake);
        }
        self.inner.turns.join(vcpu.0);
        tdx.vcpus.add(vcpu, tdvpr, &self.inner, wake, apic);
        Ok(())
    }

    fn td_read_msr(&self, vcpu: VcpuId, index: u32) -> Result<Option<u64>> {
        match self.inner.td_apic(vcpu) {
            Some(apic) => apic.read(index, self.inner.turns.clock()),
            None => Ok(None),
        }
    }

    fn td_write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Result<bool> {
        match self.inner.td_apic(vcpu) {
            Some(apic) => apic.write(&self.inner, index, value, self.inner.turns.clock()),
            None => Ok(false),
        }
    }

    fn td_wait(&self, vcpu: VcpuId, interrupts: bool) -> bool {
        let apic = self.inner.td_apic(vcpu);
        apic.is_some_and(|apic| apic.wait(&self.inner.turns, interrupts))
    }

    fn td_take_nmi(&self, vcpu: VcpuId) -> bool {
        let wake = self.inner.td_wake(vcpu);
        self.inner.td_apic(vcpu).is_some() && wake.is_ok_and(|wake| wake.take_nmi())
    }

    fn td_vcpu_state(&self, vcpu: VcpuId) -> Result<Option<TdVcpuState>> {
        let clock = self.inner.turns.clock();
        let apic = self.inner.td_apic(vcpu).map(|apic| apic.state(clock));
        Ok(Some(TdVcpuState { clock, apic }))
    }

    fn set_td_vcpu_state(&self, vcpu: VcpuId, tdvpr: Hpa, state: &TdVcpuState) -> Result<()> {
        let inner = &self.inner;
        if state.clock > LATEST {
            return Err(Error::Invalid(Field::Clock, state.clock));
        }
        let (apic, tdx) = (inner.td_apic(vcpu), inner.machine.tdx());
        if state.apic.is_some() && apic.is_none() {
            return kvm_ops::not_offered!("local APICs for this VM's vCPUs");
        }
        inner.turns.go_on_from(state.clock);
        if let (Some(state), Some(apic), Some(tdx)) = (&state.apic, apic, tdx) {
            apic.set_ticks(input_clock(&tdx.platform, tdvpr.get()));
            apic.set_state(state, inner.turns.clock());
        }
        Ok(())
    }

    fn td_instructions(&self, tdvpr: Hpa) -> Option<u64> {
        self.inner.machine.tdx()?.vcpus.instructions(tdvpr)
    }

    fn td_clock(&self) -> Option<u64> {
        Some(self.inner.turns.clock())
    }

    fn load_td_program(
        &self,
        vcpu: VcpuId,
        tdvpr: Hpa,
        mask: SharedMask,
        program: Box<dyn GuestProgram>,
    ) -> Result<()> {
        let (Some(tdx), Tech::Tdx) = (self.inner.machine.tdx(), self.inner.tech) else {
            return kvm_ops::not_offered!("load_td_program");
        };
        let wake = self.inner.td_wake(vcpu)?;
        let program = TdProgram::new(program, vcpu, mask, &self.inner, wake)
            .ok_or(Error::Invalid(Field::Gpa, mask.bits()))?;
        tdx.vcpus.remove(tdvpr);
        self.inner.drop_td_apic(vcpu);
        self.inner.turns.part(vcpu.0);
        tdx.platform.set_guest(tdvpr.get(), program);
        Ok(())
    }
}
