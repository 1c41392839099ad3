//! A vCPU: what hardware keeps in TDVPS.

use crate::arena::lock;
use crate::regs::Regs;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// State of a vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum VcpuState {
    /// Before TDH.VP.INIT.
    Uninitialized = 0,
    /// May be entered.
    Ready = 2,
    /// Running.
    Active = 4,
    /// Ended by a triple fault.
    Disabled = 8,
    /// Its import has been interrupted.
    Import = 16,
}

impl VcpuState {
    /// The name in the manuals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            VcpuState::Uninitialized => "UNINITIALIZED",
            VcpuState::Ready => "READY",
            VcpuState::Active => "ACTIVE",
            VcpuState::Disabled => "DISABLED",
            VcpuState::Import => "IMPORT",
        }
    }
}

/// What kind of event an injection delivers (VMX interruption types).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventType {
    /// External interrupt.
    Interrupt,
    /// Non-maskable interrupt.
    Nmi,
    /// Hardware exception.
    HardwareException,
    /// INT n.
    SoftwareInterrupt,
    /// INT1.
    PrivilegedSoftwareException,
    /// INT3, INTO.
    SoftwareException,
}

/// An event delivered to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Vector.
    pub vector: u8,
    /// Kind.
    pub kind: EventType,
    /// Error code, for the exceptions that have one.
    pub error: Option<u32>,
    /// CR2 at delivery; not 0 for page faults only.
    pub cr2: u64,
}

impl Event {
    pub(crate) const fn exception(vector: u8, error: Option<u32>) -> Self {
        Event {
            vector,
            kind: EventType::HardwareException,
            error,
            cr2: 0,
        }
    }

    pub(crate) const VE: Event = Event::exception(20, None);
    pub(crate) const UD: Event = Event::exception(6, None);
    pub(crate) const GP: Event = Event::exception(13, Some(0));
    pub(crate) const DF: Event = Event::exception(8, Some(0));
    pub(crate) const NMI: Event = Event {
        vector: 2,
        kind: EventType::Nmi,
        error: None,
        cr2: 0,
    };

    /// From VMX interruption (or IDT-vectoring) information; `None` if bit 31 is clear.
    pub(crate) fn from_info(info: u64, error: u64) -> Option<Self> {
        if info >> 31 & 1 == 0 {
            return None;
        }
        let kind = match info >> 8 & 7 {
            0 => EventType::Interrupt,
            2 => EventType::Nmi,
            3 => EventType::HardwareException,
            4 => EventType::SoftwareInterrupt,
            5 => EventType::PrivilegedSoftwareException,
            _ => EventType::SoftwareException,
        };
        let error = (info >> 11 & 1 != 0).then_some(error as u32);
        Some(Event {
            vector: info as u8,
            kind,
            error,
            cr2: 0,
        })
    }

    pub(crate) fn is_exception(self, vector: u8) -> bool {
        self.kind == EventType::HardwareException && self.vector == vector
    }
}

/// What TDG.VP.VEINFO.GET returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct VeInfo {
    pub(crate) reason: u32,
    pub(crate) qualification: u64,
    pub(crate) gla: u64,
    pub(crate) gpa: u64,
    pub(crate) ilen: u32,
    pub(crate) iinfo: u32,
}

/// How the vCPU left the TD last, as far as the next entry depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum LastExit {
    /// Not entered yet, or an exit that needs nothing.
    #[default]
    Other,
    /// TDG.VP.VMCALL; the next entry passes the masked registers in.
    Vmcall { mask: u64 },
    /// HOST_PRIORITY_BUSY_TIMEOUT.
    HostPriorityTimeout,
    /// EPT violation on a private GPA.
    PrivateEptViolation(VeInfo),
}

/// The 32 GPAs zero-step filtering remembers at most.
pub(crate) const ZERO_STEP_GPAS: usize = 32;
/// Violations in a row that are not recorded.
pub(crate) const ZERO_STEP_THRESHOLD: u32 = 6;

/// The part of a vCPU that only one agent at a time works on.
#[derive(Clone, Debug, Default)]
pub(crate) struct VcpuContext {
    pub(crate) gprs: Regs,
    pub(crate) rip: u64,
    pub(crate) rip_at_entry: u64,
    pub(crate) host_rbp: u64,
    pub(crate) last_exit: LastExit,
    /// An event whose delivery an exit interrupted.
    pub(crate) vectoring: Option<Event>,
    pub(crate) ve_info: Option<VeInfo>,
    pub(crate) cr2: u64,
    pub(crate) pend_nmi: bool,
    pub(crate) tsc_at_exit: u64,
    pub(crate) zero_step_count: u32,
    pub(crate) zero_step_gpas: Vec<u64>,
    /// TSC at the first of a run of TDCALLs that failed for host priority.
    pub(crate) host_priority_since: Option<u64>,
    pub(crate) cpuid_ve: u8,
    /// The VM that runs: 0 is L1, 1 to 3 are its L2 VMs.
    pub(crate) curr_vm: u8,
    // Fields the host can write with TDH.VP.WR.
    pub(crate) shared_eptp: u64,
    pub(crate) posted_interrupt_descriptor: u64,
    pub(crate) notification_vector: u64,
}

/// A vCPU.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Vcpu {
    pub(crate) td_slot: AtomicU32,
    pub(crate) td_pa: AtomicU64,
    pub(crate) pages: AtomicU32,
    state: AtomicU8,
    pub(crate) index: AtomicU32,
    /// −1: none.
    pub(crate) assoc_lp: AtomicI32,
    pub(crate) epoch: AtomicU64,
    context: Mutex<VcpuContext>,
}

impl Vcpu {
    /// Makes the slot a fresh vCPU.
    pub(crate) fn create(&self, td_slot: u32, td_pa: u64) {
        self.td_slot.store(td_slot, Ordering::Release);
        self.td_pa.store(td_pa, Ordering::Release);
        self.pages.store(1, Ordering::Release);
        self.set_state(VcpuState::Uninitialized);
        self.index.store(0, Ordering::Release);
        self.assoc_lp.store(-1, Ordering::Release);
        *self.context() = VcpuContext::default();
    }

    pub(crate) fn state(&self) -> VcpuState {
        match self.state.load(Ordering::Acquire) {
            2 => VcpuState::Ready,
            4 => VcpuState::Active,
            8 => VcpuState::Disabled,
            16 => VcpuState::Import,
            _ => VcpuState::Uninitialized,
        }
    }

    pub(crate) fn set_state(&self, to: VcpuState) {
        self.state.store(to as u8, Ordering::Release);
    }

    pub(crate) fn context(&self) -> MutexGuard<'_, VcpuContext> {
        lock(&self.context)
    }

    pub(crate) fn td_pa(&self) -> u64 {
        self.td_pa.load(Ordering::Acquire)
    }
}

impl VcpuContext {
    /// Clears the zero-step record if the guest has moved since it was entered.
    pub(crate) fn note_progress(&mut self) {
        if self.rip != self.rip_at_entry {
            self.zero_step_count = 0;
            self.zero_step_gpas.clear();
        }
    }

    /// Records an EPT violation that goes to the host.
    pub(crate) fn note_zero_step(&mut self, gpa: u64) {
        let gpa = gpa & !0xFFF;
        if self.zero_step_count < ZERO_STEP_THRESHOLD {
            self.zero_step_count += 1;
        } else if !self.zero_step_gpas.contains(&gpa) && self.zero_step_gpas.len() < ZERO_STEP_GPAS
        {
            self.zero_step_gpas.push(gpa);
        }
    }
}
