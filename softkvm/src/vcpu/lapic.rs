//! `KVM_GET_LAPIC` and `KVM_SET_LAPIC`.

use kvm_ops::sim::SimVcpu;
use kvm_ops_uapi::checks::lapic::{APIC, COPY, COPY_BACK, ID, PROTECTED};
use kvm_ops_uapi::irqchip::LapicState;
use kvm_ops_uapi::system::vm_type;

use super::Cpu;
use crate::file::VcpuFile;
use crate::machine;
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

/// The place of the number in the page.
const ID_AT: usize = 0x20;

fn require_apic(file: &VcpuFile) -> Result<()> {
    ensure(file.vm.lock().has_apics(), APIC)
}

/// The registers of a TD's are the module's.
fn require_readable(file: &VcpuFile) -> Result<()> {
    ensure(file.vm.kind() != vm_type::TDX, PROTECTED)
}

/// Works on the vCPU, if its APIC's registers are in the machine.
fn with_port<T>(file: &VcpuFile, work: impl FnOnce(&mut SimVcpu, bool) -> Option<T>) -> Result<T> {
    let mut state = file.state();
    let Cpu::Processor(vcpu) = &mut state.cpu else {
        return Err(APIC.into());
    };
    let port = machine::port_mut(vcpu).ok_or(APIC)?;
    let is_x2apic = port.is_in_x2apic_mode();
    work(port, is_x2apic).ok_or(APIC.into())
}

fn id(page: &[u8; 1024]) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[ID_AT..ID_AT + 4]);
    u32::from_le_bytes(bytes)
}

/// `KVM_GET_LAPIC`. The number is in the upper 8 bits, unless x2APIC format makes it 32 bits wide.
pub(super) fn get(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_apic(file)?;
    require_readable(file)?;
    let wide = file.vm.irq().has_x2apic_format();
    let regs = with_port(file, |port, is_x2apic| {
        let mut page = port.apic_registers()?;
        if is_x2apic && !wide {
            let number = id(&page) << 24;
            page[ID_AT..ID_AT + 4].copy_from_slice(&number.to_le_bytes());
        }
        Some(page)
    })?;
    arg::write(process, argument, &LapicState { regs }, COPY_BACK)?;
    Ok(0)
}

/// `KVM_SET_LAPIC`.
pub(super) fn set(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_apic(file)?;
    let given: LapicState = arg::read(process, argument, COPY)?;
    require_readable(file)?;
    let (wide, number) = (file.vm.irq().has_x2apic_format(), file.vcpu.id);
    with_port(file, |port, is_x2apic| {
        if is_x2apic && wide && id(&given.regs) != number {
            return Some(Err(ID.into()));
        }
        port.set_apic_registers(&given.regs).then_some(Ok(0))
    })?
}
