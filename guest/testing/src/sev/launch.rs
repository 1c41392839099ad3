//! A platform with one guest, launched by firmware commands as a host launches it.

use super::builder::Config;
use super::hypervisor::{HostError, World};
use kvm_ops_guest::PageSize as GuestSize;
use soft_amd_sp::command::{
    Activate, CommandStruct, DfFlush, Init, InitFlags, LaunchFinish, LaunchMeasure, LaunchStart,
    LaunchUpdateData, PageAddress, SevPolicy, SnpActivate, SnpDfFlush, SnpGctxCreate,
    SnpGuestRequest, SnpInit, SnpLaunchFinish, SnpLaunchStart, SnpLaunchUpdate,
    SnpLaunchUpdateFlags, SnpPolicy, SnpVlekLoad,
};
use soft_amd_sp::measure::PageType;
use soft_amd_sp::{PageSize, Platform, RmpUpdate, VlekSeed};

/// The ASIDs: SEV-ES and SNP below, SEV from here on.
const FIRST_SEV_ASID: u32 = 6;
const LAST_ASID: u32 = 12;
const ASID: u32 = 1;
/// Memory of the host, below the pages that it gives out.
const GCTX: u64 = 0x1000;
const REQUEST: u64 = 0x2000;
const RESPONSE: u64 = 0x3000;
const STAGING: u64 = 0x4000;
const TMR: u64 = 0x20_0000;
const TMR_LEN: u32 = 1 << 20;
const POOL: u64 = 0x80_0000;

/// The technology of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Technology {
    /// SEV: memory encryption.
    Sev,
    /// SEV-ES: and registers.
    SevEs,
    /// SEV-SNP: and the RMP.
    Snp,
}

/// The platform, and the guest's place on it.
pub(super) struct Machine {
    pub(super) p: Platform,
    pub(super) technology: Technology,
    pub(super) asid: u32,
    pub(super) ram: u64,
    /// What an extended guest request gets.
    pub(super) certificates: Vec<u8>,
}

fn run<C: CommandStruct>(p: &Platform, mut buffer: C) -> Result<C, HostError> {
    let (command, status) = (C::COMMAND, p.run(&mut buffer));
    let refusal = |_| HostError::Command { command, status };
    status.ok().map_err(refusal)?;
    Ok(buffer)
}

impl Machine {
    /// A guest that can run, with the pages of its layout.
    pub(super) fn new(config: &Config) -> Result<(Self, World), HostError> {
        let large = PageSize::Size2M.bytes();
        // Room for each page twice: what a guest had, a host may keep.
        let end = POOL + 2 * config.ram.next_multiple_of(large) + 16 * large;
        let p = Platform::builder()
            .memory(end)
            .cores(2)
            .asids(FIRST_SEV_ASID, LAST_ASID)
            .seed(config.seed)
            .build()
            .map_err(|_| HostError::Full)?;
        let mut machine = Self {
            p,
            technology: config.technology,
            asid: ASID,
            ram: config.ram,
            certificates: config.certificates.clone(),
        };
        let mut world = World::new(POOL, end);
        match config.technology {
            Technology::Snp => machine.launch_snp(config, &mut world)?,
            Technology::Sev | Technology::SevEs => machine.launch_sev(config, &mut world)?,
        }
        for (gpa, size) in config.layout.pending() {
            let size = match size {
                GuestSize::Size2M => PageSize::Size2M,
                _ => PageSize::Size4K,
            };
            machine.assign(&mut world, gpa, size)?;
        }
        for gpa in config.layout.shared() {
            machine.back(&mut world, gpa)?;
            world.set_shared(gpa, true);
        }
        Ok((machine, world))
    }

    fn launch_snp(&self, config: &Config, world: &mut World) -> Result<(), HostError> {
        let p = &self.p;
        p.enable_snp_all();
        run(p, SnpInit)?;
        p.wbinvd_all();
        run(p, SnpDfFlush)?;
        if let Some(seed) = config.vlek {
            self.load_vlek(seed)?;
        }
        p.rmpupdate(GCTX, &RmpUpdate::firmware())?;
        p.rmpupdate(RESPONSE, &RmpUpdate::firmware())?;
        let gctx_paddr = PageAddress::from_raw(GCTX);
        run(p, SnpGctxCreate { gctx_paddr })?;
        let start = SnpLaunchStart {
            gctx_paddr,
            policy: SnpPolicy::SMT,
            ..Default::default()
        };
        run(p, start)?;
        let asid = self.asid.into();
        run(p, SnpActivate { gctx_paddr, asid })?;
        for page in config.layout.launched() {
            let kind = match page.is_measured {
                true => PageType::Normal,
                false => PageType::Zero,
            };
            let spa = self.launch_page(world, page.gpa, kind, &page.bytes[..])?;
            world.map(page.gpa, spa, PageSize::Size4K);
        }
        if let Some(gpa) = config.secrets {
            let spa = self.launch_page(world, gpa, PageType::Secrets, &[])?;
            world.map(gpa, spa, PageSize::Size4K);
        }
        let finish = SnpLaunchFinish {
            gctx_paddr,
            ..Default::default()
        };
        run(p, finish)?;
        Ok(())
    }

