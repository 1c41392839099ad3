//! A vCPU, and the ioctls of its file.

mod cpuid;
mod pre_fault;
mod registers;
mod run;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops_uapi::checks::any;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::state::mp_state;

use crate::file::VcpuFile;
use crate::refusal::Result;
use crate::{Process, RunArea, tdx};

/// A vCPU.
pub(crate) struct Vcpu {
    id: u32,
    area: Arc<dyn RunArea>,
    state: Mutex<registers::Registers>,
}

impl Vcpu {
    pub(crate) fn new(id: u32, mp_state: u32, area: Arc<dyn RunArea>) -> Self {
        Self {
            id,
            area,
            state: Mutex::new(registers::Registers::new(mp_state)),
        }
    }

    pub(crate) fn run_area(&self) -> &Arc<dyn RunArea> {
        &self.area
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Its CPUID, as user space set it, says that it has an x2APIC.
    pub(crate) fn has_x2apic(&self) -> bool {
        /// ECX of leaf 1.
        const X2APIC: u32 = 1 << 21;
        let registers = self.lock();
        let leaf = registers.cpuid.iter().find(|leaf| leaf.function.get() == 1);
        leaf.is_some_and(|leaf| leaf.ecx.get() & X2APIC != 0)
    }

    /// Makes it ready to run, without INIT and SIPI.
    pub(crate) fn start(&self) {
        self.lock().mp_state = mp_state::RUNNABLE;
    }

    fn lock(&self) -> MutexGuard<'_, registers::Registers> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn ioctl(
    file: &VcpuFile,
    process: &dyn Process,
    ioctl: Option<Ioctl>,
    argument: u64,
) -> Result<i64> {
    match ioctl.ok_or(any::KNOWN_ON_VCPU)? {
        ioctl::KVM_RUN => run::run(file, argument),
        ioctl::KVM_GET_REGS => registers::get_regs(file, process, argument),
        ioctl::KVM_SET_REGS => registers::set_regs(file, process, argument),
        ioctl::KVM_GET_SREGS => registers::get_sregs(file, process, argument),
        ioctl::KVM_SET_SREGS => registers::set_sregs(file, process, argument),
        ioctl::KVM_GET_MP_STATE => registers::get_mp_state(file, process, argument),
        ioctl::KVM_SET_MP_STATE => registers::set_mp_state(file, process, argument),
        ioctl::KVM_GET_MSRS => registers::get_msrs(file, process, argument),
        ioctl::KVM_SET_MSRS => registers::set_msrs(file, process, argument),
        ioctl::KVM_SET_CPUID2 => cpuid::set(file, process, argument),
        ioctl::KVM_GET_CPUID2 => cpuid::get(file, process, argument),
        ioctl::KVM_MEMORY_ENCRYPT_OP => tdx::vcpu_command(file, process, argument),
        ioctl::KVM_PRE_FAULT_MEMORY => pre_fault::pre_fault(file, process, argument),
        _ => Err(any::KNOWN_ON_VCPU.into()),
    }
}
