//! Handlers for what a guest without handlers of its own runs into.
//!
//! An image that no firmware starts finds an interrupt table all the same: each entry leads to a stub
//! that writes to a port and halts. So an undefined instruction is told as such, where an empty table
//! would send the guest through zeros, or into a triple fault.

use std::fmt;

use kvm_ops::{DescTable, Gpa, Regs, Sregs, cr0};

use crate::layout::{IDT, IVT_STUBS, STUBS};
use crate::walk::translate;
use crate::{GuestRam, MachineError};

/// The port that stubs write to. A write from elsewhere goes to the devices.
pub(crate) const PORT: u16 = 0xf6;

/// A stub: `out PORT, al; l: hlt; jmp l`. It changes no register.
const STUB: [u8; 5] = [0xe6, PORT as u8, 0xf4, 0xeb, 0xfd];
const STUB_BYTES: u64 = STUB.len() as u64;
const VECTORS: u64 = 256;
/// A stub before the first vector's, for code that ran on to here without an interrupt.
const GUARDS: u64 = 1;
const STUBS_BYTES: u64 = (GUARDS + VECTORS) * STUB_BYTES;

/// `int imm8`
const INT: u8 = 0xcd;

/// The stubs of a machine, and the width of what a processor pushes before it calls one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Traps {
    at: Gpa,
    word: u64,
}

/// The things that a stub was called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) trap: Trap,
    pub(crate) cs: u16,
    pub(crate) rip: u64,
}

/// An interrupt or exception that found no handler of the guest.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// An exception of the processor.
    Exception {
        /// The vector, 0 to 31.
        vector: u8,
        /// The error code, for a vector that has one and a mode that pushes it.
        error: Option<u32>,
        /// The linear address that the guest touched, for a page fault: CR2.
        address: Option<u64>,
    },
    /// An interrupt: the instruction INT n, or a device's.
    Interrupt(u8),
    /// No interrupt: the guest ran on to where the handlers are, through memory without code.
    Astray,
}

/// Exceptions by vector, with names (SDM vol. 3, 7.3.1).
const NAMES: [(u8, &str); 19] = [
    (0, "#DE, divide error"),
    (1, "#DB, debug exception"),
    (2, "NMI"),
    (3, "#BP, breakpoint"),
    (4, "#OF, overflow"),
    (5, "#BR, bound range exceeded"),
    (6, "#UD, invalid opcode"),
    (7, "#NM, no math coprocessor"),
    (8, "#DF, double fault"),
    (10, "#TS, invalid TSS"),
    (11, "#NP, segment not present"),
    (12, "#SS, stack segment fault"),
    (13, "#GP, general protection"),
    (14, "#PF, page fault"),
    (16, "#MF, math fault"),
    (17, "#AC, alignment check"),
    (18, "#MC, machine check"),
    (19, "#XM, SIMD floating point"),
    (21, "#CP, control protection"),
];
const PAGE_FAULT: u8 = 14;

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exception {
                vector,
                error,
                address,
            } => {
                write!(f, "exception {vector}")?;
                if let Some((_, name)) = NAMES.iter().find(|(known, _)| known == vector) {
                    write!(f, " ({name})")?;
                }
                if let Some(error) = error {
                    write!(f, " with error code {error:#x}")?;
                }
                if let Some(address) = address {
                    write!(f, " at address {address:#x}")?;
                }
                f.write_str(", without a handler")
            }
            Self::Interrupt(vector) => write!(f, "interrupt {vector:#x} without a handler"),
            Self::Astray => f.write_str("ran into memory without code"),
        }
    }
}

/// Writes real mode's table and stubs, unless an image that begins at `image` lies there, or memory
/// ends before.
pub(crate) fn real(ram: &GuestRam, image: Gpa) -> Result<Option<Traps>, MachineError> {
    let end = IVT_STUBS.get() + STUBS_BYTES;
    if image.get() < end || ram.low_end().get() < end {
        return Ok(None);
    }
    let traps = Traps {
        at: IVT_STUBS,
        word: 2,
    };
    let table: Vec<u8> = (0..VECTORS)
        .flat_map(|vector| u32::to_le_bytes(traps.stub(vector) as u32))
        .collect();
    ram.write(Gpa::new(0), &table)?;
    traps.write(ram)?;
    Ok(Some(traps))
}

