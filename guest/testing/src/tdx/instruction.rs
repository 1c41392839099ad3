//! Instructions that exit from a TD.

use kvm_ops_guest::tdx::Width;
use soft_tdx_module::{Regs, VmExit};

/// An instruction that exits from a TD. The module answers some of CPUID and of the MSRs itself; for
/// the rest it raises #VE.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// HLT.
    Hlt,
    /// CPUID.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// IN. There is none of eight bytes: #UD.
    In {
        /// DX.
        port: u16,
        /// The width.
        width: Width,
    },
    /// OUT. There is none of eight bytes: #UD.
    Out {
        /// DX.
        port: u16,
        /// The width.
        width: Width,
        /// EAX.
        value: u32,
    },
    /// RDMSR.
    RdMsr(u32),
    /// WRMSR.
    WrMsr(u32, u64),
    /// WBINVD.
    Wbinvd,
}

impl Instruction {
    /// The VM exit (SDM vol. 3, appendix C), and the registers that the instruction reads. `None` for an
    /// instruction that does not exist.
    pub(super) fn exit(self) -> Option<(VmExit, Regs)> {
        let exit = |reason, ilen| VmExit {
            reason,
            ilen,
            ..VmExit::default()
        };
        let regs = |rax: u64, rcx: u64, rdx: u64| Regs {
            rax,
            rcx,
            rdx,
            ..Regs::default()
        };
        Some(match self {
            Self::Hlt => (exit(12, 1), Regs::default()),
            Self::Cpuid { leaf, subleaf } => (exit(10, 2), regs(leaf.into(), subleaf.into(), 0)),
            Self::In { port, width } => (port_io(port, width, true)?, regs(0, 0, port.into())),
            Self::Out { port, width, value } => (
                port_io(port, width, false)?,
                regs(value.into(), 0, port.into()),
            ),
            Self::RdMsr(msr) => (exit(31, 2), regs(0, msr.into(), 0)),
            Self::WrMsr(msr, value) => (
                exit(32, 2),
                regs(value & 0xFFFF_FFFF, msr.into(), value >> 32),
            ),
            Self::Wbinvd => (exit(54, 2), Regs::default()),
        })
    }

    /// The values that the instruction leaves in registers.
    pub(super) fn values(self, regs: &Regs) -> [u64; 4] {
        let low = |value: u64| value & 0xFFFF_FFFF;
        match self {
            Self::Cpuid { .. } => [low(regs.rax), low(regs.rbx), low(regs.rcx), low(regs.rdx)],
            Self::RdMsr(_) => [low(regs.rdx) << 32 | low(regs.rax), 0, 0, 0],
            _ => [0; 4],
        }
    }
}

/// The exit of IN and OUT with DX; the qualification has width, direction and port.
fn port_io(port: u16, width: Width, is_in: bool) -> Option<VmExit> {
    let size = match width {
        Width::Eight => return None,
        width => width as u64 - 1,
    };
    Some(VmExit {
        reason: 30,
        qualification: size | u64::from(is_in) << 3 | u64::from(port) << 16,
        // An operand of two bytes has a prefix.
        ilen: if width == Width::Two { 2 } else { 1 },
        ..VmExit::default()
    })
}
