//! VMGEXIT: requests of a guest with encrypted registers to its host, as KVM answers them (AMD 56421;
//! Linux `sev_handle_vmgexit`).

mod calls;
mod io;
mod page;
mod psc;
mod vcpus;

pub(super) use page::Ghcb;

use kvm_ops::guest::MAX_ACCESS;
use kvm_ops::{Error, Exit, Field, Result, Tech};
use kvm_ops_cpu::Exit as CpuExit;

use super::exits;
use super::start::Hold;
use crate::msr_exits::MsrAccess;
use crate::processor::{MsrWait, Next, Processor, Resume};
use crate::sev::protocol::{self, Reply};
use page::{CODE, INFO_1, INFO_2, RAX, RBX, RCX, RDX, XCR0};

/// Exits that only software makes.
mod code {
    pub(super) const MMIO_READ: u64 = 0x8000_0001;
    pub(super) const MMIO_WRITE: u64 = 0x8000_0002;
    pub(super) const NMI_COMPLETE: u64 = 0x8000_0003;
    pub(super) const AP_HALT_LOOP: u64 = 0x8000_0004;
    pub(super) const AP_JUMP_TABLE: u64 = 0x8000_0005;
    pub(super) const PAGE_STATE_CHANGE: u64 = 0x8000_0010;
    pub(super) const GUEST_REQUEST: u64 = 0x8000_0011;
    pub(super) const EXTENDED_GUEST_REQUEST: u64 = 0x8000_0012;
    pub(super) const AP_CREATION: u64 = 0x8000_0013;
    pub(super) const FEATURES: u64 = 0x8000_fffd;
    pub(super) const TERMINATE: u64 = 0x8000_fffe;
}

/// Exits of instructions, as SW_EXITCODE has them.
const CPUID: u64 = exits::CPUID as u64;
const INVD: u64 = exits::INVD as u64;
const HLT: u64 = exits::HLT as u64;
const IOIO: u64 = exits::IOIO as u64;
const MSR: u64 = exits::MSR as u64;
const VMMCALL: u64 = exits::VMMCALL as u64;
const WBINVD: u64 = exits::WBINVD as u64;

/// Exits of instructions that `kvm-ops-cpu` never intercepts, and that a guest may still ask for.
const RDTSC: u64 = 0x6e;
const MONITOR: u64 = 0x8a;
const MWAIT: u64 = 0x8b;
const DR7_READ: u64 = 0x27;
const DR7_WRITE: u64 = 0x37;

/// Reasons for which a request is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Malformed {
    Usage = 2,
    Scratch = 3,
    Missing = 4,
    Input = 5,
    Event = 6,
}

const LOW: u64 = 0xffff_ffff;

/// SW_EXITINFO1 of a malformed request, and of one that ends in an exception.
const MALFORMED: u64 = 2;
const EXCEPTION: u64 = 1;
/// EVENTINJ of #GP, as Linux fills it: an exception that is valid.
const INJECT_GP: u64 = 13 | 3 << 8 | 1 << 31;

/// The embedder's answer that a VMGEXIT or a hypercall waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pending {
    /// Data of a port or a device for RAX, or for the buffer from `at` on.
    Data {
        exit: CpuExit,
        at: Option<usize>,
        len: usize,
    },
    /// Nothing but its end.
    Done(CpuExit),
    /// The result of a page state change by the GHCB MSR.
    Msr(CpuExit),
    /// The result of a page state change by the GHCB page.
    Pages { exit: CpuExit, entries: u16 },
    /// The result of a hypercall.
    Call(CpuExit),
    /// An MSR that the embedder answers for.
    Access(MsrWait),
    /// Certificates for a report, which is asked for then: the pages of request and answer.
    Certificates {
        exit: CpuExit,
        request: u64,
        response: u64,
    },
}

impl Pending {
    pub(crate) fn msr_wait(&mut self) -> Option<&mut MsrWait> {
        match self {
            Self::Access(wait) => Some(wait),
            _ => None,
        }
    }
}

impl Processor {
    /// VMGEXIT.
    pub(super) fn vmgexit(&mut self, exit: CpuExit) -> Result<Next> {
        if self.side()?.ghcb.is_some() {
            return self.change_pages(exit);
        }
        let vcpu = self.vm.sev.vcpu(self.id);
        if vcpu.ghcb & 0xfff != 0 {
            return self.msr_protocol(exit, vcpu.ghcb);
        }
        if self.vm.tech == Tech::SevSnp && vcpu.registered != Some(vcpu.ghcb) {
            return Err(Error::Invalid(Field::Gpa, vcpu.ghcb));
        }
        let ghcb = Ghcb::read(&self.vm, vcpu.ghcb)?;
        self.side()?.ghcb = Some(ghcb);
        self.request(exit)
    }

