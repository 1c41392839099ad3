//! The machine: a vendor, and a count of what lives on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm_ops::{Host, Missing, NoPort, Result, Tech, Vendor, VmId, VmIds, VmParams};

use crate::SimVm;

/// A software platform. Each value is a machine of its own; clones are handles to it.
#[derive(Clone, Debug)]
pub struct SimHost {
    machine: Arc<Machine>,
}

#[derive(Debug)]
pub(crate) struct Machine {
    vendor: Vendor,
    ids: VmIds,
    live_vms: AtomicUsize,
}

impl SimHost {
    /// A machine with that vendor's processors.
    pub fn new(vendor: Vendor) -> Self {
        let machine = Machine {
            vendor,
            ids: VmIds::new(),
            live_vms: AtomicUsize::new(0),
        };
        Self {
            machine: Arc::new(machine),
        }
    }

    /// How many VMs live on this machine: created, and not yet dropped with all their vCPUs.
    pub fn live_vms(&self) -> usize {
        self.machine.live_vms.load(Ordering::Acquire)
    }
}

impl Machine {
    pub(crate) fn vm_created(&self) {
        self.live_vms.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn vm_gone(&self) {
        self.live_vms.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Host for SimHost {
    type Vm = SimVm;
    type Seam = NoPort;
    type Psp = NoPort;
    type Pages = NoPort;

    fn name(&self) -> &'static str {
        "sim"
    }

    fn vendor(&self) -> Vendor {
        self.machine.vendor
    }

    fn next_vm_id(&self) -> VmId {
        self.machine.ids.next()
    }

    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<SimVm> {
        params.validate()?;
        if tech != Tech::normal(self.machine.vendor) {
            return Err(kvm_ops::Error::Unsupported(Missing::HostTech(tech)));
        }
        Ok(SimVm::new(Arc::clone(&self.machine), params.clone()))
    }
}
