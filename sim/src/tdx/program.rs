//! A guest program of the framework as one of the software TDX module.
//!
//! Private accesses are memory operations of the module, page by page: a missing page makes
//! TDH.VP.ENTER return, and the operation is executed again. Shared accesses go to the slots of the
//! VM below. Accesses that no slot backs, and actions that the host must see, are TDG.VP.VMCALLs, as
//! a Linux guest makes them in its #VE handler.

use std::sync::Arc;

use kvm_ops::guest::{Action, GuestFault, GuestProgram, MAX_ACCESS};
use kvm_ops::{Gpa, Level, PAGE_SIZE, Privacy, SharedMask, VcpuId};
use kvm_ops_guest::tdx::{Cause, Convert, Gpaw, Progress, Regs, accept_operand, leaf};
use kvm_ops_guest::{GpaRange, PageSize};
use soft_tdx_module::{Event, EventType, GuestOp, VmExit};

use super::regs::{from_guest, to_guest};
use crate::access::{Copy, Piece, first_piece};
use crate::irq::{NMI, Wake};
use crate::reported::Reported;
use crate::vm::{Home, VmInner};

const EXIT_TRIPLE_FAULT: u16 = 2;
const EXIT_EPT_VIOLATION: u16 = 48;

/// Sub-functions of TDG.VP.VMCALL for an instruction: its exit reason.
const VMCALL_HLT: u64 = 12;
const VMCALL_IO: u64 = 30;
const VMCALL_MMIO: u64 = 48;

const VE: u8 = 20;

/// A program and what it is doing.
pub(crate) struct TdProgram {
    program: Box<dyn GuestProgram>,
    vcpu: VcpuId,
    mask: SharedMask,
    gpaw: Gpaw,
    /// The way to the VM, weak at its end: the module keeps a program until its vCPU is reclaimed, and
    /// the VM keeps the machine.
    home: Arc<Home>,
    wake: Arc<Wake>,
    doing: Doing,
    buffer: Box<[u8; MAX_ACCESS]>,
}

/// The operation under way in the module, or the next outcome for the program.
enum Doing {
    Report(Reported),
    /// A memory access, done up to `done`.
    Access(Access),
    PortRead {
        port: u16,
        len: usize,
    },
    PortWrite {
        port: u16,
        len: usize,
    },
    Hypercall(Regs),
    Vmcall(Regs),
    Tdcall(Regs),
    Accept(Regs),
    /// A conversion, and the call that it asked for.
    Convert(Box<Convert>, Regs),
    Halt,
    /// #VE came: its information is fetched, so that the next one can be delivered.
    FetchVe,
    Off,
}

#[derive(Clone, Copy)]
struct Access {
    write: bool,
    gpa: Gpa,
    len: usize,
    done: usize,
    piece: Under,
}

/// The piece of an access that is under way, in bytes.
#[derive(Clone, Copy)]
enum Under {
    /// Not begun.
    Next,
    Private(usize),
    Mmio(usize),
    /// The frame is not shared: the processor leaves with an EPT violation.
    Violation,
}

impl TdProgram {
    /// `None` for a mask that no TD has.
    pub(crate) fn new(
        program: Box<dyn GuestProgram>,
        vcpu: VcpuId,
        mask: SharedMask,
        vm: &Arc<VmInner>,
        wake: Arc<Wake>,
    ) -> Option<Self> {
        let gpaw = [Gpaw::Bits48, Gpaw::Bits52].into_iter().find(|gpaw| {
            SharedMask::shared_bit(gpaw.shared_bit().trailing_zeros()) == Some(mask)
        })?;
        Some(Self {
            program,
            vcpu,
            mask,
            gpaw,
            home: vm.home(),
            wake,
            doing: Doing::Report(Reported::Start),
            buffer: Box::new([0; MAX_ACCESS]),
        })
    }

