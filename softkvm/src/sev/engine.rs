//! The back end of a SEV guest: an `AnyVm` over the software machine, its vCPUs, and its commands.

use std::collections::BTreeMap;

use kvm_ops::sim::SimHost;
use kvm_ops::{
    AnyVcpu, EncCmd, EncParams, EncRegion, Kind, SevParams, Tech, VcpuId, VmConfig, create,
};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::vm::{MAX_VCPUS, VCPU_ID_RATIO};

use crate::refusal::Result;
use crate::vm::Slot;
use crate::vm::lent::{self, BackEnd};
use crate::{Process, Refusal};

pub(super) struct Engine {
    /// In front of the VM, so that they are dropped first.
    vcpus: BTreeMap<u32, AnyVcpu<SimHost>>,
    vm: BackEnd,
}

/// A command that failed: the errno, and the firmware's status if it was asked.
pub(super) struct Failed {
    pub(super) refusal: Refusal,
    pub(super) status: Option<u32>,
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
    ) -> Result<Self, kvm_ops::Error> {
        let config = VmConfig::new(Kind::Of(tech))
            .vcpus(MAX_VCPUS * VCPU_ID_RATIO)
            .enc(EncParams::Sev(Box::new(params)));
        let vm = create(host, &config)?;
        let vcpus = BTreeMap::new();
        Ok(Self { vcpus, vm })
    }

    pub(super) fn tech(&self) -> Tech {
        self.vm.tech()
    }

    pub(super) fn create_vcpu(&mut self, id: u32) -> Result<()> {
        let vcpu = self.vm.create_vcpu(VcpuId(id))?;
        self.vcpus.insert(id, vcpu);
        Ok(())
    }

    pub(super) fn set_slot(
        &mut self,
        process: &dyn Process,
        number: u32,
        slot: &Slot,
    ) -> Result<()> {
        lent::set_slot(&mut self.vm, process, number, slot)
    }

    pub(super) fn delete_slot(&mut self, number: u32) -> Result<()> {
        lent::delete_slot(&mut self.vm, number)
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

    pub(super) fn register(&mut self, region: EncRegion) -> Result<(), kvm_ops::Error> {
        self.vm.register_region(region)
    }

    pub(super) fn unregister(&mut self, region: EncRegion) -> Result<(), kvm_ops::Error> {
        self.vm.unregister_region(region)
    }
}
