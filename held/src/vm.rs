//! The VM: its life, and its operations as commands to the system below.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::{
    Backend, DevicePort, Diagnosis, Drained, EncCmd, EncRegion, Error, Field, FreeReport, Gfn,
    HeldFailure, HeldPort, Host, InitialPage, KeyReleased, Level, Life, Measurement, MemSlot,
    Missing, Pfn, Privacy, Result, SharedMask, Step, Tech, VcpuId, VmId, VmOps, VmParams, VmPort,
};

use crate::gate::Gate;
use crate::memory::{Memory, check_place};
use crate::{HeldVcpu, moves};

/// A TD, or an SEV, SEV-ES or SNP guest, that the system below holds; or a normal VM with private memory
/// ([`EncParams::Private`](kvm_ops::EncParams)).
///
/// Keys, private pages and firmware are the system's, so the teardown has nothing to reclaim: closing the VM
/// gives everything back, and the report counts no pages.
pub struct HeldVm<H: Host> {
    shared: Arc<Shared>,
    params: VmParams,
    mask: SharedMask,
    memory: Mutex<Memory>,
    port: H::Vm,
}

/// The part of a VM that its vCPUs hold too.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) life: Life,
    pub(crate) gate: Gate,
    protected: AtomicBool,
}

impl Shared {
    /// True once the registers of the vCPUs are the guest's secret.
    pub(crate) fn is_protected(&self) -> bool {
        self.protected.load(Ordering::Acquire)
    }

    /// Remembers a failure, with what the system told of firmware.
    #[cold]
    fn failed(&self, failure: HeldFailure) -> Error {
        let HeldFailure { error, call, cause } = failure;
        let life = &self.life;
        let mut diagnosis = Diagnosis::of(life.tech(), life.id(), error).because(cause);
        diagnosis.call = call;
        tracing::debug!(vm = life.id().0, %diagnosis, "refused");
        life.note(diagnosis);
        error
    }

    /// Remembers the vCPU of a run that failed. A VM that the kernel gave up answers EIO from then on.
    #[cold]
    pub(crate) fn run_failed(&self, vcpu: VcpuId, error: Error) {
        let life = &self.life;
        life.note(Diagnosis::of(life.tech(), life.id(), error).on_vcpu(vcpu));
    }
}

impl<H: Host> HeldVm<H> {
    /// Creates the VM on its host.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the host does not hold VMs of `tech` itself; [`Error::Invalid`] for parameters
    /// out of range, or of another technology; the answer of the host.
    pub fn create(host: &H, id: VmId, tech: Tech, params: &VmParams) -> Result<Self> {
        params.validate()?;
        let port = host.create_vm(tech, params)?;
        if port.held().is_none() {
            return Err(Error::unsupported(Missing::HostTech, tech));
        }
        let life = Life::new(id, tech);
        Ok(Self {
            shared: Arc::new(Shared {
                life,
                gate: Gate::default(),
                protected: AtomicBool::new(false),
            }),
            params: params.clone(),
            mask: SharedMask::NONE,
            memory: Mutex::default(),
            port,
        })
    }

    /// The VM below, for operations that only its host offers.
    pub fn port(&self) -> &H::Vm {
        &self.port
    }

    pub(crate) fn life(&self) -> &Life {
        &self.shared.life
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.shared.gate
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an operation of the system, and remembers its failure.
    fn below<T>(&self, body: impl FnOnce(&dyn HeldPort) -> Result<T, HeldFailure>) -> Result<T> {
        let missing = Error::unsupported(Missing::HostTech, self.tech());
        let done = self.port.held().ok_or(missing)?;
        body(done).map_err(|failure| self.shared.failed(failure))
    }

    /// Takes over what a step of the launch changed.
    pub(crate) fn follow_launch(&self) -> Result<()> {
        let (is_final, is_protected) =
            self.below(|held| Ok((held.is_final(), held.is_protected())))?;
        self.shared.protected.store(is_protected, Ordering::Release);
        if is_final && self.step() == Step::Initialized {
            self.life().advance(Step::Runnable)?;
        }
        Ok(())
    }
}

impl<H: Host> HeldVm<H> {
    /// Takes over what the books of `from` say of its guest, which is here now.
    pub(crate) fn follow_move(&self, from: &Self) -> Result<()> {
        let attributes = std::mem::take(&mut from.memory().attributes);
        self.memory().attributes = attributes;
        self.follow_launch()
    }
}

impl<H: Host> VmOps for HeldVm<H> {
    fn tech(&self) -> Tech {
        self.life().tech()
    }

    fn id(&self) -> VmId {
        self.life().id()
    }

    fn step(&self) -> Step {
        self.life().step()
    }

    fn explain(&self, error: Error) -> Diagnosis {
        self.life().explain(error)
    }

    fn shared_mask(&self) -> SharedMask {
        self.mask
    }

    fn vm_init(&mut self) -> Result<()> {
        self.life().require(Step::Created)?;
        self.mask = self.below(|held| held.init())?;
        self.life().advance(Step::Initialized)?;
        self.follow_launch()
    }

    fn add_initial_page(&mut self, page: &InitialPage<'_>) -> Result<()> {
        self.life().require(Step::Initialized)?;
        if !page.gpa.is_page_aligned() {
            return Err(Error::Invalid(Field::Gpa, page.gpa.get()));
        }
        if self
            .memory()
            .slots
            .find(Gfn::containing(page.gpa))
            .is_none()
        {
            return Err(Error::NotFound(Field::Gpa, page.gpa.get()));
        }
        self.below(|held| held.add_page(page))
    }