    /// Asks the program, and begins what it answers.
    fn ask(&mut self, reported: Reported) -> Doing {
        let outcome = reported.outcome(self.vcpu, self.mask, &*self.buffer);
        let fits = |gpa: Gpa, len: usize| {
            // The shared bit is the highest that an address has.
            let beyond = self.mask.bits() << 1;
            let last = gpa.checked_add(len.wrapping_sub(1) as u64);
            (1..=MAX_ACCESS).contains(&len) && last.is_some_and(|last| last.get() < beyond)
        };
        let access = |write, gpa, len| {
            Doing::Access(Access {
                write,
                gpa,
                len,
                done: 0,
                piece: Under::Next,
            })
        };
        let bad = Doing::Report(Reported::Fault(GuestFault::BadOperand));
        match self.program.step(outcome) {
            Action::Read { gpa, len } if fits(gpa, len) => access(false, gpa, len),
            Action::Write { gpa, data } if fits(gpa, data.len()) => {
                let len = data.len();
                self.buffer[..len].copy_from_slice(data);
                access(true, gpa, len)
            }
            Action::In {
                port,
                size: size @ (1 | 2 | 4),
            } => Doing::PortRead {
                port,
                len: size.into(),
            },
            Action::Out { port, data } if matches!(data.len(), 1 | 2 | 4) => {
                let len = data.len();
                self.buffer[..len].copy_from_slice(data);
                Doing::PortWrite { port, len }
            }
            Action::Read { .. } | Action::Write { .. } | Action::In { .. } | Action::Out { .. } => {
                bad
            }
            Action::Share { gpa, pages } => {
                self.convert(gpa, pages, kvm_ops_guest::Privacy::Shared)
            }
            Action::Unshare { gpa, pages } => {
                self.convert(gpa, pages, kvm_ops_guest::Privacy::Private)
            }
            Action::Accept { gpa, level } => {
                let size = match level {
                    Level::Size4K => PageSize::Size4K,
                    Level::Size2M => PageSize::Size2M,
                    _ => return bad,
                };
                match gpa.get() % size.bytes() == 0 && gpa.get() < self.mask.bits() {
                    true => Doing::Accept(Regs {
                        rax: leaf::MEM_PAGE_ACCEPT,
                        rcx: accept_operand(gpa.get(), size),
                        ..Regs::default()
                    }),
                    false => bad,
                }
            }
            // R10 of 0 says that it is none.
            Action::Hypercall { nr: 0, .. } => bad,
            Action::Hypercall {
                nr,
                args: [a, b, c, d],
            } => Doing::Hypercall(Regs {
                r10: nr,
                r14: d,
                ..Regs::vmcall(a, [b, c, 0, 0])
            }),
            Action::Tdvmcall { leaf, args } => Doing::Vmcall(Regs::vmcall(leaf, args)),
            // It answers in other registers; `Action::Tdvmcall` is for it.
            Action::Tdcall {
                leaf: leaf::VP_VMCALL,
                ..
            }
            | Action::TdcallWith {
                leaf: leaf::VP_VMCALL,
                ..
            } => bad,
            Action::Tdcall {
                leaf,
                args: [rcx, rdx, r8, r9],
            } => Doing::Tdcall(Regs {
                rax: leaf,
                rcx,
                rdx,
                r8,
                r9,
                ..Regs::default()
            }),
            Action::TdcallWith {
                leaf,
                args: [rcx, rdx, r8, r9, r10, r11, r12, r13],
            } => Doing::Tdcall(Regs {
                rax: leaf,
                rcx,
                rdx,
                r8,
                r9,
                r10,
                r11,
                r12,
                r13,
                ..Regs::default()
            }),
            Action::Halt => match self.wake.take_vector() {
                Some(vector) => Doing::Report(Reported::Interrupt(vector)),
                None => Doing::Halt,
            },
            Action::Shutdown => Doing::Off,
            _ => Doing::Report(Reported::Fault(GuestFault::NotOffered)),
        }
    }

    fn convert(&self, gpa: Gpa, pages: u64, to: kvm_ops_guest::Privacy) -> Doing {
        let convert =
            GpaRange::pages(gpa.get(), pages).and_then(|range| Convert::new(range, to, self.gpaw));
        match convert {
            Ok(convert) => next_step(Box::new(convert), None),
            Err(_) => Doing::Report(Reported::Fault(GuestFault::BadOperand)),
        }
    }

