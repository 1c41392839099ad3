//! Build-time measurement.

use super::checks::{TdRef, tdr};
use super::mem::{mapped_address, poison, take_operands, walk};
use super::{Call, Leaf, invalid};
use crate::lock::LockMode;
use crate::op_state::OpState;
use crate::status::{Code, Operand};
use std::sync::atomic::Ordering;

/// TDH.MR.EXTEND
pub(super) fn extend(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (gpa, rdx) = take_operands(c);
    let TdRef { td, page: _page } = tdr(p, rdx, LockMode::Exclusive, Operand::RDX)?;
    c.td_state(td, false)?;
    if gpa & 0xFF != 0 || !td.is_valid_private_gpa(gpa) {
        return Err(invalid(Operand::RCX));
    }
    let walked = walk(p, td, gpa, 0)?;
    let Some(at) = mapped_address(&walked, walked.content, gpa, false) else {
        c.show(walked.details());
        return Err(Code::EPT_ENTRY_NOT_PRESENT.on(Operand::RCX));
    };
    let mut chunk = [0; 256];
    p.mem
        .private_read(at, &mut chunk, td.key().as_deref())
        .map_err(|_| poison(td))?;
    td.measurement().extend(gpa, &chunk);
    Ok(())
}

/// TDH.MR.FINALIZE
pub(super) fn finalize(c: &mut Call<'_, '_>) -> Leaf {
    let TdRef { td, page: _page } = tdr(c.p, c.regs.rcx, LockMode::Exclusive, Operand::RCX)?;
    c.td_state(td, false)?;
    if td.num_vcpus.load(Ordering::Acquire) == 0 {
        return Err(Code::NO_VCPUS.status());
    }
    td.measurement().finalize();
    td.bindings().measure();
    td.set_op_state(OpState::Runnable);
    Ok(())
}
