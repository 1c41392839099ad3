//! Calls that prepare what a software processor does not need: they are checked, and do nothing.

use kvm_ops_uapi::{Errno, U64};
use zerocopy::IntoBytes;

use super::Vm;
use crate::Process;
use crate::refusal::Result;

/// The three pages of `KVM_SET_TSS_ADDR` end below 4 GiB.
const LAST_TSS: u64 = (1 << 32) - 3 * 4096;
/// The fewest pages that `KVM_SET_NR_MMU_PAGES` takes.
const MIN_MMU_PAGES: u64 = 64;

pub(super) fn set_tss_addr(address: u64) -> Result<i64> {
    if address > LAST_TSS {
        return Err(Errno::EINVAL.into());
    }
    Ok(0)
}

/// `KVM_SET_IDENTITY_MAP_ADDR`: before the first vCPU.
pub(super) fn set_identity_map(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut address = U64::ZERO;
    let read = process.read(argument, address.as_mut_bytes());
    read.map_err(|_| Errno::EFAULT)?;
    if !vm.lock().vcpus.is_empty() {
        return Err(Errno::EINVAL.into());
    }
    Ok(0)
}

pub(super) fn set_nr_mmu_pages(pages: u64) -> Result<i64> {
    if pages < MIN_MMU_PAGES {
        return Err(Errno::EINVAL.into());
    }
    Ok(0)
}
