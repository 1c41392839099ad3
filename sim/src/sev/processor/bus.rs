//! An encrypted guest's way to memory: by its key for private addresses, and the VM's slots for shared
//! ones.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::{Gfn, Gpa, Privacy};
use kvm_ops_cpu::{Access, Bus, Frame, Mapping};
use soft_amd_sp::{AccessFault, GuestFrame, GuestPage, GuestTurn, permission};

use crate::vm::VmInner;

/// The reasons for which a page is refused, as the code of the violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Refusal {
    /// A device's register refused in the middle of an instruction.
    Device = 0,
    /// No page is mapped at the private address.
    Absent = 1,
    /// The frame is private, and the access is not.
    NotShared = 2,
    /// No slot backs the shared address.
    Mmio = 3,
    /// The guest has not validated the page.
    NotValidated = 4,
    /// The RMP has another page size.
    SizeMismatch = 5,
    /// The RMP keeps the page from the guest.
    Denied = 6,
    /// Another thread uses the page, or the table with its place, now.
    InUse = 7,
    /// The guest has no key.
    NoKey = 8,
}

impl Refusal {
    pub(super) fn of(code: u64) -> Self {
        [
            Self::Absent,
            Self::NotShared,
            Self::Mmio,
            Self::NotValidated,
            Self::SizeMismatch,
            Self::Denied,
            Self::InUse,
            Self::NoKey,
        ]
        .into_iter()
        .find(|refusal| *refusal as u64 == code)
        .unwrap_or(Self::Device)
    }

    fn why(fault: AccessFault) -> Self {
        match fault {
            fault if fault.is_size_mismatch() => Self::SizeMismatch,
            AccessFault::NotValidated { .. } => Self::NotValidated,
            AccessFault::InUse(_) => Self::InUse,
            AccessFault::NotActive(_) => Self::NoKey,
            _ => Self::Denied,
        }
    }
}

/// The part of a bus that the processor's driver holds too.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The turn that lasts while the processor uses memory.
    turn: Mutex<Option<GuestTurn>>,
    /// Another number when translations are no longer good.
    pub(super) generation: AtomicU64,
    /// The privilege level of the register state that is loaded.
    pub(super) vmpl: AtomicU8,
}

impl Shared {
    pub(super) fn turn(&self) -> MutexGuard<'_, Option<GuestTurn>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct SevBus<B> {
    vm: Arc<VmInner>,
    shared: Arc<Shared>,
    /// Slots and devices.
    below: B,
    /// The private frames that the processor may have pointers to, by their place, and the generation in
    /// which it got the first of them.
    frames: HashMap<usize, GuestFrame>,
    since: u64,
}

const fn refused(refusal: Refusal) -> Mapping {
    Mapping::Refused {
        code: refusal as u64,
    }
}

impl<B: Bus> SevBus<B> {
    pub(super) fn new(vm: &Arc<VmInner>, shared: &Arc<Shared>, below: B) -> Self {
        Self {
            vm: Arc::clone(vm),
            shared: Arc::clone(shared),
            below,
            frames: HashMap::new(),
            since: 0,
        }
    }

