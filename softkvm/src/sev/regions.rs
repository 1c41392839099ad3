//! Regions that are pinned for a SEV guest.

use kvm_ops_uapi::checks::{reg_region, unreg_region};
use kvm_ops_uapi::{Errno, sev::EncRegion};

use super::pin::{self, Use};
use crate::refusal::{Result, ensure};
use crate::vm::Vm;
use crate::{Process, Refusal, arg};

fn region(region: &EncRegion) -> kvm_ops::EncRegion {
    kvm_ops::EncRegion {
        address: region.addr.get(),
        bytes: region.size.get(),
    }
}

pub(crate) fn register(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    use reg_region::{COPY, MEMORY, MIRROR, PINNED, RANGE, SEV};
    let args: EncRegion = arg::read(process, argument, COPY)?;
    let mut state = vm.lock();
    ensure(state.sev.is_active(), SEV)?;
    ensure(!state.sev.is_mirror(), MIRROR)?;
    vm.kernel().faults().allocate(MEMORY)?;
    let range = (args.addr.get(), args.size.get());
    let locked = state.sev.locked_pages();
    pin::require(process, locked, range, Use::Read, (RANGE, PINNED))?;
    let engine = state.sev.engine(SEV)?;
    engine.register(region(&args)).map_err(Refusal::from)?;
    Ok(0)
}

pub(crate) fn unregister(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    use unreg_region::{COPY, KNOWN, MIRROR, SEV};
    let args: EncRegion = arg::read(process, argument, COPY)?;
    let mut state = vm.lock();
    ensure(!state.sev.is_mirror(), MIRROR)?;
    let engine = state.sev.engine(SEV)?;
    engine
        .unregister(region(&args))
        .map_err(|error| match Errno(error.errno()) {
            Errno::EINVAL => KNOWN.into(),
            errno => Refusal::from(errno),
        })?;
    Ok(0)
}
