//! The instruction at which a vCPU stands.

use std::fmt;

use kvm_ops::{CodeSize, Result, Sregs, VcpuOps, cr0};

use crate::GuestRam;
use crate::traps::{Frame, Traps};
use crate::walk::translate;

/// The longest instruction of x86, in bytes.
const LONGEST: usize = 15;

/// The mode in which a processor decodes instructions (SDM vol. 1, 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CodeMode {
    /// Real mode.
    Real,
    /// Protected mode, or virtual-8086 mode, with a code segment of 16 bits.
    Protected16,
    /// Protected mode, or the compatibility mode of long mode, with a code segment of 32 bits.
    Protected32,
    /// Long mode with 64-bit code.
    Long,
}

impl CodeMode {
    fn of(sregs: &Sregs) -> Self {
        match sregs.code_size() {
            _ if sregs.cr0 & cr0::PE == 0 => Self::Real,
            CodeSize::Bits16 => Self::Protected16,
            CodeSize::Bits32 => Self::Protected32,
            CodeSize::Bits64 => Self::Long,
        }
    }

    /// The default size of operands: 16, 32 or 64 bits.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Real | Self::Protected16 => 16,
            Self::Protected32 => 32,
            Self::Long => 64,
        }
    }

    /// The mode in words: `real mode, 16-bit`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Real => "real mode, 16-bit",
            Self::Protected16 => "protected mode, 16-bit",
            Self::Protected32 => "protected mode, 32-bit",
            Self::Long => "long mode, 64-bit",
        }
    }
}

impl fmt::Display for CodeMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The instruction at which a vCPU stands: the next that it would run, or the one that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The selector of the code segment.
    pub cs: u16,
    /// The instruction pointer, from the start of the code segment.
    pub rip: u64,
    /// The linear address: RIP from the segment's base.
    pub linear: u64,
    /// The mode.
    pub mode: CodeMode,
    /// The bytes there: as many as the longest instruction has, and fewer where memory ends. None
    /// where the guest has mapped no memory, or memory is private.
    pub bytes: Vec<u8>,
}

impl Position {
    /// The position of a vCPU that does not run. One that is in a handler of `traps` stands where the
    /// handler was called from.
    ///
    /// # Errors
    /// As [`VcpuOps::regs`] and [`VcpuOps::sregs`], [`Error::Protected`](kvm_ops::Error::Protected)
    /// among them.
    pub(crate) fn of<V: VcpuOps>(
        vcpu: &V,
        memory: &GuestRam,
        traps: Option<&Traps>,
    ) -> Result<Self> {
        let (regs, sregs) = (vcpu.regs()?, vcpu.sregs()?);
        let frame = traps.and_then(|traps| traps.frame(&regs, &sregs, memory));
        Ok(match frame {
            Some(Frame { cs, rip, .. }) => {
                // The base of the same segment, unless the call changed it: flat, or real mode's.
                let base = if CodeMode::of(&sregs) == CodeMode::Real {
                    u64::from(cs) << 4
                } else {
                    sregs.cs.base
                };
                Self::at(cs, rip, base, &sregs, memory)
            }
            None => Self::at(sregs.cs.selector, regs.rip, sregs.cs.base, &sregs, memory),
        })
    }

    fn at(cs: u16, rip: u64, base: u64, sregs: &Sregs, memory: &GuestRam) -> Self {
        let mode = CodeMode::of(sregs);
        let linear = match mode {
            CodeMode::Long => rip,
            _ => base.wrapping_add(rip) & 0xffff_ffff,
        };
        Self {
            cs,
            rip,
            linear,
            mode,
            bytes: bytes_at(linear, sregs, memory),
        }
    }
}

/// Up to [`LONGEST`] bytes from a linear address.
fn bytes_at(linear: u64, sregs: &Sregs, memory: &GuestRam) -> Vec<u8> {
    // Byte by byte, because the next page may lie elsewhere, or nowhere.
    (0..LONGEST as u64)
        .map_while(|n| {
            let gpa = translate(memory, sregs, linear.checked_add(n)?)?;
            let mut byte = [0];
            memory.read(gpa, &mut byte).ok()?;
            Some(byte[0])
        })
        .collect()
}

/// `0000:7c00 (real mode, 16-bit): 0f 0b`, or with a linear address in 64-bit mode.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            CodeMode::Real => write!(f, "{:04x}:{:04x}", self.cs, self.rip)?,
            CodeMode::Long => write!(f, "{:#018x}", self.rip)?,
            _ => write!(f, "{:04x}:{:08x}", self.cs, self.rip)?,
        }
        write!(f, " ({})", self.mode)
    }
}
