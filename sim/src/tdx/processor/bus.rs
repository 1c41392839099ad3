//! A TD processor's way to memory: the Secure-EPT for private addresses, the slots of the VM for shared ones.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ops::{Gfn, Gpa};
use kvm_ops_cpu::{Access, Bus, Frame, Mapping};
use soft_tdx_module::{GuestFrame, GuestPage, LpError, Platform};

use crate::vm::VmInner;

/// The reasons for which a page is refused, as the code of the violation. Bits 6:3 would be the permissions of
/// the EPT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Refusal {
    /// A line of the page is not the TD's.
    Damaged = 0,
    /// An EPT violation.
    Violation = 1 << 8,
    /// No slot backs the shared address.
    Device = 2 << 8,
    /// Code or page tables in shared memory.
    Shared = 3 << 8,
}

impl Refusal {
    pub(super) fn of(code: u64) -> Self {
        [Self::Violation, Self::Device, Self::Shared]
            .into_iter()
            .find(|refusal| *refusal as u64 == code)
            .unwrap_or(Self::Damaged)
    }
}

/// The part of a bus that the processor's driver holds too. It changes between two turns only.
pub(super) struct Shared {
    /// The VM with the slots, another one when the TD moves.
    vm: Mutex<Arc<VmInner>>,
    /// The logical processor that is inside the TD.
    pub(super) lp: AtomicUsize,
    /// Another number when translations are no longer good.
    pub(super) generation: AtomicU64,
}

impl Shared {
    pub(super) fn new(vm: &Arc<VmInner>) -> Self {
        Self {
            vm: Mutex::new(Arc::clone(vm)),
            lp: AtomicUsize::default(),
            generation: AtomicU64::default(),
        }
    }

    pub(super) fn vm(&self) -> Arc<VmInner> {
        Arc::clone(&self.vm.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_vm(&self, vm: &Arc<VmInner>) {
        *self.vm.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(vm);
    }
}

pub(super) struct TdBus {
    platform: Arc<Platform>,
    shared: Arc<Shared>,
    /// The private frames that the processor may have pointers to, by their place, and the generation in which
    /// it got the first of them.
    frames: HashMap<usize, GuestFrame>,
    since: u64,
}

/// Asks the module again while another thread is at the logical processor's state.
pub(super) fn insist<T>(mut ask: impl FnMut() -> Result<T, LpError>) -> Result<T, LpError> {
    loop {
        match ask() {
            Err(LpError::Busy { .. }) => std::thread::yield_now(),
            answer => return answer,
        }
    }
}

const fn refused(refusal: Refusal) -> Mapping {
    Mapping::Refused {
        code: refusal as u64,
    }
}

impl TdBus {
    pub(super) fn new(platform: &Arc<Platform>, shared: &Arc<Shared>) -> Self {
        Self {
            platform: Arc::clone(platform),
            shared: Arc::clone(shared),
            frames: HashMap::new(),
            since: 0,
        }
    }

    fn lp(&self) -> usize {
        self.shared.lp.load(Ordering::Relaxed)
    }

    fn private(&mut self, frame: GuestFrame) -> Mapping {
        let generation = self.generation();
        if generation != self.since {
            self.since = generation;
            self.frames.clear();
        }
        let (host, writable) = (frame.bytes(), frame.is_writable());
        self.frames.entry(host.addr().get()).or_insert(frame);
        // SAFETY: the frame keeps its bytes where they are, and this bus keeps the frame until the generation
        // changes: `frames` is cleared when `map` is called in another generation, and the processor looks at the
        // generation before it asks for its first page in it. The generation changes between two turns only
        // (`Processor::in_turn_of`). The processor's methods that use memory are called in a turn of
        // the TD, as `GuestFrame::bytes` demands, and the module hands out no reference to the bytes. Other processors
        // of the TD use them by atomic accesses, as this one does where they execute at the same time
        // (`Cpu::set_parallel`).
        Mapping::Frame(unsafe { Frame::new(host, writable) })
    }

    /// A page of the VM's slots.
    fn shared_page(&self, gpa: u64, question: Access) -> Mapping {
        if question.execute || question.walk {
            return refused(Refusal::Shared);
        }
        let gfn = Gfn::containing(Gpa::new(gpa));
        let vm = self.shared.vm();
        let known = vm.read().lookup(gfn);
        let mapping = match known.filter(|m| m.writable || !question.write) {
            Some(mapping) => Some(mapping),
            None => {
                let mut memory = vm.write();
                if memory.is_private(gfn) {
                    return refused(Refusal::Violation);
                }
                memory.resolve(gfn, question.write)
            }
        };
        let host = mapping.and_then(|m| Some((NonNull::new(m.host as *mut u8)?, m.writable)));
        let Some((host, writable)) = host else {
            return refused(Refusal::Device);
        };
        // SAFETY: as in the bus of a normal VM's processor (`processor::bus`): the page comes from a slot, and slots and
        // conversions change only in a turn of the VM that no processor has, after which the generation of the VM, a
        // part of this bus', is another one.
        Mapping::Frame(unsafe { Frame::new(host, writable) })
    }
}

impl Bus for TdBus {
    fn map(&mut self, gpa: u64, question: Access) -> Mapping {
        let lp = self.lp();
        match insist(|| self.platform.guest_page(lp, gpa, question.write)) {
            Ok(GuestPage::Private(frame)) => self.private(frame),
            Ok(GuestPage::Damaged) if question.execute => refused(Refusal::Damaged),
            // Line by line: only one that is damaged is a machine check.
            Ok(GuestPage::Damaged) => Mapping::Device,
            Ok(GuestPage::Shared { gpa }) => self.shared_page(gpa, question),
            _ => refused(Refusal::Violation),
        }
    }

    // Accesses to pages with damaged lines.
    fn read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        let lp = self.lp();
        insist(|| self.platform.guest_try_read(lp, gpa, data)).unwrap_or(false)
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> bool {
        let lp = self.lp();
        insist(|| self.platform.guest_try_write(lp, gpa, data)).unwrap_or(false)
    }

    // Ports leave the processor before the bus is asked (`Controls::io`).
    fn port_in(&mut self, _: u16, _: u8) -> Option<u32> {
        None
    }

    fn port_out(&mut self, _: u16, _: u8, _: u32) -> Option<()> {
        None
    }

    fn clock(&mut self) -> Option<u64> {
        self.shared.vm().turns.host_clock()
    }

    fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Relaxed)
    }
}
