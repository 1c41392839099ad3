//! TDH.SERVTD.PREBIND and TDH.SERVTD.BIND

use super::{ATTRIBUTES, Binding, MIGRATION_TD, SLOTS, State, handle, info_hash};
use crate::call::{Call, Leaf, busy, invalid, shared_operand, td_in_state, tdr};
use crate::lock::{Guard, LockMode, Side};
use crate::measure::Mr;
use crate::op_state::{self, OpState};
use crate::status::{Code, Operand};
use crate::td::Td;

/// Slot, type and attributes: R8, R9 and R10.
fn binding_operands(slot: u64, kind: u64, attributes: u64) -> Leaf<(u16, u64)> {
    if slot >= SLOTS {
        return Err(invalid(Operand::R8));
    }
    if kind != MIGRATION_TD {
        return Err(invalid(Operand::R9));
    }
    if attributes & !ATTRIBUTES != 0 {
        return Err(invalid(Operand::R10));
    }
    Ok((kind as u16, attributes))
}

fn lock_bindings(td: &Td) -> Leaf<Guard<'_>> {
    td.servtd_lock
        .guard(LockMode::Exclusive, Side::Host)
        .ok_or(busy(Operand::SERVTD_BINDINGS))
}

/// TDH.SERVTD.PREBIND
pub(crate) fn prebind(c: &mut Call<'_, '_>) -> Leaf {
    const HASH_BUFFER: u64 = 64;
    let p = c.p;
    let tdr = tdr(p, c.regs.rcx, LockMode::Shared, Operand::RCX)?;
    let td = tdr.td;
    let _op_state = c.td_state(td, true)?;
    let hash_pa = shared_operand(p, c.regs.rdx, HASH_BUFFER, Operand::RDX)?;
    let (kind, attributes) = binding_operands(c.regs.r8, c.regs.r9, c.regs.r10)?;
    let _lock = lock_bindings(td)?;
    let mut bindings = td.bindings();
    match bindings.slot.state {
        State::Bound => return Err(Code::SERVTD_BOUND.status()),
        State::NotBound => bindings.num += 1,
        State::PreBound => {}
    }
    let mut hash = Mr::default();
    p.mem.host_read(hash_pa, &mut hash.0);
    bindings.slot = Binding {
        state: State::PreBound,
        kind,
        attributes,
        info_hash: hash,
        uuid: bindings.slot.uuid,
    };
    Ok(())
}

/// TDH.SERVTD.BIND
pub(crate) fn bind(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let r = *c.regs;
    c.regs.rcx = 0;
    (c.regs.r10, c.regs.r11, c.regs.r12, c.regs.r13) = (0, 0, 0, 0);
    if r.rcx == r.rdx {
        return Err(invalid(Operand::RDX));
    }
    let target = tdr(p, r.rcx, LockMode::Shared, Operand::RCX)?;
    let td = target.td;
    let _op_state = c.td_state(td, true)?;
    let service = tdr(p, r.rdx, LockMode::Shared, Operand::RDX)?;
    let _service_state = td_in_state(
        service.td,
        Some((LockMode::Shared, Side::Host)),
        op_state::can_serve,
    )?;
    let (kind, attributes) = binding_operands(r.r8, r.r9, r.r10)?;
    let _lock = lock_bindings(td)?;
    let _rtmr = service
        .td
        .rtmr_lock
        .guard(LockMode::Shared, Side::Host)
        .ok_or(busy(Operand::RTMR))?;
    let hash = info_hash(service.td, attributes);
    let mut bindings = td.bindings();
    if bindings.slot.state == State::NotBound {
        if !matches!(td.op_state(), OpState::Uninitialized | OpState::Initialized) {
            return Err(Code::OP_STATE_INCORRECT.status());
        }
        bindings.num += 1;
        bindings.slot = Binding {
            kind,
            attributes,
            info_hash: hash,
            ..Binding::default()
        };
    } else {
        let b = &bindings.slot;
        let mismatch = [
            (b.kind != kind, Code::SERVTD_TYPE_MISMATCH),
            (b.attributes != attributes, Code::SERVTD_ATTR_MISMATCH),
            (b.info_hash != hash, Code::SERVTD_INFO_HASH_MISMATCH),
        ];
        if let Some((_, code)) = mismatch.into_iter().find(|(differs, _)| *differs) {
            return Err(code.status());
        }
    }
    bindings.slot.uuid = service.td.uuid();
    bindings.slot.state = State::Bound;
    c.regs.rcx = handle(r.r8, td.pa(), &bindings.slot.uuid);
    [c.regs.r10, c.regs.r11, c.regs.r12, c.regs.r13] = td.uuid();
    Ok(())
}
