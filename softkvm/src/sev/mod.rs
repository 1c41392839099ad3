//! SEV, SEV-ES and SNP guests: the part of a VM that `KVM_MEMORY_ENCRYPT_OP` drives.
//!
//! A VM gets its back end, an `AnyVm`, when its technology is known: by INIT, ES_INIT or INIT2, or by
//! a MOVE or COPY onto it. So a VM of the default type becomes a guest late, with vCPUs already there.

mod blobs;
mod command;
mod context;
mod debug;
mod engine;
mod init;
mod launch;
mod local;
mod migrate;
mod pin;
mod regions;
mod snp;

use std::collections::BTreeSet;
use std::sync::Arc;

use kvm_ops::{EncRegion, Irqchip, Tech};
use kvm_ops_uapi::checks::Check;

pub(crate) use command::command;
pub(crate) use context::{copy_from, move_from};
pub(crate) use engine::Failed;
pub(crate) use regions::{register, unregister};

use crate::machine::Processor;
use crate::refusal::{Result, ensure};
use crate::vcpu::Links;
use crate::vm::Vm;
use crate::vm::lent::BackEnd;
use crate::{Descriptor, FileKind, Process};
use engine::Engine;

/// VMSA features that INIT2 takes: DEBUG_SWAP, as kvm-ops-sev does.
pub(crate) const VMSA_FEATURES: u64 = kvm_ops::sev::rules::supported_features(Tech::SevEs);

/// Policy bits that SNP_LAUNCH_START takes: ABI version, SMT, the bit that is always set, debugging,
/// one socket. No migration agent.
pub(crate) const POLICY_BITS: u64 = 0x1b_ffff;

/// A VM's state of encryption. Without an engine it is no SEV guest.
#[derive(Default)]
pub(crate) struct Sev {
    engine: Option<Engine>,
    /// As LAUNCH_START and SNP_LAUNCH_START were given it; 0 in front of them and after a MOVE.
    sev_fd: i32,
    /// The owner, which lives as long as its mirrors.
    owner: Option<Arc<Vm>>,
    initialised_here: bool,
    snp_started: bool,
    launched: bool,
    /// LOCAL_SEND was done.
    staged: bool,
    /// vCPUs whose registers are measured.
    protected: BTreeSet<u32>,
}

impl Sev {
    pub(crate) fn is_active(&self) -> bool {
        self.engine.is_some()
    }

    pub(crate) fn is_snp(&self) -> bool {
        self.tech() == Some(Tech::SevSnp)
    }

    fn is_es(&self) -> bool {
        matches!(self.tech(), Some(Tech::SevEs | Tech::SevSnp))
    }

    fn tech(&self) -> Option<Tech> {
        self.engine.as_ref().map(Engine::tech)
    }

    fn is_mirror(&self) -> bool {
        self.owner.is_some()
    }

    /// The VM was not only moved onto: the kernel lets no other guest of types 2 to 4 run.
    pub(crate) fn was_initialised_here(&self) -> bool {
        self.initialised_here
    }

    /// SNP_LAUNCH_FINISH was done.
    pub(crate) fn is_launched(&self) -> bool {
        self.launched
    }

    pub(crate) fn is_protected(&self, vcpu: u32) -> bool {
        self.protected.contains(&vcpu)
    }

    /// Pages that the VM's regions have pinned.
    fn locked_pages(&self) -> u64 {
        self.engine.as_ref().map_or(0, Engine::locked_pages)
    }

    /// The caller has other memory at those addresses from now on, or none.
    pub(crate) fn forget_memory(&self, address: u64, bytes: u64) {
        if let Some(engine) = &self.engine {
            engine.forget_memory(EncRegion { address, bytes });
        }
    }

    /// The back end, once the VM is a guest.
    pub(crate) fn back_end_mut(&mut self) -> Option<&mut BackEnd> {
        self.engine.as_mut().map(|engine| &mut engine.vm)
    }

    /// The back end of an SNP guest, of which some frames are private by their attribute: their contents are the RMP's to
    /// guard, and the slot's file is a name for them. A SEV or SEV-ES guest chooses with each access.
    pub(crate) fn guarded(&self) -> Option<&BackEnd> {
        let engine = self.engine.as_ref().filter(|_| self.is_snp());
        engine.map(|engine| &engine.vm)
    }

    fn engine(&mut self, check: Check) -> Result<&mut Engine> {
        self.engine.as_mut().ok_or(check.into())
    }

    /// The back end's part of `KVM_CREATE_VCPU`. `None` without one.
    pub(crate) fn create_vcpu(&mut self, id: u32, links: &Links) -> Result<Option<Processor>> {
        let engine = self.engine.as_mut();
        engine
            .map(|engine| engine.create_vcpu(id, links))
            .transpose()
    }

    /// A vCPU that existed when the VM got its back end, and whose own it shall take.
    pub(crate) fn take_vcpu(&mut self, id: u32) -> Option<Processor> {
        self.engine.as_mut()?.waiting.remove(&id)
    }

    /// `KVM_CREATE_IRQCHIP` and the like come before or after INIT2.
    pub(crate) fn set_irqchip(&self, irqchip: Irqchip) -> Result<()> {
        match &self.engine {
            Some(engine) => Ok(engine.set_irqchip(irqchip)?),
            None => Ok(()),
        }
    }

    /// Checks that the sev_fd of the launch still is one.
    fn require_fd(&self, process: &dyn Process, check: Check) -> Result<()> {
        require_fd(process, self.sev_fd, check)
    }
}

/// Checks that a descriptor is `/dev/sev`.
fn require_fd(process: &dyn Process, number: i32, check: Check) -> Result<()> {
    let is_sev = match process.descriptor(number) {
        Descriptor::File(file) => file.kind() == FileKind::Sev,
        _ => false,
    };
    ensure(is_sev, check)
}
