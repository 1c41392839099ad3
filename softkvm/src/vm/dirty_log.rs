//! `KVM_GET_DIRTY_LOG`. No guest code runs, so no page is dirty.

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::memory::{DirtyLog, USER_SLOTS};
use zerocopy::IntoBytes;

use super::{Vm, slots};
use crate::refusal::Result;
use crate::{Process, Refusal};

/// Bytes of a bitmap that are written at once.
const CHUNK: usize = 4096;

pub(super) fn get(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let fault = |_| Refusal::from(Errno::EFAULT);
    let mut log = DirtyLog::default();
    process.read(argument, log.as_mut_bytes()).map_err(fault)?;
    let number = log.slot.get();
    if slots::space(number) >= vm.address_spaces() || number & 0xffff >= USER_SLOTS {
        return Err(Errno::EINVAL.into());
    }
    let pages = {
        let state = vm.lock();
        let slot = state.slots.get(number).filter(|slot| slot.logs_dirty());
        slot.ok_or(Errno::ENOENT)?.pages()
    };
    let bytes = pages.div_ceil(64) * 8;
    for offset in (0..bytes).step_by(CHUNK) {
        let len = (bytes - offset).min(CHUNK as u64) as usize;
        let at = log.dirty_bitmap.get().wrapping_add(offset);
        process.write(at, &[0; CHUNK][..len]).map_err(fault)?;
    }
    Ok(0)
}
