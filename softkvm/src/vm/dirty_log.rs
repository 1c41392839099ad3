//! `KVM_GET_DIRTY_LOG`, `KVM_CLEAR_DIRTY_LOG`, and the logs.

use std::collections::BTreeMap;

use kvm_ops_uapi::U64;
use kvm_ops_uapi::checks::dirty_log::{BITMAP, COPY, FIRST, LOGGED, RANGE, SLOT};
use kvm_ops_uapi::checks::dirty_log_protect;
use kvm_ops_uapi::memory::{ClearDirtyLog, DirtyLog, USER_SLOTS, dirty_log_flags};

use super::{Slot, State, Vm, lent, slots};
use crate::refusal::{Result, ensure};
use crate::{Process, arg};

const PAGE: u64 = 4096;

/// What was written of slots, by their number: a bit for each page.
#[derive(Default)]
pub(super) struct Logs {
    of_slots: BTreeMap<u32, Vec<u64>>,
    /// Flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    protect: u64,
}

impl Logs {
    /// A slot has a log, or no more. One that goes on keeps its bits.
    pub(super) fn keep(&mut self, number: u32, slot: &Slot) {
        if !slot.logs_dirty() {
            self.forget(number);
            return;
        }
        let pages = slot.pages();
        let starts_set = self.protect & dirty_log_flags::INITIALLY_SET != 0;
        let of_slot = self.of_slots.entry(number);
        of_slot.or_insert_with(|| match starts_set {
            true => all_set(pages),
            false => vec![0; pages.div_ceil(64) as usize],
        });
    }

    pub(super) fn forget(&mut self, number: u32) {
        self.of_slots.remove(&number);
    }
}

/// Brings a slot's log up to date.
fn harvest(state: &mut State, number: u32) -> Result<()> {
    let State {
        machine,
        sev,
        slots,
        dirty,
        ..
    } = state;
    let (Some(slot), Some(log)) = (slots.get(number), dirty.of_slots.get_mut(&number)) else {
        return Ok(());
    };
    if let Some(machine) = machine {
        machine.harvest(slot, log)?;
    }
    if let Some(guest) = sev.back_end_mut() {
        lent::harvest(guest, number, log)?;
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

/// A bit for each page.
fn all_set(pages: u64) -> Vec<u64> {
    let word = |first: u64| match pages - first {
        left @ 0..64 => (1 << left) - 1,
        _ => u64::MAX,
    };
    (0..pages).step_by(64).map(word).collect()
}

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
pub(super) fn protect(state: &mut State, flags: u64) -> Result<i64> {
    let known = match flags & dirty_log_flags::ENABLE {
        0 => 0,
        _ => dirty_log_flags::ALL,
    };
    ensure(flags & !known == 0, dirty_log_protect::FLAGS)?;
    state.dirty.protect = flags;
    Ok(0)
}

fn in_range(vm: &Vm, number: u32) -> Result<()> {
    let known = slots::space(number) < vm.address_spaces() && number & 0xffff < USER_SLOTS;
    ensure(known, SLOT)
}

pub(super) fn get(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: DirtyLog = arg::read(process, argument, COPY)?;
    let number = args.slot.get();
    in_range(vm, number)?;
    let bits = {
        let mut state = vm.lock();
        harvest(&mut state, number)?;
        let keeps = state.dirty.protect & dirty_log_flags::ENABLE != 0;
        let log = state.dirty.of_slots.get_mut(&number).ok_or(LOGGED)?;
        match keeps {
            true => log.clone(),
            false => {
                let empty = vec![0; log.len()];
                std::mem::replace(log, empty)
            }
        }
    };
    let bits: Vec<U64> = bits.into_iter().map(U64::new).collect();
    arg::write(process, args.dirty_bitmap.get(), &bits[..], BITMAP)?;
    Ok(0)
}

/// The pages to clear are some of the slot's, in whole words.
fn are_pages_of(slot: &Slot, first: u64, count: u64) -> bool {
    let left = slot.pages().checked_sub(first);
    left.is_some_and(|left| count == left || count < left && count.is_multiple_of(64))
}

pub(super) fn clear(vm: &Vm, process: &dyn Process, argument: u64) -> Result<i64> {
    let args: ClearDirtyLog = arg::read(process, argument, COPY)?;
    let (number, first) = (args.slot.get(), args.first_page.get());
    let count = u64::from(args.num_pages.get());
    in_range(vm, number)?;
    ensure(first.is_multiple_of(64), FIRST)?;
    let mut guard = vm.lock();
    let state = &mut *guard;
    let slot = state.slots.get(number).filter(|slot| slot.logs_dirty());
    ensure(are_pages_of(slot.ok_or(LOGGED)?, first, count), RANGE)?;
    harvest(state, number)?;
    let words = count.div_ceil(64) as usize;
    let mask = arg::read_bytes(process, args.dirty_bitmap.get(), words * 8, BITMAP)?;
    let (mask, _) = mask.as_chunks::<8>();
    let log = state.dirty.of_slots.get_mut(&number).ok_or(LOGGED)?;
    for (word, mask) in log.iter_mut().skip((first / 64) as usize).zip(mask) {
        *word &= !u64::from_le_bytes(*mask);
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_has_a_bit_and_no_other_place_has() {
        for pages in [1, 63, 64, 65, 128, 130] {
            let log = all_set(pages);
            assert_eq!(log.len() as u64, pages.div_ceil(64));
            let bits: u64 = log.iter().map(|word| u64::from(word.count_ones())).sum();
            assert_eq!(bits, pages);
        }
    }
}
