//! Groups of registers that only a vCPU has whose code is executed: FPU, XSAVE, debug registers,
//! events; and XCR0.

use kvm_ops::{VcpuOps, Xcrs as OwnXcrs, Xsave};
use kvm_ops_uapi::Errno;
use kvm_ops_uapi::state::{DebugRegs, Fpu, VcpuEvents, XSAVE_SIZE, Xcrs};
use zerocopy::IntoBytes;

use super::registers::{read, require_fpu, require_readable, write};
use super::sev::or_nothing;
use super::{convert, events};
use crate::file::VcpuFile;
use crate::refusal::Result;
use crate::{Process, Refusal};

/// The order of [`Fpu`]'s fields in the legacy region of an XSAVE area, as pairs of offsets and lengths.
const FPU_IN_XSAVE: [(usize, usize, usize); 9] = [
    (0, 32, 128),
    (128, 0, 2),
    (130, 2, 2),
    (132, 4, 1),
    (134, 6, 2),
    (136, 8, 8),
    (144, 16, 8),
    (152, 160, 256),
    (408, 24, 4),
];
/// Where XSTATE_BV is, and its bits of x87 and SSE.
const XSTATE_BV: usize = 512;
const X87_SSE: u8 = 3;

pub(super) fn get_fpu(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_fpu(file)?;
    let xsave = xsave_of(file)?;
    let mut fpu = Fpu::default();
    for (to, from, len) in FPU_IN_XSAVE {
        fpu.as_mut_bytes()[to..to + len].copy_from_slice(&xsave.as_bytes()[from..from + len]);
    }
    write(process, argument, &fpu)
}

pub(super) fn set_fpu(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let fpu: Fpu = read(process, argument)?;
    require_fpu(file)?;
    let mut state = file.state();
    if state.cpu.is_protected() {
        return Ok(0);
    }
    let vcpu = state.cpu.require_processor()?;
    let mut xsave = vcpu.xsave()?;
    let area = xsave.as_bytes_mut();
    for (from, to, len) in FPU_IN_XSAVE {
        area[to..to + len].copy_from_slice(&fpu.as_bytes()[from..from + len]);
    }
    area[XSTATE_BV] |= X87_SSE;
    vcpu.set_xsave(&xsave).map_err(|_| Errno::EINVAL)?;
    Ok(0)
}

/// Extended state, as after power-on where it is the guest's secret.
fn xsave_of(file: &VcpuFile) -> Result<Xsave> {
    let mut state = file.state();
    match state.cpu.is_protected() {
        true => Ok(Xsave::initial()),
        false => Ok(state.cpu.require_processor()?.xsave()?),
    }
}

pub(super) fn get_xsave(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_fpu(file)?;
    let xsave = xsave_of(file)?;
    let mut area = [0; XSAVE_SIZE];
    let bytes = xsave.as_bytes();
    let len = bytes.len().min(XSAVE_SIZE);
    area[..len].copy_from_slice(&bytes[..len]);
    let written = process.write(argument, &area);
    written
        .map(|()| 0)
        .map_err(|_| Refusal::from(Errno::EFAULT))
}

pub(super) fn set_xsave(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut area = vec![0; XSAVE_SIZE];
    let read = process.read(argument, &mut area);
    read.map_err(|_| Errno::EFAULT)?;
    let xsave = Xsave::new(area.into())?;
    require_fpu(file)?;
    let mut state = file.state();
    let set = or_nothing(state.cpu.require_processor()?.set_xsave(&xsave));
    set.map_err(|_| Errno::EINVAL)?;
    Ok(0)
}

pub(super) fn get_xcrs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let xcrs = file.state().cpu.xcrs()?;
    write(process, argument, &convert::to_xcrs(&xcrs))
}

/// XCR0 is the one register that there is; others in the list are passed over, as in the kernel.
pub(super) fn set_xcrs(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let given: Xcrs = read(process, argument)?;
    let count = given.nr_xcrs.get() as usize;
    if count > given.xcrs.len() || given.flags.get() != 0 {
        return Err(Errno::EINVAL.into());
    }
    let mut list = given.xcrs[..count].iter();
    let Some(xcr) = list.find(|xcr| xcr.xcr.get() == 0) else {
        return Ok(0);
    };
    let xcrs = OwnXcrs {
        xcr0: xcr.value.get(),
    };
    require_readable(file)?;
    file.state().cpu.set_xcrs(&xcrs)?;
    Ok(0)
}

pub(super) fn get_debug(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    require_readable(file)?;
    let regs = or_nothing(file.state().cpu.require_processor()?.debug_regs())?;
    write(process, argument, &convert::to_debug_regs(&regs))
}

pub(super) fn set_debug(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let given: DebugRegs = read(process, argument)?;
    if given.flags.get() != 0 {
        return Err(Errno::EINVAL.into());
    }
    let regs = convert::from_debug_regs(&given);
    require_readable(file)?;
    let mut state = file.state();
    let set = or_nothing(state.cpu.require_processor()?.set_debug_regs(&regs));
    set.map_err(|_| Errno::EINVAL)?;
    Ok(0)
}

pub(super) fn get_events(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let parts = file.vm.lock().event_parts;
    let waiting = or_nothing(file.state().cpu.require_processor()?.events())?;
    write(process, argument, &events::to_uapi(&waiting, parts))
}

pub(super) fn set_events(file: &VcpuFile, process: &dyn Process, argument: u64) -> Result<i64> {
    let given: VcpuEvents = read(process, argument)?;
    let parts = file.vm.lock().event_parts;
    let mut state = file.state();
    let vcpu = state.cpu.require_processor()?;
    let events = events::from_uapi(&given, parts, &or_nothing(vcpu.events())?)?;
    or_nothing(vcpu.set_events(&events)).map_err(|_| Errno::EINVAL)?;
    Ok(0)
}
