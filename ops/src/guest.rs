//! Guest programs: guests written as Rust values, for platforms without a processor to run them.
//!
//! A program is driven step by step: the platform hands it the outcome of its last action, and it
//! answers with the next. It holds all its state itself, so that it can be stopped between any two
//! steps, moved with its VM, and replayed. One trait drives normal VMs, TDs and SEV guests; an
//! action that a technology does not have fails with [`GuestFault::NotOffered`].

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

use crate::{Gpa, Level, SharedMask, VcpuId};

/// The most bytes that one [`Action::Read`] or [`Action::Write`] may touch.
pub const MAX_ACCESS: usize = 4096;

/// The next action of the guest.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Reads memory, 1 to [`MAX_ACCESS`] bytes. The address carries the mask bit as the guest
    /// would use it. Answered by [`Outcome::Data`].
    Read {
        /// The address.
        gpa: Gpa,
        /// Bytes.
        len: usize,
    },
    /// Writes memory, 1 to [`MAX_ACCESS`] bytes.
    Write {
        /// The address.
        gpa: Gpa,
        /// The bytes.
        data: &'a [u8],
    },
    /// Reads an I/O port, `size` 1, 2 or 4 bytes. Answered by [`Outcome::Data`].
    In {
        /// The port.
        port: u16,
        /// Bytes.
        size: u8,
    },
    /// Writes an I/O port, 1, 2 or 4 bytes.
    Out {
        /// The port.
        port: u16,
        /// The bytes.
        data: &'a [u8],
    },
    /// Asks the host to make pages shared.
    Share {
        /// The first page, without mask bits.
        gpa: Gpa,
        /// The number of 4 KiB pages.
        pages: u64,
    },
    /// Asks the host to make pages private.
    Unshare {
        /// The first page, without mask bits.
        gpa: Gpa,
        /// The number of 4 KiB pages.
        pages: u64,
    },
    /// Takes a private page that the host gave into use: TDG.MEM.PAGE.ACCEPT, PVALIDATE.
    Accept {
        /// The page, without mask bits.
        gpa: Gpa,
        /// Its size.
        level: Level,
    },
    /// Calls the host. Answered by [`Outcome::Value`].
    Hypercall {
        /// The number of the call.
        nr: u64,
        /// Its arguments.
        args: [u64; 4],
    },
    /// TDG.VP.VMCALL of a sub-function (GHCI). Answered by [`Outcome::Values`]: R10, the status,
    /// and R11 to R15.
    Tdvmcall {
        /// The sub-function, in R11.
        leaf: u64,
        /// R12 to R15.
        args: [u64; 4],
    },
    /// Any other TDCALL. Answered by [`Outcome::Values`]: RAX, the status, then RCX, RDX, R8, R9
    /// and R10.
    Tdcall {
        /// The leaf, in RAX.
        leaf: u64,
        /// RCX, RDX, R8 and R9.
        args: [u64; 4],
    },
    /// The same for leaves that take more registers, as TDG.SERVTD.RD does. Answered as
    /// [`Tdcall`](Self::Tdcall).
    TdcallWith {
        /// The leaf, in RAX.
        leaf: u64,
        /// RCX, RDX and R8 to R13.
        args: [u64; 8],
    },
    /// VMGEXIT with a request in the GHCB MSR (SEV-ES and SNP). Answered by [`Outcome::Value`]: what
    /// the MSR holds then.
    GhcbMsr {
        /// The request.
        value: u64,
    },
    /// Waits for an interrupt.
    Halt,
    /// Is done: the vCPU shuts down.
    Shutdown,
}

/// The outcome of the last action.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// There was none: the vCPU starts.
    Start {
        /// The vCPU that runs this program.
        vcpu: VcpuId,
        /// The mask for shared and private addresses.
        mask: SharedMask,
    },
    /// It is done.
    Done,
    /// It is done; this was read.
    Data(&'a [u8]),
    /// It is done; this was answered.
    Value(u64),
    /// It is done; these registers were answered.
    Values([u64; 6]),
    /// It did not happen.
    Fault(GuestFault),
    /// An interrupt of this vector ended the [`Action::Halt`].
    Interrupt(u8),
}

