//! Reading the fields of a TD.

use super::place::{Context, Place};
use super::table::Agent;
use super::{Read, not_readable};
use crate::arena::lock;
use crate::call::Leaf;
use crate::measure::Mr;
use crate::op_state::OpState;
use crate::platform::Platform;
use crate::sept::{self, SeptState};
use crate::td::Td;
use crate::virt::{msr, tables, xsave};
use std::sync::atomic::Ordering::Acquire;

/// The context of a TD's fields.
pub(crate) fn context(td: &Td) -> Context {
    Context::Td {
        l2_vms: td.l2_vms.load(Acquire),
    }
}

/// The host's masks.
pub(crate) fn host(td: &Td) -> Agent {
    if td.is_debug() {
        Agent::HostOfDebug
    } else {
        Agent::Host
    }
}

/// Reads an element.
pub(crate) fn read(p: &Platform, td: &Td, agent: Agent, id: u64) -> Leaf<Read> {
    super::read(context(td), agent, id, |place| {
        if is_without_value(td, place) {
            return not_readable();
        }
        Ok(value(p, td, place))
    })
}

/// CPUID values that the processor supplies, or that do not exist, have none here; nor has any before TDH.MNG.INIT.
pub(crate) fn is_without_value(td: &Td, place: &Place) -> bool {
    place.cpuid().is_some_and(|(row, _)| {
        td.config().cpuid.is_empty() || tables::CPUID.get(row).is_none_or(|r| r.faulting)
    })
}

/// The 64-bit word of a digest.
fn word(mr: &Mr, i: usize) -> u64 {
    let mut bytes = [0; 8];
    if let Some(source) = mr.0.get(i * 8..i * 8 + 8) {
        bytes.copy_from_slice(source);
    }
    u64::from_le_bytes(bytes)
}

/// The value of an element.
pub(crate) fn value(p: &Platform, td: &Td, place: &Place) -> u64 {
    let (class, code) = place.row_key();
    let i = place.element as usize;
    match class {
        0x00..=0x02 => tdr(p, td, (class, code), i),
        0x10 => state(td, code),
        0x11 => control(p, td, code, i),
        0x12 => match code {
            0 => td.current_epoch(),
            _ => td.refcount[i & 1].load(Acquire),
        },
        0x13 => measurement(td, code, i),
        0x14 => cpuid(td, i),
        0x16 => virtual_msr(p, td, code),
        0x18 => migration(td, code, i),
        0x19 => service_tds(td, code, i),
        0x1A => td.streams.link(i),
        0x1C => u64::from(lock(&td.x2apic_ids).get(i).copied().unwrap_or(0)),
        0x20 => td.config().msr_bitmaps.get(i).copied().unwrap_or(0),
        0x21 => root_entry(p, td, i),
        _ => 0,
    }
}

fn tdr(p: &Platform, td: &Td, key: (u8, u32), i: usize) -> u64 {
    match key {
        (0x00, 0x01) => u64::from(td.is_fatal()),
        (0x00, 0x02) => u64::from(td.num_tdcx.load(Acquire)),
        (0x00, 0x04) => td.chldcnt.load(Acquire),
        (0x00, 0x05) => td.lifecycle() as u64,
        (0x00, 0x10) => match td.tdcx.get(i).map_or(0, |pa| pa.load(Acquire)) {
            0 => 0,
            pa => td.private_pa(&p.cfg, pa),
        },
        (0x00, 0x20) => td.uuid()[i & 3],
        (0x01, 0x01) => u64::from(td.hkid()),
        (0x01, 0x02) => td.pkg_bitmap.load(Acquire),
        // The only entry of the SEAM database: no module has been here before.
        (0x02, 0x01) => 1,
        _ => 0,
    }
}

fn state(td: &Td, code: u32) -> u64 {
    match code {
        1 => u64::from(td.num_vcpus.load(Acquire)),
        2 => u64::from(td.num_assoc.load(Acquire)),
        4 => td.op_state() as u64,
        5 => u64::from(td.config().l2_vms),
        _ => 0,
    }
}

