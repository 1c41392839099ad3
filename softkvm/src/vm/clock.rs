//! Time.

use std::time::Instant;

use kvm_ops_uapi::vm::ClockData;
use kvm_ops_uapi::{Errno, U64};
use zerocopy::IntoBytes;

use super::Vm;
use crate::refusal::Result;
use crate::{Process, Refusal};

/// kHz of every TSC unless the VM is told otherwise.
const TSC_KHZ: u32 = 1_000_000;
/// KVM_CLOCK_REALTIME and KVM_CLOCK_HOST_TSC.
const KNOWN_FLAGS: u32 = 1 << 2 | 1 << 3;

pub(super) struct Clock {
    since: Instant,
    /// Nanoseconds at `since`.
    offset: u64,
    tsc_khz: u32,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            offset: 0,
            tsc_khz: TSC_KHZ,
        }
    }
}

impl Clock {
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn now(&self) -> u64 {
        self.offset
            .wrapping_add(self.since.elapsed().as_nanos() as u64)
    }
}

/// `KVM_SET_TSC_KHZ` on a VM: before the first vCPU. 0 means the host's frequency.
pub(super) fn set_tsc_khz(vm: &Vm, khz: u64) -> Result<i64> {
    let mut state = vm.lock();
    let khz = u32::try_from(khz).map_err(|_| Errno::EINVAL)?;
    if !state.vcpus.is_empty() {
        return Err(Errno::EINVAL.into());
    }
    state.clock.tsc_khz = if khz == 0 { TSC_KHZ } else { khz };
    Ok(0)
}

pub(super) fn get(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let data = ClockData {
        clock: U64::new(vm.lock().clock.now()),
        ..ClockData::default()
    };
    write(process, argument, data.as_bytes())
}

pub(super) fn set(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let mut data = ClockData::default();
    read(process, argument, data.as_mut_bytes())?;
    if data.flags.get() & !KNOWN_FLAGS != 0 {
        return Err(Errno::EINVAL.into());
    }
    let mut state = vm.lock();
    (state.clock.since, state.clock.offset) = (Instant::now(), data.clock.get());
    Ok(0)
}

fn read(process: &dyn Process, address: u64, into: &mut [u8]) -> Result<()> {
    let read = process.read(address, into);
    read.map_err(|_| Errno::EFAULT.into())
}

fn write(process: &dyn Process, address: u64, bytes: &[u8]) -> Result<i64> {
    let written = process.write(address, bytes);
    written
        .map(|()| 0)
        .map_err(|_| Refusal::from(Errno::EFAULT))
}
