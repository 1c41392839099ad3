//! Exits, as the run page tells them.

use kvm_ops::sim::{MsrRefusal, SimVcpu};
use kvm_ops::{Answer, Exit, Privacy, VcpuOps};
use kvm_ops_uapi::run::{
    Debug, FailEntry, HYPERCALL_LONG_MODE, Hypercall, InternalError, Io, MEMORY_FAULT_PRIVATE,
    MemoryFault, Mmio, MsrExit, SystemEvent, exit_reason,
};
use kvm_ops_uapi::vm::{
    HC_MAP_GPA_RANGE, HC_SCHED_YIELD, HC_VAPIC_POLL_IRQ, MAP_GPA_RANGE_ENCRYPTED, msr_exit_reason,
};
use kvm_ops_uapi::{Errno, U16, U32, U64};

use super::answer::Waits;
use super::controls::EFER_LMA;
use super::page::{PORT_DATA, Page};
use super::sev;
use crate::file::VcpuFile;
use crate::irq::At;
use crate::machine::{self, Processor};
use crate::refusal::Result;
use crate::stats::{Count, Counts};

/// `KVM_EXIT_IO_IN` and `KVM_EXIT_IO_OUT`.
const IN: u8 = 0;
const OUT: u8 = 1;
/// Results of hypercalls (`uapi/linux/kvm_para.h`), which are negative.
pub(super) const KVM_ENOSYS: i64 = 1000;
const KVM_EINVAL: i64 = 22;
const PAGE: u64 = 4096;
/// `ENOSYS` of Linux, by which the back end tells the guest that nothing is converted here.
const ENOSYS: u64 = 38;

/// What comes after an exit.
pub(super) enum Next {
    /// The guest goes on.
    Again,
    /// `KVM_RUN` ends with an exit, whose answer is waited for.
    Return(Waits),
    /// `KVM_RUN` fails, and the run page says why.
    Fail(Errno),
}

/// Tells an exit, or does what the kernel does without user space.
pub(super) fn tell(
    exit: Exit,
    file: &VcpuFile,
    page: Page<'_>,
    vcpu: &mut Processor,
) -> Result<Next> {
    let done = |reason| {
        page.set_reason(reason);
        Ok(Next::Return(Waits::Nothing))
    };
    match exit {
        Exit::IoIn { port, size, count } => {
            port_access(page, (IN, port, size, count));
            Ok(Next::Return(Waits::Port))
        }
        Exit::IoOut { port, .. } if is_taken(file, At::Port(port.into()), vcpu) => Ok(Next::Again),
        Exit::IoOut { port, size, count } => {
            page.0.write(PORT_DATA, vcpu.exit_data());
            port_access(page, (OUT, port, size, count));
            Ok(Next::Return(Waits::Nothing))
        }
        Exit::MmioRead { gpa, len } => {
            device_access(page, gpa.get(), len, None);
            Ok(Next::Return(Waits::Device))
        }
        Exit::MmioWrite { gpa, .. } if is_taken(file, At::Memory(gpa.get()), vcpu) => {
            Ok(Next::Again)
        }
        Exit::MmioWrite { gpa, len } => {
            device_access(page, gpa.get(), len, Some(vcpu.exit_data()));
            Ok(Next::Return(Waits::Nothing))
        }
        Exit::ReadMsr { index } => {
            msr_access(page, exit_reason::X86_RDMSR, index, 0, vcpu);
            Ok(Next::Return(Waits::ReadMsr))
        }
        Exit::WriteMsr { index, value } => {
            msr_access(page, exit_reason::X86_WRMSR, index, value, vcpu);
            Ok(Next::Return(Waits::WriteMsr))
        }
        Exit::Debug { rip, exception } => {
            debug_event(page, rip, exception, vcpu.exit_data());
            Ok(Next::Return(Waits::Nothing))
        }
        Exit::Hlt => done(exit_reason::HLT),
        Exit::IrqWindow => done(exit_reason::IRQ_WINDOW_OPEN),
        Exit::MapGpaRange { gpa, pages, to } => {
            sev::map_gpa_range(file, page, vcpu, (gpa.get(), pages, to))
        }
        Exit::SnpCertificates { gpa, pages } => Ok(sev::certificates(page, gpa.get(), pages)),
        Exit::SystemEvent { kind } => {
            let event = system_event(kind, vcpu.exit_data());
            page.set_exit(exit_reason::SYSTEM_EVENT, &event);
            Ok(Next::Return(Waits::Nothing))
        }
        Exit::Shutdown => {
            if file.vm.kernel().is_amd() && !sev::is_protected(vcpu) {
                // As SVM, which has no state any more to go on with. Encrypted state stays as it is.
                let mp_state = vcpu.mp_state()?;
                vcpu.vcpu_reset(true)?;
                let _ = vcpu.set_mp_state(mp_state);
            }
            done(exit_reason::SHUTDOWN)
        }
        Exit::Hypercall { nr, args } => hypercall(file, page, vcpu, nr, args),
        Exit::MemoryFault { gpa, bytes, access } => {
            let flags = match access {
                Privacy::Private => MEMORY_FAULT_PRIVATE,
                Privacy::Shared => 0,
            };
            let fault = MemoryFault {
                flags: U64::new(flags),
                gpa: U64::new(gpa.get()),
                size: U64::new(bytes),
            };
            page.set_exit(exit_reason::MEMORY_FAULT, &fault);
            Ok(Next::Fail(Errno::EFAULT))
        }
        Exit::FailEntry { reason, cpu } => {
            let fail = FailEntry {
                reason: U64::new(reason),
                cpu: U32::new(cpu),
                ..FailEntry::default()
            };
            page.set_exit(exit_reason::FAIL_ENTRY, &fail);
            Ok(Next::Return(Waits::Nothing))
        }
        Exit::InternalError { suberror } => {
            internal_error(page, suberror, vcpu.exit_data());
            Ok(Next::Return(Waits::Nothing))
        }
        // No guest of the software machine has others.
        _ => done(exit_reason::UNKNOWN),
    }
}

