//! Regions that are pinned for a SEV guest.

use kvm_ops_uapi::checks::{reg_region, unreg_region};
use kvm_ops_uapi::{Errno, sev::EncRegion};

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
    let mirror = state.sev.is_mirror();
    let engine = state.sev.engine(SEV)?;
    ensure(!mirror, MIRROR)?;
    vm.kernel().faults().allocate(MEMORY)?;
    let (address, size) = (args.addr.get(), args.size.get());
    ensure(size != 0 && address.checked_add(size).is_some(), RANGE)?;
    ensure(process.is_mapped(address, size), PINNED)?;
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
