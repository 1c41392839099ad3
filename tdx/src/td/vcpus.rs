//! Creation of vCPUs: TDH.VP.CREATE, TDH.VP.ADDCX for the other pages, TDH.VP.INIT.

use alloc::sync::Arc;

use kvm_ops::{CpuId, Error, Field, Host, Result, SeamPort, Step, VcpuId, VmPort};

use super::{Td, Vcpu};
use crate::seamcall::Calls;
use crate::vcpu::{Unfinished, VcpuRecord};

/// What a vCPU starts with (TDX module ABI, TDH.VP.INIT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuStart {
    /// RCX, and R8, of the first entry: where firmware finds its hand-off block.
    pub rcx: u64,
    /// The x2APIC ID that the guest sees. TDG.VP.VMCALL for CPUID 0xb and 0x1f answers the vCPU's number, whatever is given
    /// here, unless [`TdParams::cpuid`](kvm_ops::TdParams::cpuid) has the leaf, or
    /// [`TdxVcpu::set_cpuid_answers`](crate::TdxVcpu::set_cpuid_answers) gave a list: those come first.
    pub x2apic_id: u32,
}

impl VcpuStart {
    /// RCX of 0, and the vCPU's number as its x2APIC ID.
    pub const fn new(id: VcpuId) -> Self {
        Self {
            rcx: 0,
            x2apic_id: id.0,
        }
    }
}

impl<H: Host> Td<H> {
    /// Creates a vCPU, or goes on with one whose creation was interrupted. The module gives no page
    /// of a vCPU back while the TD lives, so what is begun is kept. A vCPU that came from another VM or
    /// host has started already: `start` is not looked at.
    pub(crate) fn create_vcpu(&self, id: VcpuId, start: VcpuStart) -> Result<Arc<VcpuRecord>> {
        if self.journey.awaits() || self.has_arrived(id) {
            return self.arrived_vcpu(id);
        }
        self.life.require(Step::Initialized)?;
        self.params.check_vcpu(id)?;
        let calls = self.calls()?;
        // One at a time: two threads that create vCPUs would only find the TDR busy. The list itself
        // is not locked meanwhile, because a failure kicks the vCPUs that are in it.
        let _alone = self.lock(&self.creating);
        let begun = match self.lock(&self.vcpus).get(&id) {
            Some(Vcpu::Ready(_) | Vcpu::Arrived(_)) => {
                return Err(Error::Exists(Field::Vcpu, id.0.into()));
            }
            Some(Vcpu::Unfinished(unfinished)) => Some(*unfinished),
            None => None,
        };
        let mut unfinished = match begun {
            Some(unfinished) => unfinished,
            None => self.begin_vcpu(&calls)?,
        };
        let finished = self.finish(&calls, (id, start), &mut unfinished);
        let finished = finished.map(Arc::new);
        let vcpu = match &finished {
            Ok(record) => Vcpu::Ready(Arc::clone(record)),
            Err(_) => Vcpu::Unfinished(unfinished),
        };
        self.lock(&self.vcpus).insert(id, vcpu);
        if finished.is_ok() {
            let (vm, vcpu) = (self.life.id().0, id.0);
            tracing::debug!(technology = "tdx", vm, vcpu, "vCPU created");
        }
        finished
    }

    fn begin_vcpu(&self, calls: &Calls<'_, H::Seam>) -> Result<Unfinished> {
        let tdr = self.tdr()?;
        let tdvpr = self.give(|page| calls.vp_create(page, tdr))?;
        Ok(Unfinished { tdvpr, pages: 1 })
    }

    /// Returns whether the vCPU came with its TD, from another VM or host, and has no handle yet.
    fn has_arrived(&self, id: VcpuId) -> bool {
        matches!(self.lock(&self.vcpus).get(&id), Some(Vcpu::Arrived(_)))
    }

    /// The handle of a vCPU that came from another VM or host.
    fn arrived_vcpu(&self, id: VcpuId) -> Result<Arc<VcpuRecord>> {
        self.life.require(Step::Runnable)?;
        let mut vcpus = self.lock(&self.vcpus);
        let record = match vcpus.get(&id) {
            Some(Vcpu::Arrived(record)) => Arc::clone(record),
            Some(_) => return Err(Error::Exists(Field::Vcpu, id.0.into())),
            None => return Err(Error::NotFound(Field::Vcpu, id.0.into())),
        };
        vcpus.insert(id, Vcpu::Ready(Arc::clone(&record)));
        Ok(record)
    }

    /// Gives the module the pages of a vCPU that comes from another host. Its state, and with it its
    /// association with `cpu`, comes next: the record says so already, because a failed import may
    /// leave it associated.
    pub(crate) fn make_room_for_vcpu(&self, id: VcpuId, cpu: CpuId) -> Result<Arc<VcpuRecord>> {
        self.params.check_vcpu(id)?;
        if self.lock(&self.vcpus).contains_key(&id) {
            return Err(Error::Exists(Field::Vcpu, id.0.into()));
        }
        let calls = self.calls()?;
        let mut unfinished = self.begin_vcpu(&calls)?;
        self.add_pages(&calls, id, &mut unfinished)?;
        let record = Arc::new(VcpuRecord::new(id, unfinished.tdvpr, cpu));
        let vcpu = Vcpu::Arrived(Arc::clone(&record));
        self.lock(&self.vcpus).insert(id, vcpu);
        Ok(record)
    }

    /// Gives the module the rest of a vCPU's pages, and tells the VM below of it.
    fn add_pages(
        &self,
        calls: &Calls<'_, H::Seam>,
        id: VcpuId,
        unfinished: &mut Unfinished,
    ) -> Result<()> {
        let wanted = self.lock(&self.control).tdvps_pages;
        while unfinished.pages < wanted {
            self.give(|page| calls.vp_addcx(page, unfinished.tdvpr))?;
            unfinished.pages += 1;
        }
        let tdvpr = unfinished.tdvpr;
        // Without operations for TDs the machine below need not know.
        self.on_port(|port| port.td().map_or(Ok(()), |td| td.td_vcpu_created(id, tdvpr)))
    }

    fn finish(
        &self,
        calls: &Calls<'_, H::Seam>,
        (id, start): (VcpuId, VcpuStart),
        unfinished: &mut Unfinished,
    ) -> Result<VcpuRecord> {
        let tdvpr = unfinished.tdvpr;
        self.add_pages(calls, id, unfinished)?;
        let cpu = self.seam()?.this_cpu();
        calls
            .vp_init(cpu, tdvpr, start.rcx, start.x2apic_id)
            .map_err(|failed| self.failed(&failed))?;
        Ok(VcpuRecord::new(id, tdvpr, cpu))
    }
}
