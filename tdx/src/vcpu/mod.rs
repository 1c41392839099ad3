//! The vCPU of a trust domain.

mod record;
mod seat;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use kvm_ops::guest::GuestProgram;
use kvm_ops::{
    Answer, CpuId, CpuidEntry, Error, Exit, Field, Host, Kick, OpName, Programs, Result, SeamPort,
    TableRoot, TdPort, VcpuId, VcpuOps,
};

pub(crate) use record::{Unfinished, VcpuRecord};
pub(crate) use seat::{Resume, Tried};

use crate::run::Run;
use crate::td::Td;

/// A vCPU of [`TdxVm`](crate::TdxVm).
///
/// It may outlive the TD: its pages belong to the TD and go with it, and the handle answers
/// [`Error::WrongState`] from then on. If the TD moves to another VM, the handle answers
/// [`Error::Poisoned`]: `create_vcpu` of that VM gives the vCPU's new one.
pub struct TdxVcpu<H: Host> {
    pub(crate) td: Arc<Td<H>>,
    pub(crate) record: Arc<VcpuRecord>,
    /// The processor of `vcpu_load`.
    pub(crate) cpu: Option<CpuId>,
    /// Its state between two exits.
    pub(crate) run: Run,
    /// Asked for a reason to leave the guest, beside kicks.
    pub(crate) source: Option<InterruptSource>,
    /// What TDG.VP.VMCALL for CPUID answers, if somebody said it.
    pub(crate) cpuid: Option<Vec<CpuidEntry>>,
}

/// What [`TdxVcpu::set_interrupt_source`] takes.
pub(crate) type InterruptSource = Box<dyn Fn() -> bool + Send>;

impl<H: Host> TdxVcpu<H> {
    /// Sets a source that is asked whether the vCPU shall leave with [`Exit::Interrupted`], as for a kick: on
    /// the thread that runs it, in front of each TDH.VP.ENTER, and again and again while it halts. A
    /// hypervisor that has to look for signals asks here.
    pub fn set_interrupt_source(&mut self, source: impl Fn() -> bool + Send + 'static) {
        self.source = Some(Box::new(source));
    }

    /// Sets what the guest gets when it asks the host for CPUID (TDG.VP.VMCALL), for leaves that the module does not
    /// answer: all zeros for one that is not in the list. Without a list the TD's parameters
    /// answer, and for other leaves the vCPU is that of a hypervisor by KVM's name, with its number as x2APIC ID.
    pub fn set_cpuid_answers(&mut self, entries: Vec<CpuidEntry>) {
        self.cpuid = Some(entries);
    }

    /// Takes a kick, or the source's word.
    pub(crate) fn take_interruption(&self) -> bool {
        self.record.take_kick() || self.source.as_ref().is_some_and(|source| source())
    }

    /// The processor for this vCPU's SEAMCALLs.
    pub(crate) fn target_cpu(&self) -> Result<CpuId> {
        match self.cpu {
            Some(cpu) => Ok(cpu),
            None => Ok(self.td.seam()?.this_cpu()),
        }
    }
}

impl<H: Host> fmt::Debug for TdxVcpu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TdxVcpu")
            .field("vm", &self.td.life.id())
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

/// Kicks a vCPU from any thread.
struct KickHandle<H: Host> {
    td: Arc<Td<H>>,
    record: Arc<VcpuRecord>,
}

impl<H: Host> Kick for KickHandle<H> {
    fn kick(&self) {
        // First the flag, then the look: a vCPU says that it is inside before it looks at the flag.
        self.record.kick();
        if self.record.stay().is_some()
            && let Some(seam) = self.td.host.seam()
        {
            seam.kick(self.record.cpu());
        }
    }
}

/// TDVPS fields that the host may write (TDX module ABI, "TD VCPU metadata").
const FIELD_SHARED_EPTP: u64 = 0x203c;
const FIELD_PEND_NMI: u64 = 0x2000_0000_0000_000b;
/// Bits 51:12, all of a shared EPTP that the host chooses.
const EPTP_MASK: u64 = 0x000f_ffff_ffff_f000;

