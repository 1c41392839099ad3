//! Fields of a vCPU (VP.RD/WR).

use super::{Key, key, masked_write, not_readable, not_valid, not_writable, unknown};
use crate::call::{Leaf, shared_operand};
use crate::platform::Platform;
use crate::status::Operand;
use crate::td::Td;
use crate::vcpu::{Vcpu, VcpuContext};

const SHARED_EPTP: Key = (0x00, 0x203C);
const POSTED_INTERRUPT_DESCRIPTOR: Key = (0x00, 0x2016);
const NOTIFICATION_VECTOR: Key = (0x00, 0x0002);
const PEND_NMI: Key = (0x20, 0x0B);
/// Guest state a host sees of a debug TD only: RIP, interruption-information field.
const GUEST_RIP: Key = (0x00, 0x681E);
const ENTRY_INTERRUPTION_INFO: Key = (0x00, 0x4016);

/// The modelled fields in next-id order.
const FIELDS: &[(Key, u64)] = &[
    (NOTIFICATION_VECTOR, 0x0020_0001_0000_0002),
    (POSTED_INTERRUPT_DESCRIPTOR, 0x0020_0003_0000_2016),
    (SHARED_EPTP, 0x0020_0003_0000_203C),
    (ENTRY_INTERRUPTION_INFO, 0x0020_0002_0000_4016),
    (GUEST_RIP, 0x0020_0003_0000_681E),
    (PEND_NMI, 0x2020_0000_0000_000B),
];

const PAGE_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

fn value(c: &VcpuContext, key: Key) -> u64 {
    match key {
        SHARED_EPTP => c.shared_eptp & PAGE_ADDRESS,
        POSTED_INTERRUPT_DESCRIPTOR => c.posted_interrupt_descriptor,
        NOTIFICATION_VECTOR => c.notification_vector,
        PEND_NMI => u64::from(c.pend_nmi),
        GUEST_RIP => c.rip,
        _ => 0,
    }
}

fn is_guest_state(key: Key) -> bool {
    matches!(key, GUEST_RIP | ENTRY_INTERRUPTION_INFO)
}

/// Value and next identifier.
pub(crate) fn read(td: &Td, vcpu: &Vcpu, id: u64) -> Leaf<(u64, u64)> {
    let key = key(id)?;
    let Some(i) = FIELDS.iter().position(|f| f.0 == key) else {
        return unknown();
    };
    if is_guest_state(key) && !td.is_debug() {
        return not_readable();
    }
    let next = FIELDS.get(i + 1).map_or(u64::MAX, |f| f.1);
    Ok((value(&vcpu.context(), key), next))
}

/// The old value.
pub(crate) fn write(
    p: &Platform,
    td: &Td,
    vcpu: &Vcpu,
    id: u64,
    value: u64,
    mask: u64,
) -> Leaf<u64> {
    let key = key(id)?;
    if !FIELDS.iter().any(|f| f.0 == key) {
        return unknown();
    }
    let mut c = vcpu.context();
    let old = self::value(&c, key);
    let is_shared = |pa: u64, size: u64| shared_operand(p, pa, size, Operand::R8).is_ok();
    match key {
        SHARED_EPTP => {
            let new = masked_write(old, value, mask, PAGE_ADDRESS)?;
            if !is_shared(new, 4096) {
                return not_valid();
            }
            c.shared_eptp = new;
        }
        POSTED_INTERRUPT_DESCRIPTOR => {
            // The initial all-ones is "none" and no basis to write parts of.
            let base = if old == u64::MAX { 0 } else { old };
            let new = masked_write(base, value, mask, !0x3F)?;
            if !is_shared(new, 64) {
                return not_valid();
            }
            c.posted_interrupt_descriptor = new;
        }
        NOTIFICATION_VECTOR => {
            let new = masked_write(old, value, mask & 0xFFFF, 0xFFFF)?;
            if new > 0xFF {
                return not_valid();
            }
            c.notification_vector = new;
        }
        PEND_NMI => c.pend_nmi = masked_write(old, value, mask & 0xFF, 1)? != 0,
        GUEST_RIP if td.is_debug() => c.rip = masked_write(old, value, mask, u64::MAX)?,
        _ => return not_writable(),
    }
    Ok(old)
}
