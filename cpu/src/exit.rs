//! The processor's exits, and their encoding in VMX and SVM.

use crate::fault::Event;

/// Instructions that a host may want to see; all of them end in an exit with RIP at the
/// instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// CPUID exits; otherwise it is answered from the table.
    pub cpuid: bool,
    /// HLT exits; otherwise [`Stopped::Halted`](crate::Stopped) ends the run after it.
    pub hlt: bool,
    /// All RDMSR and WRMSR exit; otherwise only those that this processor does not know fault.
    pub msr: bool,
    /// IN, OUT, INS and OUTS exit before the bus is asked.
    pub io: bool,
    /// WBINVD, INVD and WBNOINVD exit; otherwise they do nothing.
    pub wbinvd: bool,
    /// XSETBV exits.
    pub xsetbv: bool,
    /// PAUSE exits.
    pub pause: bool,
    /// MOV to CR0, CR3 and CR4, CLTS and LMSW exit.
    pub control_registers: bool,
    /// Exceptions that exit in place of being delivered, a bit for each vector.
    pub exceptions: u32,
    /// TDCALL, VMCALL, VMMCALL, VMGEXIT, PVALIDATE and the other instructions that exist only in
    /// guests exit; otherwise they are #UD.
    pub guest_instructions: bool,
    /// VMCALL and VMMCALL exit even if the other guest instructions do not.
    pub hypercalls: bool,
    /// Hardware task switches exit, as in VMX; otherwise the processor does them.
    pub task_switches: bool,
    /// The processor leaves as soon as it could take an interrupt.
    pub interrupt_window: bool,
    /// The processor leaves as soon as it could take an NMI: before the next instruction, also out of HLT, while none is
    /// held back by the handler of an NMI or by the shadow of STI and MOV SS (SDM vol. 3, "Other Causes of VM Exits").
    /// SVM has no such control: its hypervisors intercept IRET, and step over it.
    pub nmi_window: bool,
    /// Accesses to the local APIC's page are the bus'; the host carries them out
    /// ([`Cpu::read_apic_page`](crate::Cpu::read_apic_page)).
    pub apic_page: bool,
}

impl Controls {
    /// Nothing exits that the processor can do alone.
    pub const fn none() -> Self {
        Self {
            cpuid: false,
            hlt: false,
            msr: false,
            io: false,
            wbinvd: false,
            xsetbv: false,
            pause: false,
            control_registers: false,
            exceptions: 0,
            guest_instructions: false,
            hypercalls: false,
            task_switches: false,
            interrupt_window: false,
            nmi_window: false,
            apic_page: false,
        }
    }

    /// The instructions whose exits a TDX module or a hypervisor of SEV guests wants.
    pub const fn confidential() -> Self {
        Self {
            cpuid: true,
            hlt: true,
            msr: true,
            io: true,
            wbinvd: true,
            xsetbv: true,
            guest_instructions: true,
            task_switches: true,
            ..Self::none()
        }
    }
}

/// An access to ports that the host has to carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// Port number.
    pub port: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// IN or INS.
    pub input: bool,
    /// INS or OUTS.
    pub string: bool,
    /// REP prefix.
    pub repeat: bool,
    /// The port number is an immediate.
    pub immediate: bool,
    /// Address size of INS and OUTS in bytes: 2, 4 or 8.
    pub address_size: u8,
    /// Segment register of OUTS, in the order of the encoding.
    pub segment: u8,
    /// Value to write; zero for input.
    pub value: u32,
}

/// Reason for an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// An exception of [`Controls::exceptions`], or of the [`Debugger`](crate::Debugger)'s.
    Exception(Event),
    /// An exception while a double fault was delivered. The processor is in shutdown.
    TripleFault,
    /// An interrupt could be delivered now, as [`Controls::interrupt_window`] asked.
    InterruptWindow,
    /// An NMI could be delivered now, as [`Controls::nmi_window`] asked.
    NmiWindow,
    /// CPUID.
    Cpuid,
    /// HLT.
    Hlt,
    /// INVD.
    Invd,
    /// WBINVD or WBNOINVD.
    Wbinvd,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// XSETBV.
    Xsetbv,
    /// PAUSE.
    Pause,
    /// IN, OUT, INS or OUTS.
    Io(PortAccess),
    /// MOV to CR0, CR3, CR4 or CR8.
    WriteControl {
        /// Number of the control register.
        register: u8,
        /// General register with the value.
        source: u8,
    },
    /// CLTS.
    Clts,
    /// LMSW with its operand.
    Lmsw(u16),
    /// A hardware task switch, which is the host's to carry out.
    TaskSwitch {
        /// Selector of the task state segment.
        selector: u16,
        /// 0 CALL, 1 IRET, 2 JMP, 3 a task gate in the interrupt table.
        source: u8,
    },
    /// The bus refused a guest-physical page.
    Violation {
        /// Data write.
        write: bool,
        /// Instruction fetch.
        execute: bool,
        /// The access was to a paging structure.
        walk: bool,
        /// From [`Mapping::Refused`](crate::Mapping::Refused).
        code: u64,
    },
    /// VMCALL.
    Vmcall,
    /// VMMCALL.
    Vmmcall,
    /// TDCALL.
    Tdcall,
    /// SEAMCALL.
    Seamcall,
    /// VMGEXIT.
    Vmgexit,
    /// PVALIDATE: RAX is the page, RCX its size, RDX validated or not. The platform carries it
    /// out and sets RAX, CF and the other flags.
    Pvalidate,
    /// RMPADJUST.
    Rmpadjust,
    /// RMPUPDATE.
    Rmpupdate,
    /// PSMASH.
    Psmash,
}