impl<H: Host> VcpuOps for TdxVcpu<H> {
    fn id(&self) -> VcpuId {
        self.record.id
    }

    fn vcpu_run(&mut self) -> Result<Exit> {
        let name = |vcpu: &Self| (vcpu.td.life.id(), vcpu.record.id);
        crate::trace::run(self, name, Self::run)
    }

    fn exit_data(&mut self) -> &mut [u8] {
        self.run.data()
    }

    fn answer(&mut self, answer: Answer) -> Result<()> {
        self.run.take_answer(answer)
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(KickHandle {
            td: Arc::clone(&self.td),
            record: Arc::clone(&self.record),
        })
    }

    fn programs(&mut self) -> Option<&mut dyn Programs> {
        self.td.host.runs().programs().then_some(self)
    }

    fn instructions(&self) -> Option<u64> {
        let count = |port: &dyn TdPort| Ok(port.td_instructions(self.record.tdvpr));
        self.td.on_td_port(count).ok().flatten()
    }

    fn clock(&self) -> Option<u64> {
        self.td
            .on_td_port(|port| Ok(port.td_clock()))
            .ok()
            .flatten()
    }

    /// The state of a TD's vCPU is the guest's secret.
    fn refusal(&self, operation: &'static OpName) -> Error {
        Error::Protected(operation)
    }

    /// A TD's vCPU starts once. INIT cannot reach it: the module blocks it.
    fn vcpu_reset(&mut self, init_event: bool) -> Result<()> {
        if init_event {
            return kvm_ops::refused!(self, "vcpu_reset by INIT");
        }
        Ok(())
    }

    fn vcpu_load(&mut self, cpu: CpuId) -> Result<()> {
        if self.td.seam()?.package_of(cpu).is_none() {
            return Err(Error::Invalid(Field::Cpu, cpu.0.into()));
        }
        self.cpu = Some(cpu);
        Ok(())
    }

    fn vcpu_put(&mut self) {
        self.cpu = None;
    }

    /// Gives the handle back. The vCPU's pages are reclaimed with the TD, because the module gives
    /// none back before (TDH.PHYMEM.PAGE.RECLAIM).
    fn vcpu_free(self) -> Result<()> {
        Ok(())
    }

    /// Gives the module the root of the tables of shared memory: one TDH.VP.WR.
    fn load_mmu_pgd(&mut self, root: TableRoot) -> Result<()> {
        let root = root.address();
        if root.get() & !EPTP_MASK != 0 {
            return Err(Error::Invalid(Field::HostAddress, root.get()));
        }
        self.write_field(FIELD_SHARED_EPTP, root.get(), EPTP_MASK, || ())
    }

    /// Leaves an NMI with the module, which injects it when the guest can take it: one TDH.VP.WR.
    fn inject_nmi(&mut self) -> Result<()> {
        self.write_field(FIELD_PEND_NMI, 1, 1, || self.record.wake())
    }
}

impl<H: Host> Programs for TdxVcpu<H> {
    fn load_program(&mut self, program: Box<dyn GuestProgram>) -> Result<()> {
        self.td.require_live()?;
        let (id, tdvpr, mask) = (self.record.id, self.record.tdvpr, self.td.mask);
        self.td
            .on_td_port(|port| port.load_td_program(id, tdvpr, mask, program))
    }
}

impl<H: Host> TdxVcpu<H> {
    /// TDH.VP.WR, and `then` before the vCPU can move to another VM.
    fn write_field(&self, field: u64, value: u64, mask: u64, then: impl Fn()) -> Result<()> {
        self.td.require_live()?;
        let cpu = self.target_cpu()?;
        let calls = self.td.calls()?;
        self.td
            .on_cpu_of(&self.record, cpu, || {
                calls.vp_wr(cpu, self.record.tdvpr, field, value, mask)?;
                then();
                Ok(())
            })
            .map_err(|failed| self.td.failed(&failed))
    }
}
