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

/// The TSCs of a VM's vCPUs, which are kept in step (Linux `kvm_synchronize_tsc`). All numbers are ticks, of which the VM's
/// clock and each TSC make the same.
#[derive(Default)]
pub(super) struct Tscs {
    /// TSC minus the VM's clock, of the vCPUs that are in step.
    offset: u64,
    /// The last write, or creation of a vCPU, which writes 0.
    last: Option<Write>,
    written_by_user: bool,
}

struct Write {
    value: u64,
    clock: u64,
    khz: u32,
}

impl Tscs {
    /// Returns what a vCPU's TSC becomes: one that is new (`None`), or that is written 0, takes that of the others, and so does
    /// one that is written within a second of them, for the program meant the same then. Any other value is taken as it
    /// is, and is that of later vCPUs.
    pub(super) fn synchronise(&mut self, written: Option<u64>, clock: u64, khz: u32) -> u64 {
        let value = written.unwrap_or(0);
        let is_near = |last: &Write| {
            let expected = last.value.wrapping_add(clock.wrapping_sub(last.clock));
            let second = u64::from(khz) * 1000;
            value < expected.wrapping_add(second) && value.wrapping_add(second) > expected
        };
        let is_meant = |last: &Write| value == 0 || self.written_by_user && is_near(last);
        let last = self.last.as_ref().filter(|last| last.khz == khz);
        if !last.is_some_and(is_meant) {
            self.offset = value.wrapping_sub(clock);
        }
        self.written_by_user |= written.is_some();
        self.last = Some(Write { value, clock, khz });
        clock.wrapping_add(self.offset)
    }

    /// Returns what a vCPU's TSC becomes by its distance from the VM's clock. It counts as a write of that value.
    pub(super) fn set_offset(&mut self, offset: u64, clock: u64, khz: u32) -> u64 {
        let value = clock.wrapping_add(offset);
        self.offset = offset;
        self.written_by_user = true;
        self.last = Some(Write { value, clock, khz });
        value
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

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 1_000_000;
    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_later_vcpu_has_the_tsc_that_was_written_to_the_first() {
        let mut tscs = Tscs::default();
        assert_eq!(tscs.synchronise(None, 0, KHZ), 0);
        assert_eq!(tscs.synchronise(Some(200), 10, KHZ), 200);
        for clock in [20, 500] {
            assert_eq!(tscs.synchronise(None, clock, KHZ), clock + 190);
            assert_eq!(tscs.synchronise(Some(0), clock, KHZ), clock + 190);
        }
    }

    #[test]
    fn writes_within_a_second_of_each_other_mean_the_same_but_not_the_first() {
        let mut tscs = Tscs::default();
        tscs.synchronise(None, 0, KHZ);
        let first = SECOND / 2;
        assert_eq!(tscs.synchronise(Some(first), 100, KHZ), first);
        assert_eq!(
            tscs.synchronise(Some(first + SECOND), 100, KHZ),
            first + SECOND,
            "a second away"
        );
        let near = first + SECOND + SECOND - 1;
        assert_eq!(tscs.synchronise(Some(near), 200, KHZ), first + SECOND + 100);
    }

    #[test]
    fn a_vcpu_of_another_frequency_is_not_in_step() {
        let mut tscs = Tscs::default();
        tscs.synchronise(Some(5000), 0, KHZ);
        assert_eq!(tscs.synchronise(Some(0), 10, KHZ / 2), 0);
        assert_eq!(tscs.synchronise(None, 20, KHZ / 2), 10);
    }
}
