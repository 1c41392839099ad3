//! A vCPU, and the ioctls of its file.

mod answer;
mod attributes;
mod controls;
mod convert;
mod cpu;
mod cpuid;
mod events;
mod exits;
mod groups;
mod guest_debug;
mod held;
mod interrupts;
mod lapic;
mod misc;
mod one_reg;
mod page;
mod pre_fault;
mod registers;
mod run;
mod sev;
mod sync;
mod td;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::sim::{Debugger, MsrExits};
use kvm_ops_uapi::checks::any;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::state::mp_state;
use kvm_ops_uapi::system::CpuidEntry2;

pub(crate) use cpu::Cpu;
pub(crate) use events::Parts;

use crate::file::VcpuFile;
use crate::irq::Irq;
use crate::refusal::Result;
use crate::stats::Counts;
use crate::{Process, RunArea, stats, tdx};

/// What a vCPU shares with its VM and with others who look at it: the back end is connected to these, whichever it gets.
pub(crate) struct Links {
    pub(crate) area: Arc<dyn RunArea>,
    pub(crate) irq: Arc<Irq>,
    pub(crate) msrs: Arc<MsrExits>,
    pub(crate) hypercall_fix: Arc<AtomicBool>,
    pub(crate) counts: Arc<Counts>,
}

/// A vCPU.
pub(crate) struct Vcpu {
    id: u32,
    links: Links,
    state: Mutex<State>,
}

/// What the vCPU's lock guards. It is held during `KVM_RUN`, and taken in front of the VM's.
pub(crate) struct State {
    cpu: Cpu,
    cpuid: Vec<CpuidEntry2>,
    has_run: bool,
    /// kHz of its TSC, if they are not the VM's.
    tsc_khz: Option<u32>,
    /// What debugs the guest, if anything does.
    debugger: Option<Debugger>,
    /// The exit that waits for its answer in the run page.
    waits: answer::Waits,
}

impl Vcpu {
    pub(crate) fn new(id: u32, cpu: Cpu, links: Links) -> Self {
        Self {
            id,
            links,
            state: Mutex::new(State {
                cpu,
                cpuid: Vec::new(),
                has_run: false,
                tsc_khz: None,
                debugger: None,
                waits: answer::Waits::Nothing,
            }),
        }
    }

    pub(crate) fn run_area(&self) -> &Arc<dyn RunArea> {
        &self.links.area
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.links.counts
    }

    pub(crate) fn links(&self) -> &Links {
        &self.links
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Locks the vCPU. While it runs, that waits.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Its CPUID, as user space set it, says that it has an x2APIC.
    pub(crate) fn has_x2apic(&self) -> bool {
        /// ECX of leaf 1.
        const X2APIC: u32 = 1 << 21;
        let leaf = self.cpuid.iter().find(|leaf| leaf.function.get() == 1);
        leaf.is_some_and(|leaf| leaf.ecx.get() & X2APIC != 0)
    }

    /// Makes a vCPU of a TD ready to run, without INIT and SIPI.
    pub(crate) fn start(&mut self) -> Result<()> {
        self.cpu.set_mp_state(mp_state::RUNNABLE)
    }
}

impl VcpuFile {
    /// Locks the vCPU. If its VM became a guest of SEV meanwhile, it takes that guest's vCPU.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.vcpu.lock();
        let new = self.vm.lock().sev.take_vcpu(self.vcpu.id);
        if let Some(new) = new {
            state.cpu.become_guest_of_sev(new);
            state.apply_debugger();
        }
        state
    }
}

