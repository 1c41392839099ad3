//! Commands of the SNP platform.

use super::super::asid::{AsidKind, GuestId};
use super::super::rules::PlatformState;
use super::super::{Firmware, Outcome, SnpOptions};
use crate::builder::TcbVersion;
use crate::command::Command;
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::status::Status;
use crate::wire::{copy_at, put, u16_at, u32_at, u64_at};

/// Flags of SNP_INIT_EX.
mod flag {
    pub(super) const INIT_RMP: u32 = 1 << 0;
    pub(super) const LIST_PADDR_EN: u32 = 1 << 1;
    pub(super) const RAPL_DIS: u32 = 1 << 2;
    pub(super) const CIPHERTEXT_HIDING_EN: u32 = 1 << 3;
    pub(super) const TIO_EN: u32 = 1 << 4;
    pub(super) const ALL: u32 = (1 << 5) - 1;
}

/// Entries that fit a page of range list.
const MAX_RANGES: u32 = (0x1000 - 8) / 16;
/// CPUID 0x8000_0024 ECX bits that FEATURE_INFO reports (Linux `drivers/crypto/ccp`).
const FEATURE_RAPL_DIS: u32 = 1 << 2;
const FEATURE_CIPHERTEXT_HIDING: u32 = 1 << 3;

impl Firmware<'_> {
    pub(in crate::firmware) fn snp_platform_command(
        &mut self,
        command: Command,
        buffer: &mut [u8],
    ) -> Outcome {
        use Command::*;
        match command {
            SNP_INIT => self.snp_init(flag::INIT_RMP, 0, 0),
            SNP_INIT_EX => {
                self.snp_init(u32_at(buffer, 0), u64_at(buffer, 8), u16_at(buffer, 0x10))
            }
            SNP_SHUTDOWN => self.snp_shutdown(0),
            SNP_SHUTDOWN_EX => {
                check_length(command, u32_at(buffer, 0))?;
                self.snp_shutdown(u32_at(buffer, 4))
            }
            SNP_PLATFORM_STATUS => self.snp_platform_status(u64_at(buffer, 0)),
            SNP_DF_FLUSH => self.df_flush(),
            SNP_GCTX_CREATE => self.gctx_create(u64_at(buffer, 0)),
            SNP_PAGE_RECLAIM => self.page_reclaim(u64_at(buffer, 0)),
            SNP_PAGE_UNSMASH => self.page_unsmash(u64_at(buffer, 0)),
            SNP_PAGE_SET_STATE => {
                check_length(command, u32_at(buffer, 0))?;
                self.fix_ranges(u64_at(buffer, 8))
            }
            SNP_CONFIG => self.snp_config(u64_at(buffer, 0), u32_at(buffer, 8)),
            SNP_COMMIT => {
                check_length(command, u32_at(buffer, 0))?;
                self.sp.tcb.committed = self.machine.config.tcb;
                Ok(())
            }
            SNP_FEATURE_INFO => {
                check_length(command, u32_at(buffer, 0))?;
                self.feature_info(u32_at(buffer, 4), u64_at(buffer, 8))
            }
            _ => Err(Status::INVALID_COMMAND),
        }
    }

    fn snp_init(&mut self, flags: u32, list: u64, max_snp_asid: u16) -> Outcome {
        if self.sp.platform_state() != PlatformState::Uninit {
            return Err(Status::INVALID_PLATFORM_STATE);
        }
        if flags & !flag::ALL != 0 {
            return Err(Status::INVALID_PARAM);
        }
        if !self.machine.snp_enabled() {
            return Err(Status::INVALID_CONFIG);
        }
        let features = self.machine.config.features;
        let unsupported = (flags & flag::RAPL_DIS != 0 && !features.rapl_disable)
            || (flags & flag::CIPHERTEXT_HIDING_EN != 0 && !features.ciphertext_hiding)
            || flags & flag::TIO_EN != 0;
        if unsupported {
            return Err(Status::UNSUPPORTED);
        }
        let hiding = flags & flag::CIPHERTEXT_HIDING_EN != 0;
        let max_snp_asid = u32::from(max_snp_asid);
        if hiding && !(1..self.machine.config.min_sev_asid).contains(&max_snp_asid) {
            return Err(Status::INVALID_PARAM);
        }
        let init_rmp = flags & flag::INIT_RMP != 0;
        if !init_rmp && !self.sp.rmp_initialised {
            return Err(Status::RMP_INIT_REQUIRED);
        }
        let ranges = match flags & flag::LIST_PADDR_EN {
            0 => Vec::new(),
            _ => self.read_ranges(list)?,
        };
        if init_rmp {
            for (_, region) in self.machine.memory.regions() {
                region.lock().clear_rmp();
            }
        }
        self.fix(&ranges)?;
        self.sp.rmp_initialised = true;
        self.sp.snp = Some(SnpOptions {
            max_snp_asid: hiding.then_some(max_snp_asid),
            rapl_disabled: flags & flag::RAPL_DIS != 0,
        });
        self.sp.asids.soil();
        self.machine.forget_wbinvd();
        Ok(())
    }

    fn read_ranges(&self, list: u64) -> Outcome<Vec<(u64, u64)>> {
        let mut head = [0; 8];
        self.read(list, &mut head)?;
        let count = u32_at(&head, 0);
        if count > MAX_RANGES {
            return Err(Status::INVALID_PARAM);
        }
        let mut bytes = vec![0; count as usize * 16];
        self.read(self.address(list) + 8, &mut bytes)?;
        bytes
            .chunks_exact(16)
            .map(|entry| {
                let len = u64::from(u32_at(entry, 8)) * PageSize::Size4K.bytes();
                let base = u64_at(entry, 0);
                if !PageSize::Size4K.aligns(base) || u32_at(entry, 12) != 0 {
                    return Err(Status::INVALID_PARAM);
                }
                // Linux lists every fixed range of the address map, also those without memory.
                Ok((
                    base,
                    len.min(self.machine.memory.len().saturating_sub(base)),
                ))
            })
            .collect()
    }

    fn fix_ranges(&mut self, list: u64) -> Outcome {
        let ranges = self.read_ranges(list)?;
        self.fix(&ranges)
    }

    /// Fixes pages to the hypervisor. All are checked before the first is changed; only the host
    /// could interfere, and it would have to give the page away itself.
    fn fix(&self, ranges: &[(u64, u64)]) -> Outcome {
        let pages = || {
            let step = PageSize::Size4K.bytes() as usize;
            ranges
                .iter()
                .flat_map(move |(base, len)| (*base..base + len).step_by(step))
        };
        let fixable = |entry: &RmpEntry| match entry.state {
            PageState::Hypervisor | PageState::HvFixed => Ok(RmpEntry::of(PageState::HvFixed)),
            _ => Err(Status::INVALID_PAGE_STATE),
        };
        for page in pages() {
            let place = self
                .machine
                .memory
                .place(page)
                .ok_or(Status::INVALID_ADDRESS)?;
            fixable(&place.region.lock().entry(place.index))?;
        }
        for page in pages() {
            self.with_entry(page, fixable)?;
        }
        Ok(())
    }

    /// Ends SNP. Released ASIDs must have been flushed; guests that are left are forgotten, and
    /// their context pages wait for a reclaim after the next initialisation.
    fn snp_shutdown(&mut self, flags: u32) -> Outcome {
        const IOMMU: u32 = 1 << 0;
        const X86: u32 = 1 << 1;
        if flags & !(IOMMU | X86) != 0 {
            return Err(Status::INVALID_PARAM);
        }
        if self.sp.snp.is_none() {
            return Ok(());
        }
        if self.sp.asids.any_dirty(self.asid_range(AsidKind::Snp)) {
            return Err(Status::DFFLUSH_REQUIRED);
        }
        for (context, guest) in std::mem::take(&mut self.sp.contexts) {
            self.release_asid(guest.asid, GuestId::Context(context));
            self.with_entry(context, |_| Ok(RmpEntry::of(PageState::Firmware)))?;
        }
        self.sp.snp = None;
        if flags & X86 != 0 {
            self.machine.disable_snp();
        }
        Ok(())
    }

    fn snp_platform_status(&mut self, address: u64) -> Outcome {
        let config = &self.machine.config;
        let (options, tcb) = (self.sp.snp.unwrap_or_default(), &self.sp.tcb);
        let flags = u32::from(tcb.mask_chip_id)
            | u32::from(tcb.mask_chip_key) << 1
            | 1 << 3
            | u32::from(options.rapl_disabled) << 4
            | u32::from(config.features.ciphertext_hiding) << 5
            | u32::from(options.max_snp_asid.is_some()) << 6;
        let mut out = [0; 0x20];
        let state = self.sp.snp.is_some().into();
        put(
            &mut out,
            0,
            &[
                config.api.0,
                config.api.1,
                state,
                self.sp.rmp_initialised.into(),
            ],
        );
        put(&mut out, 4, &u32::from(config.api.2).to_le_bytes());
        put(&mut out, 8, &flags.to_le_bytes());
        put(
            &mut out,
            0xc,
            &(self.sp.contexts.len() as u32).to_le_bytes(),
        );
        put(&mut out, 0x10, &config.tcb.0.to_le_bytes());
        put(&mut out, 0x18, &tcb.reported.0.to_le_bytes());
        self.write(address, &out)?;
        match self.sp.snp {
            // The page goes back; an output across two of them gives back the first.
            Some(_) => self.with_entry(self.address(address), |entry| {
                Ok(entry.with_state(PageState::Reclaim))
            }),
            None => Ok(()),
        }
    }

    fn snp_config(&mut self, reported: u64, flags: u32) -> Outcome {
        const MASK_CHIP_ID: u32 = 1 << 0;
        const MASK_CHIP_KEY: u32 = 1 << 1;
        // Zero means the version that runs.
        let reported = match reported {
            0 => self.machine.config.tcb,
            n => TcbVersion(n),
        };
        if flags & !(MASK_CHIP_ID | MASK_CHIP_KEY) != 0
            || !reported.is_at_most(self.sp.tcb.committed)
        {
            return Err(Status::INVALID_PARAM);
        }
        self.sp.tcb.reported = reported;
        self.sp.tcb.mask_chip_id = flags & MASK_CHIP_ID != 0;
        self.sp.tcb.mask_chip_key = flags & MASK_CHIP_KEY != 0;
        Ok(())
    }

    fn feature_info(&mut self, ecx_in: u32, address: u64) -> Outcome {
        if ecx_in != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let features = self.machine.config.features;
        let ecx = if features.rapl_disable {
            FEATURE_RAPL_DIS
        } else {
            0
        } | if features.ciphertext_hiding {
            FEATURE_CIPHERTEXT_HIDING
        } else {
            0
        };
        let mut out: [u8; 16] = copy_at(&[], 0);
        put(&mut out, 8, &ecx.to_le_bytes());
        self.write(address, &out)
    }
}

fn check_length(command: Command, length: u32) -> Outcome {
    if length as usize == command.buffer_len() {
        Ok(())
    } else {
        Err(Status::INVALID_LEN)
    }
}
