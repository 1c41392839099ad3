//! A call as its host reads it, for hosts and for tests of guests.

use super::vmcall::{
    CPUID, FATAL_MASK, GET_QUOTE, GET_TD_VMCALL_INFO, HLT, IO, MMIO, RDMSR, REPORT_FATAL_ERROR,
    SETUP_EVENT_NOTIFY, WRMSR,
};
use super::{Gpaw, Regs, Vmcall, VmcallStatus, Width};
use crate::{GpaRange, RangeError};

const INVALID: VmcallStatus = VmcallStatus::INVALID_OPERAND;

impl Vmcall {
    /// The call in the registers that a TDG.VP.VMCALL shows: the reverse of [`Vmcall::regs`], for the
    /// host's side. MapGPA is none of these calls ([`MapGpa`](super::MapGpa)).
    ///
    /// # Errors
    /// The status with which a host refuses it: SUBFUNC_UNSUPPORTED for another sub-function, or none
    /// of the GHCI's (R10 is not 0); ALIGN_ERROR and INVALID_OPERAND for operands out of range.
    pub fn from_regs(regs: &Regs, gpaw: Gpaw) -> Result<Self, VmcallStatus> {
        if regs.r10 != 0 {
            return Err(VmcallStatus::SUBFUNC_UNSUPPORTED);
        }
        Ok(match regs.r11 {
            CPUID => Self::Cpuid {
                leaf: word(regs.r12)?,
                subleaf: word(regs.r13)?,
            },
            HLT => Self::Halt {
                interrupts_blocked: regs.r12 & 1 != 0,
            },
            IO => io(regs)?,
            RDMSR => Self::RdMsr(word(regs.r12)?),
            WRMSR => Self::WrMsr(word(regs.r12)?, regs.r13),
            MMIO => mmio(regs, gpaw)?,
            GET_TD_VMCALL_INFO => Self::VmcallInfo { leaf: regs.r12 },
            GET_QUOTE => Self::GetQuote(buffer(regs, gpaw)?),
            SETUP_EVENT_NOTIFY => Self::EventNotify {
                vector: vector(regs.r12)?,
            },
            REPORT_FATAL_ERROR => Self::FatalError {
                code: regs.r12,
                text: text(regs),
            },
            _ => return Err(VmcallStatus::SUBFUNC_UNSUPPORTED),
        })
    }
}

fn word(value: u64) -> Result<u32, VmcallStatus> {
    value.try_into().map_err(|_| INVALID)
}

fn vector(value: u64) -> Result<u8, VmcallStatus> {
    match u8::try_from(value) {
        Ok(vector) if vector >= 32 => Ok(vector),
        _ => Err(INVALID),
    }
}

/// True for a write.
fn direction(value: u64) -> Result<bool, VmcallStatus> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(INVALID),
    }
}

fn io(regs: &Regs) -> Result<Vmcall, VmcallStatus> {
    let width = Width::from_bytes(regs.r12)
        .filter(|width| *width != Width::Eight)
        .ok_or(INVALID)?;
    let port = regs.r14.try_into().map_err(|_| INVALID)?;
    Ok(match direction(regs.r13)? {
        false => Vmcall::In { port, width },
        true => Vmcall::Out {
            port,
            width,
            value: width.cut(regs.r15),
        },
    })
}

fn mmio(regs: &Regs, gpaw: Gpaw) -> Result<Vmcall, VmcallStatus> {
    let width = Width::from_bytes(regs.r12).ok_or(INVALID)?;
    let gpa = shared(regs.r14, gpaw)?;
    if gpa % 4096 + width as u64 > 4096 {
        return Err(INVALID);
    }
    Ok(match direction(regs.r13)? {
        false => Vmcall::MmioRead { gpa, width },
        true => Vmcall::MmioWrite {
            gpa,
            width,
            value: width.cut(regs.r15),
        },
    })
}

/// The address without the shared bit, which must be there.
fn shared(gpa: u64, gpaw: Gpaw) -> Result<u64, VmcallStatus> {
    let bit = gpaw.shared_bit();
    match gpa ^ bit {
        bare if bare < bit => Ok(bare),
        _ => Err(INVALID),
    }
}

fn buffer(regs: &Regs, gpaw: Gpaw) -> Result<GpaRange, VmcallStatus> {
    let start = shared(regs.r12, gpaw)?;
    let range = GpaRange::new(start, regs.r13).and_then(|range| gpaw.check(range));
    range.map_err(|error| match error {
        RangeError::Unaligned => VmcallStatus::ALIGN_ERROR,
        _ => INVALID,
    })
}

/// What of the text the call shows.
fn text(regs: &Regs) -> [u8; 64] {
    let words = [
        (14, regs.r14),
        (15, regs.r15),
        (3, regs.rbx),
        (7, regs.rdi),
        (6, regs.rsi),
        (8, regs.r8),
        (9, regs.r9),
        (2, regs.rdx),
    ];
    let mut text = [0; 64];
    for ((register, word), bytes) in words.into_iter().zip(text.chunks_exact_mut(8)) {
        if regs.rcx & FATAL_MASK & (1 << register) != 0 {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    text
}
