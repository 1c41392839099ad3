//! The part of a normal VM that VMX and SVM share: its life over a [`VmPort`].

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::{
    Drained, Error, Field, FreeReport, Gpa, Host, Irqchip, KeyReleased, Leak, Leaked, MemSlot,
    Result, Step, Tech, VcpuId, VmId, VmParams, VmPort,
};

/// Numbers VMs. One for each host keeps numbers small and needs no global state.
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

/// A normal VM: no key, no private memory. `vmx` and `svm` wrap it and add what differs.
pub struct PlainVm<H: Host> {
    id: VmId,
    tech: Tech,
    step: Step,
    params: VmParams,
    port: H::Vm,
}

impl<H: Host> fmt::Debug for PlainVm<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainVm")
            .field("id", &self.id)
            .field("tech", &self.tech)
            .field("step", &self.step)
            .field("params", &self.params)
            .finish_non_exhaustive()
    }
}

impl<H: Host> PlainVm<H> {
    /// Creates the VM on its host.
    ///
    /// # Errors
    /// [`Error::Invalid`] for parameters out of range, and what the host answers.
    pub fn create(host: &H, id: VmId, tech: Tech, params: &VmParams) -> Result<Self> {
        params.validate()?;
        let port = host.create_vm(tech, params)?;
        Ok(Self {
            id,
            tech,
            step: Step::Created,
            params: params.clone(),
            port,
        })
    }

    /// The VM below, for what only its platform offers.
    #[inline]
    pub fn port(&self) -> &H::Vm {
        &self.port
    }

    /// What the VM was created with.
    #[inline]
    pub fn params(&self) -> &VmParams {
        &self.params
    }

    /// The VM's number.
    #[inline]
    pub fn id(&self) -> VmId {
        self.id
    }

    /// Where the VM is in its life.
    #[inline]
    pub fn step(&self) -> Step {
        self.step
    }

    /// `Created -> Initialized`, with the back end's own set-up between.
    ///
    /// # Errors
    /// [`Error::WrongState`], or what `set_up` answers; the VM stays created then.
    pub fn init(&mut self, set_up: impl FnOnce(&H::Vm) -> Result<()>) -> Result<()> {
        self.step.require(Step::Created)?;
        set_up(&self.port)?;
        self.step = Step::Initialized;
        Ok(())
    }

    /// `Initialized -> Runnable`.
    ///
    /// # Errors
    /// [`Error::WrongState`].
    pub fn finalize(&mut self) -> Result<()> {
        self.step.require(Step::Initialized)?;
        self.step = Step::Runnable;
        Ok(())
    }

    /// A normal VM has no key: the step is taken at once.
    ///
    /// # Errors
    /// [`Error::WrongState`] the second time.
    pub fn release_key(&mut self) -> Result<KeyReleased> {
        self.step.require_one_of(&[
            Step::Created,
            Step::Initialized,
            Step::Runnable,
            Step::Poisoned,
        ])?;
        self.step = Step::KeyReleased;
        Ok(KeyReleased::without_key(self.id))
    }

    /// A normal VM has no private pages: the step is taken at once.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another VM's token, which comes back.
    pub fn drain(&mut self, released: KeyReleased) -> Result<Drained, (Error, KeyReleased)> {
        if released.vm() != self.id {
            return Err((Error::Invalid(Field::Token, released.vm().0), released));
        }
        if let Err(error) = self.step.require(Step::KeyReleased) {
            return Err((error, released));
        }
        self.step = Step::Drained;
        Ok(released.without_private_pages())
    }

    /// Closes the VM below.
    pub fn free(self, drained: Drained) -> FreeReport {
        let mut report = FreeReport::new(self.id, self.tech);
        let closed = if drained.vm() == self.id {
            self.port.close()
        } else {
            // The token is another VM's proof, so nothing is proved of this one: dropping its
            // port would free what may be in use. It is kept, and said so.
            core::mem::forget(self.port);
            Err(Error::Invalid(Field::Token, drained.vm().0))
        };
        if let Err(error) = closed {
            report.leaks.push(Leak {
                what: Leaked::Handle(self.id.0 as i64),
                operation: "close VM",
                error,
            });
        }
        report
    }

    /// Creates a vCPU below.
    ///
    /// # Errors
    /// [`Error::WrongState`], [`Error::Invalid`] for a number that the VM was not made for, or
    /// what the port answers.
    pub fn create_vcpu(&self, id: VcpuId) -> Result<<H::Vm as VmPort>::Vcpu> {
        self.step.require_live()?;
        if id.0 >= self.params.vcpus {
            return Err(Error::Invalid(Field::Vcpu, id.0.into()));
        }
        self.port.create_vcpu(id)
    }

