//! Trust domains: the part of a VM of type 5 that `KVM_MEMORY_ENCRYPT_OP` drives.
//!
//! | file | part |
//! |---|---|
//! | `command` | the frame of commands on VM and vCPU files |
//! | `limits` | what module and processor allow, as CAPABILITIES shows it |
//! | `init` | INIT_VM, FINALIZE_VM |
//! | `vcpu` | INIT_VCPU, GET_CPUID |
//! | `region` | INIT_MEM_REGION |
//! | `engine` | the back end, an `AnyVm` over the software machine |
//! | `msr` | MSRs that user space may set |

mod command;
mod engine;
mod init;
mod limits;
mod msr;
mod region;
mod vcpu;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_ops::AnyVcpu;
use kvm_ops::sim::SimHost;

pub(crate) use command::{command, vcpu_command};
pub(crate) use limits::Limits;
pub(crate) use msr::has_emulated_msr;

use crate::vm::lent::BackEnd;
use engine::Engine;

/// A TD's state. Without an engine INIT_VM has not been.
#[derive(Default)]
pub(crate) struct Td {
    /// Those that INIT_VCPU was for, by their number. In front of the engine, so that they are dropped
    /// first.
    vcpus: BTreeMap<u32, Arc<TdVcpu>>,
    engine: Option<Engine>,
    finalized: bool,
}

/// The back end's vCPU, which a run takes without the VM's lock.
pub(crate) type TdVcpu = Mutex<AnyVcpu<SimHost>>;

impl Td {
    /// INIT_VM was, and FINALIZE_VM was not: the state in which vCPUs come and memory is measured.
    pub(crate) fn is_building(&self) -> bool {
        self.engine.is_some() && !self.finalized
    }

    pub(crate) fn is_finalized(&self) -> bool {
        self.finalized
    }

    /// INIT_VCPU was for the vCPU of that number.
    fn has_vcpu(&self, id: u32) -> bool {
        self.vcpus.contains_key(&id)
    }

    /// The back end's vCPU, if INIT_VCPU was for it.
    pub(crate) fn vcpu(&self, id: u32) -> Option<Arc<TdVcpu>> {
        self.vcpus.get(&id).cloned()
    }

    /// The back end, once INIT_VM made it.
    pub(crate) fn back_end(&self) -> Option<&BackEnd> {
        self.engine.as_ref().map(|engine| &engine.vm)
    }

    pub(crate) fn back_end_mut(&mut self) -> Option<&mut BackEnd> {
        self.engine.as_mut().map(|engine| &mut engine.vm)
    }

    /// The first address with the shared bit, which no slot reaches. `None` before INIT_VM chooses it.
    pub(crate) fn shared_bit(&self) -> Option<u64> {
        self.engine.as_ref().map(Engine::shared_bit)
    }
}
