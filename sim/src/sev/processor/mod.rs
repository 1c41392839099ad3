//! A vCPU of a SEV, SEV-ES or SNP guest that executes machine code: what its processor does beside a
//! normal VM's.
//!
//! | file | what it does |
//! |---|---|
//! | `bus` | pages: the encrypted part of the nested page table with the RMP, and the slots |
//! | `faults` | nested page faults, which the back end is asked about |
//! | `vmsa` | VMRUN and #VMEXIT with encrypted register state |
//! | `exits` | intercepted instructions: #VC, or an exit without the guest's help |
//! | `msr` | RDMSR and WRMSR |
//! | `rmp` | PVALIDATE and RMPADJUST |
//! | `ghcb` | VMGEXIT: the host's answers |
//! | `start` | INIT, start-up interrupts and AP creation |

mod bus;
mod exits;
mod faults;
mod ghcb;
mod msr;
mod rmp;
mod start;
mod vmsa;

pub(crate) use ghcb::Pending;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_ops::{Asid, Error, Result, Tech};
use kvm_ops_cpu::{Bus, Controls, Cpu, CpuidLeaf, CpuidTable, Event, Exception};
use soft_amd_sp::Platform;

use crate::processor::{Next, Processor};
use crate::vm::VmInner;
use bus::{SevBus, Shared};
use ghcb::Ghcb;
use vmsa::Loaded;

/// What the processor of an encrypted guest has more than others.
pub(crate) struct Side {
    shared: Arc<Shared>,
    seen: Seen,
    /// The register state that was loaded last. `None` for a guest without SEV-ES.
    loaded: Option<Loaded>,
    /// The GHCB of the VMGEXIT under way.
    ghcb: Option<Ghcb>,
    /// A VMGEXIT that goes on before the guest does.
    going_on: Option<kvm_ops_cpu::Exit>,
    /// An event whose delivery ended in an exit.
    interrupted: Option<Event>,
    hold: Option<start::Hold>,
    /// A start-up interrupt came: the first one starts the vCPU with its VMSA.
    started: bool,
    /// Bits of physical addresses, as the guest sees them: without the C-bit.
    physical_bits: u32,
}

/// Numbers that change with translations: pages closed, mappings and slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    closed: u64,
    pages: u64,
    asid: Option<Asid>,
}

/// CPUID 0x8000_001F: encryption features.
const ENCRYPTION: u32 = 0x8000_001f;
const HIGHEST: u32 = 0;
const SIGNATURE: u32 = 1;
const HIGHEST_EXTENDED: u32 = 0x8000_0000;
const STRUCTURED: u32 = 7;
const ADDRESSES: u32 = 0x8000_0008;
/// Structured features: protection keys, whose register the host could not see.
const PKU: u32 = 1 << 3;
/// FMA, XSAVE, AVX and F16C; AVX2; VAES and VPCLMULQDQ: states of XSAVE, whose leaf the table here does not have.
const EXTENDED_STATES: u32 = 1 << 12 | 1 << 26 | 1 << 28 | 1 << 29;
const AVX2: u32 = 1 << 5;
const VECTOR_CIPHERS: u32 = 1 << 9 | 1 << 10;
/// Structured features: linear addresses of 57 bits.
const LA57: u32 = 1 << 16;
/// Bits of a guest-physical address without the C-bit, unless the embedder says otherwise.
const PHYSICAL_BITS: u32 = 48;

fn features(tech: Tech) -> u32 {
    const SEV: u32 = 1 << 1;
    const ES: u32 = 1 << 3;
    const SNP: u32 = 1 << 4;
    match tech {
        Tech::SevSnp => SEV | ES | SNP,
        Tech::SevEs => SEV | ES,
        _ => SEV,
    }
}

/// The answers to CPUID unless the embedder says otherwise.
pub(crate) fn cpuid(vm: &VmInner, mut table: CpuidTable) -> CpuidTable {
    if !vm.is_sev() {
        return table;
    }
    let platform = vm.machine.sev().map(|sev| &sev.platform);
    let signature = platform.map_or(0, |platform| platform.cpuid_signature());
    change(&mut table, SIGNATURE, |leaf| leaf.eax = signature);
    if vm.has_vmsas() {
        change(&mut table, SIGNATURE, |leaf| leaf.ecx &= !EXTENDED_STATES);
        change(&mut table, STRUCTURED, |leaf| {
            (leaf.ebx, leaf.ecx) = (leaf.ebx & !AVX2, leaf.ecx & !VECTOR_CIPHERS);
        });
        // Linux asks for the states of XSAVE (0xd) where there are as many leaves, and ends itself without them.
        change(&mut table, HIGHEST, |leaf| {
            leaf.eax = leaf.eax.min(STRUCTURED);
        });
        // With five levels of page tables Linux (6.12, for one) takes them for four while it identifies its first processor and
        // while it patches its code, with interrupts enabled. The end of an interrupt is #VC at the local APIC's page, and its
        // handler walks the tables. In turns an interrupt comes then or not, the same each time; in the host's time it does in
        // some boots.
        if vm.turns.is_parallel() {
            change(&mut table, STRUCTURED, |leaf| leaf.ecx &= !LA57);
        }
    }
    encrypted(vm, table)
}

fn change(table: &mut CpuidTable, function: u32, change: impl FnOnce(&mut CpuidLeaf)) {
    let mut leaf = table.get(function, 0);
    change(&mut leaf);
    table.set(function, 0, leaf);
}