/// An exit, with RIP at the instruction that caused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Reason.
    pub cause: Cause,
    /// Length of the instruction in bytes; zero for violations and exceptions.
    pub len: u8,
    /// Linear address of a violation or of a string I/O's memory operand.
    pub linear: Option<u64>,
    /// Guest-physical address of a violation.
    pub physical: Option<u64>,
    /// Event in whose delivery the exit happened.
    pub vectoring: Option<Event>,
}

/// An exit as VMX encodes it (Intel SDM volume 3, 28.2 and appendix C).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmxExit {
    /// Basic exit reason.
    pub reason: u16,
    /// Exit qualification.
    pub qualification: u64,
    /// Instruction length.
    pub len: u8,
    /// Interruption information, for exceptions.
    pub interruption: u32,
    /// Interruption error code.
    pub error_code: u32,
    /// IDT-vectoring information; zero if no event was being delivered.
    pub vectoring: u32,
    /// IDT-vectoring error code.
    pub vectoring_error_code: u32,
}

/// An exit as SVM encodes it (AMD APM volume 2, appendix C).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SvmExit {
    /// EXITCODE.
    pub code: u64,
    /// EXITINFO1.
    pub info1: u64,
    /// EXITINFO2.
    pub info2: u64,
    /// EXITINTINFO.
    pub interrupted: u64,
}

impl PortAccess {
    fn vmx_qualification(&self) -> u64 {
        u64::from(self.size.saturating_sub(1))
            | u64::from(self.input) << 3
            | u64::from(self.string) << 4
            | u64::from(self.repeat) << 5
            | u64::from(self.immediate) << 6
            | u64::from(self.port) << 16
    }

    fn svm_info(&self) -> u64 {
        u64::from(self.input)
            | u64::from(self.string) << 2
            | u64::from(self.repeat) << 3
            | u64::from(self.size) << 4
            | u64::from(self.address_size / 2) << 7 & 0x380
            | u64::from(self.segment) << 10
            | u64::from(self.port) << 16
    }
}

impl Exit {
    /// The exit in VMX's encoding. `None` for instructions of AMD processors only.
    pub fn vmx(&self) -> Option<VmxExit> {
        let (reason, qualification) = match self.cause {
            Cause::Exception(e) => (0, e.address.unwrap_or(0)),
            Cause::TripleFault => (2, 0),
            Cause::InterruptWindow => (7, 0),
            Cause::NmiWindow => (8, 0),
            Cause::TaskSwitch { selector, source } => {
                (9, u64::from(selector) | u64::from(source) << 30)
            }
            Cause::Cpuid => (10, 0),
            Cause::Hlt => (12, 0),
            Cause::Invd => (13, 0),
            Cause::Vmcall => (18, 0),
            Cause::WriteControl { register, source } => {
                (28, u64::from(register) | u64::from(source) << 8)
            }
            Cause::Clts => (28, 2 << 4),
            Cause::Lmsw(value) => (28, 3 << 4 | u64::from(value) << 16),
            Cause::Io(io) => (30, io.vmx_qualification()),
            Cause::Rdmsr => (31, 0),
            Cause::Wrmsr => (32, 0),
            Cause::Pause => (40, 0),
            Cause::Violation {
                write,
                execute,
                walk,
                code,
            } => {
                let read = walk || !(write || execute);
                let linear = u64::from(self.linear.is_some()) << 7;
                let bits = u64::from(read) | u64::from(write) << 1 | u64::from(execute) << 2;
                (48, bits | code & 0x78 | linear | u64::from(!walk) << 8)
            }
            Cause::Wbinvd => (54, 0),
            Cause::Xsetbv => (55, 0),
            Cause::Seamcall => (76, 0),
            Cause::Tdcall => (77, 0),
            Cause::Vmmcall
            | Cause::Vmgexit
            | Cause::Pvalidate
            | Cause::Rmpadjust
            | Cause::Rmpupdate
            | Cause::Psmash => return None,
        };
        let event = match self.cause {
            Cause::Exception(e) => Some(e),
            _ => None,
        };
        Some(VmxExit {
            reason,
            qualification,
            len: self.len,
            interruption: event.map_or(0, Event::information),
            error_code: event.and_then(|e| e.code).unwrap_or(0),
            vectoring: self.vectoring.map_or(0, Event::information),
            vectoring_error_code: self.vectoring.and_then(|e| e.code).unwrap_or(0),
        })
    }

