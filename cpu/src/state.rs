//! The state of one processor, as its instructions see it.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use iced_x86::{Code, Instruction};

use crate::apic::Apic;
use crate::bus::Bus;
use crate::cpuid::CpuidTable;
use crate::debugger::Debugger;
use crate::exec::Exec;
use crate::exit::{Cause, Controls, Exit};
use crate::fault::{Event, Exception};
use crate::flags::{self, Flags};
use crate::fpu::{Fpu, MXCSR_MM};
use crate::msr::Msrs;
use crate::pages::CodePages;
use crate::parallel::Parallel;
use crate::physical::{FetchCache, FrameCache};
use crate::segment::{CS, SS, Segment, TableRegister};
use crate::tlb::{self, Tlb};

pub(crate) const CR0_PE: u64 = 1 << 0;
pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_EM: u64 = 1 << 2;
pub(crate) const CR0_TS: u64 = 1 << 3;
pub(crate) const CR0_ET: u64 = 1 << 4;
pub(crate) const CR0_NE: u64 = 1 << 5;
pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR0_AM: u64 = 1 << 18;
pub(crate) const CR0_NW: u64 = 1 << 29;
pub(crate) const CR0_CD: u64 = 1 << 30;
pub(crate) const CR0_PG: u64 = 1 << 31;

pub(crate) const CR4_VME: u64 = 1 << 0;
pub(crate) const CR4_PVI: u64 = 1 << 1;
pub(crate) const CR4_TSD: u64 = 1 << 2;
pub(crate) const CR4_DE: u64 = 1 << 3;
pub(crate) const CR4_PSE: u64 = 1 << 4;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_PCE: u64 = 1 << 8;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub(crate) const CR4_UMIP: u64 = 1 << 11;
pub(crate) const CR4_LA57: u64 = 1 << 12;
pub(crate) const CR4_FSGSBASE: u64 = 1 << 16;
pub(crate) const CR4_PCIDE: u64 = 1 << 17;
pub(crate) const CR4_OSXSAVE: u64 = 1 << 18;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const CR4_PKE: u64 = 1 << 22;
pub(crate) const CR4_PKS: u64 = 1 << 24;

pub(crate) const EFER_SCE: u64 = 1 << 0;
pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;
pub(crate) const EFER_NXE: u64 = 1 << 11;

/// The instruction did not complete; [`Core::pending`] says why.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stop;

pub(crate) type R<T> = Result<T, Stop>;

/// Reason for which an instruction did not complete.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pending {
    None,
    Fault(Exception),
    Exit(Exit),
    /// INT n, INT1, INT3, INTO.
    Software(Event),
    /// A store hit decoded code at this guest-physical page: drop it, then do the instruction
    /// again.
    CodeWrite(u64),
    /// A locked instruction that is done again while no other processor runs.
    Alone,
}

/// Number of the register that holds the start of the running block.
pub(crate) const BLOCK: usize = 17;

pub(crate) struct Core {
    /// General registers; number 16 is always zero, 17 is RIP of the running block's start. The
    /// rest makes the length a power of two, so that a masked number needs no check.
    pub(crate) r: [u64; 32],
    pub(crate) rip: u64,
    pub(crate) f: Flags,
    /// RFLAGS without the six arithmetic flags, bit 1 set.
    pub(crate) system_flags: u64,
    pub(crate) seg: [Segment; 6],
    /// Bases that 64-bit addresses add: zero but for FS and GS; number 7 is zero.
    pub(crate) base: [u64; 8],
    /// Base and limit of the last code segment outside of 64-bit mode.
    pub(crate) code: (u64, u32),
    /// Size of code: 16, 32 or 64.
    pub(crate) bits: u8,
    pub(crate) cpl: u8,
    /// TLB set of ordinary data accesses.
    pub(crate) set: usize,
    pub(crate) tlb: Tlb,
    pub(crate) pending: Pending,
    /// Instructions left in this slice.
    pub(crate) budget: i64,
    /// Instructions granted by all slices together.
    pub(crate) granted: u64,
    /// Clock ticks that passed without instructions, while halted.
    pub(crate) skipped: u64,
    /// PAUSE was executed: the slice ends.
    pub(crate) yielded: bool,
    /// Length of the instruction that is executed, for exits.
    pub(crate) len: u8,
    /// Decoded instructions that ops without a dedicated handler refer to.
    pub(crate) insns: Vec<(Exec, Instruction)>,

    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: TableRegister,
    pub(crate) idtr: TableRegister,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    pub(crate) dr: [u64; 8],
    pub(crate) pkru: u32,
    pub(crate) pkrs: u32,
    pub(crate) msrs: Msrs,
    pub(crate) apic: Apic,
    pub(crate) fpu: Box<Fpu>,
    pub(crate) cpuid: CpuidTable,
    pub(crate) controls: Controls,
    pub(crate) debugger: Debugger,

