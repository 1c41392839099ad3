//! INIT_MEM_REGION: private pages with contents.

use kvm_ops::Error;
use kvm_ops_uapi::checks::tdx_init_mem_region::{
    CONTENTS, COPY, FILE, FINALIZED, FLAGS, PRIVATE, RANGE, SIGNAL, SLOT, SOURCE, TWICE, VCPU,
};
use kvm_ops_uapi::tdx::{MEASURE_MEMORY_REGION, TdxInitMemRegion};
use kvm_ops_uapi::{Errno, U64};

use super::command::Call;
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::vcpu::Vcpu;
use crate::vm::State;

const PAGE: u64 = 4096;

/// What is left is written back, also after a failure: the caller goes on with it.
pub(super) fn add(state: &mut State, vcpu: &Vcpu, call: &Call<'_>) -> Result<()> {
    ensure(state.td.has_vcpu(vcpu.id()), VCPU)?;
    ensure(!state.td.is_finalized(), FINALIZED)?;
    ensure(call.flags & !MEASURE_MEMORY_REGION == 0, FLAGS)?;
    let mut region: TdxInitMemRegion = arg::read(call.process, call.data, COPY)?;
    check(state, &region)?;
    let mut done = Ok(());
    while region.nr_pages.get() != 0 {
        done = add_page(state, call, &region);
        if done.is_err() {
            break;
        }
        region.source_addr = U64::new(region.source_addr.get().wrapping_add(PAGE));
        region.gpa = U64::new(region.gpa.get() + PAGE);
        region.nr_pages = U64::new(region.nr_pages.get() - 1);
    }
    arg::write(call.process, call.data, &region, COPY)?;
    done
}

/// Check 5.
fn check(state: &State, region: &TdxInitMemRegion) -> Result<()> {
    let (source, gpa) = (region.source_addr.get(), region.gpa.get());
    ensure(source != 0 && source.is_multiple_of(PAGE), SOURCE)?;
    let bytes = region.nr_pages.get().checked_mul(PAGE);
    let end = bytes.filter(|bytes| *bytes != 0);
    let end = end.and_then(|bytes| gpa.checked_add(bytes)).ok_or(RANGE)?;
    let shared = state.td.shared_bit().unwrap_or(0);
    let is_private = |address: u64| address & shared == 0;
    let whole = gpa.is_multiple_of(PAGE) && is_private(gpa) && is_private(end - 1);
    ensure(whole, RANGE)
}

/// Adds the first page of what is left.
fn add_page(state: &mut State, call: &Call<'_>, left: &TdxInitMemRegion) -> Result<()> {
    ensure(!call.process.signal_pending(), SIGNAL)?;
    let gpa = left.gpa.get();
    let file = state.slots.at(0, gpa).and_then(|slot| slot.file.as_ref());
    ensure(file.ok_or(SLOT)?.is_open(), FILE)?;
    let mut contents = [0; PAGE as usize];
    let source = call.process.read(left.source_addr.get(), &mut contents);
    source.map_err(|_| CONTENTS)?;
    ensure(state.is_private(gpa / PAGE), PRIVATE)?;
    let engine = state.td.engine.as_mut().ok_or(VCPU)?;
    let measured = call.flags & MEASURE_MEMORY_REGION != 0;
    engine
        .add_page(gpa, &contents, measured)
        .map_err(|error| match error {
            Error::Exists(..) => TWICE.into(),
            // The process does not lend the slot's memory.
            Error::NotFound(..) => Errno::ENOMEM.into(),
            error => engine.failed(error).refusal,
        })
}
