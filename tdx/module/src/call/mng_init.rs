//! TDH.MNG.INIT and the checks of TD_PARAMS.

use super::checks::{TdRef, tdr};
use super::{Call, Leaf, busy, invalid, shared_operand};
use crate::config::{MAX_L2_VMS, PlatformConfig, TDCS_BASE_PAGES};
use crate::lock::LockMode;
use crate::measure::Mr;
use crate::sept;
use crate::status::{Code, Operand};
use crate::td::{ATTR_DEBUG, ATTR_MIGRATABLE, ATTR_PERFMON, FLAG_GPAW, Td, TdConfig};
use crate::virt::cpuid as virt;
use crate::virt::msr::{self, MsrFeatures};
use crate::virt::tables::Quad;
use crate::virt::tsc::VirtualTsc;
use std::sync::atomic::Ordering;

/// Size of TD_PARAMS.
const TD_PARAMS_SIZE: usize = 1024;
/// Offset of its CPUID rows.
const CPUID_OFFSET: usize = 256;

/// TD_PARAMS as read from the host.
struct Params([u8; TD_PARAMS_SIZE]);

impl Params {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut b = [0; N];
        b.copy_from_slice(&self.0[at..at + N]);
        b
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn is_zero(&self, range: core::ops::Range<usize>) -> bool {
        self.0[range].iter().all(|b| *b == 0)
    }
}

/// TDH.MNG.INIT
pub(super) fn init(c: &mut Call<'_, '_>) -> Leaf {
    let p = c.p;
    let rcx = c.regs.rcx;
    c.regs.rcx = 0;
    c.check_cpuid_limit()?;
    let TdRef { td, page: _page } = tdr(p, rcx, LockMode::Exclusive, Operand::RCX)?;
    c.td_state(td, false)?;
    let at = shared_operand(p, c.regs.rdx, TD_PARAMS_SIZE as u64, Operand::RDX)?;
    let mut params = Params([0; TD_PARAMS_SIZE]);
    p.mem.host_read(at, &mut params.0);
    let config = check(c, td, &params)?;
    let new_root = || sept::new_table(&p.tables, 0).ok_or(busy(Operand::RCX));
    let root = new_root()?;
    let l2_roots = (0..config.l2_vms)
        .map(|_| new_root())
        .collect::<Leaf<Vec<_>>>()?;
    td.initialize(config, root, &l2_roots, p.cfg.tsc_hz);
    Ok(())
}