    /// No interrupt before the next instruction: after STI and MOV SS.
    pub(crate) shadow: bool,
    /// The next instruction runs in a block that is not kept: its store hits decoded code.
    pub(crate) alone: bool,
    /// The last instruction was MOV SS or POP SS: debug traps wait until after the next one.
    pub(crate) quiet: bool,
    /// Bits of DR6 for the debug trap that waits.
    pub(crate) debug: u64,
    /// Breakpoints that the running instruction met.
    pub(crate) hit: u64,
    /// A breakpoint is enabled.
    pub(crate) watched: bool,
    /// The running instruction decided by TF at its end if it is stepped.
    pub(crate) stepped: bool,
    /// Events have to be looked at before the next block.
    pub(crate) attention: bool,
    pub(crate) nmi_pending: bool,
    /// Another NMI came before that one was taken.
    pub(crate) nmi_second: bool,
    /// Waits for a start-up interrupt.
    pub(crate) waiting: bool,
    /// NMIs are held back until IRET.
    pub(crate) nmi_blocked: bool,
    pub(crate) halted: bool,
    /// HLT instructions that did not exit.
    pub(crate) halts: u64,
    pub(crate) shutdown: bool,
    /// The last instruction is repeated and not done: RIP stays at it.
    pub(crate) again: bool,
    /// Event under delivery.
    pub(crate) vectoring: Option<Event>,
    /// State of RDRAND's generator.
    pub(crate) entropy: u64,

    pub(crate) bus: Box<dyn Bus>,
    pub(crate) pages: Arc<CodePages>,
    pub(crate) parallel: Parallel,
    pub(crate) frames: FrameCache,
    pub(crate) fetches: FetchCache,
    pub(crate) bus_generation: u64,
    /// Grows when a linear address may lead to other code: the tag of the jump cache.
    pub(crate) epoch: u64,
    pub(crate) phys_bits: u8,
    pub(crate) missing: BTreeMap<Code, u64>,
}

impl Core {
    pub(crate) fn new(bus: Box<dyn Bus>, pages: Arc<CodePages>, cpuid: CpuidTable) -> Self {
        let bus_generation = bus.generation();
        let phys_bits = cpuid.physical_bits();
        let mut fpu = Fpu::new();
        if cpuid.has_misaligned_sse() {
            fpu.mxcsr_mask |= MXCSR_MM;
        }
        let mut core = Self {
            r: [0; 32],
            rip: 0,
            f: Flags::default(),
            system_flags: 2,
            seg: [Segment::real(0, false); 6],
            base: [0; 8],
            code: (0, 0),
            bits: 16,
            cpl: 0,
            set: tlb::SUPERVISOR,
            tlb: Tlb::new(),
            pending: Pending::None,
            budget: 0,
            granted: 0,
            skipped: 0,
            yielded: false,
            len: 0,
            insns: Vec::new(),
            ldtr: Segment::null(0),
            tr: Segment::null(0),
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr: [0; 8],
            pkru: 0,
            pkrs: 0,
            msrs: Msrs::new(),
            apic: Apic::new(0),
            fpu: Box::new(fpu),
            cpuid,
            controls: Controls::none(),
            debugger: Debugger::default(),
            shadow: false,
            alone: false,
            quiet: false,
            debug: 0,
            hit: 0,
            watched: false,
            stepped: false,
            attention: true,
            nmi_pending: false,
            nmi_second: false,
            waiting: false,
            nmi_blocked: false,
            halted: false,
            halts: 0,
            shutdown: false,
            again: false,
            vectoring: None,
            entropy: 0x9e37_79b9_7f4a_7c15,
            bus,
            pages,
            parallel: Parallel::default(),
            frames: FrameCache::new(),
            fetches: FetchCache::new(),
            bus_generation,
            epoch: 1,
            phys_bits,
            missing: BTreeMap::new(),
        };
        core.reset();
        core
    }

