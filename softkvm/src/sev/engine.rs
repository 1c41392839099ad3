//! The back end of a SEV guest: an `AnyVm` over the software machine with its commands, and the vCPUs whose files did not take
//! them yet.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_ops::sev::GuestState;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    AmdVm, AnyVm, EncCmd, EncParams, EncRegion, Irqchip, Kind, SevParams, Tech, VcpuId, VmConfig,
    create,
};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::vm::{MAX_VCPUS, VCPU_ID_RATIO};

use crate::Refusal;
use crate::irq::Irq;
use crate::machine::{self, Processor};
use crate::refusal::Result;
use crate::vcpu::Links;
use crate::vm::lent::{self, BackEnd};

pub(super) struct Engine {
    /// vCPUs that existed before, until their files are used next.
    pub(super) waiting: BTreeMap<u32, Processor>,
    pub(super) vm: BackEnd,
}

/// A command that failed: the errno, and the firmware's status if it was asked.
pub(crate) struct Failed {
    pub(crate) refusal: Refusal,
    pub(crate) status: Option<u32>,
}

impl<E: Into<Refusal>> From<E> for Failed {
    fn from(refusal: E) -> Self {
        Self {
            refusal: refusal.into(),
            status: None,
        }
    }
}

impl Engine {
    /// Creates the back end, with an ASID.
    pub(super) fn new(
        host: &SimHost,
        tech: Tech,
        params: SevParams,
        irqchip: Irqchip,
        irq: &Arc<Irq>,
    ) -> Result<Self, kvm_ops::Error> {
        let config = VmConfig::new(Kind::Of(tech))
            .vcpus(MAX_VCPUS * VCPU_ID_RATIO)
            .irqchip(irqchip)
            .enc(EncParams::Sev(Box::new(params)));
        let vm = create(host, &config)?;
        let engine = Self {
            waiting: BTreeMap::new(),
            vm,
        };
        lent::with_port(&engine.vm, |port| {
            Irq::attach(irq, port.wires());
            // Firmware of such guests tells nobody what it shares with its devices.
            port.show_slots_without_c_bit();
        });
        Ok(engine)
    }

    pub(super) fn set_irqchip(&self, irqchip: Irqchip) -> Result<(), kvm_ops::Error> {
        lent::with_port(&self.vm, |port| port.set_irqchip(irqchip)).unwrap_or(Ok(()))
    }

    /// The embedder has certificates for reports.
    pub(super) fn ask_for_certificates(&self) {
        lent::with_port(&self.vm, |port| port.ask_for_certificates(true));
    }

    pub(super) fn tech(&self) -> Tech {
        self.vm.tech()
    }

    pub(super) fn create_vcpu(&mut self, id: u32, links: &Links) -> Result<Processor> {
        let mut vcpu = self.vm.create_vcpu(VcpuId(id))?;
        machine::connect(&mut vcpu, links);
        Ok(vcpu)
    }

    /// Runs a command on its structure, behind which its blobs stand.
    pub(super) fn command(&mut self, id: u32, data: &mut [u8]) -> Result<(), Failed> {
        let mut cmd = EncCmd {
            id,
            flags: 0,
            data,
            firmware_status: 0,
        };
        let done = self.vm.mem_enc_op(&mut cmd);
        let status = cmd.firmware_status as u32;
        done.map_err(|error| {
            tracing::debug!(command = id, diagnosis = %self.vm.explain(error), "command failed");
            Failed {
                refusal: Errno(error.errno()).into(),
                status: (status != 0).then_some(status),
            }
        })
    }

    pub(super) fn move_to(&mut self, destination: &mut Self) -> Result<()> {
        Ok(self.vm.move_to(&mut destination.vm)?)
    }

    pub(super) fn copy_to(&mut self, mirror: &mut Self) -> Result<()> {
        Ok(self.vm.copy_to(&mut mirror.vm)?)
    }

    /// True if firmware has a guest of this VM's.
    pub(super) fn knows_guest(&self) -> bool {
        match self.vm.back_end() {
            AnyVm::Amd(AmdVm::Sev(vm)) => vm.guest_state() != GuestState::Uninit,
            _ => false,
        }
    }

    /// Ends the guest that a command just made.
    pub(super) fn undo_start(&self) -> Result<()> {
        if let AnyVm::Amd(AmdVm::Sev(vm)) = self.vm.back_end() {
            vm.undo_start()?;
        }
        Ok(())
    }

    /// Pages that regions have pinned.
    pub(super) fn locked_pages(&self) -> u64 {
        match self.vm.back_end() {
            AnyVm::Amd(AmdVm::Sev(vm)) => vm.locked_pages(),
            _ => 0,
        }
    }

    /// What the guest had in memory that is not the caller's any more is gone.
    pub(super) fn forget_memory(&self, memory: EncRegion) {
        if let AnyVm::Amd(AmdVm::Sev(vm)) = self.vm.back_end() {
            vm.forget_memory(memory);
        }
    }

    pub(super) fn register(&mut self, region: EncRegion) -> Result<(), kvm_ops::Error> {
        self.vm.register_region(region)
    }

    pub(super) fn unregister(&mut self, region: EncRegion) -> Result<(), kvm_ops::Error> {
        self.vm.unregister_region(region)
    }
}