    /// Ends the launch, as far as commands did not.
    fn vm_finalize(&mut self) -> Result<()> {
        self.life().require(Step::Initialized)?;
        let done = self.below(|held| held.finalize());
        // What was done before a failure stays done.
        self.follow_launch()?;
        done
    }

    /// MEASURE and MNONCE of LAUNCH_MEASURE for SEV and SEV-ES. The measurement of an SNP guest or a TD is the
    /// guest's to ask for, by a report.
    fn measurement(&self) -> Result<Measurement> {
        let measured = self.below(|held| Ok(held.measurement()?))?;
        measured.ok_or(Error::WrongState(self.step()))
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        // The key is the system's, which releases it when the VM is closed.
        Ok(self.life().release_without_key())
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        self.life().drain_without_private_pages(released)
    }

    fn vm_free(self, drained: Drained) -> FreeReport {
        let mut report = FreeReport::new(self.id(), self.tech());
        match self.life().check_drained(&drained) {
            Ok(()) => report.close_vm(self.port.close()),
            Err(error) => {
                // Nothing is proved of this VM: closing its port would free what may be in use.
                let _port = ManuallyDrop::new(self.port);
                report.close_vm(Err(error));
            }
        }
        report
    }

    /// The memory of a slot begins private, but that of a normal VM shared.
    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.life().require_live()?;
        let begins = self.below(|held| Ok(held.begins()))?;
        check_place(slot, self.mask, begins)?;
        let mut memory = self.memory();
        let is_new = memory.slots.check(slot)?;
        self.port.set_memory_slot(slot)?;
        memory.slots.insert(*slot);
        if is_new {
            let (first, pages) = frames(slot);
            memory.attributes.set(first, pages, begins)?;
        }
        Ok(())
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.life().require_live()?;
        let mut memory = self.memory();
        memory.slots.known(slot)?;
        self.port.delete_memory_slot(slot)?;
        memory.slots.remove(slot.id);
        Ok(())
    }

    fn set_memory_attributes(&self, first: Gfn, pages: u64, to: Privacy) -> Result<u64> {
        self.life().require_live()?;
        self.below(|held| self.memory().convert(held, first, pages, to))
    }

    /// A SEV or SEV-ES guest chooses with each access: its frames count as private until it said otherwise.
    fn privacy(&self, gfn: Gfn) -> Privacy {
        self.memory().attributes.get(gfn)
    }

    fn pre_fault_memory(&self, first: Gfn, pages: u64) -> Result<u64> {
        self.life().require(Step::Runnable)?;
        self.below(|held| self.memory().pre_fault(held, first, pages))
    }

    /// The system chooses the sizes of private mappings.
    fn gmem_max_mapping_level(&self, _page: Pfn, _privacy: Privacy) -> Level {
        Level::Size1G
    }

    fn mem_enc_op(&mut self, cmd: &mut EncCmd<'_>) -> Result<()> {
        self.life().require_live()?;
        let done = self.below(|held| held.command(cmd));
        self.follow_launch()?;
        done
    }

    fn mem_enc_register_region(&mut self, region: EncRegion) -> Result<()> {
        self.below(|held| held.register_region(region))
    }

    fn mem_enc_unregister_region(&mut self, region: EncRegion) -> Result<()> {
        self.below(|held| held.unregister_region(region))
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.life().require_live()?;
        self.params.check_interrupt(vcpu, vector)?;
        self.port.deliver_interrupt(vcpu, vector)
    }

    fn devices(&self) -> Option<&dyn DevicePort> {
        self.port.devices()
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        self.port.has_emulated_msr(index)
    }
}

/// The first frame of a slot, and their number.
fn frames(slot: &MemSlot) -> (Gfn, u64) {
    (Gfn::containing(slot.gpa), slot.bytes() / kvm_ops::PAGE_SIZE)
}

impl<H: Host> Backend for HeldVm<H> {
    type Vcpu = HeldVcpu<<H::Vm as VmPort>::Vcpu>;

    /// A vCPU with secret registers exists before the launch ends: they are part of the measurement.
    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu> {
        self.life().require_live()?;
        self.params.check_vcpu(id)?;
        let is_late = self.step() == Step::Runnable && self.shared.is_protected();
        if is_late || self.step() == Step::Created {
            return Err(Error::WrongState(self.step()));
        }
        let port = self.port.create_vcpu(id)?;
        Ok(HeldVcpu::new(port, self.shared.clone()))
    }

    /// The destination was created with [`arrives`](kvm_ops::SevParams::arrives), the source with
    /// [`movable`](kvm_ops::SevParams::movable) or `arrives`. The vCPUs of a SEV-ES destination are there, with the same
    /// numbers in the same order. The registers of a plain SEV guest are the embedder's to carry: read them before.
    ///
    /// # Errors
    /// As in the trait; [`Error::NotOffered`] for a guest that the system does not move, and one that was created without
    /// `movable`; [`Error::Invalid`] with [`Field::VcpuCount`] for vCPUs that do not fit;
    /// [`Error::Busy`] while an exit of a vCPU waits for its answer, which the next run hands over, also one that a
    /// kick ends.
    fn move_context(from: &mut Self, to: &mut Self) -> Result<()> {
        moves::move_context(from, to)
    }

    /// The mirror was created with [`arrives`](kvm_ops::SevParams::arrives), and its vCPUs come later. Those of a SEV-ES
    /// mirror are encrypted by LAUNCH_UPDATE_VMSA as a command, before the owner's launch ends.
    ///
    /// # Errors
    /// As in the trait, and [`Error::WrongState`] for an owner whose launch has not begun.
    fn copy_context(owner: &mut Self, mirror: &mut Self) -> Result<()> {
        moves::copy_context(owner, mirror)
    }
}

impl<H: Host> fmt::Debug for HeldVm<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldVm")
            .field("life", self.life())
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}