    fn msr_protocol(&mut self, exit: CpuExit, msr: u64) -> Result<Next> {
        tracing::trace!(
            vcpu = self.id.0,
            request = format_args!("{msr:#x}"),
            "VMGEXIT with a request in the MSR"
        );
        let value = match protocol::reply(&self.vm, msr) {
            Reply::Value(value) => value,
            Reply::Register { gpa, value } => {
                self.vm
                    .sev
                    .change_vcpu(self.id, |vcpu| vcpu.registered = Some(gpa));
                value
            }
            Reply::Cpuid { function, register } => {
                let leaf = self.cpuid_answer(function, 0);
                let registers = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
                let value = u64::from(registers[usize::from(register & 3)]);
                value << 32 | u64::from(register) << 30 | protocol::CPUID
            }
            Reply::Hold => return self.hold(Hold::Msr(exit)),
            Reply::Convert { gpa, to } => {
                let leave = Exit::MapGpaRange { gpa, pages: 1, to };
                return self.wait_for(Pending::Msr(exit), leave, Vec::new());
            }
            Reply::Terminate => return Ok(self.terminate(&exit)),
        };
        self.answer_msr(&exit, value);
        Ok(Next::Again)
    }

    fn answer_msr(&mut self, exit: &CpuExit, value: u64) {
        self.vm.sev.change_vcpu(self.id, |vcpu| vcpu.ghcb = value);
        self.cpu.skip(exit);
    }

    /// The start-up interrupt came that the guest waited for.
    pub(super) fn release(&mut self, hold: Hold) {
        match hold {
            Hold::Msr(exit) => self.answer_msr(&exit, protocol::HELD),
            Hold::Page(exit) => {
                if let Some(ghcb) = self.sev.as_mut().and_then(|side| side.ghcb.as_mut()) {
                    ghcb.put(INFO_2, 1);
                }
                self.done(&exit);
            }
        }
    }

    /// Leaves to the embedder, and goes on with its answer.
    fn wait_for(&mut self, pending: Pending, leave: Exit, data: Vec<u8>) -> Result<Next> {
        self.resume = Resume::Sev(pending);
        self.vm.sev.change_vcpu(self.id, |vcpu| vcpu.owes = true);
        Ok(Next::Leave(leave, data))
    }

    /// The guest asks to be ended. The embedder gets the GHCB MSR, whose value is the reason or the page with it, as on KVM.
    /// One that runs the vCPU again all the same finds it past VMGEXIT, where the processor left it.
    fn terminate(&mut self, exit: &CpuExit) -> Next {
        let reason = self.vm.sev.vcpu(self.id).ghcb;
        tracing::error!(
            technology = %self.vm.tech,
            vcpu = self.id.0,
            rip = format_args!("{:#x}", self.cpu.rip()),
            reason = format_args!("{reason:#x}"),
            "the guest ends itself (GHCB: termination request)"
        );
        self.cpu.skip(exit);
        let kind = protocol::SEV_TERM;
        Next::Leave(Exit::SystemEvent { kind }, reason.to_ne_bytes().to_vec())
    }

    /// The GHCB of the VMGEXIT under way.
    fn ghcb(&mut self) -> Result<&mut Ghcb> {
        let missing = Error::NotOffered(&super::super::ENCRYPTED);
        self.side()?.ghcb.as_mut().ok_or(missing)
    }

    /// Writes the answer into the page, and goes past VMGEXIT.
    fn done(&mut self, exit: &CpuExit) {
        if let Some(ghcb) = self.sev.as_mut().and_then(|side| side.ghcb.take())
            && let Err(error) = ghcb.write(&self.vm)
        {
            // The embedder took the memory away: the guest sees its own fields.
            tracing::debug!(vcpu = self.id.0, %error, "the GHCB is no memory any more");
        }
        self.cpu.skip(exit);
    }

    /// A request that the host took.
    fn took(&mut self, exit: CpuExit, info2: u64) -> Result<Next> {
        self.answer_page(exit, 0, info2)
    }

