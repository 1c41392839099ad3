//! Sub-functions of TDG.VP.VMCALL other than MapGPA: requests to the host.

use super::{CompletionStatus, Gpaw, Regs, VmcallStatus};
use crate::GpaRange;
use core::fmt;

/// The width of an I/O or MMIO access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Width {
    /// A byte.
    One = 1,
    /// Two bytes.
    Two = 2,
    /// Four bytes.
    Four = 4,
    /// Eight bytes; MMIO only.
    Eight = 8,
}

impl Width {
    /// From a number of bytes. `None` unless 1, 2, 4 or 8.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            1 => Some(Self::One),
            2 => Some(Self::Two),
            4 => Some(Self::Four),
            8 => Some(Self::Eight),
            _ => None,
        }
    }

    /// `value` cut to so many bytes. A host's answer is cut, so that it cannot set more of a
    /// register than the access is wide.
    pub const fn cut(self, value: u64) -> u64 {
        match self {
            Self::Eight => value,
            narrow => value & ((1 << (8 * narrow as u32)) - 1),
        }
    }
}

/// A TD's request to its host (GHCI, "TDG.VP.VMCALL Interface").
///
/// Everything that comes back is the host's word. CPUID leaves that matter to security come from
/// the TDX module, which answers them without the host; MSRs read here are not the processor's.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmcall {
    /// CPUID. Answered by EAX, EBX, ECX, EDX.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// HLT: wait for an interrupt.
    Halt {
        /// Set if the guest blocks interrupts (RFLAGS.IF is 0), so that none can wake it.
        interrupts_blocked: bool,
    },
    /// IN. Answered by the value.
    In {
        /// The port.
        port: u16,
        /// Up to four bytes.
        width: Width,
    },
    /// OUT.
    Out {
        /// The port.
        port: u16,
        /// Up to four bytes.
        width: Width,
        /// The value.
        value: u64,
    },
    /// RDMSR. Answered by the value.
    RdMsr(u32),
    /// WRMSR.
    WrMsr(u32, u64),
    /// Reads device memory. Answered by the value.
    MmioRead {
        /// The address, without the shared bit. The access does not cross a page.
        gpa: u64,
        /// The size.
        width: Width,
    },
    /// Writes device memory.
    MmioWrite {
        /// The address, without the shared bit. The access does not cross a page.
        gpa: u64,
        /// The size.
        width: Width,
        /// The value.
        value: u64,
    },
    /// GetTdVmCallInfo: which sub-functions there are. Answered by R11 to R14.
    VmcallInfo {
        /// 0 for the base set, 1 for the optional ones.
        leaf: u64,
    },
    /// GetQuote: asks for a quote of the TDREPORT in a **shared** buffer. The answer comes into the
    /// buffer later; its header tells.
    GetQuote(GpaRange),
    /// SetupEventNotifyInterrupt: the vector that tells of events such as a quote that is ready.
    EventNotify {
        /// 32 to 255.
        vector: u8,
    },
    /// ReportFatalError: the TD cannot go on. The host may enter it again nevertheless.
    FatalError {
        /// Why.
        code: u64,
        /// A text in ASCII, padded with zeros. The host reads it: no secrets.
        text: [u8; 64],
    },
}

pub(super) const CPUID: u64 = 10;
pub(super) const HLT: u64 = 12;
pub(super) const IO: u64 = 30;
pub(super) const RDMSR: u64 = 31;
pub(super) const WRMSR: u64 = 32;
pub(super) const MMIO: u64 = 48;
pub(super) const GET_TD_VMCALL_INFO: u64 = 0x1_0000;
pub(super) const GET_QUOTE: u64 = 0x1_0002;
pub(super) const REPORT_FATAL_ERROR: u64 = 0x1_0003;
pub(super) const SETUP_EVENT_NOTIFY: u64 = 0x1_0004;

/// RDX, RBX, RSI, RDI, R8, R9 and R10 to R15: what ReportFatalError shows.
pub(super) const FATAL_MASK: u64 = 0xFFCC;

