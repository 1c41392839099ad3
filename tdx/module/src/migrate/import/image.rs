//! Destinations of imported fields: a TD and a vCPU.

use crate::arena::lock;
use crate::call::{Leaf, busy, invalid};
use crate::measure::Mr;
use crate::meta::place::Place;
use crate::meta::table::{Agent, Table};
use crate::meta::vcpu::VcpuFields;
use crate::meta::vcpu_initial::{self, RESET_RIP};
use crate::meta::vcpu_store::class;
use crate::meta::{Write, not_valid, not_writable, td_write};
use crate::migrate::fields::Sink;
use crate::platform::Platform;
use crate::status::{Code, Operand, Status};
use crate::td::{ATTR_MIGRATABLE, FLAG_GPAW, Td, TdConfig};
use crate::vcpu::{LastExit, Vcpu, VcpuState};
use crate::virt::cpuid as virt;
use crate::virt::msr::MsrFeatures;
use crate::virt::tsc::VirtualTsc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// A TD under import. Fields are stored as they come, as the TD is of no use before all have come.
pub(super) struct TdImage<'a> {
    p: &'a Platform,
    td: &'a Td,
    config: TdConfig,
}

impl<'a> TdImage<'a> {
    pub(super) fn of(p: &'a Platform, td: &'a Td) -> Self {
        let mut config = TdConfig::clone(&td.config());
        config.cpuid.resize(virt::ROWS, [0; 4]);
        TdImage { p, td, config }
    }

    /// Stores the configuration as far as it has come.
    pub(super) fn keep(self) {
        if self.config.eptp_controls != 0 {
            self.td.ensure_root(&self.p.tables);
        }
        self.td.set_config(self.config);
    }

    /// Makes a TD of the complete immutable state, in the op_state it has.
    pub(super) fn apply(mut self) -> Leaf {
        let (p, td) = (self.p, self.td);
        let config = &mut self.config;
        if config.l2_vms != 0 {
            return Err(invalid(Operand::RDX));
        }
        let num_vcpus = td.num_vcpus.load(Acquire);
        if num_vcpus == 0 || num_vcpus > u32::from(config.max_vcpus) {
            return Err(invalid(Operand::MAX_VCPUS));
        }
        let mut values: Box<virt::Values> = Box::new([[0; 4]; virt::ROWS]);
        for (to, from) in values.iter_mut().zip(&config.cpuid) {
            *to = *from;
        }
        let format = Code::CPUID_LEAF_1F_FORMAT_UNRECOGNIZED;
        virt::leaf_b(&mut values).map_err(|()| format.status())?;
        config.flags = virt::flags(&values);
        if config.flags.tsx && config.arch_capabilities & TSX_CTRL == 0 {
            return not_valid();
        }
        let (attributes, xfam) = (config.attributes, config.xfam);
        config.msr_bitmaps = MsrFeatures::new(&p.cfg, attributes, xfam, config.flags).bitmaps();
        if !td.ensure_root(&p.tables) {
            return Err(busy(Operand::RCX));
        }
        td.bindings().measure();
        td.begin_import(self.config);
        Ok(())
    }

    fn set(&mut self, place: &Place, new: u64) -> Leaf {
        let (td, i) = (self.td, place.element as usize);
        match place.row_key() {
            (0x00, 0x20) => td.import_uuid(i, new),
            (0x10, 0x01) => td.num_vcpus.store(new as u32, Release),
            (0x13, 0x00) => set_word(&mut td.measurement().mrtd, i, new),
            (0x13, code @ (0x10 | 0x18 | 0x20)) => {
                let which = (code as usize - 0x10) / 8;
                set_word(&mut self.config.mr_config_id[which], i, new);
            }
            (0x13, 0x40) => {
                if let Some(rtmr) = td.measurement().rtmr.get_mut(i / 6) {
                    set_word(rtmr, i % 6, new);
                }
            }
            (0x14, _) => self.cpuid(place, new)?,
            (0x18, 0x02) => td.migration().export_count = new as u32,
            (0x18, 0x03) => td.migration().import_count = new as u32,
            (0x1C, _) => {
                let mut ids = lock(&td.x2apic_ids);
                if ids.len() <= i {
                    ids.resize(i + 1, 0);
                }
                ids[i] = new as u32;
            }
            (0x10, _) | (0x11, _) | (0x16, _) | (0x19, _) => self.control(place, new)?,
            _ => return not_writable(),
        }
        Ok(())
    }