fn control(p: &Platform, td: &Td, code: u32, i: usize) -> u64 {
    let config = || td.config();
    match code {
        0x00 => td.attributes(),
        0x01 => config().xfam,
        0x02 => u64::from(config().max_vcpus),
        0x03 => u64::from(td.gpa_width() == 52),
        0x04 => td.root_pa() | config().eptp_controls,
        0x0A => config().tsc.offset,
        0x0B => config().tsc.multiplier,
        0x0C => u64::from(config().tsc_frequency),
        0x0D => config().tsc.at(p.machine.tsc()),
        0x0E => tables::CPUID.len() as u64,
        0x0F => u64::from(xsave::layout(&p.cfg, config().xfam).1),
        0x10 => td.notify_enables.load(Acquire),
        0x11 => td.hp_lock_timeout_us(p.cfg.tsc_hz),
        0x12 => td.vm_ctls[i & 3].load(Acquire),
        0x16 => config().config_flags,
        0x17 => td.td_ctls.load(Acquire),
        0x19 => u64::from(td.topology_configured.load(Acquire)),
        0x80 => u64::from(tables::CPUID.get(i).is_some_and(|r| !r.faulting)),
        0x800 => {
            let (offsets, _) = xsave::layout(&p.cfg, config().xfam);
            u64::from(offsets.get(i).copied().unwrap_or(0))
        }
        _ => 0,
    }
}

fn measurement(td: &Td, code: u32, i: usize) -> u64 {
    let m = td.measurement();
    match code {
        0x00 => word(&m.mrtd, i),
        0x10 | 0x18 | 0x20 => {
            let which = (code as usize - 0x10) / 8;
            word(&td.config().mr_config_id[which], i)
        }
        _ => m.rtmr.get(i / 6).map_or(0, |rtmr| word(rtmr, i % 6)),
    }
}

fn cpuid(td: &Td, element: usize) -> u64 {
    let config = td.config();
    let half = element % 2 * 2;
    config.cpuid.get(element / 2).map_or(0, |values| {
        u64::from(values[half]) | u64::from(values[half + 1]) << 32
    })
}

fn virtual_msr(p: &Platform, td: &Td, address: u32) -> u64 {
    let config = td.config();
    match address {
        crate::virt::cpuid::IA32_ARCH_CAPABILITIES => config.arch_capabilities,
        _ => msr::vmx_capability(&p.cfg, config.attributes, config.xfam, address),
    }
}

fn migration(td: &Td, code: u32, i: usize) -> u64 {
    let m = td.migration();
    match code {
        0x01 => u64::from(m.dec_key_set),
        0x02 => u64::from(m.export_count),
        0x03 => u64::from(m.import_count),
        0x04 => u64::from(m.mig_epoch),
        0x05 => m.bw_epoch,
        0x06 => m.total_mb_count,
        0x10 => m.dec_key[i & 3],
        0x14 => m.dec_working_key[i & 3],
        0x18 => m.enc_key[i & 3],
        0x1C => m.enc_working_key[i & 3],
        0x20 => u64::from(m.version),
        0x21 => u64::from(m.working_version),
        0x30 => m.dirty_count,
        0x31 => m.mig_count,
        0x32 => u64::from(m.num_migs),
        0x34 => u64::from(m.num_migrated_vcpus),
        0x40 => m.pre_import_uuid[i & 3],
        _ => 0,
    }
}

fn service_tds(td: &Td, code: u32, i: usize) -> u64 {
    let s = td.bindings();
    match code {
        0x00 => word(&s.hash, i),
        0x06 => u64::from(s.num),
        0x80 => s.words().get(i).copied().unwrap_or(0),
        _ => 0,
    }
}

/// An entry of the root table, as the processor has it.
fn root_entry(p: &Platform, td: &Td, i: usize) -> u64 {
    const SUPPRESS_VE: u64 = 1 << 63;
    const BLOCKED: u64 = 1 << 55;
    const FREE: u64 = SUPPRESS_VE | BLOCKED | 1 << 54 | 1 << 53;
    const READ_WRITE_EXECUTE: u64 = 7;
    if td.op_state() == OpState::Uninitialized {
        return 0;
    }
    let table = p.tables.get(td.root.load(Acquire));
    let Some(content) = table.and_then(|t| t.entries.get(i)).map(|e| e.get()) else {
        return 0;
    };
    let child = p.tables.get(content.slot()).map_or(0, sept::Table::hpa);
    match content.state() {
        SeptState::NlMapped => SUPPRESS_VE | child | READ_WRITE_EXECUTE,
        SeptState::NlBlocked => SUPPRESS_VE | BLOCKED | child,
        _ => FREE,
    }
}