impl Vmcall {
    /// The registers of the call.
    ///
    /// # Errors
    /// [`CallError::Operand`]: an access of eight bytes to a port, device memory across a page or
    /// above the shared bit, a vector below 32. The host would have to refuse it; a host that did
    /// not would do something else than what was meant.
    pub fn regs(&self, gpaw: Gpaw) -> Result<Regs, CallError> {
        let regs = match *self {
            Self::Cpuid { leaf, subleaf } => {
                Regs::vmcall(CPUID, [leaf.into(), subleaf.into(), 0, 0])
            }
            Self::Halt { interrupts_blocked } => {
                Regs::vmcall(HLT, [interrupts_blocked.into(), 0, 0, 0])
            }
            Self::In { port, width } => Regs::vmcall(IO, [io(width)?, 0, port.into(), 0]),
            Self::Out { port, width, value } => {
                Regs::vmcall(IO, [io(width)?, 1, port.into(), width.cut(value)])
            }
            Self::RdMsr(msr) => Regs::vmcall(RDMSR, [msr.into(), 0, 0, 0]),
            Self::WrMsr(msr, value) => Regs::vmcall(WRMSR, [msr.into(), value, 0, 0]),
            Self::MmioRead { gpa, width } => {
                Regs::vmcall(MMIO, [width as u64, 0, device(gpa, width, gpaw)?, 0])
            }
            Self::MmioWrite { gpa, width, value } => {
                let gpa = device(gpa, width, gpaw)?;
                Regs::vmcall(MMIO, [width as u64, 1, gpa, width.cut(value)])
            }
            Self::VmcallInfo { leaf } => Regs::vmcall(GET_TD_VMCALL_INFO, [leaf, 0, 0, 0]),
            Self::GetQuote(buffer) => {
                let buffer = gpaw.check(buffer).map_err(|_| CallError::Operand)?;
                let start = buffer.start() | gpaw.shared_bit();
                Regs::vmcall(GET_QUOTE, [start, buffer.bytes(), 0, 0])
            }
            Self::EventNotify { vector } if vector < 32 => return Err(CallError::Operand),
            Self::EventNotify { vector } => {
                Regs::vmcall(SETUP_EVENT_NOTIFY, [vector.into(), 0, 0, 0])
            }
            Self::FatalError { code, text } => fatal(code, &text),
        };
        Ok(regs)
    }

    /// The results of the call: the values named at the variant, the rest 0.
    ///
    /// # Errors
    /// The module or the host refused.
    pub fn answer(&self, regs: &Regs) -> Result<[u64; 4], CallError> {
        let module = CompletionStatus(regs.rax);
        if !module.is_success() {
            return Err(CallError::Module(module));
        }
        let host = VmcallStatus(regs.r10);
        if host != VmcallStatus::SUCCESS {
            return Err(CallError::Host(host));
        }
        let low = |value| Width::Four.cut(value);
        Ok(match *self {
            Self::Cpuid { .. } => [low(regs.r12), low(regs.r13), low(regs.r14), low(regs.r15)],
            Self::In { width, .. } | Self::MmioRead { width, .. } => [width.cut(regs.r11), 0, 0, 0],
            Self::RdMsr(_) => [regs.r11, 0, 0, 0],
            Self::VmcallInfo { .. } => [regs.r11, regs.r12, regs.r13, regs.r14],
            _ => [0; 4],
        })
    }
}

fn io(width: Width) -> Result<u64, CallError> {
    match width {
        Width::Eight => Err(CallError::Operand),
        width => Ok(width as u64),
    }
}

fn device(gpa: u64, width: Width, gpaw: Gpaw) -> Result<u64, CallError> {
    if gpa >= gpaw.shared_bit() || gpa % 4096 + width as u64 > 4096 {
        return Err(CallError::Operand);
    }
    Ok(gpa | gpaw.shared_bit())
}

fn fatal(code: u64, text: &[u8; 64]) -> Regs {
    let word = |n: usize| {
        let bytes = text.iter().skip(8 * n).take(8);
        bytes
            .rev()
            .fold(0, |word, byte| word << 8 | u64::from(*byte))
    };
    // In the order in which Linux guests put it and VMMs print it.
    Regs {
        rcx: FATAL_MASK,
        r14: word(0),
        r15: word(1),
        rbx: word(2),
        rdi: word(3),
        rsi: word(4),
        r8: word(5),
        r9: word(6),
        rdx: word(7),
        ..Regs::vmcall(REPORT_FATAL_ERROR, [code, 0, 0, 0])
    }
}

/// Why a call did not do what was asked.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// It was not made: an operand is out of range.
    Operand,
    /// The TDX module refused.
    Module(CompletionStatus),
    /// The host refused.
    Host(VmcallStatus),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operand => f.write_str("operand out of range"),
            Self::Module(status) => write!(f, "the tdx module answered {status}"),
            Self::Host(status) => write!(f, "the host answered {status}"),
        }
    }
}

impl core::error::Error for CallError {}
