//! The capabilities of KVM that matter here, each tried.

use std::os::fd::AsRawFd;

use kvm_bindings::*;
use kvm_ops::{
    Call, EncParams, Error, Gpa, HeldPort, Host, Irqchip, Result, SevParams, Tech, VcpuId,
    VmParams, VmPort,
};
use kvm_ops_uapi::system::vm_type;

use crate::error::from_errno;
use crate::vm::enable;
use crate::{EventFd, IoEvent, IoEventMatch, KvmHost, KvmVm, sys};

/// The VM type of normal VMs with private memory.
const PRIVATE_VM: &str = "KVM_X86_SW_PROTECTED_VM";

/// One capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its name in `linux/kvm.h`.
    pub name: &'static str,
    /// Its use.
    pub purpose: &'static str,
    /// The answer of `KVM_CHECK_EXTENSION`: 0 for no; a number where the capability has one.
    pub answer: u32,
    /// The result of the operation itself, with its errno, if it was tried: some modules claim
    /// capabilities that they refuse.
    pub tried: Option<std::result::Result<(), i32>>,
}

impl Capability {
    /// True if it can be used: the trial counts more than the claim.
    pub fn is_available(&self) -> bool {
        match self.tried {
            Some(result) => result.is_ok(),
            None => self.answer != 0,
        }
    }

    /// True if KVM claims it and refuses it.
    pub fn is_claimed_only(&self) -> bool {
        self.answer != 0 && !self.is_available()
    }
}

macro_rules! untried {
    ($host:ident, $($name:ident => $purpose:literal,)*) => {
        vec![$( Capability {
            name: stringify!($name),
            purpose: $purpose,
            answer: $host.check($name),
            tried: None,
        }, )*]
    };
}

/// Asks for each capability, and tries those that can be tried on short-lived VMs.
pub(crate) fn probe(host: &KvmHost) -> Vec<Capability> {
    let mut list = untried! { host,
        KVM_CAP_NR_VCPUS => "vCPUs in a VM, recommended",
        KVM_CAP_MAX_VCPUS => "vCPUs in a VM, at most",
        KVM_CAP_NR_MEMSLOTS => "memory slots in a VM, at most",
        KVM_CAP_IRQCHIP => "PIC, IOAPIC and local APICs in the kernel",
        KVM_CAP_PIT2 => "the timer chip in the kernel",
        KVM_CAP_SPLIT_IRQCHIP => "only the local APICs in the kernel",
        KVM_CAP_IRQFD => "interrupts from an eventfd",
        KVM_CAP_IOEVENTFD => "eventfds signalled by guest writes",
        KVM_CAP_SIGNAL_MSI => "interrupt messages",
        KVM_CAP_READONLY_MEM => "read-only slots, for ROMs",
        KVM_CAP_SET_TSS_ADDR => "pages for real mode on VMX",
        KVM_CAP_SET_IDENTITY_MAP_ADDR => "the identity map for real mode on VMX",
        KVM_CAP_IMMEDIATE_EXIT => "kicks that are never lost",
        KVM_CAP_SET_GUEST_DEBUG => "single step and breakpoints",
        KVM_CAP_TSC_CONTROL => "another TSC frequency than the host's",
        KVM_CAP_TSC_DEADLINE_TIMER => "the APIC timer's TSC-deadline mode",
        KVM_CAP_X86_USER_SPACE_MSR => "MSR accesses as exits",
        KVM_CAP_X86_MSR_FILTER => "a choice of MSRs that become exits",
        KVM_CAP_X2APIC_API => "more than 255 vCPUs",
        KVM_CAP_DISABLE_QUIRKS2 => "hypercall instructions left as the guest wrote them",
        KVM_CAP_EXIT_HYPERCALL => "requests to convert memory as exits",
        KVM_CAP_USER_MEMORY2 => "slots with private memory",
        KVM_CAP_GUEST_MEMFD => "memory that only guests reach",
        KVM_CAP_MEMORY_ATTRIBUTES => "pages marked private or shared",
        KVM_CAP_PRE_FAULT_MEMORY => "pages mapped before the guest touches them",
        KVM_CAP_MEMORY_FAULT_INFO => "where a fault happened, on exits",
        KVM_CAP_VM_COPY_ENC_CONTEXT_FROM => "mirror VMs of a SEV guest",
        KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM => "a SEV guest moved to another VM",
    };
    list.push(Capability {
        name: PRIVATE_VM,
        purpose: "normal VMs with private memory (CONFIG_KVM_SW_PROTECTED_VM)",
        answer: host.vm_types() >> vm_type::SW_PROTECTED & 1,
        tried: None,
    });
    for capability in &mut list {
        capability.tried =
            attempt(host, capability.name).map(|result| result.map_err(|error| error.errno()));
    }
    list
}

