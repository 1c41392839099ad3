//! TDH.EXPORT.PAUSE, TRACK and ABORT.

use crate::call::{Call, Leaf, invalid, tdr};
use crate::lock::LockMode;
use crate::migrate::mbmd::{Kind, Mbmd, Received, Specific};
use crate::migrate::operands::{
    MbmdBuffer, StreamOperand, invalid_mbmd, lock_migration, no_stream, stream_busy,
};
use crate::op_state::OpState;
use crate::status::{Code, Operand};
use std::sync::atomic::Ordering;

/// The migration epoch of everything that follows the start token.
pub(crate) const OUT_OF_ORDER_EPOCH: u32 = u32::MAX;

/// TDH.EXPORT.PAUSE
pub(crate) fn pause(c: &mut Call<'_, '_>) -> Leaf {
    let tdr = tdr(c.p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    td.epoch.fetch_add(1, Ordering::AcqRel);
    td.set_op_state(OpState::PausedExport);
    Ok(())
}

/// TDH.EXPORT.TRACK: an epoch token, of the next epoch or of the out-of-order phase.
pub(crate) fn track(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let tdr = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let td = tdr.td;
    let _op_state = c.td_state_in(td, Some(LockMode::Exclusive))?;
    let _mig = lock_migration(td, LockMode::Exclusive)?;
    let operand = StreamOperand::parse_first(c.regs.r10)?;
    let out = MbmdBuffer::parse(p, c.regs.r8)?;
    let mut stream = td.streams.forward(0).ok_or_else(stream_busy)?;
    if !stream.is_initialised() {
        return Err(Code::MIGRATION_STREAM_STATE_INCORRECT.status());
    }
    let mut m = td.migration();
    if operand.command {
        if td.op_state() != OpState::PausedExport {
            return Err(Code::OP_STATE_INCORRECT.status());
        }
        if m.dirty_count != 0 {
            return Err(Code::EXPORTED_DIRTY_PAGES_REMAIN.status());
        }
        m.mig_epoch = OUT_OF_ORDER_EPOCH;
        td.set_op_state(OpState::PostExport);
    } else {
        if m.mig_epoch == OUT_OF_ORDER_EPOCH - 1 {
            return Err(Code::MIGRATION_EPOCH_OVERFLOW.status());
        }
        m.mig_epoch += 1;
    }
    m.total_mb_count = m.total_mb_count.wrapping_add(1);
    let token = Mbmd {
        version: m.working_version,
        stream: 0,
        kind: Kind::EpochToken,
        mb_counter: 0,
        epoch: m.mig_epoch,
        iv_counter: stream.next_iv(),
        specific: Specific::Token {
            total: m.total_mb_count,
        },
    };
    stream.next_mb = 1;
    if let Some(key) = stream.key() {
        out.write(p, &token.sealed(key));
    }
    Ok(())
}

/// TDH.EXPORT.ABORT
pub(crate) fn abort(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let tdr = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let td = tdr.td;
    let _op_state = c.td_state_in(td, Some(LockMode::Exclusive))?;
    let _mig = lock_migration(td, LockMode::Exclusive)?;
    no_stream(c.regs.r10)?;
    if td.op_state() == OpState::PostExport {
        check_abort_token(c, td)?;
    } else if c.regs.r8 != 0 {
        return Err(invalid(Operand::R8));
    }
    td.streams.forget_all();
    td.set_op_state(OpState::Runnable);
    Ok(())
}

/// After the start token only the importer can say that it has not run the TD and never will.
fn check_abort_token(c: &Call<'_, '_>, td: &crate::td::Td) -> Leaf {
    let p = c.p;
    let input = MbmdBuffer::parse(p, c.regs.r8)?;
    let m = *td.migration();
    let token = Received::parse(&input.read(p), Kind::AbortToken, m.working_version)
        .filter(|r| r.mbmd.stream == 0)
        .ok_or_else(invalid_mbmd)?;
    let mut stream = td.streams.backward().ok_or_else(stream_busy)?;
    if !stream.is_initialised() {
        stream.initialise(m.dec_working_key);
    }
    match stream.key() {
        Some(key) if token.is_authentic(key) => Ok(()),
        _ => Err(Code::INCORRECT_MBMD_MAC.status()),
    }
}
