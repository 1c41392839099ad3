//! The registers of a processor from outside, events, and what hosts do after exits.

use alloc::vec::Vec;

use crate::bus::Bus;
use crate::cpu::Cpu;
use crate::exit::{Exit, PortAccess};
use crate::fault::Event;
use crate::flags::zero;
use crate::paging::{READ, WRITE};
use crate::segment::{CS, Segment, TableRegister};
use crate::state::{CR0_CD, CR0_NW, Pending, R};

/// The registers that instructions see, as a host saves and loads them (the VMCS' guest state, a
/// VMSA).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8: task priority, 0 to 15.
    pub cr8: u8,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 to DR3.
    pub breakpoints: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

/// Errors of [`Cpu::complete_io`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// The exit was no I/O.
    NotIo,
    /// The memory operand of INS can not be written any more; the fault or violation is raised
    /// when the processor runs again, since RIP stays at the instruction.
    Memory,
}

/// Reasons why [`Cpu::translate`] has no address, or [`Cpu::overwrite_instruction`] no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untranslated {
    /// The page tables deny it.
    Fault(crate::fault::Exception),
    /// The second stage refuses a page table.
    Exit(Exit),
    /// Decoded code lay in a page table and was dropped: the instruction is done again.
    Again,
}

impl core::fmt::Display for IoError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NotIo => "the exit is not an access to ports",
            Self::Memory => "the memory operand of ins is not writable",
        })
    }
}

impl core::error::Error for IoError {}