/// Counts an exit, also one that does not leave.
pub(super) fn count(exit: &Exit, counts: &Counts) {
    counts.add(Count::Exits);
    let kind = match exit {
        Exit::IoIn { .. } | Exit::IoOut { .. } => Count::IoExits,
        Exit::MmioRead { .. } | Exit::MmioWrite { .. } => Count::MmioExits,
        Exit::IrqWindow => Count::IrqWindowExits,
        Exit::Hlt => Count::HaltExits,
        Exit::Hypercall { .. } => Count::Hypercalls,
        _ => return,
    };
    counts.add(kind);
}

/// True if the guest's write is for an eventfd, which is signalled, or waits in the ring.
fn is_taken(file: &VcpuFile, at: At, vcpu: &mut Processor) -> bool {
    let area = &**file.vcpu.run_area();
    file.vm.irq().take_write(at, vcpu.exit_data(), area)
}

fn port_access(page: Page<'_>, (direction, port, size, count): (u8, u16, u8, u32)) {
    let io = Io {
        direction,
        size,
        port: U16::new(port),
        count: U32::new(count),
        data_offset: U64::new(PORT_DATA),
    };
    page.set_exit(exit_reason::IO, &io);
}

fn msr_access(page: Page<'_>, exit: u32, index: u32, value: u64, vcpu: &mut Processor) {
    let refusal = machine::port_mut(vcpu).and_then(SimVcpu::msr_refusal);
    let reason = match refusal {
        Some(MsrRefusal::Filtered) => msr_exit_reason::FILTER,
        Some(MsrRefusal::Unknown) | None => msr_exit_reason::UNKNOWN,
        Some(MsrRefusal::Invalid) => msr_exit_reason::INVAL,
    };
    let msr = MsrExit {
        reason: U32::new(reason as u32),
        index: U32::new(index),
        data: U64::new(value),
        ..MsrExit::default()
    };
    page.set_exit(exit, &msr);
}

fn device_access(page: Page<'_>, gpa: u64, len: u8, written: Option<&mut [u8]>) {
    let mut mmio = Mmio {
        phys_addr: U64::new(gpa),
        len: U32::new(len.into()),
        is_write: written.is_some().into(),
        ..Mmio::default()
    };
    if let Some(written) = written {
        for (to, from) in mmio.data.iter_mut().zip(written) {
            *to = *from;
        }
    }
    page.set_exit(exit_reason::MMIO, &mmio);
}

