//! Fields of a TD (MNG.RD/WR, VM.RD/WR).

use super::{Key, key, key_of, masked_write, not_readable, not_writable, unknown};
use crate::call::Leaf;
use crate::lock::Side;
use crate::meta::not_valid;
use crate::td::{ATTR_SEPT_VE_DISABLE, Td};
use std::sync::atomic::Ordering::Acquire;

/// Identifier, and who reads it.
struct Field {
    id: u64,
    host: bool,
    guest: bool,
}

const fn h(id: u64) -> Field {
    Field {
        id,
        host: true,
        guest: false,
    }
}

const fn g(id: u64) -> Field {
    Field {
        id,
        host: false,
        guest: true,
    }
}

const fn hg(id: u64) -> Field {
    Field {
        id,
        host: true,
        guest: true,
    }
}

const NOTIFY_ENABLES: u64 = 0x9110_0003_0000_0010;
const TD_CTLS: u64 = 0x9110_0003_0000_0017;

const FIELDS: &[Field] = &[
    h(0x8010_0000_0000_0001),
    h(0x8010_0002_0000_0002),
    h(0x8010_0003_0000_0004),
    h(0x8010_0002_0000_0005),
    h(0x8110_0001_0000_0001),
    h(0x8110_0003_0000_0002),
    hg(0x9010_0002_0000_0001),
    h(0x9010_0002_0000_0002),
    h(0x9010_0002_0000_0004),
    hg(0x9010_0001_0000_0005),
    hg(0x1110_0003_0000_0000),
    hg(0x1110_0003_0000_0001),
    hg(0x1110_0002_0000_0002),
    hg(0x1110_0000_0000_0003),
    hg(0x1110_0001_0000_000C),
    g(NOTIFY_ENABLES),
    hg(0x9110_0003_0000_0016),
    g(TD_CTLS),
    hg(0x1310_0003_0000_0000),
    hg(0x1310_0003_0000_0001),
    hg(0x1310_0003_0000_0002),
    hg(0x1310_0003_0000_0003),
    hg(0x1310_0003_0000_0004),
    hg(0x1310_0003_0000_0005),
];

fn find(key: Key) -> Option<usize> {
    FIELDS.iter().position(|f| key_of(f.id) == key)
}

fn readable(f: &Field, side: Side) -> bool {
    match side {
        Side::Host => f.host,
        Side::Guest => f.guest,
    }
}

/// Value and next identifier.
pub(crate) fn read(td: &Td, id: u64, side: Side) -> Leaf<(u64, u64)> {
    let key = key(id)?;
    let Some(i) = find(key) else { return unknown() };
    if !readable(&FIELDS[i], side) {
        return not_readable();
    }
    let next = FIELDS[i + 1..]
        .iter()
        .find(|f| readable(f, side))
        .map_or(u64::MAX, |f| f.id);
    Ok((value(td, key), next))
}

fn value(td: &Td, key: Key) -> u64 {
    match key {
        (0x00, 1) => u64::from(td.is_fatal()),
        (0x00, 2) => u64::from(td.num_tdcx.load(Acquire)),
        (0x00, 4) => td.chldcnt.load(Acquire),
        (0x00, 5) => td.lifecycle() as u64,
        (0x01, 1) => u64::from(td.hkid()),
        (0x01, 2) => td.pkg_bitmap.load(Acquire),
        (0x10, 1) => u64::from(td.num_vcpus.load(Acquire)),
        (0x10, 2) => u64::from(td.num_assoc.load(Acquire)),
        (0x10, 4) => td.op_state() as u64,
        (0x10, 5) => u64::from(td.config().l2_vms),
        (0x11, 0) => td.attributes(),
        (0x11, 1) => td.config().xfam,
        (0x11, 2) => u64::from(td.config().max_vcpus),
        (0x11, 3) => u64::from(td.gpa_width() == 52),
        (0x11, 0x0C) => u64::from(td.config().tsc_frequency),
        (0x11, 0x10) => td.notify_enables.load(Acquire),
        (0x11, 0x16) => td.config().config_flags,
        (0x11, 0x17) => td.td_ctls.load(Acquire),
        (0x13, word @ 0..=5) => {
            let mut b = [0; 8];
            b.copy_from_slice(&td.measurement().mrtd.0[word as usize * 8..][..8]);
            u64::from_le_bytes(b)
        }
        _ => 0,
    }
}

/// The old value.
pub(crate) fn write(td: &Td, id: u64, value: u64, mask: u64, side: Side) -> Leaf<u64> {
    use std::sync::atomic::Ordering::Release;
    let key = key(id)?;
    if find(key).is_none() {
        return unknown();
    }
    let field = match (side, key) {
        (Side::Guest, k) if k == key_of(NOTIFY_ENABLES) => &td.notify_enables,
        (Side::Guest, k) if k == key_of(TD_CTLS) => &td.td_ctls,
        _ => return not_writable(),
    };
    let old = field.load(Acquire);
    let new = masked_write(old, value, mask, 1)?;
    // SEPT_VE_DISABLE, chosen at creation, is not the guest's to undo.
    let fixed = key == key_of(TD_CTLS) && td.attributes() & ATTR_SEPT_VE_DISABLE != 0;
    if fixed && new != old {
        return not_valid();
    }
    field.store(new, Release);
    Ok(old)
}