    /// The exit in SVM's encoding. `next_rip` goes to EXITINFO2 of I/O exits. `None` for TDCALL, SEAMCALL and the
    /// window of an NMI, and for PVALIDATE, RMPADJUST, RMPUPDATE and PSMASH, which hardware carries
    /// out without an exit.
    pub fn svm(&self, next_rip: u64) -> Option<SvmExit> {
        let (code, info1, info2) = match self.cause {
            Cause::Exception(e) => {
                let code = u64::from(e.code.unwrap_or(0));
                (0x40 + u64::from(e.vector), code, e.address.unwrap_or(0))
            }
            Cause::TripleFault => (0x7f, 0, 0),
            Cause::InterruptWindow => (0x64, 0, 0),
            Cause::WriteControl { register, source } => {
                (0x10 + u64::from(register), 1 << 63 | u64::from(source), 0)
            }
            Cause::Clts | Cause::Lmsw(_) => (0x10, 0, 0),
            Cause::Cpuid => (0x72, 0, 0),
            Cause::Invd => (0x76, 0, 0),
            Cause::Pause => (0x77, 0, 0),
            Cause::Hlt => (0x78, 0, 0),
            Cause::TaskSwitch { selector, source } => {
                let bits = u64::from(source == 1) << 36 | u64::from(source == 2) << 38;
                (0x7d, selector.into(), bits)
            }
            Cause::Io(io) => (0x7b, io.svm_info(), next_rip),
            Cause::Rdmsr => (0x7c, 0, 0),
            Cause::Wrmsr => (0x7c, 1, 0),
            Cause::Vmmcall => (0x81, 0, 0),
            Cause::Wbinvd => (0x89, 0, 0),
            Cause::Xsetbv => (0x8d, 0, 0),
            Cause::Violation {
                write,
                execute,
                walk,
                code,
            } => {
                let kind = if walk { 1 << 33 } else { 1 << 32 };
                let bits = u64::from(write) << 1 | 1 << 2 | u64::from(execute) << 4;
                (0x400, bits | kind | code, self.physical.unwrap_or(0))
            }
            Cause::Vmgexit => (0x403, 0, 0),
            Cause::NmiWindow
            | Cause::Vmcall
            | Cause::Tdcall
            | Cause::Seamcall
            | Cause::Pvalidate
            | Cause::Rmpadjust
            | Cause::Rmpupdate
            | Cause::Psmash => return None,
        };
        let interrupted = self.vectoring.map_or(0, |e| {
            u64::from(e.information()) | u64::from(e.code.unwrap_or(0)) << 32
        });
        Some(SvmExit {
            code,
            info1,
            info2,
            interrupted,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IO: PortAccess = PortAccess {
        port: 0x3f8,
        size: 1,
        input: false,
        string: true,
        repeat: true,
        immediate: false,
        address_size: 8,
        segment: 3,
        value: 0x41,
    };

    fn exit(cause: Cause) -> Exit {
        Exit {
            cause,
            len: 2,
            linear: Some(0x1000),
            physical: Some(0x2000),
            vectoring: None,
        }
    }

    #[test]
    fn string_output_in_both_encodings() {
        let e = exit(Cause::Io(IO));
        assert_eq!(
            e.vmx().map(|v| (v.reason, v.qualification)),
            Some((30, 0x03f8_0030))
        );
        let svm = e.svm(0x55).expect("an SVM exit");
        assert_eq!((svm.code, svm.info1, svm.info2), (0x7b, 0x03f8_0e1c, 0x55));
    }

    #[test]
    fn a_write_violation_in_both_encodings() {
        let e = exit(Cause::Violation {
            write: true,
            execute: false,
            walk: false,
            code: 0,
        });
        assert_eq!(
            e.vmx().map(|v| (v.reason, v.qualification)),
            Some((48, 0x182))
        );
        let svm = e.svm(0).expect("an SVM exit");
        assert_eq!(
            (svm.code, svm.info1, svm.info2),
            (0x400, 0x1_0000_0006, 0x2000)
        );
    }

    #[test]
    fn an_event_under_delivery_is_told() {
        let e = Exit {
            vectoring: Some(Event::interrupt(0x30)),
            ..exit(Cause::TripleFault)
        };
        assert_eq!(e.vmx().map(|v| v.vectoring), Some(0x8000_0030));
        assert_eq!(e.svm(0).map(|s| s.interrupted), Some(0x8000_0030));
    }
}