    fn malformed(&mut self, exit: CpuExit, why: Malformed) -> Result<Next> {
        tracing::debug!(vcpu = self.id.0, ?why, "malformed request in the GHCB");
        self.answer_page(exit, MALFORMED, why as u64)
    }

    fn answer_page(&mut self, exit: CpuExit, info1: u64, info2: u64) -> Result<Next> {
        let ghcb = self.ghcb()?;
        ghcb.put(INFO_1, info1);
        ghcb.put(INFO_2, info2);
        self.done(&exit);
        Ok(Next::Again)
    }

    /// A request by the GHCB page.
    fn request(&mut self, exit: CpuExit) -> Result<Next> {
        let ghcb = self.ghcb()?;
        // The version in the page is not looked at, as on KVM: that of OVMF's first page is 0.
        let usage = ghcb.usage();
        let fields = [CODE, INFO_1, INFO_2].map(|at| ghcb.get(at));
        if usage != 0 {
            return self.malformed(exit, Malformed::Usage);
        }
        let [Some(code), Some(info1), Some(info2)] = fields else {
            return self.malformed(exit, Malformed::Missing);
        };
        tracing::trace!(
            vcpu = self.id.0,
            code = format_args!("{code:#x}"),
            info1 = format_args!("{info1:#x}"),
            info2 = format_args!("{info2:#x}"),
            "VMGEXIT"
        );
        // The answer of a request that does not say otherwise.
        let ghcb = self.ghcb()?;
        ghcb.put(INFO_1, 0);
        ghcb.put(INFO_2, 0);
        let snp = self.vm.tech == Tech::SevSnp;
        match code {
            CPUID => self.cpuid_request(exit),
            MSR => self.msr_request(exit, info1),
            IOIO => self.port_request(exit, info1, info2),
            VMMCALL => self.call_request(exit),
            HLT => self.halt_request(exit),
            // Nothing is cached, and nothing watches memory.
            WBINVD | INVD => self.took(exit, 0),
            MONITOR | MWAIT | DR7_WRITE => self.took(exit, 0),
            DR7_READ => {
                const DR7_RESET: u64 = 0x400;
                self.ghcb()?.put(RAX, DR7_RESET);
                self.took(exit, 0)
            }
            RDTSC => self.time_request(exit),
            code::MMIO_READ => self.device_request(exit, info1, info2, false),
            code::MMIO_WRITE => self.device_request(exit, info1, info2, true),
            code::NMI_COMPLETE => {
                self.change_activity(|activity| activity.nmi_blocked = false);
                self.took(exit, 0)
            }
            code::AP_HALT_LOOP => self.hold(Hold::Page(exit)),
            code::AP_JUMP_TABLE if !snp => self.jump_table(exit, info1, info2),
            code::PAGE_STATE_CHANGE if snp => self.change_pages(exit),
            code::GUEST_REQUEST if snp => self.guest_request(exit, info1, info2),
            code::EXTENDED_GUEST_REQUEST if snp => self.extended_guest_request(exit, info1, info2),
            code::AP_CREATION if snp => self.create_vcpu(exit, info1, info2),
            code::FEATURES => {
                let features = protocol::features(&self.vm);
                self.took(exit, features)
            }
            code::TERMINATE => {
                self.side()?.ghcb = None;
                Ok(self.terminate(&exit))
            }
            _ => self.malformed(exit, Malformed::Event),
        }
    }

    fn cpuid_request(&mut self, exit: CpuExit) -> Result<Next> {
        const XSTATE: u64 = 0xd;
        let ghcb = self.ghcb()?;
        let (Some(function), Some(index)) = (ghcb.get(RAX), ghcb.get(RCX)) else {
            return self.malformed(exit, Malformed::Missing);
        };
        if function == XSTATE && ghcb.get(XCR0).is_none() {
            return self.malformed(exit, Malformed::Missing);
        }
        let leaf = self.cpuid_answer(function as u32, index as u32);
        let ghcb = self.ghcb()?;
        for (at, value) in [
            (RAX, leaf.eax),
            (RBX, leaf.ebx),
            (RCX, leaf.ecx),
            (RDX, leaf.edx),
        ] {
            ghcb.put(at, value.into());
        }
        self.took(exit, 0)
    }