fn internal_error(page: Page<'_>, suberror: u32, data: &[u8]) {
    let mut error = InternalError {
        suberror: U32::new(suberror),
        ..InternalError::default()
    };
    let words = data.chunks_exact(8);
    error.ndata = U32::new(words.len().min(error.data.len()) as u32);
    for (to, word) in error.data.iter_mut().zip(words) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        *to = U64::new(u64::from_le_bytes(bytes));
    }
    page.set_exit(exit_reason::INTERNAL_ERROR, &error);
}

/// An exception that is the debugger's: DR6 and DR7 are the data.
fn debug_event(page: Page<'_>, pc: u64, exception: u32, data: &[u8]) {
    let (words, _) = data.as_chunks::<8>();
    let word = |n: usize| U64::new(words.get(n).map_or(0, |word| u64::from_le_bytes(*word)));
    let event = Debug {
        exception: U32::new(exception),
        pc: U64::new(pc),
        dr6: word(0),
        dr7: word(1),
        ..Debug::default()
    };
    page.set_exit(exit_reason::DEBUG, &event);
}

fn system_event(kind: u32, data: &[u8]) -> SystemEvent {
    let mut event = SystemEvent {
        kind: U32::new(kind),
        ..SystemEvent::default()
    };
    let (words, _) = data.as_chunks::<8>();
    for (to, word) in event.data.iter_mut().zip(words) {
        *to = U64::new(u64::from_ne_bytes(*word));
    }
    event.ndata = U32::new(words.len().min(event.data.len()) as u32);
    event
}

/// The attributes of KVM_HC_MAP_GPA_RANGE.
pub(super) fn attributes_of(to: Privacy) -> u64 {
    match to {
        Privacy::Private => MAP_GPA_RANGE_ENCRYPTED,
        Privacy::Shared => 0,
    }
}

/// A TD's MapGPA or an SNP guest's page state change, which the kernel tells as KVM_HC_MAP_GPA_RANGE.
pub(super) fn ask_to_map(
    file: &VcpuFile,
    page: Page<'_>,
    vcpu: &mut Processor,
    (gpa, pages, to): (u64, u64, Privacy),
) -> Result<Next> {
    if !file.vm.lock().leaves(HC_MAP_GPA_RANGE) {
        vcpu.answer(Answer::Value(ENOSYS))?;
        return Ok(Next::Again);
    }
    let call = Hypercall {
        nr: U64::new(HC_MAP_GPA_RANGE),
        args: [gpa, pages, attributes_of(to), 0, 0, 0].map(U64::new),
        flags: U64::new(HYPERCALL_LONG_MODE),
        ..Hypercall::default()
    };
    page.set_exit(exit_reason::HYPERCALL, &call);
    Ok(Next::Return(Waits::MapGpa))
}

/// A hypercall: one leaves to user space where that was asked for, and the others are refused.
pub(super) fn hypercall(
    file: &VcpuFile,
    page: Page<'_>,
    vcpu: &mut Processor,
    nr: u64,
    args: [u64; 6],
) -> Result<Next> {
    // The mode of secret registers is not known, and taken for the longest.
    let long = sev::is_protected(vcpu) || {
        let sregs = vcpu.sregs()?;
        sregs.cs.l && sregs.efer & EFER_LMA != 0
    };
    let width = if long { u64::MAX } else { u64::from(u32::MAX) };
    let (nr, args) = (nr & width, args.map(|arg| arg & width));
    let [gpa, pages, ..] = args;
    let result = match nr {
        HC_MAP_GPA_RANGE if file.vm.lock().leaves(nr) => {
            let frame = gpa / PAGE;
            let fits = frame.checked_add(pages).is_some_and(|end| end > frame);
            if gpa.is_multiple_of(PAGE) && fits {
                let flags = if long { HYPERCALL_LONG_MODE } else { 0 };
                let call = Hypercall {
                    nr: U64::new(nr),
                    args: [args[0], args[1], args[2], 0, 0, 0].map(U64::new),
                    flags: U64::new(flags),
                    ..Hypercall::default()
                };
                page.set_exit(exit_reason::HYPERCALL, &call);
                return Ok(Next::Return(Waits::Hypercall));
            }
            -KVM_EINVAL
        }
        // Features that a guest was not told of are refused only if user space enforces that.
        HC_VAPIC_POLL_IRQ | HC_SCHED_YIELD => 0,
        _ => -KVM_ENOSYS,
    };
    vcpu.answer(Answer::Value(result as u64 & width))?;
    Ok(Next::Again)
}
