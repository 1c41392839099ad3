//! Device attributes of a vCPU: the offset of its TSC.

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::vcpu_attr::{ADDRESS, COPY, GROUP, KNOWN};
use kvm_ops_uapi::system::{ATTR_TSC_OFFSET, DeviceAttr, GROUP_TSC};

use super::cpu::TSC;
use crate::file::VcpuFile;
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

/// The address of the value.
fn address(process: &dyn Process, argument: u64) -> Result<u64> {
    let args: DeviceAttr = arg::read(process, argument, COPY)?;
    ensure(args.group.get() == GROUP_TSC, GROUP)?;
    ensure(args.attr.get() == ATTR_TSC_OFFSET, KNOWN)?;
    Ok(args.addr.get())
}

pub(super) fn has(process: &dyn Process, argument: u64) -> Result<i64> {
    address(process, argument).map(|_| 0)
}

/// The host's TSC is the VM's clock. A vCPU that nothing executes has no offset.
pub(super) fn get(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let address = address(process, argument)?;
    let state = file.state();
    let tsc = state.cpu.msr(TSC).zip(state.cpu.clock());
    let offset = tsc.map_or(0, |(tsc, clock)| tsc.wrapping_sub(clock));
    arg::write(process, address, &U64::new(offset), ADDRESS)?;
    Ok(0)
}

pub(super) fn set(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let address = address(process, argument)?;
    let offset: U64 = arg::read(process, address, ADDRESS)?;
    let mut state = file.state();
    if let Some(clock) = state.cpu.clock() {
        let khz = state.tsc_khz;
        let tsc = file.vm.lock().set_tsc_offset(offset.get(), clock, khz);
        state.cpu.set_tsc(tsc);
    }
    Ok(0)
}