/// Writes the table of 32-bit code, or of 64-bit code, and its stubs. The code segment of the gates is
/// `code`.
pub(crate) fn protected(ram: &GuestRam, long: bool, code: u16) -> Result<Traps, MachineError> {
    /// Present, for ring 0, an interrupt gate of 32 or 64 bits.
    const GATE: u16 = 0x8e00;
    let traps = Traps {
        at: STUBS,
        word: if long { 8 } else { 4 },
    };
    let table: Vec<u8> = (0..VECTORS)
        .flat_map(|vector| {
            let stub = (traps.stub(vector) as u32).to_le_bytes();
            let [kind_low, kind_high] = GATE.to_le_bytes();
            let [code_low, code_high] = code.to_le_bytes();
            let mut gate = vec![stub[0], stub[1], code_low, code_high];
            gate.extend([kind_low, kind_high, stub[2], stub[3]]);
            // Bits 63:32 of the address, and a reserved word.
            gate.resize(if long { 16 } else { 8 }, 0);
            gate
        })
        .collect();
    ram.write(IDT, &table)?;
    traps.write(ram)?;
    Ok(traps)
}

/// The register that leads to the table of [`protected`].
pub(crate) fn idt(long: bool) -> DescTable {
    let gate = if long { 16 } else { 8 };
    DescTable {
        base: IDT.get(),
        limit: (VECTORS * gate - 1) as u16,
    }
}

impl Traps {
    /// The address of a vector's stub.
    fn stub(&self, vector: u64) -> u64 {
        self.at.get() + (GUARDS + vector) * STUB_BYTES
    }

    fn write(&self, ram: &GuestRam) -> Result<(), MachineError> {
        ram.write(self.at, &STUB.repeat((GUARDS + VECTORS) as usize))
    }

    /// The call of the stub that a vCPU with these registers is in; `None` if it is in none.
    pub(crate) fn frame(&self, regs: &Regs, sregs: &Sregs, memory: &GuestRam) -> Option<Frame> {
        // Platforms stop at the instruction that writes to the port, or behind it: either is inside.
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let offset = linear.checked_sub(self.at.get())?;
        if offset >= STUBS_BYTES || self.is_foreign(sregs) {
            return None;
        }
        let Some(vector) = (offset / STUB_BYTES).checked_sub(GUARDS) else {
            return Some(Frame {
                trap: Trap::Astray,
                cs: sregs.cs.selector,
                rip: regs.rip,
            });
        };
        let vector = vector as u8;
        let stack = Stack {
            base: if self.word == 8 { 0 } else { sregs.ss.base },
            pointer: regs.rsp,
            word: self.word,
            sregs,
            memory,
        };
        let has_error = self.word != 2 && matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30);
        let first = u64::from(has_error);
        let (cs, rip) = match (stack.at(first + 1), stack.at(first)) {
            (Some(cs), Some(rip)) => (cs as u16, rip),
            // The stack lies outside of memory.
            _ => (sregs.cs.selector, regs.rip),
        };
        let trap = if vector >= 32 || (self.word == 2 && stack.is_int(cs, rip, vector)) {
            Trap::Interrupt(vector)
        } else {
            Trap::Exception {
                vector,
                error: has_error.then(|| stack.at(0)).flatten().map(|n| n as u32),
                address: (vector == PAGE_FAULT && has_error).then_some(sregs.cr2),
            }
        };
        Some(Frame { trap, cs, rip })
    }

    /// True in a mode that these stubs are not for: the guest has left the one in which it started.
    fn is_foreign(&self, sregs: &Sregs) -> bool {
        let real = sregs.cr0 & cr0::PE == 0;
        real != (self.word == 2) || sregs.cs.l != (self.word == 8)
    }
}

/// A stack, as a processor in that mode uses it.
struct Stack<'a> {
    base: u64,
    pointer: u64,
    word: u64,
    sregs: &'a Sregs,
    memory: &'a GuestRam,
}

impl Stack<'_> {
    /// The word at this place, counted from the top.
    fn at(&self, place: u64) -> Option<u64> {
        let pointer = self.pointer.wrapping_add(place * self.word);
        let pointer = match self.word {
            2 => pointer & 0xffff,
            4 => pointer & 0xffff_ffff,
            _ => pointer,
        };
        let gpa = translate(self.memory, self.sregs, self.base.wrapping_add(pointer))?;
        let mut bytes = [0; 8];
        let word = &mut bytes[..self.word as usize];
        self.memory.read(gpa, word).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// True if the instruction before that address of real mode is INT with this vector.
    fn is_int(&self, cs: u16, ip: u64, vector: u8) -> bool {
        let Some(at) = ip.checked_sub(2) else {
            return false;
        };
        let mut code = [0; 2];
        let gpa = Gpa::new((u64::from(cs) << 4) + at);
        self.memory.read(gpa, &mut code).is_ok() && code == [INT, vector]
    }
}

#[cfg(test)]
mod tests;
