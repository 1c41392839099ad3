//! Exits of a processor: what each is to the embedder, and how its answer gets back.

use std::sync::atomic::Ordering;

use kvm_ops::guest::MAX_ACCESS;
use kvm_ops::{Exit, Gfn, Gpa, PAGE_SIZE, Vendor};
use kvm_ops_cpu::{Cause, Event, Exception, Exit as CpuExit, PortAccess, Stopped, Untranslated};

use crate::processor::mmio::Access;
use crate::processor::{Next, Port, Processor, Resume, state};

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
/// RFLAGS.DF.
const DF: u64 = 1 << 10;
/// Bytes that a repeated INS reads in one exit at the most, as on KVM.
const BATCH: u64 = 1024;

fn leave(exit: Exit) -> Next {
    Next::Leave(exit, Vec::new())
}

/// An event could not be delivered because its table or stack is no memory. The data is what KVM tells
/// of the exit in VMX's encoding: the event, the reason, its qualification, the address, the processor.
pub(crate) fn delivery_failed(exit: &CpuExit) -> Next {
    let vmx = exit.vmx();
    let words = [
        vmx.map_or(0, |vmx| vmx.vectoring.into()),
        vmx.map_or(0, |vmx| vmx.reason.into()),
        vmx.map_or(0, |vmx| vmx.qualification),
        exit.physical.unwrap_or(0),
        0,
    ];
    let exit = Exit::InternalError {
        suberror: DELIVERY_EVENT,
    };
    Next::Leave(exit, words.into_iter().flat_map(u64::to_le_bytes).collect())
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
            Stopped::Alone => return Next::Alone,
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
        if access.is_none() && self.is_sev_exit(&exit) {
            return Next::Outside(exit);
        }
        match (exit.cause, access) {
            (Cause::Violation { .. }, access) => self.violation(&exit, access),
            (Cause::Io(io), _) => self.port(exit, io),
            (Cause::Hlt, _) => {
                self.cpu.skip(&exit);
                leave(Exit::Hlt)
            }
            (Cause::InterruptWindow, _) => self.window_open(),
            (Cause::Vmcall | Cause::Vmmcall, _) => self.call(exit),
            (Cause::Rdmsr | Cause::Wrmsr, _) => self.msr_access(exit),
            (Cause::Exception(event), _) => self.for_debugger(event),
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

    /// An exception that is the debugger's, with what DR6 would be, as VMX tells it, and DR7.
    fn for_debugger(&self, event: Event) -> Next {
        /// DR6 without events (SDM vol. 3, 18.2.3).
        const NOTHING: u64 = 0xffff_0ff0;
        let registers = self.cpu.registers();
        let own = registers.dr7;
        let dr7 = self.cpu.debugger().breakpoints.map_or(own, |(_, dr7)| dr7);
        let words = [NOTHING | event.address.unwrap_or(0), dr7];
        let exit = Exit::Debug {
            rip: state::linear_rip(&registers),
            exception: event.vector.into(),
        };
        Next::Leave(exit, words.into_iter().flat_map(u64::to_le_bytes).collect())
    }

    fn violation(&mut self, exit: &CpuExit, access: Option<Access>) -> Next {
        if exit.vectoring.is_some() {
            self.shared.mmio().end();
            return delivery_failed(exit);
        }
        if let Some(fault) = exit.physical.and_then(|gpa| self.missing(gpa)) {
            return leave(fault);
        }
        // Neither code nor paging structures are in devices.
        let walk = matches!(exit.cause, Cause::Violation { walk: true, .. });
        match access {
            Some(access) if !walk => self.device(access),
            _ => {
                self.shared.mmio().end();
                leave(Exit::InternalError {
                    suberror: EMULATION,
                })
            }
        }
    }

    fn device(&mut self, mut access: Access) -> Next {
        if self.own_device(&mut access) {
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

    /// Does an access to the local APIC, which the processor did not know by an address with the C-bit, or to one
    /// of the platform's chips.
    pub(crate) fn own_device(&mut self, access: &mut Access) -> bool {
        const OFFSET: u64 = PAGE_SIZE - 1;
        let (offset, len) = ((access.gpa & OFFSET) as usize, usize::from(access.len));
        if self.cpu.apic_page() == Some(access.gpa & !OFFSET) {
            match access.write {
                true => self.cpu.write_apic_page(offset, &access.data[..len]),
                false => self.cpu.read_apic_page(offset, &mut access.data[..len]),
            }
            return true;
        }
        let vm = std::sync::Arc::clone(&self.vm);
        vm.chips().is_some_and(|mut chips| chips.device(access))
    }

    fn port(&mut self, exit: CpuExit, io: PortAccess) -> Next {
        let PortAccess {
            port, size, value, ..
        } = io;
        if let Some(value) = self.chip_port(&io) {
            let _ = self.in_memory(|cpu| cpu.complete_io(&exit, value));
            self.shared.mmio().end();
            return Next::Again;
        }
        let count = if io.input { self.batch(&io) } else { 1 };
        self.resume = Resume::Port(exit, count);
        if io.input {
            let data = vec![0; usize::from(size) * count as usize];
            return Next::Leave(Exit::IoIn { port, size, count }, data);
        }
        let data = value.to_le_bytes()[..usize::from(size)].to_vec();
        Next::Leave(Exit::IoOut { port, size, count }, data)
    }

    /// The items of a repeated INS that leave as one exit: those in the page, and not too many.
    fn batch(&self, io: &PortAccess) -> u32 {
        if !io.string || !io.repeat {
            return 1;
        }
        let mask = u64::MAX >> (64 - 8 * u32::from(io.address_size));
        let offset = self.cpu.gpr(RDI) & mask & (PAGE_SIZE - 1);
        let down = self.cpu.rflags() & DF != 0;
        let bytes = if down { offset } else { PAGE_SIZE - offset };
        let items = (bytes.min(BATCH) / u64::from(io.size)).max(1);
        items.min(self.cpu.gpr(RCX) & mask) as u32
    }

    /// Completes a port access with the items of its answer.
    fn finish_port(&mut self, exit: CpuExit, data: &[u8], count: u32) {
        let Cause::Io(io) = exit.cause else {
            return;
        };
        let items = data.chunks_exact(io.size.into()).take(count as usize);
        let items = items.map(|item| {
            let mut value = [0; 4];
            value[..item.len()].copy_from_slice(item);
            u32::from_le_bytes(value)
        });
        let items = items.collect();
        let vm = std::sync::Arc::clone(&self.vm);
        let _turn = vm.turns.take_to_execute();
        self.port = self.put_items(Port { exit, items });
        self.shared.mmio().end();
    }

    /// Does an access to a port of the platform's chips; the value that is read, or 0.
    pub(crate) fn chip_port(&mut self, io: &PortAccess) -> Option<u32> {
        if let Some(now) = self.vm.turns.host_clock() {
            self.cpu.advance_to(now);
        }
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
            let fix = self.hypercall_fix.as_ref();
            return match fix.is_some_and(|fix| fix.load(Ordering::Relaxed)) {
                true => self.fix_hypercall(own),
                false => self.take(Exception::plain(UD)),
            };
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

    /// Puts the own hypercall instruction where the guest has another one, and lets it execute that.
    fn fix_hypercall(&mut self, own: Cause) -> Next {
        let last = match own {
            Cause::Vmmcall => 0xd9,
            _ => 0xc1,
        };
        match self.in_memory(|cpu| cpu.overwrite_instruction(&[0x0f, 0x01, last])) {
            Ok(()) | Err(Untranslated::Again) => Next::Again,
            Err(Untranslated::Fault(fault)) => self.take(fault),
            Err(Untranslated::Exit(_)) => leave(Exit::InternalError {
                suberror: EMULATION,
            }),
        }
    }

    /// Lets the guest take an exception.
    fn take(&mut self, exception: Exception) -> Next {
        let event = Event::exception(exception);
        self.deliver(event).unwrap_or(Next::Again)
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
            Resume::Port(exit, count) => self.finish_port(exit, buffer, count),
            Resume::Msr(wait) => self.finish_msr(wait, ret),
            Resume::Sev(pending) => self.finish_sev(pending, buffer, ret),
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

    /// Completes an access to ports whose items go to memory of a device, or to memory that is missing.
    pub(super) fn complete_port(&mut self, port: Port) -> Next {
        self.shared.mmio().begin();
        if let Some(port) = self.put_items(port) {
            let progress = self.progress();
            let wanted = self.shared.mmio().leave(progress);
            if let Some(access) = wanted {
                self.port = Some(port);
                return match self.missing(access.gpa) {
                    Some(fault) => leave(fault),
                    None => self.device(access),
                };
            }
            // The operand can not be written any more: the instruction faults when it is done again.
        }
        self.midway = false;
        self.shared.mmio().end();
        Next::Again
    }

    /// Hands the items of an access to ports to the guest. Those that the registers have no place for any
    /// more, since they were changed, are dropped. Returns what is left where an item can not be written.
    fn put_items(&mut self, mut port: Port) -> Option<Port> {
        let rip = self.cpu.rip();
        while let Some(item) = port.items.front() {
            let done = self.in_memory(|cpu| cpu.complete_io(&port.exit, *item));
            if done.is_err() {
                return Some(port);
            }
            port.items.pop_front();
            self.shared.mmio().end();
            if self.cpu.rip() != rip {
                break;
            }
        }
        None
    }

    /// The registers that tell one element of a repeated string instruction from the next.
    fn progress(&self) -> [u64; 4] {
        let [rcx, rsi, rdi] = [RCX, RSI, RDI].map(|n| self.cpu.gpr(n));
        [self.cpu.rip(), rcx, rsi, rdi]
    }

    /// Gives up the instruction of the last exit: another one comes next.
    pub(crate) fn give_up(&mut self) {
        self.resume = Resume::Nothing;
        self.midway = false;
        self.port = None;
        self.shared.mmio().end();
    }

    /// The exit of an access to memory that is missing. The instruction begins again in the next run.
    fn missing(&self, gpa: u64) -> Option<Exit> {
        let gfn = Gfn::containing(Gpa::new(gpa));
        let access = self.vm.read().missing(gfn)?;
        Some(Exit::MemoryFault {
            gpa: gfn.base()?,
            bytes: PAGE_SIZE,
            access,
        })
    }
}
