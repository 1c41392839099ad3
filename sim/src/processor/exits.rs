//! Exits of a processor: what each is to the embedder, and how its answer gets back.

use kvm_ops::guest::MAX_ACCESS;
use kvm_ops::{Exit, Gpa, Vendor};
use kvm_ops_cpu::{Cause, Event, Exception, Exit as CpuExit, PortAccess, Stopped};

use crate::processor::mmio::Access;
use crate::processor::{Next, Processor, Resume};

/// `KVM_INTERNAL_ERROR_EMULATION` and `KVM_INTERNAL_ERROR_DELIVERY_EV`.
const EMULATION: u32 = 1;
const DELIVERY_EVENT: u32 = 3;

/// Linux's answer to a hypercall from user mode (`KVM_EPERM`, `uapi/linux/kvm_para.h`).
const KVM_EPERM: u64 = 1;

/// General registers by their numbers.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSI: usize = 6;
const RDI: usize = 7;
/// #UD.
const UD: u8 = 6;

fn leave(exit: Exit) -> Next {
    Next::Leave(exit, Vec::new())
}

/// An event could not be delivered because its table or stack is no memory.
pub(crate) fn delivery_failed() -> Next {
    leave(Exit::InternalError {
        suberror: DELIVERY_EVENT,
    })
}

impl Processor {
    /// What comes after the processor stopped.
    pub(crate) fn stopped(&mut self, stopped: Stopped) -> Next {
        let exit = match stopped {
            Stopped::Exit(exit) => exit,
            Stopped::Budget | Stopped::Paused => {
                self.shared.mmio().end();
                return Next::Again;
            }
            Stopped::Halted => {
                self.shared.mmio().end();
                // An interrupt that came before the shadow of STI ended is injected now, and the end of
                // one may bring the next.
                let injected = self.interrupt_line() && self.cpu.interruptible();
                return match injected || self.shared.any_ended() {
                    true => Next::Again,
                    false => Next::Sleep(self.cpu.wakes_at()),
                };
            }
            Stopped::WaitsForStart => return Next::Sleep(None),
        };
        let access = {
            let progress = self.progress();
            let mut mmio = self.shared.mmio();
            let access = mmio.leave(progress);
            if access.is_none() {
                mmio.end();
            }
            access
        };
        match (exit.cause, access) {
            (Cause::Violation { .. }, Some(access)) if exit.vectoring.is_none() => {
                self.device(access)
            }
            (Cause::Violation { .. }, _) => {
                self.shared.mmio().end();
                match exit.vectoring {
                    Some(_) => delivery_failed(),
                    None => leave(Exit::InternalError {
                        suberror: EMULATION,
                    }),
                }
            }
            (Cause::Io(io), _) => self.port(exit, io),
            (Cause::Hlt, _) => {
                self.cpu.skip(&exit);
                leave(Exit::Hlt)
            }
            (Cause::InterruptWindow, _) => self.window_open(),
            (Cause::Vmcall | Cause::Vmmcall, _) => self.call(exit),
            (Cause::TripleFault, _) => {
                tracing::debug!(
                    vcpu = self.id.0,
                    rip = format_args!("{:#x}", self.cpu.rip()),
                    "triple fault"
                );
                leave(Exit::Shutdown)
            }
            (cause, _) => {
                tracing::debug!(vcpu = self.id.0, ?cause, "not emulated");
                leave(Exit::InternalError {
                    suberror: EMULATION,
                })
            }
        }
    }

    fn device(&mut self, mut access: Access) -> Next {
        if self
            .vm
            .chips()
            .is_some_and(|mut chips| chips.device(&mut access))
        {
            self.shared.mmio().answer(access);
            self.midway = true;
            return Next::Again;
        }
        let (gpa, len) = (Gpa::new(access.gpa), access.len);
        let data = access.data[..usize::from(len)].to_vec();
        self.resume = Resume::Device(access);
        match access.write {
            true => Next::Leave(Exit::MmioWrite { gpa, len }, data),
            false => Next::Leave(Exit::MmioRead { gpa, len }, data),
        }
    }

