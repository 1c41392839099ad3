//! VMs of two hosts in one collection.

use kvm_ops_core::backend_enum;

use crate::kvm::KvmHost;
use crate::sim::SimHost;
use crate::{AnyVcpu, AnyVm};

backend_enum! {
    /// A VM on `/dev/kvm` or on the software platform: normal VMs on the first and confidential VMs on
    /// the second share one `Vec`. Create them with [`create_as`](crate::create_as).
    #[derive(Debug)]
    pub enum FleetVm {
        Kvm(AnyVm<KvmHost>),
        Sim(AnyVm<SimHost>),
    }

    /// A vCPU of [`FleetVm`].
    pub enum FleetVcpu {
        Kvm(AnyVcpu<KvmHost>),
        Sim(AnyVcpu<SimHost>),
    }
}