/// Uses the capability on a VM made for it. `None` where that takes more than a moment (a guest that
/// runs, or 256 vCPUs) and no module is known to claim it falsely.
fn attempt(host: &KvmHost, name: &str) -> Option<Result<()>> {
    let normal = |irqchip| {
        let params = VmParams {
            vcpus: 1,
            irqchip,
            enc: EncParams::Default,
        };
        host.create_vm(Tech::normal(host.vendor()), &params)
    };
    let on = |irqchip, operation: fn(&KvmVm) -> Result<()>| {
        Some(normal(irqchip).and_then(|vm| operation(&vm)))
    };
    // An address that lies in no slot and no device.
    const NOWHERE: Gpa = Gpa::new(0x1000);
    match name {
        "KVM_CAP_IRQCHIP" | "KVM_CAP_PIT2" => on(Irqchip::Full, |_| Ok(())),
        "KVM_CAP_SPLIT_IRQCHIP" => on(Irqchip::Split, |_| Ok(())),
        "KVM_CAP_IRQFD" => on(Irqchip::Full, |vm| {
            let event = event()?;
            vm.register_irqfd(&event, 5)?;
            vm.unregister_irqfd(&event, 5)
        }),
        "KVM_CAP_IOEVENTFD" => on(Irqchip::None, |vm| {
            let (event, at) = (event()?, IoEvent::Mmio(NOWHERE));
            vm.register_ioevent(&event, at, IoEventMatch::Any)?;
            vm.unregister_ioevent(&event, at, IoEventMatch::Any)
        }),
        "KVM_CAP_SET_TSS_ADDR" => on(Irqchip::None, |vm| vm.set_tss_addr(Gpa::new(0xfeff_d000))),
        "KVM_CAP_SET_IDENTITY_MAP_ADDR" => on(Irqchip::None, |vm| {
            vm.set_identity_map_addr(Gpa::new(0xfeff_c000))
        }),
        "KVM_CAP_GUEST_MEMFD" => on(Irqchip::None, |vm| {
            vm.create_guest_memfd(0x1000, 0).map(drop)
        }),
        "KVM_CAP_MEMORY_ATTRIBUTES" => on(Irqchip::None, |vm| {
            sys::set_attributes(vm.fd(), NOWHERE.get(), 0x1000, true)
        }),
        "KVM_CAP_PRE_FAULT_MEMORY" => on(Irqchip::None, |vm| {
            let vcpu = vm.create_vcpu(VcpuId(0))?;
            match sys::pre_fault(vcpu.fd(), NOWHERE.get(), 0x1000) {
                // No slot is there, which only a kernel with the operation finds out.
                Err(error) if error.errno() == libc::ENOENT => Ok(()),
                result => result.map(drop),
            }
        }),
        PRIVATE_VM => Some(private_vm(host)),
        "KVM_CAP_VM_COPY_ENC_CONTEXT_FROM" => context_from(host, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM),
        "KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM" => context_from(host, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM),
        _ => None,
    }
}

/// Makes a normal VM with private memory.
fn private_vm(host: &KvmHost) -> Result<()> {
    let params = VmParams {
        enc: EncParams::Private,
        ..VmParams::new(1)
    };
    let vm = host.create_vm(Tech::normal(host.vendor()), &params)?;
    sys::set_attributes(vm.fd(), 0, kvm_ops::PAGE_SIZE, true)
}

/// Takes a context over from another VM. On a host without SEV guests there is none, and the refusal says that the capability
/// is claimed only. `None` where no ASID is free for the trial.
fn context_from(host: &KvmHost, cap: u32) -> Option<Result<()>> {
    let normal = || host.create_vm(Tech::normal(host.vendor()), &VmParams::new(1));
    if host.create_vm(Tech::Sev, &VmParams::new(1)).is_err() {
        return Some(normal().and_then(|source| take_from(&normal()?, cap, &source)));
    }
    let guest = |params| {
        let params = VmParams {
            enc: EncParams::Sev(Box::new(params)),
            ..VmParams::new(1)
        };
        host.create_vm(Tech::Sev, &params)
    };
    let source = guest(SevParams {
        movable: true,
        ..SevParams::default()
    });
    let taken = source.and_then(|source| {
        source.init().map_err(|failure| failure.error)?;
        let taker = guest(SevParams {
            arrives: true,
            ..SevParams::default()
        })?;
        take_from(&taker, cap, &source)
    });
    match taken {
        Err(Error::NoKeyId) => None,
        taken => Some(taken),
    }
}

/// Enables a capability whose argument is another VM.
fn take_from(taker: &KvmVm, cap: u32, source: &KvmVm) -> Result<()> {
    enable(taker.fd(), cap, source.fd().as_raw_fd() as u64)
}

fn event() -> Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|error| from_errno(Call::Irqfd, error.raw_os_error().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_tried_counts_more_than_what_was_said() {
        for (answer, tried, available, claimed_only) in [
            (0, None, false, false),
            (1, None, true, false),
            (1, Some(Ok(())), true, false),
            (1, Some(Err(25)), false, true),
            (0, Some(Err(25)), false, false),
            (0, Some(Ok(())), true, false),
        ] {
            let capability = Capability {
                name: "X",
                purpose: "",
                answer,
                tried,
            };
            assert_eq!(capability.is_available(), available);
            assert_eq!(capability.is_claimed_only(), claimed_only);
        }
    }
}