pub(crate) fn ioctl(
    file: &VcpuFile,
    process: &dyn Process,
    ioctl: Option<Ioctl>,
    argument: u64,
) -> Result<i64> {
    match ioctl.ok_or(any::KNOWN_ON_VCPU)? {
        ioctl::KVM_RUN => run::run(file, process, argument),
        ioctl::KVM_GET_REGS => registers::get_regs(file, process, argument),
        ioctl::KVM_SET_REGS => registers::set_regs(file, process, argument),
        ioctl::KVM_GET_SREGS => registers::get_sregs(file, process, argument),
        ioctl::KVM_SET_SREGS => registers::set_sregs(file, process, argument),
        ioctl::KVM_GET_MP_STATE => registers::get_mp_state(file, process, argument),
        ioctl::KVM_SET_MP_STATE => registers::set_mp_state(file, process, argument),
        ioctl::KVM_GET_MSRS => registers::get_msrs(file, process, argument),
        ioctl::KVM_SET_MSRS => registers::set_msrs(file, process, argument),
        ioctl::KVM_GET_ONE_REG => one_reg::get(file, process, argument),
        ioctl::KVM_SET_ONE_REG => one_reg::set(file, process, argument),
        ioctl::KVM_GET_REG_LIST => one_reg::list(process, argument),
        ioctl::KVM_HAS_DEVICE_ATTR => attributes::has(process, argument),
        ioctl::KVM_GET_DEVICE_ATTR => attributes::get(file, process, argument),
        ioctl::KVM_SET_DEVICE_ATTR => attributes::set(file, process, argument),
        ioctl::KVM_GET_FPU => groups::get_fpu(file, process, argument),
        ioctl::KVM_SET_FPU => groups::set_fpu(file, process, argument),
        ioctl::KVM_GET_XSAVE | ioctl::KVM_GET_XSAVE2 => groups::get_xsave(file, process, argument),
        ioctl::KVM_SET_XSAVE => groups::set_xsave(file, process, argument),
        ioctl::KVM_GET_XCRS => groups::get_xcrs(file, process, argument),
        ioctl::KVM_SET_XCRS => groups::set_xcrs(file, process, argument),
        ioctl::KVM_GET_DEBUGREGS => groups::get_debug(file, process, argument),
        ioctl::KVM_SET_DEBUGREGS => groups::set_debug(file, process, argument),
        ioctl::KVM_GET_VCPU_EVENTS => groups::get_events(file, process, argument),
        ioctl::KVM_SET_VCPU_EVENTS => groups::set_events(file, process, argument),
        ioctl::KVM_GET_LAPIC => lapic::get(file, process, argument),
        ioctl::KVM_SET_LAPIC => lapic::set(file, process, argument),
        ioctl::KVM_GET_STATS_FD => stats::open(&file.vm, Some(&file.vcpu), process),
        ioctl::KVM_SET_SIGNAL_MASK => misc::signal_mask(file, process, argument),
        ioctl::KVM_GET_TSC_KHZ => misc::tsc_khz(file),
        ioctl::KVM_SET_TSC_KHZ => misc::set_tsc_khz(file, argument),
        ioctl::KVM_X86_SETUP_MCE => misc::setup_mce(file, process, argument),
        ioctl::KVM_TPR_ACCESS_REPORTING => misc::tpr_access(process, argument),
        ioctl::KVM_SET_VAPIC_ADDR => misc::vapic_addr(file, process, argument),
        ioctl::KVM_KVMCLOCK_CTRL => misc::kvmclock_ctrl(),
        ioctl::KVM_GET_SREGS2 => registers::get_sregs2(file, process, argument),
        ioctl::KVM_SET_SREGS2 => registers::set_sregs2(file, process, argument),
        ioctl::KVM_SET_GUEST_DEBUG => guest_debug::set(file, process, argument),
        ioctl::KVM_INTERRUPT => interrupts::interrupt(file, process, argument),
        ioctl::KVM_NMI => interrupts::nmi(file),
        ioctl::KVM_SET_CPUID2 => cpuid::set(file, process, argument),
        ioctl::KVM_GET_CPUID2 => cpuid::get(file, process, argument),
        ioctl::KVM_MEMORY_ENCRYPT_OP => tdx::vcpu_command(file, process, argument),
        ioctl::KVM_PRE_FAULT_MEMORY => pre_fault::pre_fault(file, process, argument),
        _ => Err(any::KNOWN_ON_VCPU.into()),
    }
}