    /// State after RESET (Intel SDM volume 3, table 10-1).
    pub(crate) fn reset(&mut self) {
        self.r = [0; 32];
        self.r[2] = u64::from(self.cpuid.get(1, 0).eax);
        self.rip = 0xfff0;
        self.f.set(0);
        self.system_flags = 2;
        self.seg = [Segment::real(0, false); 6];
        self.seg[CS] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            rights: 0x9b,
        };
        self.ldtr = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            rights: 0x82,
        };
        self.tr = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            rights: 0x8b,
        };
        self.gdtr = TableRegister {
            base: 0,
            limit: 0xffff,
        };
        self.idtr = self.gdtr;
        self.cr0 = CR0_ET | CR0_CD | CR0_NW;
        (self.cr2, self.cr3, self.cr4, self.efer) = (0, 0, 0, 0);
        self.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        (self.quiet, self.debug, self.hit) = (false, 0, 0);
        (self.pkru, self.pkrs) = (0, 0);
        self.halted = false;
        self.shutdown = false;
        self.shadow = false;
        self.attention = true;
        self.nmi_pending = false;
        self.nmi_second = false;
        self.waiting = false;
        self.nmi_blocked = false;
        *self.fpu = self.fpu.initial();
        self.flush_all();
        self.update_mode();
        self.update_watch();
    }

    pub(crate) fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0
    }

    pub(crate) fn protected(&self) -> bool {
        self.cr0 & CR0_PE != 0
    }

    pub(crate) fn vm86(&self) -> bool {
        self.system_flags & flags::VM != 0
    }

    /// Real or virtual-8086 mode: selectors are paragraphs.
    pub(crate) fn paragraphs(&self) -> bool {
        !self.protected() || self.vm86()
    }

    /// Updates the state that is derived from control registers, segments and flags.
    pub(crate) fn update_mode(&mut self) {
        let cs = &self.seg[CS];
        self.bits = if self.long_mode() && cs.long() {
            64
        } else if cs.big() && !self.vm86() {
            32
        } else {
            16
        };
        self.cpl = if !self.protected() {
            0
        } else if self.vm86() {
            3
        } else {
            self.seg[SS].dpl()
        };
        let long = self.bits == 64;
        let code = (self.seg[CS].base, self.seg[CS].limit);
        if !long && code != self.code {
            // RIP leads to other code now.
            self.code = code;
            self.epoch += 1;
        }
        for i in 0..6 {
            self.base[i] = if long && i < 4 { 0 } else { self.seg[i].base };
        }
        self.update_set();
    }

    /// Chooses the TLB set, after CPL, CR0, CR4 or EFLAGS.AC changed.
    pub(crate) fn update_set(&mut self) {
        let ac = self.system_flags & flags::AC != 0;
        self.set = if self.watched {
            tlb::CHECKED
        } else if self.cpl == 3 {
            if ac && self.cr0 & CR0_AM != 0 {
                tlb::CHECKED
            } else {
                tlb::USER
            }
        } else if ac && self.cr4 & CR4_SMAP != 0 {
            tlb::SUPERVISOR_AC
        } else {
            tlb::SUPERVISOR
        };
    }

    pub(crate) fn rflags(&self) -> u64 {
        self.f.get() | self.system_flags
    }

    /// Writes all of RFLAGS. Bit 1 is kept, reserved bits are dropped.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.f.set(value);
        let kept = flags::TF
            | flags::IF
            | flags::DF
            | flags::IOPL
            | flags::NT
            | flags::RF
            | flags::VM
            | flags::AC
            | flags::VIF
            | flags::VIP
            | flags::ID;
        self.system_flags = value & kept | 2;
        self.update_set();
    }

    pub(crate) fn iopl(&self) -> u8 {
        (self.system_flags >> 12 & 3) as u8
    }

    /// Mask of the stack pointer: 16, 32 or 64 bits.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.bits == 64 {
            u64::MAX
        } else if self.seg[SS].big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Instructions retired since the processor was made.
    pub(crate) fn retired(&self) -> u64 {
        self.granted.wrapping_sub(self.budget as u64)
    }

    #[cold]
    pub(crate) fn fault(&mut self, e: Exception) -> Stop {
        self.pending = Pending::Fault(e);
        Stop
    }

    #[cold]
    pub(crate) fn gp(&mut self, code: u32) -> Stop {
        self.fault(Exception::with_code(Exception::GP, code))
    }

    #[cold]
    pub(crate) fn ud(&mut self) -> Stop {
        self.fault(Exception::plain(Exception::UD))
    }

    /// #UD for an instruction that exists but is not implemented; it is named in the log.
    #[cold]
    pub(crate) fn missing(&mut self, code: Code) -> Stop {
        *self.missing.entry(code).or_insert(0) += 1;
        self.ud()
    }

    #[cold]
    pub(crate) fn exit(&mut self, cause: Cause, len: u8) -> Stop {
        self.pending = Pending::Exit(Exit {
            cause,
            len,
            linear: None,
            physical: None,
            vectoring: self.vectoring,
        });
        Stop
    }

    /// Forgets all translations of the first stage.
    pub(crate) fn flush_linear(&mut self) {
        self.tlb.flush();
        self.fetches.flush();
        self.epoch += 1;
    }

    /// Forgets all translations and frames.
    pub(crate) fn flush_all(&mut self) {
        self.flush_linear();
        self.frames.flush();
    }

    pub(crate) fn flush_page(&mut self, linear: u64) {
        self.tlb.flush_page(linear);
        self.fetches.flush();
        self.epoch += 1;
    }
}