    /// Creates a slot or changes its flags.
    ///
    /// # Errors
    /// [`Error::WrongState`], [`Error::Invalid`] for a slot that wraps or is not page-aligned, or
    /// what the port answers.
    pub fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.step.require_live()?;
        slot.last()?;
        self.port.set_memory_slot(slot)
    }

    /// Deletes a slot.
    ///
    /// # Errors
    /// [`Error::WrongState`], or what the port answers.
    pub fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.step.require_live()?;
        self.port.delete_memory_slot(slot)
    }

    /// Fetches and clears a dirty bitmap.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bitmap of the wrong length, [`Error::NotFound`] for a slot without
    /// a dirty log, or what the port answers.
    pub fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.step.require_live()?;
        if bitmap.len() != slot.dirty_words() {
            return Err(Error::Invalid(Field::BufferLength, bitmap.len() as u64));
        }
        if !slot.flags.log_dirty {
            return Err(Error::NotFound(Field::Slot, slot.id.0.into()));
        }
        self.port.dirty_log(slot, bitmap)
    }

    /// Sends an interrupt to a vCPU's local APIC.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a vCPU that the VM cannot have or a vector below 16, which the APIC
    /// refuses (SDM vol. 3, 11.5.3); unsupported without an irqchip in the platform.
    pub fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.step.require_live()?;
        if vcpu.0 >= self.params.vcpus {
            return Err(Error::Invalid(Field::Vcpu, vcpu.0.into()));
        }
        if vector < 16 {
            return Err(Error::Invalid(Field::Vector, vector.into()));
        }
        if self.params.irqchip == Irqchip::None {
            return crate::unsupported!("deliver_interrupt without an irqchip in the platform");
        }
        self.port.deliver_interrupt(vcpu, vector)
    }

    /// Places the TSS pages.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is not page-aligned, or what the port answers.
    pub fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        check_page(gpa)?;
        self.port.set_tss_addr(gpa)
    }

    /// Places the identity map.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an address that is not page-aligned, or what the port answers.
    pub fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        check_page(gpa)?;
        self.port.set_identity_map_addr(gpa)
    }
}

fn check_page(gpa: Gpa) -> Result<()> {
    if gpa.is_page_aligned() {
        Ok(())
    } else {
        Err(Error::Invalid(Field::Gpa, gpa.get()))
    }
}

/// Implements [`VmOps`](crate::VmOps) and [`Backend`](crate::Backend) for a normal VM that holds a
/// [`PlainVm`] in its field `plain`: everything but `vm_init`, which stands in `$set_up`.
#[doc(hidden)]
#[macro_export]
macro_rules! plain_vm_ops {
    ($Vm:ident, $Vcpu:ident, $tech:expr, $set_up:path) => {
        impl<H: ::kvm_ops::Host> ::kvm_ops::VmOps for $Vm<H> {
            #[inline]
            fn tech(&self) -> ::kvm_ops::Tech {
                $tech
            }

            #[inline]
            fn id(&self) -> ::kvm_ops::VmId {
                self.plain.id()
            }

            #[inline]
            fn step(&self) -> ::kvm_ops::Step {
                self.plain.step()
            }

            fn vm_init(&mut self) -> ::kvm_ops::Result<()> {
                self.plain.init($set_up)
            }

            fn vm_finalize(&mut self) -> ::kvm_ops::Result<()> {
                self.plain.finalize()
            }

            fn mmu_release_hkid(&mut self) -> ::kvm_ops::Result<::kvm_ops::KeyReleased> {
                self.plain.release_key()
            }

            fn drain_private(
                &mut self,
                released: ::kvm_ops::KeyReleased,
            ) -> ::kvm_ops::Result<::kvm_ops::Drained, (::kvm_ops::Error, ::kvm_ops::KeyReleased)>
            {
                self.plain.drain(released)
            }

            fn vm_free(self, drained: ::kvm_ops::Drained) -> ::kvm_ops::FreeReport {
                self.plain.free(drained)
            }

            fn set_memory_slot(&self, slot: &::kvm_ops::MemSlot) -> ::kvm_ops::Result<()> {
                self.plain.set_memory_slot(slot)
            }

            fn delete_memory_slot(&self, slot: &::kvm_ops::MemSlot) -> ::kvm_ops::Result<()> {
                self.plain.delete_memory_slot(slot)
            }

            fn dirty_log(
                &self,
                slot: &::kvm_ops::MemSlot,
                bitmap: &mut [u64],
            ) -> ::kvm_ops::Result<()> {
                self.plain.dirty_log(slot, bitmap)
            }

            fn set_tss_addr(&self, gpa: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> {
                self.plain.set_tss_addr(gpa)
            }

            fn set_identity_map_addr(&self, gpa: ::kvm_ops::Gpa) -> ::kvm_ops::Result<()> {
                self.plain.set_identity_map_addr(gpa)
            }

            fn has_emulated_msr(&self, index: u32) -> bool {
                ::kvm_ops::VmPort::has_emulated_msr(self.plain.port(), index)
            }

            fn deliver_interrupt(
                &self,
                vcpu: ::kvm_ops::VcpuId,
                vector: u8,
            ) -> ::kvm_ops::Result<()> {
                self.plain.deliver_interrupt(vcpu, vector)
            }
        }

        impl<H: ::kvm_ops::Host> ::kvm_ops::Backend for $Vm<H> {
            type Vcpu = $Vcpu<H>;

            fn create_vcpu(&self, id: ::kvm_ops::VcpuId) -> ::kvm_ops::Result<Self::Vcpu> {
                self.plain.create_vcpu(id).map(::kvm_ops::PlainVcpu::new)
            }
        }
    };
}
