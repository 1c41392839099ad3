//! Writing the fields of a TD.

use super::place::Place;
use super::table::Agent;
use super::{Write, locate, not_valid, not_writable};
use crate::call::Leaf;
use crate::platform::Platform;
use crate::status::Code;
use crate::td::{CTLS_ENUM_TOPOLOGY, CTLS_PENDING_VE_DISABLE, FLAG_FLEXIBLE_PENDING_VE, Td};
use std::sync::atomic::Ordering::{Acquire, Release};

/// HP_LOCK_TIMEOUT, in microseconds.
const HP_LOCK_TIMEOUT_US: core::ops::RangeInclusive<u64> = 10_000..=100_000_000;

/// Writes bits of an element and returns what it was, as far as the agent may read it.
pub(crate) fn write(p: &Platform, td: &Td, agent: Agent, write: Write) -> Leaf<u64> {
    let place = locate(super::td::context(td), write.id)?;
    if super::td::is_without_value(td, &place) {
        return super::not_readable();
    }
    let field = place.field();
    let allowed = field.write_mask(agent);
    let old = super::td::value(p, td, &place);
    let new = write.merge(old, allowed)?;
    if place.row_key() == HP_LOCK_TIMEOUT && write.mask & allowed != u64::MAX {
        return Err(Code::METADATA_WR_MASK_NOT_VALID.status());
    }
    store(p, td, &place, new)?;
    Ok(old & field.read_mask(agent))
}

const HP_LOCK_TIMEOUT: (u8, u32) = (0x11, 0x11);

/// Stores a value that the masks allow, if it is a valid one.
pub(crate) fn store(p: &Platform, td: &Td, place: &Place, new: u64) -> Leaf {
    let i = place.element as usize & 3;
    match place.row_key() {
        (0x11, 0x10) => td.notify_enables.store(new, Release),
        HP_LOCK_TIMEOUT => {
            if !HP_LOCK_TIMEOUT_US.contains(&new) {
                return not_valid();
            }
            td.set_hp_lock_timeout_us(new, p.cfg.tsc_hz);
        }
        (0x11, 0x12) => td.vm_ctls[i].store(new, Release),
        (0x11, 0x17) => td_ctls(td, new)?,
        (0x18, 0x10) => {
            let mut m = td.migration();
            m.dec_key[i] = new;
            m.dec_key_set = true;
        }
        (0x18, 0x20) => {
            if new != 0 {
                return not_valid();
            }
        }
        _ => return not_writable(),
    }
    Ok(())
}

fn td_ctls(td: &Td, new: u64) -> Leaf {
    let changed = new ^ td.td_ctls.load(Acquire);
    if changed & CTLS_PENDING_VE_DISABLE != 0 && !td.has_flag(FLAG_FLEXIBLE_PENDING_VE) {
        return not_valid();
    }
    if new & CTLS_ENUM_TOPOLOGY != 0 && !td.topology_configured.load(Acquire) {
        return not_valid();
    }
    td.td_ctls.store(new, Release);
    Ok(())
}
