//! TDH.SYS.INFO, TDH.SYS.RD and TDH.SYS.RDALL: what the module says of itself.

use super::{Call, Leaf, invalid, shared_operand};
use crate::config::{TDCS_BASE_PAGES, TDVPS_BASE_PAGES};
use crate::meta;
use crate::meta::place::{Context, is_null};
use crate::meta::table::Agent;
use crate::status::{Code, Operand};
use std::sync::atomic::Ordering;

const INFO_SIZE: u64 = 1024;
const CMR_ENTRIES: u64 = 32;

fn check_lp(c: &Call<'_, '_>) -> Leaf {
    match c.this.initialised.load(Ordering::Acquire) {
        true => Ok(()),
        false => Err(Code::SYS_LP_INIT_NOT_DONE.status()),
    }
}

/// TDH.SYS.INFO
pub(super) fn info(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (buffer, size) = (c.regs.rcx, c.regs.rdx);
    let (cmrs, entries) = (c.regs.r8, c.regs.r9);
    (c.regs.rdx, c.regs.r9) = (0, 0);
    check_lp(c)?;
    let buffer = shared_operand(p, buffer, INFO_SIZE, Operand::RCX)?;
    if size < INFO_SIZE {
        return Err(invalid(Operand::RDX));
    }
    p.mem.host_write(buffer, &[0; INFO_SIZE as usize]);
    let cmrs = shared_operand(p, cmrs, 512, Operand::R8)?;
    if entries < CMR_ENTRIES {
        return Err(invalid(Operand::R9));
    }
    let cfg = &p.cfg;
    let mut out = [0u8; INFO_SIZE as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        // The CPUID rows are bounded by the builder to what fits.
        if let Some(slot) = out.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    };
    put(4, &meta::VENDOR_ID.to_le_bytes());
    put(8, &cfg.build_date.to_le_bytes());
    put(12, &meta::BUILD_NUMBER.to_le_bytes());
    put(14, &meta::MINOR_VERSION.to_le_bytes());
    put(16, &meta::MAJOR_VERSION.to_le_bytes());
    put(18, &[1]);
    put(32, &64u16.to_le_bytes());
    put(34, &16u16.to_le_bytes());
    put(36, &16u16.to_le_bytes());
    put(48, &(TDCS_BASE_PAGES as u16 * 4096).to_le_bytes());
    put(52, &(TDVPS_BASE_PAGES as u16 * 4096).to_le_bytes());
    put(64, &cfg.attributes_fixed0.to_le_bytes());
    put(72, &cfg.attributes_fixed1.to_le_bytes());
    put(80, &cfg.xfam_fixed0.to_le_bytes());
    put(88, &cfg.xfam_fixed1.to_le_bytes());
    put(128, &(cfg.cpuid_configs.len() as u32).to_le_bytes());
    for (i, row) in cfg.cpuid_configs.iter().enumerate() {
        let reported = cfg.reported_cpuid(row.leaf, row.subleaf);
        let words = [row.leaf, row.subleaf].into_iter().chain(reported);
        for (j, word) in words.enumerate() {
            put(132 + i * 24 + j * 4, &word.to_le_bytes());
        }
    }
    p.mem.host_write(buffer, &out);
    for (i, slot) in (0..CMR_ENTRIES).enumerate() {
        let cmr = cfg.cmrs.get(i).copied().unwrap_or_default();
        p.mem.host_write(cmrs + slot * 16, &cmr.base.to_le_bytes());
        p.mem
            .host_write(cmrs + slot * 16 + 8, &cmr.size.to_le_bytes());
    }
    (c.regs.rdx, c.regs.r9) = (INFO_SIZE, CMR_ENTRIES);
    Ok(())
}

/// TDH.SYS.RD
pub(super) fn rd(c: &mut Call<'_, '_>) -> Leaf {
    let id = c.regs.rdx;
    (c.regs.rdx, c.regs.r8) = (u64::MAX, 0);
    check_lp(c)?;
    if is_null(id) {
        c.regs.rdx = meta::first_id(Context::Sys, Agent::Host);
        return Err(Code::METADATA_FIRST_FIELD_ID_IN_CONTEXT.status());
    }
    let read = meta::sys::read(&c.p.cfg, Agent::Host, id)?;
    (c.regs.rdx, c.regs.r8) = (read.next(), read.value);
    Ok(())
}

/// TDH.SYS.RDALL
pub(super) fn rdall(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let (buffer, id) = (c.regs.rdx, c.regs.r8);
    c.regs.r8 = u64::MAX;
    check_lp(c)?;
    let at = shared_operand(p, buffer, meta::sys::LIST_SIZE as u64, Operand::RDX)?;
    let mut list = [0; meta::sys::LIST_SIZE];
    p.mem.host_read(at, &mut list);
    let dump = meta::sys::dump(&p.cfg, Agent::Host, id, &mut list)?;
    p.mem.host_write(at, &list);
    c.regs.r8 = dump.next;
    dump.result
}
