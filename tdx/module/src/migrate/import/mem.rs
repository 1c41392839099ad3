//! TDH.IMPORT.MEM

use super::page::import_page;
use crate::call::{Call, Leaf, invalid};
use crate::migrate::export::OUT_OF_ORDER_EPOCH;
use crate::migrate::interrupt::Work;
use crate::migrate::lists::Outcome;
use crate::migrate::mbmd::{Received, Specific};
use crate::migrate::operands::invalid_mbmd;
use crate::migrate::transfer::{KIND, Transfer};
use crate::op_state::OpState;
use crate::platform::Platform;
use crate::status::{Code, Operand, Status};
use crate::td::Td;

/// TDH.IMPORT.MEM
pub(crate) fn mem(c: &mut Call<'_, '_>) -> Leaf {
    let mut t = Transfer::begin(c, true)?;
    if t.operand.command {
        let (rax, operands) = (t.rax(), t.operands());
        t.stream.resume_memory(rax, &operands)?;
    } else {
        start(c.p, &mut t)?;
    }
    let mut problems = 0;
    loop {
        let taken = import_entry(c.p, &mut t);
        c.regs.rcx = t.list.info.register();
        problems += u32::from(taken?);
        let last = t.list.is_at_last();
        t.list.advance();
        c.regs.rcx = t.list.info.register();
        if last {
            break;
        }
        if c.this.host_event_pending() {
            let (rax, operands) = (t.rax(), t.operands());
            return Err(t.stream.interrupt(rax, Work::Memory { operands, pages: 0 }));
        }
    }
    let mut m = t.td.migration();
    m.total_mb_count = m.total_mb_count.wrapping_add(1);
    match problems {
        0 => Ok(()),
        n => Err(Code::SUCCESS.detail(n)),
    }
}

/// Bundles must come in the order they were sent.
pub(super) fn is_in_order(td: &Td) -> bool {
    matches!(td.op_state(), OpState::MemoryImport | OpState::StateImport)
}

/// Checks the MBMD of a new bundle.
fn start(p: &Platform, t: &mut Transfer<'_>) -> Leaf {
    if t.list.info.first != 0 {
        return Err(invalid(Operand::RCX));
    }
    let m = *t.td.migration();
    if !t.stream.is_initialised() {
        t.stream.initialise(m.dec_working_key);
    }
    t.stream.interrupted = None;
    let entries = t.list.info.last + 1;
    let in_order = is_in_order(t.td);
    let received = Received::parse(&t.mbmd.read(p), KIND, m.working_version)
        .filter(|r| r.mbmd.stream == t.operand.index)
        .filter(|r| r.mbmd.specific == Specific::Memory { entries })
        .filter(|r| match in_order {
            true => r.mbmd.epoch == m.mig_epoch && r.mbmd.mb_counter == t.stream.expected_mb,
            false => r.mbmd.epoch == OUT_OF_ORDER_EPOCH,
        })
        .ok_or_else(invalid_mbmd)?;
    t.stream.iv_counter = received.mbmd.iv_counter;
    if !t.stream.key().is_some_and(|key| received.is_authentic(key)) {
        return Err(Code::INCORRECT_MBMD_MAC.status());
    }
    t.stream.expected_mb = t.stream.expected_mb.wrapping_add(1);
    Ok(())
}

/// Imports the entry the list is at. True if it failed and the leaf goes on.
fn import_entry(p: &Platform, t: &mut Transfer<'_>) -> Leaf<bool> {
    let entry = t.list.entry(p);
    let counter = t.stream.next_iv();
    let (outcome, end) = match import_page(p, t, entry, counter) {
        Ok(outcome) => (outcome, None),
        Err(r) => {
            let ends = r.always_ends || is_in_order(t.td);
            (r.outcome, ends.then_some(r.status))
        }
    };
    t.list.write(p, entry.with_outcome(outcome));
    if let (Some(new_pages), true) = (t.new_pages, outcome != Outcome::Success) {
        let index = t.list.info.first;
        let page = new_pages.page_entry(p, index).invalidated();
        new_pages.set(p, index, page.0);
    }
    match end {
        Some(status) => Err(give_up(t.td, status)),
        None => Ok(!matches!(outcome, Outcome::Success | Outcome::Skipped)),
    }
}

/// Once the TD runs here, a bundle that cannot be imported ends the post-copy, not the TD.
fn give_up(td: &Td, status: Status) -> Status {
    if td.op_state() == OpState::LiveImport {
        td.set_op_state(OpState::Runnable);
        status
    } else {
        td.import_failed(status)
    }
}
