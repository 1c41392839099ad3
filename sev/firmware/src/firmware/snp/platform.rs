//! Commands of the SNP platform.

use super::super::asid::{AsidKind, GuestId};
use super::super::rules::PlatformState;
use super::super::{Firmware, Outcome, SnpOptions, check_length, view};
use crate::builder::TcbVersion;
use crate::command::{
    Command, SnpCommit, SnpConfig, SnpConfigFlags, SnpFeatureInfo, SnpFeatureInfoPage, SnpFeatures,
    SnpGctxCreate, SnpInitEx, SnpInitFlags, SnpPageMdInit, SnpPageReclaim, SnpPageSetState,
    SnpPageUnsmash, SnpPlatformStatus, SnpPlatformStatusPage, SnpShutdownEx, SnpShutdownFlags,
    SnpStatusFlags, SnpVlekLoad,
};
use crate::machine::entry::{PageSize, PageState, RmpEntry};
use crate::status::Status;
use crate::vlek::{VlekSeed, WrappedVlek};
use crate::wire::{u32_at, u64_at};
use zerocopy::IntoBytes;

/// Entries that fit a page of range list.
const MAX_RANGES: u32 = (0x1000 - 8) / 16;

impl Firmware<'_> {
    pub(in crate::firmware) fn snp_platform_command(
        &mut self,
        command: Command,
        buffer: &mut [u8],
    ) -> Outcome {
        use Command::*;
        match command {
            SNP_INIT => self.snp_init(&SnpInitEx {
                flags: SnpInitFlags::INIT_RMP,
                ..Default::default()
            }),
            SNP_INIT_EX => self.snp_init(view(buffer)?),
            SNP_SHUTDOWN => self.snp_shutdown(&SnpShutdownEx::default()),
            SNP_SHUTDOWN_EX => self.snp_shutdown(view(buffer)?),
            SNP_PLATFORM_STATUS => {
                let buffer: &mut SnpPlatformStatus = view(buffer)?;
                self.snp_platform_status(buffer.status_paddr.get())
            }
            SNP_DF_FLUSH => self.df_flush(),
            SNP_GCTX_CREATE => self.gctx_create(view::<SnpGctxCreate>(buffer)?.gctx_paddr),
            SNP_PAGE_RECLAIM => self.page_reclaim(view::<SnpPageReclaim>(buffer)?.page_paddr),
            SNP_PAGE_UNSMASH => self.page_unsmash(view::<SnpPageUnsmash>(buffer)?.page_paddr),
            SNP_PAGE_MD_INIT => self.page_md_init(view::<SnpPageMdInit>(buffer)?.page_paddr),
            SNP_PAGE_SET_STATE => self.fix_ranges(view(buffer)?),
            SNP_CONFIG => self.snp_config(view(buffer)?),
            SNP_COMMIT => {
                check_length(view::<SnpCommit>(buffer)?.length)?;
                self.sp.tcb.committed = self.machine.config.tcb;
                Ok(())
            }
            SNP_VLEK_LOAD => self.vlek_load(view(buffer)?),
            SNP_FEATURE_INFO => self.feature_info(view(buffer)?),
            _ => Err(Status::INVALID_COMMAND),
        }
    }

    fn snp_init(&mut self, buffer: &SnpInitEx) -> Outcome {
        let flags = buffer.flags;
        if self.sp.platform_state() != PlatformState::Uninit {
            return Err(Status::INVALID_PLATFORM_STATE);
        }
        if flags.reserved() != 0 {
            return Err(Status::INVALID_PARAM);
        }
        if !self.machine.snp_enabled() {
            return Err(Status::INVALID_CONFIG);
        }
        let features = self.machine.config.features;
        let unsupported = (flags.contains(SnpInitFlags::RAPL_DIS) && !features.rapl_disable)
            || (flags.contains(SnpInitFlags::CIPHERTEXT_HIDING_EN) && !features.ciphertext_hiding)
            || flags.contains(SnpInitFlags::TIO_EN);
        if unsupported {
            return Err(Status::UNSUPPORTED);
        }
        let hiding = flags.contains(SnpInitFlags::CIPHERTEXT_HIDING_EN);
        let max_snp_asid = u32::from(buffer.max_snp_asid.get());
        if hiding && !(1..self.machine.config.min_sev_asid).contains(&max_snp_asid) {
            return Err(Status::INVALID_PARAM);
        }
        let init_rmp = flags.contains(SnpInitFlags::INIT_RMP);
        if !init_rmp && !self.sp.rmp_initialised {
            return Err(Status::RMP_INIT_REQUIRED);
        }
        let ranges = match flags.contains(SnpInitFlags::LIST_PADDR_EN) {
            false => Vec::new(),
            true => self.read_ranges(buffer.list_paddr.get())?,
        };
        if init_rmp {
            for place in self.machine.memory.places() {
                place.lock_all().clear_rmp();
            }
        }
        self.fix(&ranges)?;
        self.sp.rmp_initialised = true;
        self.sp.snp = Some(SnpOptions {
            max_snp_asid: hiding.then_some(max_snp_asid),
            rapl_disabled: flags.contains(SnpInitFlags::RAPL_DIS),
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

    fn fix_ranges(&mut self, buffer: &SnpPageSetState) -> Outcome {
        check_length(buffer.length)?;
        let ranges = self.read_ranges(buffer.list_paddr.get())?;
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
            let place = self.place(page)?;
            fixable(&place.peek().entry(place.index))?;
        }
        for page in pages() {
            self.with_entry(page, fixable)?;
        }
        Ok(())
    }

    /// Ends SNP. Released ASIDs must have been flushed; guests that are left are forgotten, and
    /// their context pages wait for a reclaim after the next initialisation.
    fn snp_shutdown(&mut self, buffer: &SnpShutdownEx) -> Outcome {
        check_length(buffer.length)?;
        if buffer.flags.reserved() != 0 {
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
        self.sp.vlek = None;
        if buffer.flags.contains(SnpShutdownFlags::X86_SNP_SHUTDOWN) {
            self.machine.disable_snp();
        }
        Ok(())
    }

    fn snp_platform_status(&mut self, address: u64) -> Outcome {
        let config = &self.machine.config;
        let (options, tcb) = (self.sp.snp.unwrap_or_default(), &self.sp.tcb);
        let flags = [
            (SnpStatusFlags::MASK_CHIP_ID, tcb.mask_chip_id),
            (SnpStatusFlags::MASK_CHIP_KEY, tcb.mask_chip_key),
            (SnpStatusFlags::VLEK_EN, self.sp.vlek.is_some()),
            (SnpStatusFlags::RAPL_DIS, options.rapl_disabled),
            (
                SnpStatusFlags::CIPHERTEXT_HIDING_CAP,
                config.features.ciphertext_hiding,
            ),
            (
                SnpStatusFlags::CIPHERTEXT_HIDING_EN,
                options.max_snp_asid.is_some(),
            ),
        ]
        .into_iter()
        .filter(|(_, on)| *on)
        .fold(SnpStatusFlags::FEATURE_INFO, |all, (flag, _)| all | flag);
        let (api_major, api_minor, build) = config.api;
        let out = SnpPlatformStatusPage {
            api_major,
            api_minor,
            state: self.sp.snp.is_some().into(),
            is_rmp_init: self.sp.rmp_initialised.into(),
            build: u32::from(build).into(),
            flags,
            guest_count: (self.sp.contexts.len() as u32).into(),
            current_tcb: config.tcb.0.into(),
            reported_tcb: tcb.reported.0.into(),
        };
        self.write(address, out.as_bytes())?;
        match self.sp.snp {
            // The page goes back; an output across two of them gives back the first.
            Some(_) => self.with_entry(self.address(address), |entry| {
                Ok(entry.with_state(PageState::Reclaim))
            }),
            None => Ok(()),
        }
    }

    fn snp_config(&mut self, buffer: &SnpConfig) -> Outcome {
        let flags = buffer.flags;
        // Zero means the version that runs.
        let reported = match buffer.reported_tcb.get() {
            0 => self.machine.config.tcb,
            n => TcbVersion(n),
        };
        if flags.reserved() != 0 || !reported.is_at_most(self.sp.tcb.committed) {
            return Err(Status::INVALID_PARAM);
        }
        self.sp.tcb.reported = reported;
        self.sp.tcb.mask_chip_id = flags.contains(SnpConfigFlags::MASK_CHIP_ID);
        self.sp.tcb.mask_chip_key = flags.contains(SnpConfigFlags::MASK_CHIP_KEY);
        Ok(())
    }

    /// Loads a provider's seed, in place of one that was loaded before.
    fn vlek_load(&mut self, buffer: &SnpVlekLoad) -> Outcome {
        check_length(buffer.length)?;
        if buffer.vlek_wrapped_version != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let mut wrapped = WrappedVlek::default();
        self.read(buffer.vlek_wrapped_address.get(), wrapped.as_mut_bytes())?;
        let key = self.sp.identity.vlek_wrapping_key();
        let seed = VlekSeed::unwrap(&key, &wrapped).ok_or(Status::BAD_MEASUREMENT)?;
        self.sp.vlek = Some(seed);
        Ok(())
    }

    fn feature_info(&mut self, buffer: &SnpFeatureInfo) -> Outcome {
        check_length(buffer.length)?;
        if buffer.ecx_in != 0 {
            return Err(Status::INVALID_PARAM);
        }
        let features = self.machine.config.features;
        let mut out = SnpFeatureInfoPage::default();
        if features.rapl_disable {
            out.ecx = out.ecx | SnpFeatures::RAPL_DIS;
        }
        if features.ciphertext_hiding {
            out.ecx = out.ecx | SnpFeatures::CIPHERTEXT_HIDING;
        }
        self.write(buffer.feature_info_paddr.get(), out.as_bytes())
    }
}