    /// Controls, most of which have values that this module does not support.
    fn control(&mut self, place: &Place, new: u64) -> Leaf {
        let (p, td) = (self.p, self.td);
        let (cfg, config) = (&p.cfg, &mut self.config);
        let valid = match place.row_key() {
            (0x10, 0x05) => {
                let Ok(l2_vms) = u8::try_from(new) else {
                    return not_valid();
                };
                if l2_vms <= crate::config::MAX_L2_VMS && !td.has_l2_pages(l2_vms) {
                    return Err(Code::TDCS_NOT_ALLOCATED.status());
                }
                config.l2_vms = l2_vms;
                l2_vms <= crate::config::MAX_L2_VMS
            }
            (0x11, 0x00) => {
                config.attributes = new;
                crate::call::are_valid_attributes(cfg, new) && new & ATTR_MIGRATABLE != 0
            }
            (0x11, 0x01) => {
                config.xfam = new;
                crate::call::is_valid_xfam(cfg, new)
            }
            (0x11, 0x02) => {
                config.max_vcpus = new as u16;
                new <= u64::from(cfg.max_vcpus)
            }
            // The same as a bit of CONFIG_FLAGS.
            (0x11, 0x03) => true,
            (0x11, 0x04) => {
                config.eptp_controls = new;
                crate::call::is_valid_eptp_controls(new, config.config_flags & FLAG_GPAW != 0)
            }
            (0x11, 0x0C) => {
                config.tsc_frequency = new as u16;
                (u64::from(cfg.tsc_frequency.0)..=u64::from(cfg.tsc_frequency.1)).contains(&new)
            }
            (0x11, 0x0D) => {
                let now = p.machine.tsc();
                let frequency = config.tsc_frequency;
                config.tsc = VirtualTsc::starting_at(new, now, frequency, cfg.tsc_hz);
                true
            }
            (0x11, 0x0E) => new == virt::ROWS as u64,
            (0x11, 0x16) => {
                config.config_flags = new;
                new & !cfg.config_flags_fixed0 == 0
            }
            (0x11, 0x19) => {
                td.topology_configured.store(new != 0, Release);
                true
            }
            (0x16, virt::IA32_ARCH_CAPABILITIES) => {
                config.arch_capabilities = new;
                is_valid_arch_capabilities(cfg.native_msr(virt::IA32_ARCH_CAPABILITIES), new)
            }
            // Follow from attributes, XFAM and the processor.
            (0x16, _) => true,
            (0x19, 0x06) => new == crate::servtd::SLOTS,
            _ => return td_write::store(p, td, place, new),
        };
        if valid { Ok(()) } else { not_valid() }
    }

    fn cpuid(&mut self, place: &Place, new: u64) -> Leaf {
        let Some((row, half)) = place.cpuid() else {
            return not_writable();
        };
        let pair = [new as u32, (new >> 32) as u32];
        if !super::cpuid::is_valid(&self.p.cfg, &self.config, row, half, pair) {
            return not_valid();
        }
        self.config.cpuid[row][half * 2..half * 2 + 2].copy_from_slice(&pair);
        Ok(())
    }
}

impl Sink for TdImage<'_> {
    fn store(&mut self, place: &Place, value: u64, mask: u64) -> Result<(), Status> {
        let old = match place.row_key() {
            // Checked only.
            (0x11, 0x0E) | (0x19, 0x06) => return self.control(place, value),
            _ => 0,
        };
        let allowed = place.field().write_mask(Agent::Migration);
        let write = Write {
            id: place.id(),
            value,
            mask,
        };
        let new = write.merge(old, allowed)?;
        self.set(place, new)
    }
}

fn set_word(mr: &mut Mr, i: usize, word: u64) {
    if let Some(bytes) = mr.0.get_mut(i * 8..i * 8 + 8) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// IA32_ARCH_CAPABILITIES: there is IA32_TSX_CTRL. A TD with TSX needs it.
const TSX_CTRL: u64 = 1 << 7;

/// IA32_ARCH_CAPABILITIES that a TD may bring to a processor with the native value.
fn is_valid_arch_capabilities(native: u64, value: u64) -> bool {
    const SET: u64 = 0x20_F16B;
    const CLEAR: u64 = 1 << 2 | 7 << 9 | 7 << 16 | 3 << 22 | u64::MAX << 25;
    /// SSB_NO, BHI_NO and PBRSB_NO.
    const NOT_ABOVE_NATIVE: u64 = 1 << 4 | 1 << 20 | 1 << 24;
    const NOT_BELOW_NATIVE: u64 = 1 << 19;
    value & SET == SET
        && value & CLEAR == 0
        && value & NOT_ABOVE_NATIVE & !native == 0
        && native & NOT_BELOW_NATIVE & !value == 0
}

/// Gives a vCPU under import what its bundle does not carry, as TDH.VP.INIT does.
pub(super) fn initialise_vcpu(p: &Platform, td: &Td, vcpu: &Vcpu) {
    let mut context = vcpu.context();
    context.tsc_at_exit = p.machine.tsc();
    context.rip = RESET_RIP;
    vcpu_initial::initialise(p, td, vcpu, &mut context.store);
}

impl Sink for VcpuFields<'_> {
    fn store(&mut self, place: &Place, value: u64, mask: u64) -> Result<(), Status> {
        let management = place.table == Table::Vcpu && place.row_key().0 == class::MANAGEMENT;
        match (management, place.row_key().1) {
            (true, VCPU_STATE) => {
                if value == VcpuState::Disabled as u64 {
                    self.vcpu.set_state(VcpuState::Disabled);
                }
                Ok(())
            }
            (true, VCPU_INDEX) => match u32::try_from(value) {
                Ok(index) if index < self.td.num_vcpus.load(Acquire) => {
                    self.vcpu.index.store(index, Release);
                    Ok(())
                }
                _ => not_valid(),
            },
            (true, LAST_TD_EXIT) => {
                // RCX came before; the mask of TDG.VP.VMCALL is still in it.
                let rcx = self.ctx.gprs.rcx;
                self.ctx.last_exit = LastExit::from_number(value, rcx);
                self.ctx.last_td_exit = value;
                Ok(())
            }
            _ => {
                let write = Write {
                    id: place.id(),
                    value,
                    mask,
                };
                self.write(write).map(drop)
            }
        }
    }
}

const VCPU_STATE: u32 = 0x00;
const VCPU_INDEX: u32 = 0x02;
const LAST_TD_EXIT: u32 = 0x0F;
