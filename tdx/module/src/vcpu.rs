//! A vCPU: what hardware keeps in TDVPS.

use crate::arena::lock;
use crate::config::TDVPS_MAX_PAGES;
use crate::guest::VmExit;
use crate::meta::vcpu::VE_VALID;
use crate::meta::vcpu_store::{VcpuStore, class};
use crate::meta::vmcs;
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

/// Kind of event an injection delivers (VMX interruption types).
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

    /// VMX interruption information; the error code is apart.
    pub(crate) fn to_info(self) -> u64 {
        const VALID: u64 = 1 << 31;
        VALID | self.entry_info().0
    }

    /// VM-entry interruption information without its valid bit, and the error code.
    fn entry_info(self) -> (u64, u64) {
        const ERROR_CODE: u64 = 1 << 11;
        let kind = match self.kind {
            EventType::Interrupt => 0,
            EventType::Nmi => 2,
            EventType::HardwareException => 3,
            EventType::SoftwareInterrupt => 4,
            EventType::PrivilegedSoftwareException => 5,
            EventType::SoftwareException => 6,
        };
        let has_error = if self.error.is_some() { ERROR_CODE } else { 0 };
        let info = u64::from(self.vector) | kind << 8 | has_error;
        (info, u64::from(self.error.unwrap_or(0)))
    }

    pub(crate) fn is_exception(self, vector: u8) -> bool {
        self.kind == EventType::HardwareException && self.vector == vector
    }
}

/// Outputs of TDG.VP.VEINFO.GET.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct VeInfo {
    pub(crate) reason: u32,
    pub(crate) qualification: u64,
    pub(crate) gla: u64,
    pub(crate) gpa: u64,
    pub(crate) ilen: u32,
    pub(crate) iinfo: u32,
}

/// Last exit of the vCPU from the TD, as far as the next entry depends on it.
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

impl LastExit {
    /// The number LAST_TD_EXIT shows: a fault, a trap, or TDG.VP.VMCALL.
    pub(crate) const fn number(self) -> u64 {
        match self {
            LastExit::Other | LastExit::PrivateEptViolation(_) => 0,
            LastExit::HostPriorityTimeout => 1,
            LastExit::Vmcall { .. } => 2,
        }
    }

    /// The exit of a number, in a vCPU whose RCX is `rcx`.
    pub(crate) const fn from_number(number: u64, rcx: u64) -> Self {
        match number {
            1 => LastExit::HostPriorityTimeout,
            2 => LastExit::Vmcall { mask: rcx },
            _ => LastExit::Other,
        }
    }
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
    /// PEND_NMI; not 0 asks for an NMI.
    pub(crate) pend_nmi: u8,
    pub(crate) tsc_at_exit: u64,
    pub(crate) zero_step_count: u32,
    pub(crate) zero_step_gpas: Vec<u64>,
    /// TSC at the first of a run of TDCALLs that failed for host priority.
    pub(crate) host_priority_since: Option<u64>,
    /// The VM that runs: 0 is L1, 1 to 3 are its L2 VMs.
    pub(crate) curr_vm: u8,
    /// The last VM exit of L1.
    pub(crate) exit: VmExit,
    /// The guest has run since TDH.VP.INIT.
    pub(crate) has_run: bool,
    /// A processor model saves the registers of L1 before each event.
    pub(crate) has_processor: bool,
    /// The state components in the buffer are others than a processor model saved.
    pub(crate) xbuff_changed: bool,
    /// The mode the guest was in at its last VM exit.
    is_64_bit: bool,
    /// LAST_TD_EXIT: what the next entry has to do.
    pub(crate) last_td_exit: u64,
    /// All other fields.
    pub(crate) store: VcpuStore,
}

/// A vCPU.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Vcpu {
    pub(crate) td_slot: AtomicU32,
    pub(crate) td_pa: AtomicU64,
    pub(crate) pages: AtomicU32,
    /// TDVPR and the TDCX pages, in the order they were given.
    page_pas: [AtomicU64; TDVPS_MAX_PAGES as usize],
    state: AtomicU8,
    pub(crate) index: AtomicU32,
    /// The export session, by its EXPORT_COUNT, in which the vCPU was exported last.
    pub(crate) export_count: AtomicU32,
    /// −1: none.
    pub(crate) assoc_lp: AtomicI32,
    pub(crate) epoch: AtomicU64,
    context: Mutex<VcpuContext>,
}