/// What the processor tells of encryption: addresses have the C-bit.
fn encrypted(vm: &VmInner, mut table: CpuidTable) -> CpuidTable {
    let platform = vm.machine.sev().map(|sev| &sev.platform);
    let c_bit = platform.map_or(0, |platform| platform.c_bit());
    change(&mut table, HIGHEST_EXTENDED, |leaf| {
        leaf.eax = leaf.eax.max(ENCRYPTION)
    });
    change(&mut table, STRUCTURED, |leaf| leaf.ecx &= !PKU);
    change(&mut table, ADDRESSES, |leaf| {
        leaf.eax = leaf.eax & !0xff | 52
    });
    change(&mut table, ENCRYPTION, |leaf| {
        // EBX: the C-bit, and the bits of physical addresses that encryption takes.
        *leaf = CpuidLeaf {
            eax: features(vm.tech),
            ebx: c_bit & 0x3f | 1 << 6,
            ..*leaf
        };
    });
    table
}

/// The embedder's answers to CPUID in the place of those: the processor keeps its C-bit.
pub(crate) fn change_cpuid(processor: &mut Processor, table: CpuidTable) -> CpuidTable {
    let bits = table.get(ADDRESSES, 0).eax & 0xff;
    if let Some(side) = processor.sev.as_mut().filter(|_| bits != 0) {
        side.physical_bits = bits;
    }
    match processor.vm.is_sev() {
        true => encrypted(&processor.vm, table),
        false => table,
    }
}

/// The instructions that exit.
pub(crate) fn controls(vm: &VmInner, normal: Controls) -> Controls {
    if !vm.is_sev() {
        return normal;
    }
    let encrypted = Controls {
        cpuid: true,
        msr: true,
        ..normal
    };
    match vm.has_vmsas() {
        false => encrypted,
        true => Controls {
            wbinvd: true,
            guest_instructions: true,
            apic_page: true,
            ..encrypted
        },
    }
}

/// Puts the encrypted memory of a guest before its bus.
pub(crate) fn surround(
    vm: &Arc<VmInner>,
    bus: impl Bus + 'static,
) -> (Box<dyn Bus>, Option<Box<Side>>) {
    if !vm.is_sev() {
        return (Box::new(bus), None);
    }
    let shared = Arc::new(Shared::default());
    let bus = SevBus::new(vm, &shared, bus);
    let side = Side {
        shared,
        seen: Seen::default(),
        loaded: None,
        ghcb: None,
        going_on: None,
        interrupted: None,
        hold: None,
        started: false,
        physical_bits: PHYSICAL_BITS,
    };
    (Box::new(bus), Some(Box::new(side)))
}

/// The machine below, which a VM with an ASID has.
fn platform(vm: &VmInner) -> Result<&Platform> {
    super::access::platform(vm)
}

impl Side {
    /// Takes a turn at the guest's memory, which others may have too if it is `shared`. Without one, no page of it is lent.
    fn begin(&mut self, vm: &VmInner, shared: bool) {
        let asid = vm.sev.asid();
        let turn = asid.and_then(|asid| match shared {
            true => platform(vm).ok()?.guest_turn_shared(asid.0).ok(),
            false => platform(vm).ok()?.guest_turn(asid.0).ok(),
        });
        let seen = Seen {
            closed: turn.as_ref().map_or(0, |turn| turn.closed()),
            pages: vm.generation(),
            asid,
        };
        if seen != self.seen {
            self.seen = seen;
            self.shared.generation.fetch_add(1, Ordering::Relaxed);
        }
        *self.shared.turn() = turn;
    }

    fn end(&mut self) {
        *self.shared.turn() = None;
    }
}

impl Processor {
    /// The side of an encrypted guest. Asked only where `self.sev` was just looked at, or an exit came
    /// from it.
    fn side(&mut self) -> Result<&mut Side> {
        self.sev
            .as_deref_mut()
            .ok_or(Error::NotOffered(&super::ENCRYPTED))
    }

    /// Lets the processor use memory, in a turn of the VM that is `shared` or not.
    pub(crate) fn with_memory<T>(&mut self, shared: bool, work: impl FnOnce(&mut Cpu) -> T) -> T {
        let Some(side) = &mut self.sev else {
            return work(&mut self.cpu);
        };
        side.begin(&self.vm, shared);
        let result = work(&mut self.cpu);
        side.end();
        result
    }

    /// The processor's own exception.
    fn raise(&mut self, exception: Exception) -> Next {
        self.again_with(Event::exception(exception))
    }

    fn again_with(&mut self, event: Event) -> Next {
        match self.in_turn(|cpu| cpu.inject(event)) {
            Some(exit) => Next::Outside(exit),
            None => Next::Again,
        }
    }

    /// The event whose delivery ended in an exit.
    pub(crate) fn take_interrupted(&mut self) -> Option<Event> {
        self.sev.as_mut()?.interrupted.take()
    }

    /// The answer to CPUID, as the guest sees it.
    pub(crate) fn cpuid_answer(&self, function: u32, index: u32) -> CpuidLeaf {
        let mut leaf = self.cpu.cpuid(function, index);
        if function == ADDRESSES
            && let Some(side) = &self.sev
        {
            leaf.eax = leaf.eax & !0xff | side.physical_bits;
        }
        leaf
    }
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}