    /// Loads the VLEK of a seed, as the vendor's service wraps it for this platform.
    fn load_vlek(&self, seed: u64) -> Result<(), HostError> {
        const IV: [u8; 12] = *b"one hashstic";
        let wrapped = self.p.wrap_vlek(&VlekSeed::from_seed(seed), IV);
        self.p.host_write(STAGING, &wrapped.to_bytes())?;
        let load = SnpVlekLoad {
            vlek_wrapped_address: STAGING.into(),
            ..Default::default()
        };
        run(&self.p, load).map(|_| ())
    }

    fn launch_page(
        &self,
        world: &mut World,
        gpa: u64,
        kind: PageType,
        contents: &[u8],
    ) -> Result<u64, HostError> {
        let spa = world.free_page(PageSize::Size4K)?;
        self.p.host_write(spa, contents)?;
        let update = RmpUpdate::pre_guest(self.asid, gpa);
        self.p.rmpupdate(spa, &update)?;
        let update = SnpLaunchUpdate {
            gctx_paddr: PageAddress::from_raw(GCTX),
            flags: SnpLaunchUpdateFlags::of(kind),
            page_paddr: PageAddress::from_raw(spa),
            ..Default::default()
        };
        run(&self.p, update)?;
        Ok(spa)
    }

    fn launch_sev(&mut self, config: &Config, world: &mut World) -> Result<(), HostError> {
        let (policy, asid) = match config.technology {
            Technology::SevEs => (SevPolicy::ES, ASID),
            _ => (SevPolicy::default(), FIRST_SEV_ASID),
        };
        self.asid = asid;
        let p = &self.p;
        let init = Init {
            options: InitFlags::SEV_ES,
            tmr_paddr: TMR.into(),
            tmr_length: TMR_LEN.into(),
            ..Default::default()
        };
        run(p, init)?;
        p.wbinvd_all();
        run(p, DfFlush)?;
        let start = LaunchStart {
            policy,
            ..Default::default()
        };
        let handle = run(p, start)?.handle;
        let asid = asid.into();
        run(p, Activate { handle, asid })?;
        let launch = |spa: u64, contents: &[u8]| {
            p.host_write(spa, contents)?;
            let update = LaunchUpdateData {
                handle,
                data_paddr: spa.into(),
                data_len: (contents.len() as u32).into(),
                ..Default::default()
            };
            run(p, update).map(|_| ())
        };
        // A launch measures something.
        launch(STAGING, &[0; 0x1000])?;
        for page in config.layout.launched() {
            let spa = world.free_page(PageSize::Size4K)?;
            launch(spa, &page.bytes[..])?;
            world.map(page.gpa, spa, PageSize::Size4K);
        }
        let measure = LaunchMeasure {
            handle,
            measure_paddr: STAGING.into(),
            measure_len: 48.into(),
            ..Default::default()
        };
        run(p, measure)?;
        run(p, LaunchFinish { handle })?;
        Ok(())
    }

    /// Carries a message of the guest to the firmware.
    pub(super) fn guest_request(&self, message: &[u8]) -> Result<Vec<u8>, HostError> {
        let mut page = [0; 0x1000];
        let Some(start) = page.get_mut(..message.len()) else {
            return Err(HostError::TooLong(message.len()));
        };
        start.copy_from_slice(message);
        self.p.host_write(REQUEST, &page)?;
        let request = SnpGuestRequest {
            gctx_paddr: PageAddress::from_raw(GCTX),
            request_paddr: PageAddress::from_raw(REQUEST),
            response_paddr: PageAddress::from_raw(RESPONSE),
        };
        run(&self.p, request)?;
        self.p.host_read(RESPONSE, &mut page)?;
        Ok(page.to_vec())
    }
}
