//! TDG.VP.VMCALL: what the guest asks of the host (GHCI; Linux `handle_tdvmcall`).

use kvm_ops::{
    CpuidEntry, Error, Exit, Gpa, Host, Irqchip, PAGE_SIZE, Privacy, TdxRequest, VcpuId, VcpuOps,
};

use super::{Pending, Run, SYSTEM_EVENT_TDX_FATAL};
use crate::TdxVcpu;

/// Sub-functions, in R11. The small ones name an instruction by its exit reason.
mod function {
    pub(super) const CPUID: u64 = 10;
    pub(super) const HLT: u64 = 12;
    pub(super) const IO: u64 = 30;
    pub(super) const RDMSR: u64 = 31;
    pub(super) const WRMSR: u64 = 32;
    pub(super) const MMIO: u64 = 48;
    pub(super) const GET_TD_VM_CALL_INFO: u64 = 0x1_0000;
    pub(super) const MAP_GPA: u64 = 0x1_0001;
    pub(super) const GET_QUOTE: u64 = 0x1_0002;
    pub(super) const REPORT_FATAL_ERROR: u64 = 0x1_0003;
    pub(super) const SETUP_EVENT_NOTIFY: u64 = 0x1_0004;
}

/// Statuses, in R10.
pub(super) const SUCCESS: u64 = 0;
pub(super) const RETRY: u64 = 1;
pub(super) const INVALID_OPERAND: u64 = 1 << 63;
pub(super) const ALIGN_ERROR: u64 = 1 << 63 | 2;
pub(super) const SUBFUNC_UNSUPPORTED: u64 = 1 << 63 | 3;

/// `KVM_HC_MAP_GPA_RANGE`, and the bit of its third argument that says private.
const HC_MAP_GPA_RANGE: u64 = 12;
const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
/// `-KVM_EINVAL`.
const HC_EINVAL: u64 = 22u64.wrapping_neg();

const FIRST_VECTOR: u64 = 32;

/// The leaf that names the hypervisor and its last leaf, which would list features. The name is KVM's, whose answers to calls
/// these are (Linux Documentation/virt/kvm/x86/cpuid.rst). Without a name Linux takes x2APIC mode for unusable where nothing remaps
/// interrupts, and a TD cannot leave that mode.
const HYPERVISOR: u32 = 0x4000_0000;
const FEATURES: u32 = HYPERVISOR + 1;
const KVM: [u8; 12] = *b"KVMKVMKVM\0\0\0";

/// Leaves of the topology, whose EDX is the x2APIC ID for every sub-leaf. OVMF's loop for waiting vCPUs asks the host, and not
/// the module, which one it runs on.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// A leaf that the TD was not created with, as the host answers it.
fn host_leaf(leaf: u32, subleaf: u32, vcpu: VcpuId) -> [u32; 4] {
    let name = |at: usize| u32::from_le_bytes([KVM[at], KVM[at + 1], KVM[at + 2], KVM[at + 3]]);
    match leaf {
        HYPERVISOR => [FEATURES, name(0), name(4), name(8)],
        _ if TOPOLOGY.contains(&leaf) => [0, 0, subleaf & 0xff, vcpu.0],
        _ => [0; 4],
    }
}

impl Run {
    /// Finishes the call at once with this status.
    pub(super) fn finish_call(&mut self, status: u64) -> Option<Exit> {
        self.regs.r10 = status;
        None
    }
}

impl<H: Host> TdxVcpu<H> {
    pub(super) fn vmcall(&mut self) -> Option<Exit> {
        if self.run.regs.r10 != 0 {
            return self.hypercall();
        }
        match self.run.regs.r11 {
            function::CPUID => self.cpuid(),
            function::HLT => match self.td.params.irqchip {
                Irqchip::None => self.run.leave(Pending::Halt, Exit::Hlt),
                _ => {
                    self.run.pending = Pending::Halt;
                    None
                }
            },
            function::IO => self.io(),
            function::MMIO => self.mmio(),
            function::RDMSR | function::WRMSR => self.msr(),
            function::GET_TD_VM_CALL_INFO => self.vm_call_info(),
            function::MAP_GPA => self.map_gpa(),
            function::GET_QUOTE => self.get_quote(),
            function::REPORT_FATAL_ERROR => self.fatal_error(),
            function::SETUP_EVENT_NOTIFY => self.setup_event_notify(),
            _ => self.run.finish_call(SUBFUNC_UNSUPPORTED),
        }
    }

