//! The back end of a TD: an `AnyVm` over the software machine.

use std::sync::Arc;

use kvm_ops::sim::{SimHost, SimVm, Wires};
use kvm_ops::tdx::{TdxVm, VcpuStart};
use kvm_ops::{
    AnyVcpu, AnyVm, CreateError, EncParams, Gpa, InitialPage, InitialPageKind, IntelVcpu, IntelVm,
    Irqchip, Kind, TdParams, Tech, VcpuId, VmConfig, create,
};
use kvm_ops_uapi::Errno;

use crate::vm::lent::{self, BackEnd};
use crate::{Refusal, RunArea};

pub(super) struct Engine {
    pub(super) vm: BackEnd,
}

/// A command that failed: the errno, and the module's status if it was asked.
pub(super) struct Failed {
    pub(super) refusal: Refusal,
    pub(super) hw_error: u64,
}

impl<E: Into<Refusal>> From<E> for Failed {
    fn from(refusal: E) -> Self {
        Self {
            refusal: refusal.into(),
            hw_error: 0,
        }
    }
}

impl Engine {
    /// Creates and initialises the TD, with a KeyID, for as many vCPUs.
    pub(super) fn new(host: &SimHost, params: TdParams, vcpus: u32) -> Result<Self, CreateError> {
        let config = VmConfig::new(Kind::Of(Tech::Tdx))
            .vcpus(vcpus)
            .irqchip(Irqchip::Split)
            .enc(EncParams::Td(Box::new(params)));
        let vm = create(host, &config)?;
        Ok(Self { vm })
    }

    /// The errno of a failure, with the module's status.
    pub(super) fn failed(&self, error: kvm_ops::Error) -> Failed {
        let diagnosis = self.vm.explain(error);
        tracing::debug!(%diagnosis, "TDX command failed");
        Failed {
            refusal: Errno(error.errno()).into(),
            hw_error: diagnosis.call.map_or(0, |call| call.status),
        }
    }

    /// The back end as what it is.
    fn td(&self) -> Result<&TdxVm<SimHost>, kvm_ops::Error> {
        match self.vm.back_end() {
            AnyVm::Intel(IntelVm::Tdx(td)) => Ok(td),
            _ => Err(kvm_ops::Error::Poisoned),
        }
    }

    /// The local APICs of its vCPUs.
    pub(super) fn wires(&self) -> Option<Wires> {
        lent::with_port(&self.vm, SimVm::wires)
    }

    pub(super) fn shared_bit(&self) -> u64 {
        self.vm.shared_mask().bits()
    }

    /// A vCPU, which leaves the guest when a signal is pending.
    pub(super) fn create_vcpu(
        &self,
        index: u32,
        start: VcpuStart,
        area: Arc<dyn RunArea>,
    ) -> Result<AnyVcpu<SimHost>, kvm_ops::Error> {
        let mut vcpu = self.td()?.create_vcpu_starting(VcpuId(index), start)?;
        vcpu.set_interrupt_source(move || area.signal_pending());
        Ok(IntelVcpu::from(vcpu).into())
    }

    pub(super) fn cpuid(
        &self,
        leaf: u32,
        subleaf: Option<u32>,
    ) -> Result<Option<[u32; 4]>, kvm_ops::Error> {
        self.td()?.cpuid(leaf, subleaf)
    }

    pub(super) fn add_page(
        &mut self,
        gpa: u64,
        contents: &[u8; 4096],
        measured: bool,
    ) -> Result<(), kvm_ops::Error> {
        self.vm.add_initial_page(&InitialPage {
            gpa: Gpa::new(gpa),
            contents,
            kind: match measured {
                true => InitialPageKind::Measured,
                false => InitialPageKind::Unmeasured,
            },
        })
    }
}