    /// Continues an access up to the first piece that needs the module or the host.
    fn access(&mut self, mut access: Access) -> Doing {
        while access.done < access.len {
            let at = Gpa::new(access.gpa.get() + access.done as u64);
            let in_page = (PAGE_SIZE - at.get() % PAGE_SIZE) as usize;
            let piece = access.done..access.len.min(access.done + in_page);
            let len = piece.len();
            if self.mask.split(at).1 == Privacy::Private {
                access.piece = Under::Private(len);
                return Doing::Access(access);
            }
            let gpa = Gpa::new(at.get() & !self.mask.bits());
            let mut copy = match access.write {
                true => Copy::ToGuest(&self.buffer[piece]),
                false => Copy::FromGuest(&mut self.buffer[piece]),
            };
            let done = match self.home.vm() {
                Some(vm) => first_piece(&vm, gpa, &mut copy),
                None => Piece::Mmio(len),
            };
            match done {
                Piece::Memory(bytes) => access.done += bytes,
                Piece::Mmio(bytes) => {
                    // 1, 2, 4 or 8.
                    access.piece = Under::Mmio(1 << bytes.ilog2());
                    return Doing::Access(access);
                }
                Piece::NotShared => {
                    access.piece = Under::Violation;
                    return Doing::Access(access);
                }
            }
        }
        Doing::Report(if access.write {
            Reported::Done
        } else {
            Reported::Data(access.len)
        })
    }

    /// The next operation of the action under way, `None` if the program must be asked.
    fn operation(&self) -> Option<GuestOp> {
        Some(match &self.doing {
            Doing::Report(_) => return None,
            Doing::Access(access) => self.access_operation(access)?,
            Doing::PortRead { port, len } => vmcall(VMCALL_IO, [*len as u64, 0, (*port).into(), 0]),
            Doing::PortWrite { port, len } => {
                let value = little_endian(&self.buffer[..*len]);
                vmcall(VMCALL_IO, [*len as u64, 1, (*port).into(), value])
            }
            Doing::Hypercall(regs)
            | Doing::Vmcall(regs)
            | Doing::Tdcall(regs)
            | Doing::Accept(regs)
            | Doing::Convert(_, regs) => tdcall(regs),
            Doing::Halt => vmcall(VMCALL_HLT, [0; 4]),
            Doing::FetchVe => tdcall(&Regs {
                rax: leaf::VP_VEINFO_GET,
                ..Regs::default()
            }),
            Doing::Off => GuestOp::Instruction(VmExit {
                reason: EXIT_TRIPLE_FAULT,
                ..VmExit::default()
            }),
        })
    }

    fn access_operation(&self, access: &Access) -> Option<GuestOp> {
        let from = access.done;
        let gpa = access.gpa.get() + from as u64;
        Some(match (access.piece, access.write) {
            (Under::Next, _) => return None,
            (Under::Private(len), true) => GuestOp::Write {
                gpa,
                data: self.buffer[from..from + len].to_vec(),
            },
            (Under::Private(len), false) => GuestOp::Read { gpa, len },
            (Under::Mmio(len), true) => {
                let value = little_endian(&self.buffer[from..from + len]);
                vmcall(VMCALL_MMIO, [len as u64, 1, gpa, value])
            }
            (Under::Mmio(len), false) => vmcall(VMCALL_MMIO, [len as u64, 0, gpa, 0]),
            (Under::Violation, write) => GuestOp::Fault(VmExit {
                reason: EXIT_EPT_VIOLATION,
                // Bits 0 and 1: a read, a write.
                qualification: if write { 2 } else { 1 },
                gpa,
                gla: gpa,
                ..VmExit::default()
            }),
        })
    }

    /// Takes the module's results for the action under way.
    fn complete(&mut self, regs: &Regs) -> Doing {
        let doing = std::mem::replace(&mut self.doing, Doing::Off);
        if let Doing::FetchVe = doing {
            return Doing::Report(Reported::Fault(GuestFault::NotAccepted(Gpa::new(regs.r9))));
        }
        let refused = |status| Doing::Report(Reported::Fault(GuestFault::Refused(status)));
        match doing {
            Doing::Convert(convert, _) => next_step(convert, Some(regs)),
            Doing::Tdcall(_) => Doing::Report(Reported::Values([
                regs.rax, regs.rcx, regs.rdx, regs.r8, regs.r9, regs.r10,
            ])),
            Doing::Accept(call) => match kvm_ops_guest::tdx::CompletionStatus(regs.rax) {
                status if status.is_success() => Doing::Report(Reported::Done),
                // Another vCPU is at the page; the module ends that.
                status if status.code() == kvm_ops_guest::tdx::CompletionStatus::OPERAND_BUSY => {
                    Doing::Accept(call)
                }
                status => refused(status.0),
            },
            // The module refused the call itself.
            _ if regs.rax != 0 => refused(regs.rax),
            Doing::Hypercall(_) => Doing::Report(Reported::Value(regs.r10)),
            Doing::Vmcall(_) => Doing::Report(Reported::Values([
                regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
            ])),
            _ if regs.r10 != 0 => refused(regs.r10),
            Doing::PortRead { len, .. } => {
                self.buffer[..len].copy_from_slice(&regs.r11.to_le_bytes()[..len]);
                Doing::Report(Reported::Data(len))
            }
            Doing::PortWrite { .. } => Doing::Report(Reported::Done),
            Doing::Halt => match self.wake.take_vector() {
                Some(vector) => Doing::Report(Reported::Interrupt(vector)),
                None => Doing::Halt,
            },
            Doing::Access(access) => {
                if let (Under::Mmio(len), false) = (access.piece, access.write) {
                    let data = &regs.r11.to_le_bytes()[..len];
                    self.buffer[access.done..access.done + len].copy_from_slice(data);
                }
                self.after_piece(access)
            }
            other => other,
        }
    }

