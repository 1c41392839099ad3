//! TDH.EXPORT.MEM

use crate::call::{Call, Leaf, poison};
use crate::migrate::cipher::Working;
use crate::migrate::entries::{LockedLeaf, invalid_entry, lock_leaf};
use crate::migrate::interrupt::Work;
use crate::migrate::lists::{GpaEntry, Operation, Outcome, PageEntry};
use crate::migrate::mbmd::{Mbmd, Specific};
use crate::migrate::transfer::{KIND, Transfer, buffer_page};
use crate::op_state::OpState;
use crate::sept::{Content, SeptState as S};
use crate::status::Code;
use aes_gcm::aead::inout::InOutBuf;

/// TDH.EXPORT.MEM
pub(crate) fn mem(c: &mut Call<'_, '_>) -> Leaf {
    let mut t = Transfer::begin(c, false)?;
    let mut pages = if t.operand.command {
        let operands = t.operands();
        let rax = t.rax();
        t.stream.resume_memory(rax, &operands)?
    } else {
        start(c, &mut t)?
    };
    let mut problems = 0;
    loop {
        let sent = export_entry(c, &mut t);
        c.regs.rcx = t.list.info.register();
        match sent? {
            Sent::Page => pages += 1,
            Sent::Nothing => {}
            Sent::Problem => problems += 1,
        }
        let last = t.list.is_at_last();
        t.list.advance();
        c.regs.rcx = t.list.info.register();
        if last {
            break;
        }
        if c.this.host_event_pending() {
            let (rax, operands) = (t.rax(), t.operands());
            return Err(t.stream.interrupt(rax, Work::Memory { operands, pages }));
        }
    }
    t.stream.next_mb = t.stream.next_mb.wrapping_add(1);
    let mut m = t.td.migration();
    m.total_mb_count = m.total_mb_count.wrapping_add(1);
    c.regs.rdx = pages;
    match problems {
        0 => Ok(()),
        n => Err(Code::SUCCESS.detail(n)),
    }
}

/// Writes the MBMD of a new bundle. Returns the pages it takes beside those of the TD.
fn start(c: &Call<'_, '_>, t: &mut Transfer<'_>) -> Leaf<u64> {
    if t.list.info.first != 0 {
        return Err(crate::call::invalid(crate::status::Operand::RCX));
    }
    let m = *t.td.migration();
    if !t.stream.is_initialised() {
        t.stream.initialise(m.enc_working_key);
    }
    t.stream.interrupted = None;
    let mbmd = Mbmd {
        version: m.working_version,
        stream: t.operand.index,
        kind: KIND,
        mb_counter: t.stream.next_mb,
        epoch: m.mig_epoch,
        iv_counter: t.stream.next_iv(),
        specific: Specific::Memory {
            entries: t.list.info.last + 1,
        },
    };
    if let Some(key) = t.stream.key() {
        t.mbmd.write(c.p, &mbmd.sealed(key));
    }
    Ok(1 + t.mac_lists())
}

/// Contribution of a list entry to the bundle.
enum Sent {
    Page,
    Nothing,
    Problem,
}

fn export_entry(c: &Call<'_, '_>, t: &mut Transfer<'_>) -> Leaf<Sent> {
    let p = c.p;
    let entry = t.list.entry(p);
    let mut buffer = t.buffer(p);
    let given = buffer;
    // The lock on the page's entry is kept until the page is read.
    let mut leaf = None;
    let outcome = if !entry.is_valid_for(t.td) {
        t.list.write(p, entry.with_outcome(Outcome::Invalid));
        return Err(invalid_entry());
    } else if entry.operation() == Operation::Nop {
        Err(Outcome::Skipped)
    } else {
        export_page(c, t, entry, &mut buffer, &mut leaf)
    };
    let written = match outcome {
        Ok(described) => described.with_outcome(Outcome::Success),
        Err(outcome) => {
            buffer = buffer.invalidated();
            entry.with_outcome(outcome)
        }
    };
    let page = match leaf
        .as_ref()
        .filter(|_| outcome.is_ok() && !buffer.is_invalid())
    {
        Some((_, content)) => Some((*content, buffer_page(p, buffer)?)),
        None => None,
    };
    t.list.write(p, written);
    if buffer != given {
        t.buffers.set(p, t.list.info.first, buffer.0);
    }
    let (counter, index) = (t.stream.next_iv(), t.operand.index);
    if let Some(key) = t.stream.key() {
        let mac = seal_page(c, t, key, (counter, index), written, page)?;
        t.write_mac(p, &mac);
    }
    Ok(match outcome {
        Ok(_) if page.is_some() => Sent::Page,
        Ok(_) | Err(Outcome::Skipped) => Sent::Nothing,
        Err(_) => Sent::Problem,
    })
}