/// Why an action did not happen.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestFault {
    /// The technology has no such action.
    NotOffered,
    /// The length, size or alignment is not allowed.
    BadOperand,
    /// A private page that was not accepted (#VE or #VC on the real machine).
    NotAccepted(Gpa),
    /// The host changed or replaced private memory, and the processor noticed.
    Integrity(Gpa),
    /// The host refused, with this status.
    Refused(u64),
}

impl fmt::Display for GuestFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOffered => f.write_str("not offered to this kind of guest"),
            Self::BadOperand => f.write_str("operand not allowed"),
            Self::NotAccepted(gpa) => write!(f, "page {gpa} not accepted"),
            Self::Integrity(gpa) => write!(f, "page {gpa} was tampered with"),
            Self::Refused(status) => write!(f, "refused by the host with {status:#x}"),
        }
    }
}

/// A guest as a Rust value.
///
/// ```
/// use kvm_ops_core::guest::{Action, GuestProgram, Outcome};
/// use kvm_ops_core::Gpa;
///
/// /// Increments the byte at 0x1000 until it is 3, then shuts down.
/// struct Counter(u8);
///
/// impl GuestProgram for Counter {
///     fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
///         match last {
///             Outcome::Data(&[3]) => Action::Shutdown,
///             Outcome::Data(&[n]) => {
///                 self.0 = n + 1;
///                 Action::Write { gpa: Gpa::new(0x1000), data: core::slice::from_ref(&self.0) }
///             }
///             _ => Action::Read { gpa: Gpa::new(0x1000), len: 1 },
///         }
///     }
/// }
/// ```
pub trait GuestProgram: Send {
    /// Takes the outcome of the last action and says what comes next.
    ///
    /// Called once for each action. An action that left the guest as an exit ends when the vCPU
    /// is entered again.
    fn step(&mut self, last: Outcome<'_>) -> Action<'_>;
}

impl GuestProgram for Box<dyn GuestProgram> {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        (**self).step(last)
    }
}

/// A program that is a list of actions, each done once, with a shutdown at the end.
///
/// It goes on after a fault.
/// ```
/// use kvm_ops_core::guest::Script;
/// use kvm_ops_core::Gpa;
/// let program = Script::new().write(Gpa::new(0x1000), b"hello").print(0x3f8, "hello").halt();
/// assert_eq!(program.remaining(), 7);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Script {
    actions: Vec<Owned>,
    next: usize,
}

#[derive(Clone, Debug)]
enum Owned {
    Read { gpa: Gpa, len: usize },
    Write { gpa: Gpa, data: Vec<u8> },
    In { port: u16, size: u8 },
    Out { port: u16, data: Vec<u8> },
    Share { gpa: Gpa, pages: u64 },
    Unshare { gpa: Gpa, pages: u64 },
    Accept { gpa: Gpa, level: Level },
    Hypercall { nr: u64, args: [u64; 4] },
    Tdvmcall { leaf: u64, args: [u64; 4] },
    Tdcall { leaf: u64, args: [u64; 4] },
    GhcbMsr { value: u64 },
    Halt,
}

impl Script {
    /// No actions yet.
    pub const fn new() -> Self {
        Self {
            actions: Vec::new(),
            next: 0,
        }
    }

    fn then(mut self, action: Owned) -> Self {
        self.actions.push(action);
        self
    }

    /// Reads `len` bytes.
    pub fn read(self, gpa: Gpa, len: usize) -> Self {
        self.then(Owned::Read { gpa, len })
    }

    /// Writes `data`.
    pub fn write(self, gpa: Gpa, data: &[u8]) -> Self {
        self.then(Owned::Write {
            gpa,
            data: data.into(),
        })
    }

    /// Reads a port.
    pub fn input(self, port: u16, size: u8) -> Self {
        self.then(Owned::In { port, size })
    }

    /// Writes a port.
    pub fn output(self, port: u16, data: &[u8]) -> Self {
        self.then(Owned::Out {
            port,
            data: data.into(),
        })
    }

    /// Writes each byte of `text` to a port, as a guest prints on a serial or debug port.
    pub fn print(self, port: u16, text: &str) -> Self {
        text.bytes()
            .fold(self, |script, byte| script.output(port, &[byte]))
    }