    fn port(&mut self, exit: CpuExit, io: PortAccess) -> Next {
        let PortAccess {
            port, size, value, ..
        } = io;
        if let Some(value) = self.chip_port(&io) {
            let _ = self.cpu.complete_io(&exit, value);
            self.shared.mmio().end();
            return Next::Again;
        }
        self.resume = Resume::Port(exit);
        let count = 1;
        let data = value.to_le_bytes()[..usize::from(size)].to_vec();
        match io.input {
            true => Next::Leave(Exit::IoIn { port, size, count }, vec![0; size.into()]),
            false => Next::Leave(Exit::IoOut { port, size, count }, data),
        }
    }

    /// Does an access to a port of the platform's chips; the value that is read, or 0.
    fn chip_port(&mut self, io: &PortAccess) -> Option<u32> {
        let now = self.cpu.clock();
        let mut chips = self.vm.chips()?;
        match io.input {
            true => chips.port_in(io.port, io.size, now),
            false => chips.port_out(io.port, io.size, io.value, now).then_some(0),
        }
    }

    /// A hypercall, by KVM's convention.
    fn call(&mut self, exit: CpuExit) -> Next {
        let own = match self.vm.machine.vendor {
            Vendor::Amd => Cause::Vmmcall,
            _ => Cause::Vmcall,
        };
        if exit.cause != own {
            let ud = Event::exception(Exception::plain(UD));
            return self.deliver(ud).unwrap_or(Next::Again);
        }
        if self.cpu.cpl() != 0 {
            self.cpu.set_gpr(RAX, KVM_EPERM.wrapping_neg());
            self.cpu.skip(&exit);
            return Next::Again;
        }
        self.resume = Resume::Call(exit);
        let [a, b, c, d] = [RBX, RCX, RDX, RSI].map(|n| self.cpu.gpr(n));
        leave(Exit::Hypercall {
            nr: self.cpu.gpr(RAX),
            args: [a, b, c, d, 0, 0],
        })
    }

    /// Hands the answer to the last exit to the guest.
    pub(crate) fn finish_exit(&mut self, buffer: &[u8; MAX_ACCESS], ret: u64) {
        let first = |len: u8| {
            let mut bytes = [0; 8];
            let len = usize::from(len);
            bytes[..len].copy_from_slice(&buffer[..len]);
            bytes
        };
        match std::mem::replace(&mut self.resume, Resume::Nothing) {
            Resume::Nothing => {}
            Resume::Port(exit) => {
                let Cause::Io(io) = exit.cause else {
                    return;
                };
                let value = u64::from_le_bytes(first(io.size)) as u32;
                let vm = std::sync::Arc::clone(&self.vm);
                let _turn = vm.turns.take();
                if self.cpu.complete_io(&exit, value).is_err() {
                    self.port = Some((exit, value));
                }
                self.shared.mmio().end();
            }
            Resume::Device(access) => {
                let data = match access.write {
                    true => access.data,
                    false => first(access.len),
                };
                self.shared.mmio().answer(Access { data, ..access });
                self.midway = true;
            }
            Resume::Call(exit) => {
                self.cpu.set_gpr(RAX, ret);
                self.cpu.skip(&exit);
            }
        }
    }

    /// Completes an access to ports that writes to memory of a device.
    pub(crate) fn complete_port(&mut self, exit: CpuExit, value: u32) -> Next {
        self.shared.mmio().begin();
        if self.cpu.complete_io(&exit, value).is_err() {
            let progress = self.progress();
            let wanted = self.shared.mmio().leave(progress);
            if let Some(access) = wanted {
                self.port = Some((exit, value));
                return self.device(access);
            }
            // The operand can not be written any more: the instruction faults when it is done again.
        }
        self.midway = false;
        self.shared.mmio().end();
        Next::Again
    }

    /// The registers that tell one element of a repeated string instruction from the next.
    fn progress(&self) -> [u64; 4] {
        let [rcx, rsi, rdi] = [RCX, RSI, RDI].map(|n| self.cpu.gpr(n));
        [self.cpu.rip(), rcx, rsi, rdi]
    }

    /// Before registers are loaded: a port access is completed, an instruction under way is given up.
    pub(crate) fn settle(&mut self, buffer: &[u8; MAX_ACCESS], ret: u64) {
        match self.resume {
            Resume::Device(_) => self.resume = Resume::Nothing,
            _ => self.finish_exit(buffer, ret),
        }
        self.midway = false;
        self.port = None;
        self.shared.mmio().end();
    }
}
