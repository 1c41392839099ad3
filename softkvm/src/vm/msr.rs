//! The guest's MSRs that are user space's: `KVM_X86_SET_MSR_FILTER` and `KVM_CAP_X86_USER_SPACE_MSR`.

use kvm_ops::sim::{MsrFilter, MsrLeaves, MsrRange};
use kvm_ops_uapi::checks::msr_filter::{ACCESS, BITMAP, COPY, COUNT, FLAGS, RANGE_FLAGS, RANGES};
use kvm_ops_uapi::checks::user_space_msr::MASK;
use kvm_ops_uapi::vm::msr_filter_flags::{DEFAULT_DENY, READ, WRITE};
use kvm_ops_uapi::vm::{MSR_FILTER_BITMAP_SIZE, MsrFilterRange, msr_exit_reason};

use super::Vm;
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

/// `KVM_X86_SET_MSR_FILTER`: the filter takes the place of the last one.
pub(super) fn set_filter(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let given: kvm_ops_uapi::vm::MsrFilter = arg::read(process, argument, COPY)?;
    let flags = given.flags.get();
    ensure(flags & !DEFAULT_DENY == 0, FLAGS)?;
    let allows_others = flags & DEFAULT_DENY == 0;
    let mut ranges = given.ranges.iter().filter(|range| range.nmsrs.get() != 0);
    ensure(ranges.clone().next().is_some() || allows_others, RANGES)?;
    let ranges = ranges.try_fold(Vec::new(), |mut ranges, given| {
        ranges.push(range(process, given)?);
        Ok::<_, crate::Refusal>(ranges)
    })?;
    vm.msrs().set_filter(MsrFilter {
        allows_others,
        ranges,
    });
    Ok(0)
}

fn range(process: &dyn Process, given: &MsrFilterRange) -> Result<MsrRange> {
    let (flags, count) = (given.flags.get(), given.nmsrs.get());
    ensure(flags & !(READ | WRITE) == 0, RANGE_FLAGS)?;
    ensure(flags != 0, ACCESS)?;
    let bytes = count.div_ceil(64) as usize * 8;
    ensure(bytes <= MSR_FILTER_BITMAP_SIZE, COUNT)?;
    Ok(MsrRange {
        first: given.base.get(),
        count,
        reads: flags & READ != 0,
        writes: flags & WRITE != 0,
        allowed: arg::read_bytes(process, given.bitmap.get(), bytes, BITMAP)?,
    })
}

/// `KVM_CAP_X86_USER_SPACE_MSR`: the failing accesses that leave.
pub(super) fn leave_for(vm: &Vm, mask: u64) -> Result<i64> {
    use msr_exit_reason::{ALL, FILTER, INVAL, UNKNOWN};
    ensure(mask & !ALL == 0, MASK)?;
    vm.msrs().set_leaves(MsrLeaves {
        filtered: mask & FILTER != 0,
        unknown: mask & UNKNOWN != 0,
        invalid: mask & INVAL != 0,
    });
    Ok(0)
}
