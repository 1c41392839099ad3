//! A normal VM: no key, no private memory. VMX and SVM share its life over a [`VmPort`].

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicU64, Ordering};

use alloc::sync::Arc;

use crate::{
    Backend, DevicePort, Drained, EncParams, Error, Field, FreeReport, Gpa, Host, KeyReleased,
    Life, MemSlot, PlainVcpu, Result, Step, Tech, VcpuId, VmId, VmOps, VmParams, VmPort,
};

/// Numbers VMs from 1. Each host has its own, so that numbers stay small.
#[derive(Debug, Default)]
pub struct VmIds(AtomicU64);

impl VmIds {
    /// Starts at 1.
    pub const fn new() -> Self {
        Self(AtomicU64::new(1))
    }

    /// The next number.
    pub fn next(&self) -> VmId {
        VmId(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

/// The part of a normal VM that differs between technologies.
pub trait PlainTech: Send + Sync + 'static {
    /// The technology.
    const TECH: Tech;

    /// Sets up the VM below in `vm_init`.
    ///
    /// # Errors
    /// The answer of the port; the VM stays created then.
    fn set_up<P: VmPort>(port: &P) -> Result<()>;
}

/// A normal VM of technology `T`.
pub struct PlainVm<H: Host, T> {
    life: Arc<Life>,
    params: VmParams,
    port: H::Vm,
    tech: PhantomData<fn() -> T>,
}

impl<H: Host, T: PlainTech> PlainVm<H, T> {
    /// Creates the VM on its host.
    ///
    /// # Errors
    /// [`Error::Invalid`] for parameters out of range; [`Error::NotOffered`] for those of another kind of VM; the
    /// answer of the host.
    pub fn create(host: &H, id: VmId, params: &VmParams) -> Result<Self> {
        params.validate()?;
        if params.enc != EncParams::Default {
            return crate::not_offered!("a normal VM with parameters of other VMs");
        }
        Ok(Self {
            life: Arc::new(Life::new(id, T::TECH)),
            params: params.clone(),
            port: host.create_vm(T::TECH, params)?,
            tech: PhantomData,
        })
    }

    /// The VM below, for operations that only its platform offers.
    #[inline]
    pub fn port(&self) -> &H::Vm {
        &self.port
    }
}

impl<H: Host, T> fmt::Debug for PlainVm<H, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainVm")
            .field("life", &self.life)
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

impl<H: Host, T: PlainTech> VmOps for PlainVm<H, T> {
    #[inline]
    fn tech(&self) -> Tech {
        T::TECH
    }

    #[inline]
    fn id(&self) -> VmId {
        self.life.id()
    }

    #[inline]
    fn step(&self) -> Step {
        self.life.step()
    }

    fn vm_init(&mut self) -> Result<()> {
        self.life.require(Step::Created)?;
        T::set_up(&self.port)?;
        self.life.advance(Step::Initialized)
    }

    fn vm_finalize(&mut self) -> Result<()> {
        self.life.advance(Step::Runnable)
    }

    fn mmu_release_hkid(&mut self) -> Result<KeyReleased> {
        Ok(self.life.release_without_key())
    }

    fn drain_private(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        self.life.drain_without_private_pages(released)
    }

    fn vm_free(self, drained: Drained) -> FreeReport {
        let mut report = FreeReport::new(self.life.id(), T::TECH);
        match self.life.check_drained(&drained) {
            Ok(()) => report.close_vm(self.port.close()),
            Err(error) => {
                // Nothing is proved of this VM: closing its port would free what may be in use.
                core::mem::forget(self.port);
                report.close_vm(Err(error));
            }
        }
        report
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.life.require_live()?;
        slot.last()?;
        self.port.set_memory_slot(slot)
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.life.require_live()?;
        self.port.delete_memory_slot(slot)
    }

    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.life.require_live()?;
        if bitmap.len() != slot.dirty_words() {
            return Err(Error::Invalid(Field::BufferLength, bitmap.len() as u64));
        }
        if !slot.flags.log_dirty {
            return Err(Error::NotFound(Field::Slot, slot.id.0.into()));
        }
        self.port.dirty_log(slot, bitmap)
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.life.require_live()?;
        self.params.check_interrupt(vcpu, vector)?;
        self.port.deliver_interrupt(vcpu, vector)
    }

    fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        check_page(gpa)?;
        self.port.set_tss_addr(gpa)
    }

    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        check_page(gpa)?;
        self.port.set_identity_map_addr(gpa)
    }

    fn devices(&self) -> Option<&dyn DevicePort> {
        self.port.devices()
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        self.port.has_emulated_msr(index)
    }
}

impl<H: Host, T: PlainTech> Backend for PlainVm<H, T> {
    type Vcpu = PlainVcpu<<H::Vm as VmPort>::Vcpu, T>;

    fn create_vcpu(&self, id: VcpuId) -> Result<Self::Vcpu> {
        self.life.require_live()?;
        self.params.check_vcpu(id)?;
        let port = self.port.create_vcpu(id)?;
        Ok(PlainVcpu::new(port, self.life.clone()))
    }
}

fn check_page(gpa: Gpa) -> Result<()> {
    if gpa.is_page_aligned() {
        Ok(())
    } else {
        Err(Error::Invalid(Field::Gpa, gpa.get()))
    }
}