    /// RDMSR, or WRMSR if bit 0 of the information is set.
    fn msr_request(&mut self, exit: CpuExit, info1: u64) -> Result<Next> {
        let ghcb = self.ghcb()?;
        let [rax, rcx, rdx] = [RAX, RCX, RDX].map(|at| ghcb.get(at));
        let Some(index) = rcx.map(|rcx| rcx as u32) else {
            return self.malformed(exit, Malformed::Missing);
        };
        let (access, value) = match (info1 & 1, rax, rdx) {
            (0, ..) => (MsrAccess::Read, 0),
            (_, Some(rax), Some(rdx)) => (MsrAccess::Write, rdx << 32 | rax & LOW),
            _ => return self.malformed(exit, Malformed::Missing),
        };
        match self.try_msr(index, access, value) {
            Ok(read) => self.end_msr_request(exit, access, read),
            Err(refusal) if self.leaves(refusal) => {
                let wait = MsrWait {
                    exit,
                    access,
                    refusal,
                    faults: false,
                };
                let leave = MsrWait::leave(index, access, value);
                self.wait_for(Pending::Access(wait), leave, Vec::new())
            }
            Err(_) => self.answer_page(exit, EXCEPTION, INJECT_GP),
        }
    }

    fn end_msr_request(&mut self, exit: CpuExit, access: MsrAccess, read: u64) -> Result<Next> {
        if access == MsrAccess::Read {
            let ghcb = self.ghcb()?;
            ghcb.put(RAX, read & LOW);
            ghcb.put(RDX, read >> 32);
        }
        self.took(exit, 0)
    }

    /// The guest's halt, after which it is past VMGEXIT.
    fn halt_request(&mut self, exit: CpuExit) -> Result<Next> {
        let answered = self.took(exit, 0)?;
        if !self.has_apic() {
            return Ok(Next::Leave(Exit::Hlt, Vec::new()));
        }
        self.change_activity(|activity| activity.halted = true);
        self.halt_hook.call(1);
        Ok(answered)
    }

    fn time_request(&mut self, exit: CpuExit) -> Result<Next> {
        const TSC: u32 = 0x10;
        let tsc = self.cpu.read_msr(TSC).unwrap_or(0);
        let ghcb = self.ghcb()?;
        ghcb.put(RAX, tsc & 0xffff_ffff);
        ghcb.put(RDX, tsc >> 32);
        self.took(exit, 0)
    }

    /// Takes the embedder's answer to an exit that came from the GHCB.
    pub(crate) fn finish_sev(&mut self, pending: Pending, data: &[u8; MAX_ACCESS], ret: u64) {
        self.vm.sev.change_vcpu(self.id, |vcpu| vcpu.owes = false);
        match pending {
            Pending::Data { exit, at, len } => {
                if let Some(ghcb) = self.sev.as_mut().and_then(|side| side.ghcb.as_mut()) {
                    take_data(ghcb, at, &data[..len]);
                }
                self.done(&exit);
            }
            Pending::Done(exit) => self.done(&exit),
            Pending::Msr(exit) => self.answer_msr(&exit, protocol::converted(ret)),
            Pending::Pages { exit, entries } => self.converted(exit, entries, ret),
            Pending::Access(MsrWait {
                exit,
                access,
                faults,
                ..
            }) => {
                // A failure is in the GHCB.
                let _ = match faults {
                    true => self.answer_page(exit, EXCEPTION, INJECT_GP),
                    false => self.end_msr_request(exit, access, ret),
                };
            }
            Pending::Certificates {
                exit,
                request,
                response,
            } => {
                let mut pages = [0; 8];
                pages.copy_from_slice(&data[..8]);
                let pages = u64::from_le_bytes(pages);
                // A failure is in the GHCB.
                let _ = self.certified(exit, (request, response), (ret, pages));
            }
            Pending::Call(exit) => {
                if let Some(ghcb) = self.sev.as_mut().and_then(|side| side.ghcb.as_mut()) {
                    ghcb.put(RAX, ret);
                }
                self.done(&exit);
            }
        }
    }
}

/// Puts what a port or a device has into RAX, or into the buffer.
fn take_data(ghcb: &mut Ghcb, at: Option<usize>, data: &[u8]) {
    match at {
        Some(at) => ghcb.bytes_mut(at..at + data.len()).copy_from_slice(data),
        None => {
            let mut bytes = [0; 8];
            let len = data.len().min(8);
            bytes[..len].copy_from_slice(&data[..len]);
            ghcb.put(RAX, u64::from_le_bytes(bytes));
        }
    }
}