impl Vcpu {
    /// Makes the slot a fresh vCPU.
    pub(crate) fn create(&self, pa: u64, td_slot: u32, td_pa: u64) {
        self.td_slot.store(td_slot, Ordering::Release);
        self.td_pa.store(td_pa, Ordering::Release);
        self.pages.store(0, Ordering::Release);
        self.page_pas
            .iter()
            .for_each(|page| page.store(0, Ordering::Release));
        self.add_page(pa);
        self.set_state(VcpuState::Uninitialized);
        self.index.store(0, Ordering::Release);
        self.export_count.store(0, Ordering::Release);
        self.assoc_lp.store(-1, Ordering::Release);
        *self.context() = VcpuContext::default();
    }

    /// Adds a page of TDVPS; there must be room for it.
    pub(crate) fn add_page(&self, pa: u64) {
        let n = self.pages.fetch_add(1, Ordering::AcqRel) as usize;
        if let Some(page) = self.page_pas.get(n) {
            page.store(pa, Ordering::Release);
        }
    }

    /// The address of a page of TDVPS, 0 if it has not been given.
    pub(crate) fn page_pa(&self, n: usize) -> u64 {
        self.page_pas
            .get(n)
            .map_or(0, |pa| pa.load(Ordering::Acquire))
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

    /// An interrupt of L1's virtual APIC has a higher priority than what L1 does.
    pub(crate) fn has_deliverable_interrupt(&self) -> bool {
        const PPR: u32 = 0xA0 / 8;
        const PRIORITY: u64 = 0xF0;
        let requested = self.store.vmcs(0, vmcs::INTERRUPT_STATUS);
        requested & PRIORITY > self.store.get((class::VAPIC, PPR)) & PRIORITY
    }

    /// The mode the guest is in, as the processor stores it at a VM exit: EFER.LMA, and CS.L and CS.D.
    pub(crate) fn set_64_bit_mode(&mut self, is_64_bit: bool) {
        const LMA: u64 = 1 << 10;
        const LONG: u64 = 1 << 13;
        const DEFAULT_32: u64 = 1 << 14;
        if self.is_64_bit == is_64_bit {
            return;
        }
        self.is_64_bit = is_64_bit;
        let efer = self.store.vmcs(0, vmcs::EFER);
        self.store.set_vmcs(0, vmcs::EFER, efer | LMA);
        let rights = self.store.vmcs(0, vmcs::CS_ACCESS_RIGHTS) & !(LONG | DEFAULT_32);
        let size = if is_64_bit { LONG } else { DEFAULT_32 };
        self.store
            .set_vmcs(0, vmcs::CS_ACCESS_RIGHTS, rights | size);
    }

    /// Leaves the traces of an injection in the VMCS: the processor takes the valid bit away, and an exception
    /// that restarts its instruction sets RFLAGS.RF.
    pub(crate) fn note_injection(&mut self, event: Event) {
        const RESUME_FLAG: u64 = 1 << 16;
        let (info, error) = event.entry_info();
        self.store.set_vmcs(0, vmcs::ENTRY_INTERRUPTION_INFO, info);
        self.store.set_vmcs(0, vmcs::ENTRY_ERROR_CODE, error);
        if event.kind == EventType::HardwareException {
            let rflags = self.store.vmcs(0, vmcs::RFLAGS);
            self.store.set_vmcs(0, vmcs::RFLAGS, rflags | RESUME_FLAG);
        }
    }

    /// Takes the event over that an import has stored in the fields of VM entry, for the first entry.
    pub(crate) fn adopt_vectoring(&mut self) {
        let field = |code| self.store.vmcs(0, code);
        let error = field(vmcs::ENTRY_ERROR_CODE);
        self.vectoring = Event::from_info(field(vmcs::ENTRY_INTERRUPTION_INFO), error);
    }

    /// Takes the VE info over that an import has stored field by field.
    pub(crate) fn adopt_ve_info(&mut self) {
        let field = |code| self.store.get((class::VE_INFO, code));
        if field(VE_VALID) != 0 {
            self.ve_info = Some(VeInfo {
                reason: field(0x00) as u32,
                qualification: field(0x02),
                gla: field(0x03),
                gpa: field(0x04),
                ilen: field(0x10) as u32,
                iinfo: field(0x11) as u32,
            });
        }
    }

    /// Makes #VE information ready for the guest.
    pub(crate) fn set_ve_info(&mut self, info: VeInfo) {
        self.ve_info = Some(info);
        let words = [
            (0, u64::from(info.reason)),
            (2, info.qualification),
            (3, info.gla),
            (4, info.gpa),
            (0x10, u64::from(info.ilen)),
            (0x11, u64::from(info.iinfo)),
        ];
        for (code, word) in words {
            self.store.set((class::VE_INFO, code), word);
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
