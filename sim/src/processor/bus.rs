//! A processor's way to the memory of its VM, to its devices and to its other processors.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::{Gfn, Gpa};
use kvm_ops_cpu::{Access as Question, Bus, Frame, Mapping};

use crate::irq::Wake;
use crate::processor::mmio::{Access, Mmio};
use crate::processor::routing::{Command, Kind};
use crate::table::GPA_BITS;
use crate::vm::VmInner;

/// The part of a bus that the vCPU's thread holds too.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    mmio: Mutex<Mmio>,
    /// Vectors that the guest ended, for the IOAPIC: one bit a vector.
    ended: [AtomicU64; 4],
}

impl Shared {
    pub(crate) fn mmio(&self) -> MutexGuard<'_, Mmio> {
        self.mmio.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the guest ended an interrupt since they were taken.
    pub(crate) fn any_ended(&self) -> bool {
        let mut words = self.ended.iter();
        words.any(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// Takes the vectors that the guest ended since they were taken last.
    pub(crate) fn take_ended(&self) -> impl Iterator<Item = u8> + Clone + use<> {
        let words = self
            .ended
            .each_ref()
            .map(|word| match word.load(Ordering::Relaxed) {
                0 => 0,
                _ => word.swap(0, Ordering::Relaxed),
            });
        vectors(words)
    }
}

/// The vectors of a bitmap.
fn vectors(words: [u64; 4]) -> impl Iterator<Item = u8> + Clone {
    (0..).zip(words).flat_map(|(i, word)| {
        let bits = (0..64u8).filter(move |bit| word >> bit & 1 != 0);
        bits.map(move |bit| i * 64 + bit)
    })
}

pub(crate) struct VmBus {
    pub(crate) vm: Arc<VmInner>,
    pub(crate) shared: Arc<Shared>,
}

impl VmBus {
    fn device(&self, gpa: u64, data: &[u8], write: bool) -> Option<[u8; 8]> {
        self.shared.mmio().access(Access::new(gpa, data, write))
    }
}

impl Bus for VmBus {
    fn map(&mut self, gpa: u64, question: Question) -> Mapping {
        let device = match question.execute {
            // There is no code in devices.
            true => Mapping::Refused { code: 0 },
            false => Mapping::Device,
        };
        if gpa >> GPA_BITS != 0 {
            return device;
        }
        let gfn = Gfn::containing(Gpa::new(gpa));
        let known = self.vm.read().lookup(gfn);
        let mapping = match known.filter(|m| m.writable || !question.write) {
            Some(mapping) => Some(mapping),
            None => self.vm.write().resolve(gfn, question.write),
        };
        let Some(mapping) = mapping else {
            return device;
        };
        let Some(host) = NonNull::new(mapping.host as *mut u8) else {
            return device;
        };
        // SAFETY: the page comes from a slot, so by the contract of `HostRange::new` it is mapped,
        // writable where the mapping is, and no Rust reference to it exists; it is page-aligned. Other
        // processors and the host use it by atomic accesses. A slot changes only
        // in a turn that no processor has, and the generation that `generation` returns is another
        // one afterwards (`SimVm::set_memory_slot` and others, `VmInner::close`); the processor's
        // methods that use the frame are called in its turn (`Processor::in_turn`), and look at
        // the generation first.
        Mapping::Frame(unsafe { Frame::new(host, mapping.writable) })
    }

    fn read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        for (at, piece) in (gpa..).step_by(8).zip(data.chunks_mut(8)) {
            match self.device(at, piece, false) {
                Some(bytes) => piece.copy_from_slice(&bytes[..piece.len()]),
                None => return false,
            }
        }
        true
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> bool {
        (gpa..)
            .step_by(8)
            .zip(data.chunks(8))
            .all(|(at, piece)| self.device(at, piece, true).is_some())
    }

    // Ports leave the processor before the bus is asked (`Controls::io`).
    fn port_in(&mut self, _: u16, _: u8) -> Option<u32> {
        None
    }

    fn port_out(&mut self, _: u16, _: u8, _: u32) -> Option<()> {
        None
    }

    fn ipi(&mut self, from: u32, command: u64) {
        self.vm.send(&Command::from_icr(command), Some(from));
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.shared.ended[usize::from(vector / 64)].fetch_or(1 << (vector % 64), Ordering::Relaxed);
    }

    fn clock(&mut self) -> Option<u64> {
        self.vm.turns.host_clock()
    }

    fn generation(&self) -> u64 {
        self.vm.generation()
    }
}

/// Hands an interrupt message to the mailbox of a processor.
pub(crate) fn send(wake: &Wake, kind: Kind, vector: u8, level: bool) {
    match kind {
        Kind::Fixed | Kind::Lowest if level => wake.post_level(vector),
        Kind::Fixed | Kind::Lowest => wake.post(vector),
        Kind::Nmi => wake.nmi(),
        Kind::Init => wake.init(),
        Kind::Start => wake.start(vector),
    }
}
