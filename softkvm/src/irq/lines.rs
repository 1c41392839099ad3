//! Lines and messages from user space.

use kvm_ops::Msi;
use kvm_ops_uapi::U32;
use kvm_ops_uapi::checks::{irq_line, signal_msi};
use kvm_ops_uapi::irq::MSI_VALID_DEVID;
use kvm_ops_uapi::vm::{self as uapi, IrqLevel};

use super::Source;
use super::routes::is_x2apic_address;
use crate::refusal::{Result, ensure};
use crate::vm::{IrqchipKind, Vm};
use crate::{Process, arg};

/// `KVM_IRQ_LINE`, and `KVM_IRQ_LINE_STATUS`, which says what became of it.
pub(crate) fn irq_line(vm: &Vm, process: &dyn Process, argument: u64, tells: bool) -> Result<i64> {
    use irq_line::{COPY, COPY_BACK, IRQCHIP};
    let mut line: IrqLevel = arg::read(process, argument, COPY)?;
    ensure(vm.lock().irqchip_kind() != IrqchipKind::None, IRQCHIP)?;
    vm.require_wires()?;
    let high = line.level.get() != 0;
    let taken = vm.irq().set_line(line.irq.get(), Source::User, high);
    if tells {
        // The status has the place of the number.
        line.irq = U32::new(taken as u32);
        arg::write(process, argument, &line, COPY_BACK)?;
    }
    Ok(0)
}

/// `KVM_SIGNAL_MSI`: the number of local APICs that took it.
pub(crate) fn signal_msi(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    use signal_msi::{ADDRESS, COPY, FLAGS, IRQCHIP, TARGET};
    let given: uapi::Msi = arg::read(process, argument, COPY)?;
    let (kind, x2apic) = (vm.lock().irqchip_kind(), vm.irq().has_x2apic_format());
    ensure(kind != IrqchipKind::None, IRQCHIP)?;
    ensure(given.flags.get() & !MSI_VALID_DEVID == 0, FLAGS)?;
    let address = u64::from(given.address_hi.get()) << 32 | u64::from(given.address_lo.get());
    let msi = Msi {
        address,
        data: given.data.get(),
    };
    ensure(!x2apic || is_x2apic_address(msi), ADDRESS)?;
    vm.require_wires()?;
    ensure(vm.irq().send(msi), TARGET)?;
    Ok(1)
}