impl Cpu {
    /// Copies the registers out.
    pub fn registers(&self) -> Registers {
        let c = &self.core;
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&c.r[..16]);
        let [d0, d1, d2, d3, _, _, dr6, dr7] = c.dr;
        Registers {
            gpr,
            rip: c.rip,
            rflags: c.rflags(),
            segments: c.seg,
            ldtr: c.ldtr,
            tr: c.tr,
            gdtr: c.gdtr,
            idtr: c.idtr,
            cr0: c.cr0,
            cr2: c.cr2,
            cr3: c.cr3,
            cr4: c.cr4,
            cr8: c.apic.tpr() >> 4,
            efer: c.efer,
            xcr0: c.fpu.xcr0,
            breakpoints: [d0, d1, d2, d3],
            dr6,
            dr7,
        }
    }

    /// Loads the registers, as VM entry does: nothing is checked, LMA follows from EFER, and all
    /// translations are forgotten.
    pub fn set_registers(&mut self, from: &Registers) {
        let c = &mut self.core;
        c.r[..16].copy_from_slice(&from.gpr);
        c.rip = from.rip;
        c.seg = from.segments;
        c.ldtr = from.ldtr;
        c.tr = from.tr;
        c.gdtr = from.gdtr;
        c.idtr = from.idtr;
        c.cr0 = from.cr0;
        c.cr2 = from.cr2;
        c.cr3 = from.cr3;
        c.cr4 = from.cr4;
        c.apic.set_tpr(from.cr8 << 4);
        c.efer = from.efer;
        c.fpu.xcr0 = from.xcr0 | 1;
        let [d0, d1, d2, d3] = from.breakpoints;
        c.dr = [d0, d1, d2, d3, 0, 0, from.dr6, from.dr7];
        c.set_rflags(from.rflags);
        c.update_mode();
        c.update_watch();
        c.flush_linear();
    }

    /// A general register by its number, 0 (RAX) to 15.
    pub fn gpr(&self, n: usize) -> u64 {
        self.core.r[n & 15]
    }

    /// Writes a general register.
    pub fn set_gpr(&mut self, n: usize, value: u64) {
        self.core.r[n & 15] = value;
    }

    /// RIP.
    pub fn rip(&self) -> u64 {
        self.core.rip
    }

    /// XMM register `n`, 0 to 15.
    pub fn xmm(&self, n: usize) -> u128 {
        self.core.fpu.xmm[n & 15]
    }

    /// Writes an XMM register.
    pub fn set_xmm(&mut self, n: usize, value: u128) {
        self.core.fpu.xmm[n & 15] = value;
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        self.core.fpu.mxcsr
    }

    /// Writes MXCSR; bits 31:16 are ignored.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.core.fpu.mxcsr = value & 0xffff;
    }

    /// Writes RIP; the next instruction is there.
    pub fn set_rip(&mut self, rip: u64) {
        self.core.rip = rip;
    }

    /// RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.core.rflags()
    }

    /// Writes RFLAGS; reserved bits are ignored.
    pub fn set_rflags(&mut self, value: u64) {
        self.core.set_rflags(value);
        self.core.update_mode();
        self.core.attention = true;
    }

    /// The privilege level, 0 to 3.
    pub fn cpl(&self) -> u8 {
        self.core.cpl
    }

    /// Goes past the instruction of an exit that the host carried out.
    pub fn skip(&mut self, exit: &Exit) {
        self.advance_rip(exit.len);
        self.core.shadow = false;
    }

    /// The host carried the instruction out: it counts as executed.
    fn advance_rip(&mut self, len: u8) {
        let c = &mut self.core;
        c.granted = c.granted.wrapping_add(1);
        let mask = if c.bits == 64 { u64::MAX } else { 0xffff_ffff };
        c.rip = c.rip.wrapping_add(len.into()) & mask;
        let step = c.steps();
        c.completed(step);
        c.system_flags &= !crate::flags::RF;
        c.attention = true;
    }

    /// Completes an I/O exit: `value` goes to the register or, for INS, to memory; a repeated
    /// string instruction goes on with its next element.
    ///
    /// # Errors
    ///
    /// [`IoError`] says why nothing changed.
    pub fn complete_io(&mut self, exit: &Exit, value: u32) -> Result<(), IoError> {
        let crate::exit::Cause::Io(io) = exit.cause else {
            return Err(IoError::NotIo);
        };
        self.enter();
        if !io.string {
            if io.input {
                self.core.set_gpr(0, io.size.into(), value.into());
            }
            self.advance_rip(exit.len);
            return Ok(());
        }
        while self.complete_string(&io, value).is_err() {
            match core::mem::replace(&mut self.core.pending, Pending::None) {
                // The bytes lie in decoded code.
                Pending::CodeWrite(gpa) => self.core.pages.forget(gpa),
                _ => return Err(IoError::Memory),
            }
        }
        let c = &self.core;
        if !io.repeat || zero(c.r[1], io.address_size.into()) == 0 {
            self.advance_rip(exit.len);
        }
        Ok(())
    }

    fn complete_string(&mut self, io: &PortAccess, value: u32) -> R<()> {
        let c = &mut self.core;
        let address = u32::from(io.address_size);
        let index = if io.input { 7 } else { 6 };
        if io.input {
            let offset = zero(c.r[7], address);
            let at = c.linear(0, offset, io.size.into(), true)?;
            c.write_linear(0, at, &value.to_le_bytes()[..usize::from(io.size)], WRITE)?;
        }
        let size = u64::from(io.size);
        let down = c.system_flags & crate::flags::DF != 0;
        let step = if down { size.wrapping_neg() } else { size };
        c.set_gpr(index, address, c.r[index].wrapping_add(step));
        if io.repeat {
            c.set_gpr(1, address, c.r[1].wrapping_sub(1));
        }
        Ok(())
    }

    /// Delivers an event before the next instruction: what VM entry does with an injected event.
    /// `Some` is an exit on the way, with the event as its `vectoring`.
    pub fn inject(&mut self, event: Event) -> Option<Exit> {
        self.enter();
        self.core.halted = false;
        self.core.attention = true;
        if self.core.deliver(event).is_ok() {
            return None;
        }
        match core::mem::replace(&mut self.core.pending, Pending::None) {
            Pending::Exit(exit) => Some(exit),
            _ => None,
        }
    }

    /// The registers of the local APIC, as [`Apic::save`](crate::Apic::save) has them. `None` for a processor without
    /// one.
    pub fn apic_registers(&self) -> Option<[u8; crate::APIC_PAGE_BYTES]> {
        let now = self.core.clock();
        (!self.core.apic.absent).then(|| self.core.apic.save(now))
    }

    /// Loads them ([`Apic::load`](crate::Apic::load)). Does nothing without a local APIC.
    pub fn set_apic_registers(&mut self, page: &[u8; crate::APIC_PAGE_BYTES]) {
        if !self.core.apic.absent {
            let now = self.core.clock();
            self.core.apic.load(page, now);
            self.core.attention = true;
        }
    }

    /// Gives the processor banks of the machine-check architecture: IA32_MCG_CAP, whose low 8 bits are their
    /// number. After power-on there are none.
    pub fn set_mce(&mut self, cap: u64) {
        self.core.msrs.mce.set_up(cap);
    }

    /// Sets the clock ticks of one tick of the local APIC's timer (see [`Apic::ticks`](crate::Apic::ticks)). CPUID
    /// leaf 15H is the caller's to change.
    pub fn set_apic_ticks(&mut self, ticks: u64) {
        self.core.apic.set_ticks(ticks);
    }

    /// Requests an interrupt from the local APIC. Vectors below 16 are ignored, and so is all
    /// while the APIC is disabled.
    pub fn interrupt(&mut self, vector: u8) {
        self.core.apic.request(vector);
        self.core.attention = true;
    }

    /// Requests an interrupt that a level-triggered pin of an I/O APIC sent: as
    /// [`interrupt`](Self::interrupt), and the local APIC's TMR says so.
    pub fn level_interrupt(&mut self, vector: u8) {
        self.core.apic.request_level(vector);
        self.core.attention = true;
    }

    /// True if an interrupt without an APIC could be delivered now: IF set, no shadow.
    pub fn interruptible(&self) -> bool {
        let c = &self.core;
        c.system_flags & crate::flags::IF != 0 && !c.shadow && !c.waiting && !c.shutdown
    }

    /// Raises an NMI. Of NMIs that come together two are taken, one after the other; while one is handled, one waits. So
    /// does KVM (Linux `process_nmi`).
    pub fn nmi(&mut self) {
        self.core.receive_nmi();
    }

    /// INIT: registers as after reset, but for extended state, MSRs, the caching bits of CR0 and the
    /// APIC's id and base. The boot processor starts over, any other one waits for [`Cpu::start`].
    pub fn init(&mut self) {
        let c = &mut self.core;
        let fpu = {
            let initial = c.fpu.initial();
            core::mem::replace(&mut *c.fpu, initial)
        };
        let caching = CR0_CD | CR0_NW;
        let kept = c.cr0 & caching;
        let base = c.apic.base();
        c.reset();
        c.cr0 = c.cr0 & !caching | kept;
        *c.fpu = fpu;
        c.apic.reset();
        // It held this value before.
        let _ = c.apic.load_base(base, c.phys_bits);
        c.waiting = base & crate::apic::BSP == 0;
    }

    /// A start-up interrupt: real mode at `vector` pages. Ignored unless the processor waits.
    pub fn start(&mut self, vector: u8) {
        let c = &mut self.core;
        if c.waiting {
            c.waiting = false;
            c.seg[CS] = Segment::real(u16::from(vector) << 8, true);
            c.rip = 0;
            c.update_mode();
        }
    }

    /// RESET.
    pub fn reset(&mut self) {
        self.core.apic.reset();
        self.core.msrs = crate::msr::Msrs::new();
        self.core.reset();
    }

    /// Sets the local APIC's number, and resets the APIC. Number 0 is the boot processor.
    pub fn set_apic_id(&mut self, id: u32) {
        self.core.apic = crate::apic::Apic::new(id);
    }

    /// Instructions executed so far.
    pub fn retired(&self) -> u64 {
        self.core.retired()
    }

    /// HLT instructions executed so far, but for those that exited ([`Controls::hlt`](crate::Controls::hlt)).
    pub fn halts(&self) -> u64 {
        self.core.halts
    }

    /// Clock of the processor in ticks; the TSC runs with it.
    pub fn clock(&self) -> u64 {
        self.core.clock()
    }

    /// Clock at which the APIC timer interrupts a halted processor, if nothing else does before.
    pub fn wakes_at(&self) -> Option<u64> {
        let enabled = self.core.system_flags & crate::flags::IF != 0;
        self.core.apic.interrupts_at().filter(|_| enabled)
    }

    /// Clock at which the APIC timer fires.
    pub fn deadline(&self) -> Option<u64> {
        self.core.apic.expires()
    }

    /// Lets time pass for a halted processor: the clock becomes `clock`, unless it is past that.
    pub fn advance_to(&mut self, clock: u64) {
        let c = &mut self.core;
        c.skipped = c.skipped.wrapping_add(clock.saturating_sub(c.clock()));
    }

    /// Carries out RDMSR. `None`: the MSR does not exist, hardware would raise #GP.
    pub fn read_msr(&self, index: u32) -> Option<u64> {
        self.core.read_msr(index)
    }

    /// Carries out WRMSR. `None`: hardware would raise #GP.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        self.core.attention = true;
        self.core.write_msr(index, value)
    }

    /// Sets the time-stamp counter from outside. Unlike WRMSR it leaves IA32_TSC_ADJUST alone, in which a guest sees what
    /// it wrote itself (SDM vol. 3, 19.17.3).
    pub fn set_tsc(&mut self, value: u64) {
        self.core.attention = true;
        let delta = value.wrapping_sub(self.core.tsc());
        let offset = &mut self.core.msrs.tsc_offset;
        *offset = offset.wrapping_add(delta);
    }

    /// IA32_TSC_AUX, whatever CPUID says of the instructions that read it.
    pub fn tsc_aux(&self) -> u32 {
        self.core.msrs.tsc_aux as u32
    }

    /// Sets IA32_TSC_AUX from outside, whatever CPUID says of the instructions that read it.
    pub fn set_tsc_aux(&mut self, value: u32) {
        self.core.msrs.tsc_aux = value.into();
    }

    /// Sets IA32_TSC_ADJUST from outside. Unlike WRMSR it leaves the time-stamp counter alone.
    pub fn set_tsc_adjust(&mut self, value: u64) {
        self.core.msrs.tsc_adjust = value;
    }

    /// Forgets all translations and frames: after a change of the second stage.
    pub fn flush(&mut self) {
        self.core.flush_all();
    }

    /// Reads linear memory with the rights of the current privilege. False if a page faults;
    /// accessed bits may have been set.
    pub fn read_linear(&mut self, linear: u64, data: &mut [u8]) -> bool {
        self.enter();
        let done = self.core.read_linear(3, linear, data, READ).is_ok();
        self.core.pending = Pending::None;
        done
    }

    /// Translates a linear address as a read of the current privilege does; accessed bits are set.
    ///
    /// # Errors
    ///
    /// [`Untranslated`]: the fault or the exit that the read would end in. Nothing is raised.
    pub fn translate(&mut self, linear: u64) -> Result<u64, Untranslated> {
        self.enter();
        let linear = self.core.wrap(linear);
        if self.core.long_mode() && !self.core.canonical(linear) {
            let fault = crate::fault::Exception::with_code(crate::fault::Exception::GP, 0);
            return Err(Untranslated::Fault(fault));
        }
        if let Ok(walked) = self.core.walk(linear, READ) {
            return Ok(walked.gpa);
        }
        match core::mem::replace(&mut self.core.pending, Pending::None) {
            Pending::Fault(fault) => Err(Untranslated::Fault(fault)),
            Pending::Exit(exit) => Err(Untranslated::Exit(exit)),
            _ => Err(Untranslated::Again),
        }
    }

    /// Writes over the instruction at CS:RIP with the rights of the current privilege, as a hypervisor does that gives the
    /// guest its own processor's hypercall instruction.
    ///
    /// # Errors
    ///
    /// [`Untranslated`]: the fault or the exit that the write would end in. Nothing is raised or written.
    pub fn overwrite_instruction(&mut self, bytes: &[u8]) -> Result<(), Untranslated> {
        self.enter();
        let linear = self.core.seg[CS].base.wrapping_add(self.core.rip);
        while self.core.write_linear(CS, linear, bytes, WRITE).is_err() {
            match core::mem::replace(&mut self.core.pending, Pending::None) {
                // The processor has decoded what lies there.
                Pending::CodeWrite(gpa) => self.core.pages.forget(gpa),
                Pending::Fault(fault) => return Err(Untranslated::Fault(fault)),
                Pending::Exit(exit) => return Err(Untranslated::Exit(exit)),
                _ => return Err(Untranslated::Again),
            }
        }
        Ok(())
    }

    /// Instructions that gave #UD because they are not implemented, by name, with their count.
    pub fn missing(&self) -> Vec<(alloc::string::String, u64)> {
        self.core
            .missing
            .iter()
            .map(|(code, n)| (alloc::format!("{code:?}"), *n))
            .collect()
    }

    /// The bus that the processor owns.
    pub fn bus_mut(&mut self) -> &mut dyn Bus {
        &mut *self.core.bus
    }
}
