//! guest_memfd: the object. Its pages belong to the file that the caller sees.

use std::sync::Arc;

use kvm_ops_uapi::checks::gmem::{COPY, DESCRIPTOR, FLAGS, MEMORY, SIZE};
use kvm_ops_uapi::checks::{gmem_fallocate, gmem_mmap};
use kvm_ops_uapi::memory::{CreateGuestMemfd, gmem_flags};

use super::{Vm, lent};
use crate::refusal::{Result, ensure};
use crate::{File, Process, arg};

const PAGE: u64 = 4096;
/// FALLOC_FL_KEEP_SIZE.
const KEEP_SIZE: i32 = 1;
/// FALLOC_FL_PUNCH_HOLE.
const PUNCH_HOLE: i32 = 2;

/// An open guest_memfd. It keeps its VM, and slots do not keep it.
pub(crate) struct Gmem {
    vm: Arc<Vm>,
    size: u64,
    flags: u64,
}

impl Gmem {
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn flags(&self) -> u64 {
        self.flags
    }

    pub(crate) fn check_fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<()> {
        check_fallocate(self.size, mode, offset, len)?;
        if mode & PUNCH_HOLE != 0 {
            self.zap((offset as u64, len as u64))?;
        }
        Ok(())
    }

    /// Takes a range away from the guests that have mapped it.
    fn zap(&self, range: (u64, u64)) -> Result<()> {
        let state = self.vm.lock();
        let (slots, attributes) = (&state.slots, &state.attributes);
        state
            .guarded()
            .map_or(Ok(()), |vm| lent::zap(vm, slots, attributes, self, range))
    }
}

impl Drop for Gmem {
    /// Slots that use it have no private memory any more. Never under the VM's lock.
    fn drop(&mut self) {
        if let Err(refusal) = self.zap((0, self.size)) {
            tracing::error!(%refusal, "private pages of a closed guest_memfd stay mapped");
        }
    }
}

/// `KVM_CREATE_GUEST_MEMFD`.
pub(super) fn create(vm: &Arc<Vm>, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: CreateGuestMemfd = arg::read(process, argument, COPY)?;
    let (size, flags) = (args.size.get(), args.flags.get());
    ensure(flags & !vm.gmem_flags() == 0, FLAGS)?;
    ensure(size as i64 > 0 && size.is_multiple_of(PAGE), SIZE)?;
    let number = process.reserve().map_err(|_| DESCRIPTOR)?;
    if let Err(refusal) = vm.kernel().faults().allocate(MEMORY) {
        process.release(number);
        return Err(refusal);
    }
    let vm = Arc::clone(vm);
    process.install(number, File::gmem(Arc::new(Gmem { vm, size, flags })));
    Ok(number.into())
}

/// Checks `mmap` of a guest_memfd with these flags.
pub(crate) fn check_mmap(flags: u64, shared: bool) -> Result<()> {
    ensure(flags & gmem_flags::MMAP != 0, gmem_mmap::ALLOWED)?;
    ensure(shared, gmem_mmap::SHARED)
}

/// Checks `fallocate` of a guest_memfd of that size.
pub(crate) fn check_fallocate(size: u64, mode: i32, offset: i64, len: i64) -> Result<()> {
    let known = mode & !(KEEP_SIZE | PUNCH_HOLE) == 0;
    ensure(known && mode & KEEP_SIZE != 0, gmem_fallocate::MODE)?;
    let page = PAGE as i64;
    // Negative numbers and lengths of 0 do not reach a file.
    let whole = offset >= 0 && len > 0 && offset % page == 0 && len % page == 0;
    ensure(whole, gmem_fallocate::PAGES)?;
    let inside = (offset as u64)
        .checked_add(len as u64)
        .is_some_and(|end| end <= size);
    ensure(mode & PUNCH_HOLE != 0 || inside, gmem_fallocate::SIZE)
}
