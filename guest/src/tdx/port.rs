//! The TDCALL instruction as a port, and its registers.

use crate::{GpaRange, Privacy, RangeError};

/// The registers of a TDCALL, before and after it.
///
/// RSP and RBP are not among them: no leaf needs them, and TDG.VP.VMCALL never shows them to the
/// host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are the registers
pub struct Regs {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// Numbers of the guest-side leaves (TDX module ABI, "Guest-Side Interface Functions").
pub mod leaf {
    /// TDG.VP.VMCALL.
    pub const VP_VMCALL: u64 = 0;
    /// TDG.VP.INFO.
    pub const VP_INFO: u64 = 1;
    /// TDG.MR.RTMR.EXTEND.
    pub const MR_RTMR_EXTEND: u64 = 2;
    /// TDG.VP.VEINFO.GET.
    pub const VP_VEINFO_GET: u64 = 3;
    /// TDG.MR.REPORT.
    pub const MR_REPORT: u64 = 4;
    /// TDG.MEM.PAGE.ACCEPT.
    pub const MEM_PAGE_ACCEPT: u64 = 6;
    /// TDG.SERVTD.RD.
    pub const SERVTD_RD: u64 = 18;
    /// TDG.SERVTD.WR.
    pub const SERVTD_WR: u64 = 20;
}

impl Regs {
    /// RCX of a TDG.VP.VMCALL that shows the host R10 to R15 and nothing else.
    pub const R10_TO_R15: u64 = 0xFC00;

    /// TDG.VP.VMCALL of a sub-function of the GHCI (R10 is 0), with R10 to R15 shown.
    pub fn vmcall(function: u64, [r12, r13, r14, r15]: [u64; 4]) -> Self {
        Self {
            rax: leaf::VP_VMCALL,
            rcx: Self::R10_TO_R15,
            r11: function,
            r12,
            r13,
            r14,
            r15,
            ..Self::default()
        }
    }

    /// The sixteen general-purpose registers in encoding order (RAX is 0, R15 is 15); RSP and RBP are
    /// 0.
    pub const fn to_array(self) -> [u64; 16] {
        [
            self.rax, self.rcx, self.rdx, self.rbx, 0, 0, self.rsi, self.rdi, self.r8, self.r9,
            self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ]
    }

    /// The reverse of [`Regs::to_array`]; RSP and RBP are left out.
    pub const fn from_array(registers: [u64; 16]) -> Self {
        let [
            rax,
            rcx,
            rdx,
            rbx,
            _,
            _,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        ] = registers;
        Self {
            rax,
            rcx,
            rdx,
            rbx,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        }
    }
}

/// Executes TDCALL.
pub trait TdcallPort {
    /// Executes TDCALL with these registers, and leaves in them what it brought back.
    ///
    /// Registers that RCX of a TDG.VP.VMCALL does not name keep their values.
    fn tdcall(&mut self, regs: &mut Regs);
}

impl<P: TdcallPort + ?Sized> TdcallPort for &mut P {
    fn tdcall(&mut self, regs: &mut Regs) {
        (**self).tdcall(regs);
    }
}

/// The width of guest-physical addresses of a TD. The top bit is the shared bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gpaw {
    /// 48 bits: bit 47 means shared.
    Bits48,
    /// 52 bits: bit 51 means shared.
    Bits52,
}

impl Gpaw {
    /// From a number of bits, as TDG.VP.INFO gives it. `None` unless 48 or 52.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        match bits {
            48 => Some(Self::Bits48),
            52 => Some(Self::Bits52),
            _ => None,
        }
    }

    /// The shared bit.
    pub const fn shared_bit(self) -> u64 {
        match self {
            Self::Bits48 => 1 << 47,
            Self::Bits52 => 1 << 51,
        }
    }

    /// The address by which the guest reaches `gpa` as `privacy`. `gpa` comes without the bit.
    pub const fn join(self, gpa: u64, privacy: Privacy) -> u64 {
        match privacy {
            Privacy::Private => gpa,
            Privacy::Shared => gpa | self.shared_bit(),
        }
    }

    /// Fails unless every address of `range` lies below the shared bit.
    pub(crate) const fn check(self, range: GpaRange) -> Result<GpaRange, RangeError> {
        range.below(self.shared_bit())
    }
}