    /// A KVM hypercall: R10 is its number, R11 to R14 are its arguments, R10 is the answer.
    fn hypercall(&mut self) -> Option<Exit> {
        let r = self.run.regs;
        match r.r10 {
            HC_MAP_GPA_RANGE => {
                let gpa = Gpa::new(r.r11);
                let bytes = r.r12.checked_mul(PAGE_SIZE).filter(|bytes| *bytes != 0);
                let end = bytes.and_then(|bytes| r.r11.checked_add(bytes));
                let fits = end.is_some_and(|end| end <= self.td.mask.bits());
                if !gpa.is_page_aligned() || !fits {
                    return self.run.finish_call(HC_EINVAL);
                }
                let to = match r.r13 & MAP_GPA_RANGE_ENCRYPTED {
                    0 => Privacy::Shared,
                    _ => Privacy::Private,
                };
                let pages = r.r12;
                let exit = Exit::MapGpaRange { gpa, pages, to };
                self.run.leave(Pending::MapGpaHypercall, exit)
            }
            nr => {
                let args = [r.r11, r.r12, r.r13, r.r14, 0, 0];
                self.run
                    .leave(Pending::Hypercall, Exit::Hypercall { nr, args })
            }
        }
    }

    /// Answered from the list that was set; without one from what the TD was created with, else as [`host_leaf`].
    fn cpuid(&mut self) -> Option<Exit> {
        let vcpu = self.id();
        let (leaf, subleaf) = (self.run.regs.r12 as u32, self.run.regs.r13 as u32);
        let told = |list: &[CpuidEntry]| CpuidEntry::find(list, leaf, subleaf).map(|row| row.regs);
        let [eax, ebx, ecx, edx] = if let Some(list) = &self.cpuid {
            told(list).unwrap_or([0; 4])
        } else {
            let params = self.td.lock(&self.td.td_params);
            told(&params.cpuid).unwrap_or_else(|| host_leaf(leaf, subleaf, vcpu))
        };
        let r = &mut self.run.regs;
        [r.r12, r.r13, r.r14, r.r15] = [eax.into(), ebx.into(), ecx.into(), edx.into()];
        self.run.finish_call(SUCCESS)
    }

    /// R12 the size, R13 0 for IN and 1 for OUT, R14 the port, R15 the value to write.
    fn io(&mut self) -> Option<Exit> {
        let r = self.run.regs;
        let (Ok(port), bytes @ (1 | 2 | 4)) = (u16::try_from(r.r14), r.r12) else {
            return self.run.finish_call(INVALID_OPERAND);
        };
        let (size, count) = (bytes as u8, 1);
        let input = Exit::IoIn { port, size, count };
        let output = Exit::IoOut { port, size, count };
        self.access(r.r13, bytes as usize, r.r15, (input, output))
    }

    /// R12 the size, R13 0 for a read and 1 for a write, R14 the address, R15 the value to write.
    fn mmio(&mut self) -> Option<Exit> {
        let r = self.run.regs;
        let last = r.r14.checked_add(r.r12.wrapping_sub(1));
        let fits = matches!(r.r12, 1 | 2 | 4 | 8)
            && self.is_shared(r.r14)
            && last.is_some_and(|last| self.is_shared(last));
        if !fits {
            return self.run.finish_call(INVALID_OPERAND);
        }
        let (gpa, len) = (Gpa::new(r.r14 & !self.td.mask.bits()), r.r12 as u8);
        let (read, write) = (Exit::MmioRead { gpa, len }, Exit::MmioWrite { gpa, len });
        self.access(r.r13, len.into(), r.r15, (read, write))
    }

    /// Leaves with the first exit for a read (0), with the second for a write (1).
    fn access(
        &mut self,
        direction: u64,
        len: usize,
        value: u64,
        (read, write): (Exit, Exit),
    ) -> Option<Exit> {
        match direction {
            0 => self.run.leave_with(Pending::Read, &[0; 8][..len], read),
            1 => {
                let value = value.to_le_bytes();
                self.run.leave_with(Pending::Success, &value[..len], write)
            }
            _ => self.run.finish_call(INVALID_OPERAND),
        }
    }

    /// Returns whether that is a shared address of the TD.
    pub(super) fn is_shared(&self, gpa: u64) -> bool {
        self.is_legal(gpa) && self.td.mask.split(Gpa::new(gpa)).1 == Privacy::Shared
    }

    /// Returns whether the address has no bit above the shared one, the TD's highest.
    pub(super) fn is_legal(&self, gpa: u64) -> bool {
        gpa < self.td.mask.bits() << 1
    }

