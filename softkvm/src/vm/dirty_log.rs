//! `KVM_GET_DIRTY_LOG`, and the logs.

use std::collections::BTreeMap;

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::memory::{DirtyLog, USER_SLOTS};
use zerocopy::IntoBytes;

use super::{Slot, State, Vm, slots};
use crate::refusal::Result;
use crate::{Process, Refusal};

const PAGE: u64 = 4096;

/// What was written of slots, by their number: a bit for each page.
#[derive(Default)]
pub(super) struct Logs(BTreeMap<u32, Vec<u64>>);

impl Logs {
    /// A slot has a log, or no more. One that goes on keeps its bits.
    pub(super) fn keep(&mut self, number: u32, slot: &Slot) {
        if !slot.logs_dirty() {
            self.forget(number);
            return;
        }
        let words = slot.pages().div_ceil(64) as usize;
        self.0.entry(number).or_insert_with(|| vec![0; words]);
    }

    pub(super) fn forget(&mut self, number: u32) {
        self.0.remove(&number);
    }
}

/// Brings a slot's log up to date.
fn harvest(state: &mut State, number: u32) -> Result<()> {
    let State {
        machine,
        slots,
        dirty,
        ..
    } = state;
    let parts = (
        machine.as_ref(),
        slots.get(number),
        dirty.0.get_mut(&number),
    );
    if let (Some(machine), Some(slot), Some(log)) = parts {
        machine.harvest(slot, log)?;
    }
    Ok(())
}

/// Brings the logs of the slots in a range of frames up to date, whose pieces are about to change.
pub(super) fn harvest_range(state: &mut State, first: u64, pages: u64) -> Result<()> {
    let last = first + (pages - 1);
    let met = |slot: &Slot| slot.gpa / PAGE <= last && slot.last() / PAGE >= first;
    let logged = state.slots.iter().filter(|(_, slot)| slot.logs_dirty());
    let numbers: Vec<u32> = logged
        .filter(|(_, slot)| met(slot))
        .map(|(number, _)| number)
        .collect();
    numbers
        .into_iter()
        .try_for_each(|number| harvest(state, number))
}

pub(super) fn get(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let fault = |_| Refusal::from(Errno::EFAULT);
    let mut log = DirtyLog::default();
    process.read(argument, log.as_mut_bytes()).map_err(fault)?;
    let number = log.slot.get();
    if slots::space(number) >= vm.address_spaces() || number & 0xffff >= USER_SLOTS {
        return Err(Errno::EINVAL.into());
    }
    let bits = {
        let mut state = vm.lock();
        harvest(&mut state, number)?;
        let log = state.dirty.0.get_mut(&number).ok_or(Errno::ENOENT)?;
        let empty = vec![0; log.len()];
        std::mem::replace(log, empty)
    };
    let bytes: Vec<u8> = bits.into_iter().flat_map(u64::to_le_bytes).collect();
    process
        .write(log.dirty_bitmap.get(), &bytes)
        .map_err(fault)?;
    Ok(0)
}