fn check(c: &mut Call<'_, '_>, td: &Td, params: &Params) -> Leaf<TdConfig> {
    let cfg = &c.p.cfg;
    let attributes = params.u64(0);
    let migratable = attributes & ATTR_MIGRATABLE != 0;
    if !are_valid_attributes(cfg, attributes) {
        return Err(invalid(Operand::ATTRIBUTES));
    }
    let xfam = params.u64(8);
    if !is_valid_xfam(cfg, xfam) {
        return Err(invalid(Operand::XFAM));
    }
    let max_vcpus = params.u16(16);
    if !(1..=cfg.max_vcpus).contains(&max_vcpus) {
        return Err(invalid(Operand::MAX_VCPUS));
    }
    let l2_vms = params.0[18];
    if l2_vms > MAX_L2_VMS {
        return Err(invalid(Operand::NUM_L2_VMS));
    }
    if td.num_tdcx.load(Ordering::Acquire) < TDCS_BASE_PAGES + u32::from(l2_vms) {
        return Err(Code::TDCS_NOT_ALLOCATED.status());
    }
    if !params.is_zero(20..24) {
        return Err(invalid(Operand::RDX));
    }
    let config_flags = params.u64(32);
    if config_flags & !cfg.config_flags_fixed0 != 0 {
        return Err(invalid(Operand::EXEC_CONTROLS));
    }
    let eptp_controls = params.u64(24);
    if !is_valid_eptp_controls(eptp_controls, config_flags & FLAG_GPAW != 0) {
        return Err(invalid(Operand::EPTP_CONTROLS));
    }
    let tsc_frequency = params.u16(40);
    if !(cfg.tsc_frequency.0..=cfg.tsc_frequency.1).contains(&tsc_frequency) {
        return Err(invalid(Operand::TSC_FREQUENCY));
    }
    c.check_tsc_adjust()?;
    let msr_config_ctls = params.0[19];
    if !params.is_zero(42..80) || msr_config_ctls & !1 != 0 || !params.is_zero(232..256) {
        return Err(invalid(Operand::RDX));
    }
    let cpuid = cpuid(c, params)?;
    let cfg = &c.p.cfg;
    if !params.is_zero(CPUID_OFFSET + 16 * cfg.cpuid_configs.len()..TD_PARAMS_SIZE) {
        return Err(invalid(Operand::RDX));
    }
    let arch_capabilities = params.u64(224);
    if arch_capabilities & !cfg.arch_capabilities_config_mask != 0
        || arch_capabilities != 0 && msr_config_ctls & 1 == 0
    {
        return Err(invalid(Operand::IA32_ARCH_CAPABILITIES_CONFIG));
    }
    if migratable && l2_vms != 0 {
        return Err(invalid(Operand::RDX));
    }
    let flags = virt::flags(&cpuid);
    Ok(TdConfig {
        attributes,
        xfam,
        max_vcpus,
        l2_vms,
        eptp_controls,
        config_flags,
        tsc_frequency,
        mr_config_id: [80, 128, 176].map(|at| Mr(params.bytes(at))),
        cpuid: cpuid.to_vec(),
        flags,
        arch_capabilities: msr::arch_capabilities(cfg, arch_capabilities, flags),
        msr_bitmaps: MsrFeatures::new(cfg, attributes, xfam, flags).bitmaps(),
        tsc: VirtualTsc::starting_at(0, c.p.machine.tsc(), tsc_frequency, cfg.tsc_hz),
    })
}

/// The CPUID values the host asks for; RCX names the sub-leaf that cannot be had.
fn cpuid(c: &mut Call<'_, '_>, params: &Params) -> Leaf<Box<virt::Values>> {
    let cfg = &c.p.cfg;
    let row =
        |index: usize| core::array::from_fn(|i| params.u32(CPUID_OFFSET + index * 16 + i * 4));
    let config: Vec<Quad> = (0..cfg.cpuid_configs.len()).map(row).collect();
    let wanted = virt::Wanted {
        cfg,
        attributes: params.u64(0),
        xfam: params.u64(8),
        tsc_frequency: params.u16(40),
        config: &config,
    };
    wanted.values().map_err(|refused| {
        if let Some(row) = refused.row {
            c.regs.rcx = row;
        }
        refused.status
    })
}

/// Attributes this module supports; a TD that migrates is neither debugged nor profiled.
pub(crate) fn are_valid_attributes(cfg: &PlatformConfig, attributes: u64) -> bool {
    let conflicting = attributes & (ATTR_DEBUG | ATTR_PERFMON) != 0;
    attributes & !cfg.attributes_fixed0 == 0
        && !attributes & cfg.attributes_fixed1 == 0
        && !(attributes & ATTR_MIGRATABLE != 0 && conflicting)
}

/// State components this processor has, in combinations that make sense.
pub(crate) fn is_valid_xfam(cfg: &PlatformConfig, xfam: u64) -> bool {
    xfam & !cfg.xfam_fixed0 == 0 && !xfam & cfg.xfam_fixed1 == 0 && is_consistent_xfam(xfam)
}

/// Components that come together: AVX before AVX-512, its three parts, both CET, both AMX.
fn is_consistent_xfam(xfam: u64) -> bool {
    let bit = |n: u32| xfam >> n & 1;
    (bit(5) == 0 || bit(2) == 1)
        && bit(5) == bit(6)
        && bit(6) == bit(7)
        && bit(11) == bit(12)
        && bit(17) == bit(18)
}

pub(crate) fn is_valid_eptp_controls(eptp: u64, gpaw: bool) -> bool {
    const WRITE_BACK: u64 = 6;
    let levels_less_one = eptp >> 3 & 7;
    eptp & 7 == WRITE_BACK
        && eptp >> 6 == 0
        && (levels_less_one == 4 || levels_less_one == 3 && !gpaw)
}