    /// R12 the MSR, R13 the value to write. Those of the local APIC are the platform's, if that has one.
    fn msr(&mut self) -> Option<Exit> {
        let r = self.run.regs;
        let Ok(index) = u32::try_from(r.r12) else {
            return self.run.finish_call(INVALID_OPERAND);
        };
        let value = r.r13;
        let platform = self.td.params.irqchip != Irqchip::None;
        match r.r11 {
            function::RDMSR if platform => self.read_apic(index),
            function::RDMSR => self.run.leave(Pending::MsrRead, Exit::ReadMsr { index }),
            _ if platform => self.write_apic(index, value),
            _ => self.leave_to_write(index, value),
        }
    }

    fn read_apic(&mut self, index: u32) -> Option<Exit> {
        let id = self.record.id;
        match self.td.on_td_port(|port| port.td_read_msr(id, index)) {
            Ok(Some(value)) => {
                self.run.regs.r11 = value;
                self.run.finish_call(SUCCESS)
            }
            Err(Error::Invalid(..)) => self.run.finish_call(INVALID_OPERAND),
            _ => self.run.leave(Pending::MsrRead, Exit::ReadMsr { index }),
        }
    }

    fn write_apic(&mut self, index: u32, value: u64) -> Option<Exit> {
        let id = self.record.id;
        match self
            .td
            .on_td_port(|port| port.td_write_msr(id, index, value))
        {
            Ok(true) => self.run.finish_call(SUCCESS),
            Err(Error::Invalid(..)) => self.run.finish_call(INVALID_OPERAND),
            _ => self.leave_to_write(index, value),
        }
    }

    fn leave_to_write(&mut self, index: u32, value: u64) -> Option<Exit> {
        self.run
            .leave(Pending::MsrWrite, Exit::WriteMsr { index, value })
    }

    /// R12 of 0: all basic sub-functions are there, which zeros say. R12 of 1: the embedder knows the
    /// other ones.
    fn vm_call_info(&mut self) -> Option<Exit> {
        match self.run.regs.r12 {
            0 => {
                let r = &mut self.run.regs;
                [r.r11, r.r12, r.r13, r.r14] = [0; 4];
                self.run.finish_call(SUCCESS)
            }
            leaf @ 1 => {
                let values = Pending::Request {
                    default: SUCCESS,
                    values: true,
                };
                self.run
                    .leave(values, Exit::Tdx(TdxRequest::GetTdVmCallInfo { leaf }))
            }
            _ => self.run.finish_call(INVALID_OPERAND),
        }
    }

    /// R12 a shared buffer, R13 its length.
    fn get_quote(&mut self) -> Option<Exit> {
        let r = self.run.regs;
        if !self.is_shared(r.r12) {
            return self.run.finish_call(INVALID_OPERAND);
        }
        let gpa = Gpa::new(r.r12 & !self.td.mask.bits());
        self.request(TdxRequest::GetQuote { gpa, bytes: r.r13 })
    }

    fn setup_event_notify(&mut self) -> Option<Exit> {
        match u8::try_from(self.run.regs.r12) {
            Ok(vector) if u64::from(vector) >= FIRST_VECTOR => {
                self.request(TdxRequest::SetupEventNotify { vector })
            }
            _ => self.run.finish_call(INVALID_OPERAND),
        }
    }

    /// Leaves with a request that an embedder may not offer.
    fn request(&mut self, request: TdxRequest) -> Option<Exit> {
        let status = Pending::Request {
            default: SUBFUNC_UNSUPPORTED,
            values: false,
        };
        self.run.leave(status, Exit::Tdx(request))
    }

    /// All registers, in the order of their numbers; the host does not see RSP and RBP. The guest may
    /// be run again.
    fn fatal_error(&mut self) -> Option<Exit> {
        const TDCALL: u64 = 77;
        let r = self.run.regs;
        let registers = [
            TDCALL, r.rcx, r.rdx, r.rbx, 0, 0, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
            r.r13, r.r14, r.r15,
        ];
        let kind = SYSTEM_EVENT_TDX_FATAL;
        let words = registers.map(u64::to_ne_bytes);
        let exit = Exit::SystemEvent { kind };
        self.run
            .leave_with(Pending::Success, words.as_flattened(), exit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hypervisor_is_kvm_without_features_and_each_vcpu_has_its_x2apic_id() {
        let leaf = |leaf, subleaf| host_leaf(leaf, subleaf, VcpuId(3));
        let [last, name @ ..] = leaf(0x4000_0000, 0);
        assert_eq!(last, 0x4000_0001);
        assert_eq!(name.map(u32::to_le_bytes).as_flattened(), KVM);
        assert_eq!(leaf(0x4000_0001, 0), [0; 4]);
        for topology in [0xb, 0x1f] {
            assert_eq!(leaf(topology, 0), [0, 0, 0, 3]);
            assert_eq!(leaf(topology, 0x101), [0, 0, 1, 3]);
        }
        assert_eq!(leaf(1, 0), [0; 4]);
    }
}
