//! TDH.IMPORT.TRACK, COMMIT, END and ABORT.

use crate::call::{Call, Leaf, tdr};
use crate::lock::LockMode;
use crate::migrate::export::OUT_OF_ORDER_EPOCH;
use crate::migrate::mbmd::{Kind, Mbmd, Received, Specific};
use crate::migrate::operands::{MbmdBuffer, invalid_mbmd, no_stream, stream_busy};
use crate::op_state::OpState;
use crate::status::{Code, Operand, Status};
use std::sync::atomic::Ordering;

/// TDH.IMPORT.TRACK: takes an epoch token.
pub(crate) fn track(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let tdr = tdr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    no_stream(c.regs.r10)?;
    let input = MbmdBuffer::parse(p, c.regs.r8)?;
    let mut stream = td.streams.forward(0).ok_or_else(stream_busy)?;
    let Some(key) = stream.key() else {
        return Err(Code::MIGRATION_STREAM_STATE_INCORRECT.status());
    };
    let mut m = td.migration();
    let total = m.total_mb_count.wrapping_add(1);
    let token = Received::parse(&input.read(p), Kind::EpochToken, m.working_version)
        .filter(|r| r.mbmd.stream == 0 && r.mbmd.mb_counter == 0)
        .filter(|r| r.mbmd.epoch > m.mig_epoch && r.mbmd.specific == Specific::Token { total })
        .ok_or_else(|| td.import_failed(invalid_mbmd()))?;
    if !token.is_authentic(key) {
        return Err(td.import_failed(Code::INCORRECT_MBMD_MAC.status()));
    }
    if token.mbmd.epoch == OUT_OF_ORDER_EPOCH {
        if m.num_migrated_vcpus != td.num_vcpus.load(Ordering::Acquire) {
            return Err(td.import_failed(Code::SOME_VCPUS_NOT_MIGRATED.status()));
        }
        td.set_op_state(OpState::PostImport);
    }
    m.total_mb_count = total;
    m.mig_epoch = token.mbmd.epoch;
    stream.expected_mb = 1;
    Ok(())
}

/// TDH.IMPORT.COMMIT: the TD runs here from now on, the rest of its memory may follow.
pub(crate) fn commit(c: &mut Call<'_, '_>) -> Leaf {
    let tdr = tdr(c.p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    let mut m = td.migration();
    m.import_count = m.import_count.wrapping_add(1);
    td.set_op_state(OpState::LiveImport);
    Ok(())
}

/// TDH.IMPORT.END
pub(crate) fn end(c: &mut Call<'_, '_>) -> Leaf {
    let tdr = tdr(c.p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    if td.op_state() != OpState::LiveImport {
        let mut m = td.migration();
        m.import_count = m.import_count.wrapping_add(1);
    }
    td.set_op_state(OpState::Runnable);
    Ok(())
}

/// TDH.IMPORT.ABORT: gives the import up, and gives the exporter the token that lets it run the TD again.
pub(crate) fn abort(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let tdr = tdr(p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    let td = tdr.td;
    c.td_state(td, false)?;
    no_stream(c.regs.r10)?;
    let out = MbmdBuffer::parse(p, c.regs.r8)?;
    let mut stream = td.streams.backward().ok_or_else(stream_busy)?;
    td.set_op_state(OpState::FailedImport);
    let m = *td.migration();
    if !stream.is_initialised() {
        stream.initialise(m.enc_working_key);
    }
    let token = Mbmd {
        version: m.working_version,
        stream: 0,
        kind: Kind::AbortToken,
        mb_counter: stream.next_mb,
        epoch: 0,
        iv_counter: stream.next_iv(),
        specific: Specific::None,
    };
    if let Some(key) = stream.key() {
        out.write(p, &token.sealed(key));
    }
    stream.next_mb = stream.next_mb.wrapping_add(1);
    Err(Status::SUCCESS.fatal())
}