    fn after_piece(&mut self, access: Access) -> Doing {
        let done = match access.piece {
            Under::Private(len) | Under::Mmio(len) => len,
            // The access is looked at again.
            Under::Next | Under::Violation => 0,
        };
        self.access(Access {
            done: access.done + done,
            ..access
        })
    }

    fn event(&mut self, event: Event) {
        let doing = std::mem::replace(&mut self.doing, Doing::Off);
        self.doing = match (event.kind, event.vector, doing) {
            (EventType::HardwareException, VE, _) => Doing::FetchVe,
            (EventType::Nmi, _, Doing::Halt) => Doing::Report(Reported::Interrupt(NMI)),
            // Not executed: it is issued again.
            (EventType::Nmi | EventType::Interrupt, _, doing) => doing,
            // There are no handlers: the processor shuts down.
            _ => Doing::Off,
        };
    }
}

impl soft_tdx_module::GuestProgram for TdProgram {
    fn step(&mut self, last: &soft_tdx_module::Outcome) -> GuestOp {
        use soft_tdx_module::Outcome as Last;
        match (last, &self.doing) {
            (Last::Event(event), _) => self.event(*event),
            (Last::Registers(regs), _) => self.doing = self.complete(&to_guest(regs)),
            (Last::Data(data), Doing::Access(access)) => {
                let access = *access;
                // As many as were asked for.
                let into = self.buffer[access.done..].iter_mut();
                into.zip(data).for_each(|(to, from)| *to = *from);
                self.doing = self.after_piece(access);
            }
            (Last::Done, Doing::Access(access)) => self.doing = self.after_piece(*access),
            _ => {}
        }
        loop {
            if let Some(operation) = self.operation() {
                return operation;
            }
            self.doing = match &self.doing {
                Doing::Report(reported) => self.ask(*reported),
                Doing::Access(access) => self.access(*access),
                _ => Doing::Off,
            };
            // An action that needed neither the module nor the host was an instruction all the same:
            // an interrupt may come after it.
            if let Doing::Report(_) = self.doing {
                return GuestOp::Nop;
            }
        }
    }
}

/// Asks a conversion for its next call. Linear addresses of a guest program are physical ones,
/// cached nowhere: there is nothing to flush.
fn next_step(mut convert: Box<Convert>, mut last: Option<&Regs>) -> Doing {
    loop {
        match convert.next(last.take()) {
            Progress::Flush(_) => {}
            Progress::Call(regs) => return Doing::Convert(convert, regs),
            Progress::Done => return Doing::Report(Reported::Done),
            Progress::Failed(error) => {
                return Doing::Report(Reported::Fault(GuestFault::Refused(status(&error.cause))));
            }
        }
    }
}

/// The status word that ended a conversion; of one that the guest itself gave up, the host's last.
fn status(cause: &Cause) -> u64 {
    use kvm_ops_guest::tdx::{CompletionStatus, VmcallStatus};
    match cause {
        Cause::Module(status) | Cause::Busy { status, .. } => status.0,
        Cause::Host { status, .. } => status.0,
        Cause::AlreadyAccepted { size } => CompletionStatus::PAGE_ALREADY_ACCEPTED | *size as u64,
        _ => VmcallStatus::RETRY.0,
    }
}

fn vmcall(function: u64, args: [u64; 4]) -> GuestOp {
    tdcall(&Regs::vmcall(function, args))
}

fn tdcall(regs: &Regs) -> GuestOp {
    GuestOp::Tdcall(from_guest(regs))
}

/// At most 8 bytes as a number.
fn little_endian(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}