    /// Makes pages shared.
    pub fn share(self, gpa: Gpa, pages: u64) -> Self {
        self.then(Owned::Share { gpa, pages })
    }

    /// Makes pages private.
    pub fn unshare(self, gpa: Gpa, pages: u64) -> Self {
        self.then(Owned::Unshare { gpa, pages })
    }

    /// Accepts a page.
    pub fn accept(self, gpa: Gpa, level: Level) -> Self {
        self.then(Owned::Accept { gpa, level })
    }

    /// Calls the host.
    pub fn hypercall(self, nr: u64, args: [u64; 4]) -> Self {
        self.then(Owned::Hypercall { nr, args })
    }

    /// TDG.VP.VMCALL of a sub-function.
    pub fn tdvmcall(self, leaf: u64, args: [u64; 4]) -> Self {
        self.then(Owned::Tdvmcall { leaf, args })
    }

    /// Any other TDCALL.
    pub fn tdcall(self, leaf: u64, args: [u64; 4]) -> Self {
        self.then(Owned::Tdcall { leaf, args })
    }

    /// VMGEXIT with a request in the GHCB MSR.
    pub fn ghcb_msr(self, value: u64) -> Self {
        self.then(Owned::GhcbMsr { value })
    }

    /// Waits for an interrupt.
    pub fn halt(self) -> Self {
        self.then(Owned::Halt)
    }

    /// The number of actions that are left.
    pub fn remaining(&self) -> usize {
        self.actions.len() - self.next
    }
}

impl GuestProgram for Script {
    fn step(&mut self, _last: Outcome<'_>) -> Action<'_> {
        let Some(action) = self.actions.get(self.next) else {
            return Action::Shutdown;
        };
        self.next += 1;
        match action {
            Owned::Read { gpa, len } => Action::Read {
                gpa: *gpa,
                len: *len,
            },
            Owned::Write { gpa, data } => Action::Write { gpa: *gpa, data },
            Owned::In { port, size } => Action::In {
                port: *port,
                size: *size,
            },
            Owned::Out { port, data } => Action::Out { port: *port, data },
            Owned::Share { gpa, pages } => Action::Share {
                gpa: *gpa,
                pages: *pages,
            },
            Owned::Unshare { gpa, pages } => Action::Unshare {
                gpa: *gpa,
                pages: *pages,
            },
            Owned::Accept { gpa, level } => Action::Accept {
                gpa: *gpa,
                level: *level,
            },
            Owned::Hypercall { nr, args } => Action::Hypercall {
                nr: *nr,
                args: *args,
            },
            Owned::Tdvmcall { leaf, args } => Action::Tdvmcall {
                leaf: *leaf,
                args: *args,
            },
            Owned::Tdcall { leaf, args } => Action::Tdcall {
                leaf: *leaf,
                args: *args,
            },
            Owned::GhcbMsr { value } => Action::GhcbMsr { value: *value },
            Owned::Halt => Action::Halt,
        }
    }
}

/// A program made of a closure.
///
/// ```
/// use kvm_ops_core::guest::{Action, FnProgram, GuestProgram, Outcome};
/// let mut idle = FnProgram(|_: Outcome<'_>| Action::Halt);
/// assert_eq!(idle.step(Outcome::Done), Action::Halt);
/// ```
#[derive(Clone, Debug)]
pub struct FnProgram<F>(pub F);

impl<F: FnMut(Outcome<'_>) -> Action<'static> + Send> GuestProgram for FnProgram<F> {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        (self.0)(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_does_each_action_once_and_then_shuts_down() {
        let mut script = Script::new().print(0x402, "ab").read(Gpa::new(8), 2).halt();
        assert_eq!(
            script.step(Outcome::Done),
            Action::Out {
                port: 0x402,
                data: b"a"
            }
        );
        assert_eq!(
            script.step(Outcome::Done),
            Action::Out {
                port: 0x402,
                data: b"b"
            }
        );
        assert_eq!(
            script.step(Outcome::Done),
            Action::Read {
                gpa: Gpa::new(8),
                len: 2
            }
        );
        assert_eq!(script.step(Outcome::Data(&[0, 0])), Action::Halt);
        for _ in 0..3 {
            assert_eq!(script.step(Outcome::Done), Action::Shutdown);
        }
    }
}
