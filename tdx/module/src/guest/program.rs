//! Guest programs: Rust values that run inside TDH.VP.ENTER, an instruction at a time.

use super::VmExit;
use crate::leaf::GuestLeaf;
use crate::regs::Regs;
use crate::status::Status;
use crate::vcpu::Event;
use std::collections::VecDeque;

/// One instruction of a guest program.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum GuestOp {
    /// Reads guest-physical memory, private or (with the shared bit) shared. At most 2 MiB.
    Read {
        /// Guest-physical address.
        gpa: u64,
        /// Number of bytes.
        len: usize,
    },
    /// Writes guest-physical memory.
    Write {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes to write.
        data: Vec<u8>,
    },
    /// TDCALL with these registers.
    Tdcall(Regs),
    /// An instruction that exits, by its exit reason: CPUID, HLT, I/O, MSR access, ...
    Instruction(VmExit),
    /// An exit after which the program chooses its next operation anew: unlike an instruction, it is not repeated
    /// automatically. For a program that walks the shared EPT of its host, whose violations only it knows of.
    Fault(VmExit),
    /// An instruction without effect outside the processor.
    Nop,
}

impl GuestOp {
    /// TDG.MEM.PAGE.ACCEPT of the page at `gpa`; level 0 is 4 KiB, 1 is 2 MiB.
    #[must_use]
    pub fn accept(gpa: u64, level: u8) -> Self {
        GuestOp::Tdcall(Regs {
            rcx: gpa | u64::from(level),
            ..Regs::leaf(GuestLeaf::MemPageAccept.number())
        })
    }

    /// TDG.VP.VMCALL of a sub-function in R11 with arguments in R12 to R15, R10 being 0.
    #[must_use]
    pub fn vmcall(function: u64, arguments: [u64; 4]) -> Self {
        const R10_TO_R15: u64 = 0xFC00;
        let [r12, r13, r14, r15] = arguments;
        GuestOp::Tdcall(Regs {
            rcx: R10_TO_R15,
            r11: function,
            r12,
            r13,
            r14,
            r15,
            ..Regs::leaf(GuestLeaf::VpVmcall.number())
        })
    }

    /// TDG.VP.ENTER of L2 VM `vm` (1 to 3) with its registers in the page at `state`. It completes when the VM exits
    /// to L1; RAX of its outcome has the exit reason.
    #[must_use]
    pub fn enter_l2(vm: u8, state: u64) -> Self {
        const VM_SHIFT: u32 = 52;
        GuestOp::tdcall(GuestLeaf::VpEnter, u64::from(vm) << VM_SHIFT, state)
    }

    /// HLT, which a TD takes as #VE, and an L2 VM's L1 as an exit.
    #[must_use]
    pub fn hlt() -> Self {
        GuestOp::Instruction(VmExit {
            reason: 12,
            ilen: 1,
            ..VmExit::default()
        })
    }

    /// Any other TDCALL without operands beyond RCX and RDX.
    #[must_use]
    pub fn tdcall(leaf: GuestLeaf, rcx: u64, rdx: u64) -> Self {
        GuestOp::Tdcall(Regs {
            rcx,
            rdx,
            ..Regs::leaf(leaf.number())
        })
    }
}

/// Result of the program's last operation.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// Nothing yet: the registers of the first entry.
    Start(Regs),
    /// Done, without output.
    Done,
    /// The bytes read.
    Data(Vec<u8>),
    /// The registers after a TDCALL; RAX is its status.
    Registers(Regs),
    /// An exception or interrupt was delivered. The operation was **not** executed; the program may issue it again.
    /// An event never replaces a completion: the program gets the completion first, and the event before the
    /// operation with which it answers the completion.
    Event(Event),
}

impl Outcome {
    /// Status of a completed TDCALL.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        match self {
            Outcome::Registers(r) => Some(Status(r.rax)),
            _ => None,
        }
    }
}

/// A program a vCPU runs.
///
/// The platform asks for one operation at a time and executes it as hardware would: an access to a page that
/// is not mapped makes TDH.VP.ENTER return to the host with an EPT violation, and the next TDH.VP.ENTER
/// executes the same operation again without asking. The program sees completed operations and the events
/// delivered to it.
pub trait GuestProgram: Send {
    /// Returns the next operation, given the outcome of the last.
    fn step(&mut self, last: &Outcome) -> GuestOp;
}

impl<F: FnMut(&Outcome) -> GuestOp + Send> GuestProgram for F {
    fn step(&mut self, last: &Outcome) -> GuestOp {
        self(last)
    }
}

/// A program that runs a list of operations, then asks the host to halt it, for ever. An event delivered to
/// it makes it repeat the operation.
#[derive(Clone, Debug, Default)]
pub struct Script {
    ops: VecDeque<GuestOp>,
    current: Option<GuestOp>,
}

impl Script {
    /// A program of these operations.
    pub fn new(ops: impl IntoIterator<Item = GuestOp>) -> Self {
        Script {
            ops: ops.into_iter().collect(),
            current: None,
        }
    }
}

impl GuestProgram for Script {
    fn step(&mut self, last: &Outcome) -> GuestOp {
        const HLT: u64 = 12;
        if !matches!(last, Outcome::Event(_)) || self.current.is_none() {
            self.current = self.ops.pop_front();
        }
        self.current
            .clone()
            .unwrap_or_else(|| GuestOp::vmcall(HLT, [0; 4]))
    }
}
