//! The place of the software AMD SP in a build without the feature `sev`: no machine has one, so no
//! guest is a SEV guest.

use kvm_ops::guest::{GuestFault, MAX_ACCESS};
use kvm_ops::{Exit, Gpa, Level, Privacy, Result, SevPort, SharedMask, Tech};
use kvm_ops_cpu::{Bus, Controls, Cpu, CpuidLeaf, CpuidTable, Event, Exit as CpuExit};

pub(crate) use kvm_ops::NoPort as SoftPsp;

use crate::access::{Copy, Touch};
use crate::irq::Mail;
use crate::processor::{Next, Processor};
use crate::vcpu::{Core, Flow};
use crate::vm::VmInner;
use crate::{BuildError, SimVm, SoftPages};

impl VmInner {
    pub(crate) fn shows_slots(&self) -> bool {
        false
    }
}

#[derive(Debug)]
pub(crate) enum Setup {}

#[derive(Debug)]
pub(crate) enum Sev {}

impl Sev {
    pub(crate) fn up(setup: Setup) -> Result<Self, BuildError> {
        match setup {}
    }

    pub(crate) fn up_or_log(setup: Setup) -> Option<Self> {
        match setup {}
    }

    pub(crate) fn up_default() -> Option<Self> {
        None
    }

    pub(crate) fn offers(&self, _: Tech) -> bool {
        match *self {}
    }

    pub(crate) fn psp(&self) -> &SoftPsp {
        match *self {}
    }

    pub(crate) fn pages(&self) -> &SoftPages {
        match *self {}
    }
}

pub(crate) fn port(_: &SimVm) -> Option<&dyn SevPort> {
    None
}

#[derive(Default)]
pub(crate) struct Guest {}

impl Guest {
    pub(crate) fn mask(&self) -> SharedMask {
        SharedMask::NONE
    }

    pub(crate) fn close(&self) {}

    pub(crate) fn owes(&self) -> bool {
        false
    }

    pub(crate) fn take_vcpus(&self, _: &Self) {}
}

/// What the processor of an encrypted guest has more than others.
#[derive(Debug)]
pub(crate) enum Side {}

/// The embedder's answer that such a processor waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pending {}

impl Pending {
    pub(crate) fn msr_wait(&mut self) -> Option<&mut crate::processor::MsrWait> {
        match *self {}
    }
}

pub(crate) fn surround(_: &VmInner, bus: impl Bus + 'static) -> (Box<dyn Bus>, Option<Box<Side>>) {
    (Box::new(bus), None)
}

pub(crate) fn cpuid(_: &VmInner, table: CpuidTable) -> CpuidTable {
    table
}

pub(crate) fn change_cpuid(_: &Processor, table: CpuidTable) -> CpuidTable {
    table
}

pub(crate) fn controls(_: &VmInner, controls: Controls) -> Controls {
    controls
}

impl Processor {
    pub(crate) fn load_vmsa(&mut self) -> Result<Option<Exit>> {
        Ok(None)
    }

    pub(crate) fn store_vmsa(&mut self) -> Result<()> {
        Ok(())
    }

    pub(crate) fn take_work(&mut self) -> Result<Option<Next>> {
        Ok(None)
    }

    pub(crate) fn outside(&mut self, _: CpuExit) -> Result<Next> {
        Ok(Next::Again)
    }

    pub(crate) fn cpuid_answer(&self, function: u32, index: u32) -> CpuidLeaf {
        self.cpu.cpuid(function, index)
    }

    pub(crate) fn take_interrupted(&mut self) -> Option<Event> {
        None
    }

    pub(crate) fn with_memory<T>(&mut self, _: bool, work: impl FnOnce(&mut Cpu) -> T) -> T {
        work(&mut self.cpu)
    }

    pub(crate) fn start_protected(&mut self, _: &Mail) -> bool {
        false
    }

    pub(crate) fn is_sev_exit(&self, _: &CpuExit) -> bool {
        false
    }

    pub(crate) fn finish_sev(&mut self, pending: Pending, _: &[u8; MAX_ACCESS], _: u64) {
        match pending {}
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Converting {}

impl Converting {
    pub(crate) fn asks(&self) -> bool {
        match *self {}
    }
}

pub(crate) fn first_touch(_: &VmInner, gpa: Gpa, _: Copy<'_>) -> Touch {
    Touch::Fault(GuestFault::Integrity(gpa))
}

impl Core {
    pub(crate) fn convert(&mut self, _: Gpa, _: u64, _: Privacy) -> Flow {
        Flow::fault(GuestFault::NotOffered)
    }

    pub(crate) fn accept(&mut self, _: Gpa, _: Level) -> Flow {
        Flow::fault(GuestFault::NotOffered)
    }

    pub(crate) fn ghcb_msr(&mut self, _: u64) -> Flow {
        Flow::fault(GuestFault::NotOffered)
    }

    pub(crate) fn go_on_converting(&mut self, now: Converting) -> Flow {
        match now {}
    }
}
