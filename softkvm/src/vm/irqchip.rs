//! Interrupt controllers: which exist.

use kvm_ops_uapi::checks::{create_irqchip, split_irqchip};
use kvm_ops_uapi::system::vm_type;
use kvm_ops_uapi::vm::{MAX_IRQ_ROUTES, PIT_SPEAKER_DUMMY, PitConfig};
use kvm_ops_uapi::{Errno, checks::enable_cap};

use super::{State, Vm};
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

#[derive(Default)]
pub(super) struct Irqchip {
    kind: IrqchipKind,
    has_pit: bool,
}

/// The interrupt controllers in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum IrqchipKind {
    #[default]
    None,
    /// Local APICs, I/O APIC and PICs.
    Full,
    /// Local APICs.
    Split,
}

impl Irqchip {
    pub(super) fn kind(&self) -> IrqchipKind {
        self.kind
    }

    pub(super) fn has_pit(&self) -> bool {
        self.has_pit
    }

    pub(super) fn has_apics(&self) -> bool {
        self.kind != IrqchipKind::None
    }

    pub(super) fn is_split(&self) -> bool {
        self.kind == IrqchipKind::Split
    }

    pub(super) fn place(&self) -> kvm_ops::Irqchip {
        match self.kind {
            IrqchipKind::None => kvm_ops::Irqchip::None,
            IrqchipKind::Full => kvm_ops::Irqchip::Full,
            IrqchipKind::Split => kvm_ops::Irqchip::Split,
        }
    }
}

/// `KVM_CREATE_IRQCHIP`.
pub(super) fn create(vm: &Vm) -> Result<i64> {
    let mut state = vm.lock();
    ensure(!state.irqchip.has_apics(), create_irqchip::NONE_YET)?;
    ensure(vm.kind() != vm_type::TDX, create_irqchip::NOT_TD)?;
    ensure(state.vcpus.is_empty(), create_irqchip::NO_VCPU)?;
    state.irqchip.kind = IrqchipKind::Full;
    state.irq.set_full();
    state.sev.set_irqchip(state.irqchip.place())?;
    Ok(0)
}

/// `KVM_CAP_SPLIT_IRQCHIP`.
pub(super) fn split(state: &mut State, reserved: u64) -> Result<i64> {
    ensure(reserved <= MAX_IRQ_ROUTES, split_irqchip::GSIS)?;
    ensure(!state.irqchip.has_apics(), split_irqchip::NONE_YET)?;
    ensure(state.vcpus.is_empty(), split_irqchip::NO_VCPU)?;
    state.irqchip.kind = IrqchipKind::Split;
    state.irq.set_split(reserved as u32);
    state.sev.set_irqchip(state.irqchip.place())?;
    Ok(0)
}

/// `KVM_CREATE_PIT2`: once, beside the I/O APIC and PICs.
pub(super) fn create_pit(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: PitConfig = arg::read(process, argument, enable_cap::COPY)
        .map_err(|_| crate::Refusal::from(Errno::EFAULT))?;
    let mut state = vm.lock();
    if state.irqchip.has_pit {
        return Err(Errno::EEXIST.into());
    }
    if state.irqchip.kind != IrqchipKind::Full {
        return Err(Errno::ENOENT.into());
    }
    state.irqchip.has_pit = true;
    let speaker = args.flags.get() & PIT_SPEAKER_DUMMY != 0;
    state.irq.set_timer(speaker);
    Ok(0)
}