    /// A page of the guest's own, through its key.
    fn private(&mut self, page: GuestPage, question: Access) -> Mapping {
        let vmpl = self.shared.vmpl.load(Ordering::Relaxed);
        let page = page.vmpl(vmpl);
        let need = match question {
            Access { write: true, .. } => permission::WRITE,
            _ => permission::READ,
        };
        let lent = {
            let turn = self.shared.turn();
            let (Some(turn), Ok(platform)) = (&*turn, super::platform(&self.vm)) else {
                return refused(Refusal::NoKey);
            };
            platform.guest_frame(turn, &page, need)
        };
        let frame = match lent {
            Ok(frame) => frame,
            Err(fault) => return refused(Refusal::why(fault)),
        };
        let generation = self.generation();
        if generation != self.since {
            self.since = generation;
            self.frames.clear();
        }
        // A page whose slot keeps a dirty log is asked for once more when it is first written.
        let gfn = Gfn::containing(Gpa::new(page.gpa));
        let logs = self.vm.read().logs(gfn);
        if logs && question.write {
            self.vm.write().log_write(gfn);
        }
        let writable = frame.is_writable() && (question.write || !logs);
        let host = frame.bytes();
        self.frames.entry(host.addr().get()).or_insert(frame);
        // SAFETY: the frame keeps its bytes where they are, and this bus keeps the frame until the generation
        // changes: `frames` is cleared when `map` is called in another generation, and the processor looks at
        // the generation before it asks for its first page in it. The generation changes between two turns
        // only (`Side::begin`). The processor's methods that use memory are called while the guest's turn is
        // held (`Processor::with_memory`), as `GuestFrame::bytes` demands, and the platform hands out no
        // reference to the bytes. Other processors of the guest use them by atomic accesses, as this one does where
        // they execute at the same time (`Cpu::set_parallel`).
        Mapping::Frame(unsafe { Frame::new(host, writable) })
    }

    /// A private page that is not there yet, or a device's register: the C-bit is no part of an address, and
    /// firmware reaches its local APIC with it.
    fn absent(&mut self, gpa: u64, gfn: Gfn, question: Access) -> Mapping {
        let code = question.execute || question.walk;
        if code || self.vm.read().slot_page(gfn, false).is_some() {
            return refused(Refusal::Absent);
        }
        self.device(gpa, question)
    }

    /// Memory without a page. The host cannot see what a guest with encrypted registers wants of a device.
    fn device(&mut self, gpa: u64, question: Access) -> Mapping {
        let gfn = Gfn::containing(Gpa::new(self.plain(gpa)));
        if self.vm.read().missing(gfn).is_some() {
            return refused(Refusal::NotShared);
        }
        match self.below.map(gpa, question) {
            Mapping::Device if self.vm.has_vmsas() => refused(Refusal::Mmio),
            mapping => mapping,
        }
    }

    /// A page of the VM's slots.
    fn shared(&mut self, gpa: u64, question: Access) -> Mapping {
        if self.vm.read().is_private(Gfn::containing(Gpa::new(gpa))) {
            return refused(Refusal::NotShared);
        }
        self.device(gpa, question)
    }

    /// An address without the C-bit.
    fn plain(&self, gpa: u64) -> u64 {
        gpa & !self.vm.sev.mask().bits()
    }
}

impl<B: Bus> Bus for SevBus<B> {
    fn map(&mut self, gpa: u64, question: Access) -> Mapping {
        let vm = Arc::clone(&self.vm);
        let Some(state) = vm.sev.try_read() else {
            return refused(Refusal::InUse);
        };
        let (gfn, named) = state.mask().split(Gpa::new(gpa));
        // Code and page tables are always private, and so is everything while no page table can name
        // the C-bit (APM vol. 2, 15.34.5).
        let privacy = match question.execute || question.walk || !question.wide {
            true => Privacy::Private,
            false => named,
        };
        let page = state.page(gfn, 0);
        drop(state);
        match (page, privacy) {
            (Some(page), Privacy::Private) => self.private(page, question),
            (None, Privacy::Private) => self.absent(gpa, gfn, question),
            (Some(_), Privacy::Shared) if !self.vm.shows_slots() => refused(Refusal::NotShared),
            (_, Privacy::Shared) => self.shared(gpa, question),
        }
    }

    fn read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        self.below.read(self.plain(gpa), data)
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> bool {
        self.below.write(self.plain(gpa), data)
    }

    fn port_in(&mut self, port: u16, size: u8) -> Option<u32> {
        self.below.port_in(port, size)
    }

    fn port_out(&mut self, port: u16, size: u8, value: u32) -> Option<()> {
        self.below.port_out(port, size, value)
    }

    fn ipi(&mut self, from: u32, command: u64) {
        self.below.ipi(from, command);
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.below.end_of_interrupt(vector);
    }

    fn clock(&mut self) -> Option<u64> {
        self.below.clock()
    }

    fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Relaxed)
    }
}