/// Encrypts a page into its buffer, and authenticates it with its entry.
fn seal_page(
    c: &Call<'_, '_>,
    t: &Transfer<'_>,
    key: &Working,
    (counter, index): (u64, u16),
    entry: GpaEntry,
    page: Option<(Content, u64)>,
) -> Leaf<crate::migrate::cipher::Tag> {
    let aad = entry.0.to_le_bytes();
    let Some((content, buffer)) = page else {
        return Ok(key.seal(counter, index, &aad, &mut []));
    };
    let of_td = t.td.key();
    let (from, to) = ((content.hpa(), of_td.as_deref()), (buffer, None));
    let sealed = c.p.mem.make_page(from, to, |text, out| {
        let text = InOutBuf::new(text, out).ok()?;
        Some(key.seal_to(counter, index, &aad, text))
    });
    sealed.ok().flatten().ok_or_else(|| poison(t.td))
}

/// Changes the state of a page that is exported, or whose export is cancelled. Returns the entry as it
/// describes the page.
fn export_page<'p>(
    c: &Call<'p, '_>,
    t: &Transfer<'p>,
    entry: GpaEntry,
    buffer: &mut PageEntry,
    held: &mut Option<(LockedLeaf<'p>, Content)>,
) -> Result<GpaEntry, Outcome> {
    let leaf = lock_leaf(c.p, t.td, entry.gpa())?;
    let content = leaf.content;
    let state = content.state();
    let cancel = entry.operation() == Operation::Cancel;
    let operation = operation(t, state, cancel)?;
    let pending = state.is_pending();
    let mut m = t.td.migration();
    let leave_dirty = u64::from(state.is_exported_dirty());
    if cancel {
        leaf.set(content.with_state(state.settled()));
        m.mig_count = m.mig_count.wrapping_sub(1);
        m.dirty_count = m.dirty_count.wrapping_sub(leave_dirty);
        *buffer = buffer.invalidated();
    } else {
        let to = if pending {
            *buffer = buffer.invalidated();
            S::PendingExportedBlockedW
        } else if buffer.is_invalid() {
            return Err(Outcome::NoBuffer);
        } else {
            S::ExportedBlockedW
        };
        if !state.is_exported() {
            m.mig_count = m.mig_count.wrapping_add(1);
        }
        m.dirty_count = m.dirty_count.wrapping_sub(leave_dirty);
        leaf.set(content.with_state(to));
    }
    drop(m);
    *held = Some((leaf, content));
    Ok(entry.describing(operation, pending))
}

/// Operation for a page in a state, which depends on the phase of the export.
fn operation(t: &Transfer<'_>, state: S, cancel: bool) -> Result<Operation, Outcome> {
    let wrong = Err(Outcome::StateIncorrect);
    if !is_exportable(state) {
        return wrong;
    }
    let phase = t.td.op_state();
    if phase == OpState::PostExport {
        // Nothing changes any more, so every page may be sent as often as the importer asks.
        return if cancel {
            Err(Outcome::OpStateIncorrect)
        } else {
            Ok(Operation::Migrate)
        };
    }
    if cancel {
        return if state.is_exported() {
            Ok(Operation::Cancel)
        } else {
            wrong
        };
    }
    let operation = if state.is_exported_dirty() {
        Operation::Remigrate
    } else if state.is_exported() {
        return wrong;
    } else {
        Operation::Migrate
    };
    if phase == OpState::LiveExport {
        if !state.is_write_blocked() {
            return wrong;
        }
        let blocked_in = t.td.migration().bw_epoch;
        if state.needs_tlb_tracking() && !t.td.is_tracked(blocked_in) {
            return Err(Outcome::NotTracked);
        }
    }
    Ok(operation)
}

/// A leaf that is not blocked.
fn is_exportable(state: S) -> bool {
    state.is_leaf() && !state.is_blocked()
}
