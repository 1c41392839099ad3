//! `KVM_SET_MEMORY_ATTRIBUTES`.

use kvm_ops::{Gfn, Privacy};
use kvm_ops_uapi::checks::attributes::{COPY, FLAGS, KNOWN, MEMORY, PAGES, SIZE};
use kvm_ops_uapi::memory::{ATTRIBUTE_PRIVATE, MemoryAttributes};

use super::{Vm, dirty_log, lent};
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

const PAGE: u64 = 4096;

pub(super) fn set(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: MemoryAttributes = arg::read(process, argument, COPY)?;
    let (address, size) = (args.address.get(), args.size.get());
    ensure(args.flags.get() == 0, FLAGS)?;
    let attributes = args.attributes.get();
    ensure(attributes & !vm.supported_attributes() == 0, KNOWN)?;
    ensure(size != 0 && address.checked_add(size).is_some(), SIZE)?;
    ensure(
        address.is_multiple_of(PAGE) && size.is_multiple_of(PAGE),
        PAGES,
    )?;
    let to = match attributes & ATTRIBUTE_PRIVATE {
        0 => Privacy::Shared,
        _ => Privacy::Private,
    };
    let (first, pages) = (address / PAGE, size / PAGE);
    vm.kernel().faults().allocate(MEMORY)?;
    let mut guard = vm.lock();
    let state = &mut *guard;
    dirty_log::harvest_range(state, first, pages)?;
    let changes = !state.attributes.all(Gfn::new(first), pages, to)?;
    state.flushes += u64::from(changes);
    state.attributes.set(Gfn::new(first), pages, to)?;
    if let Some(machine) = &mut state.machine {
        machine.convert((first, pages), &state.slots, &state.attributes)?;
    }
    if let Some(vm) = state.guarded() {
        lent::set_attributes(vm, &state.slots, &state.attributes, (address, size))?;
    }
    Ok(0)
}
