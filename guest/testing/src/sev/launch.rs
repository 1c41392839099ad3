//! A platform with one guest, launched by firmware commands as a host launches it.

use super::builder::Config;
use super::hypervisor::{HostError, World};
use kvm_ops_guest::PageSize as GuestSize;
use soft_amd_sp::{Command, CommandBuffer, PageSize, Platform, RmpUpdate, Status};

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
const TMR_LEN: u64 = 1 << 20;
const POOL: u64 = 0x80_0000;
const POLICY_ES: u64 = 1 << 2;
const POLICY_SNP: u64 = 0x3_0000;
/// Types of pages of SNP_LAUNCH_UPDATE.
const NORMAL: u64 = 1;
const ZERO: u64 = 3;
const SECRETS: u64 = 5;

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
}

fn run(p: &Platform, command: Command, fields: &[(&str, u64)]) -> Result<CommandBuffer, HostError> {
    let mut buffer = CommandBuffer::new(command);
    for (name, value) in fields {
        buffer = buffer.with(name, *value);
    }
    let status = p.run(&mut buffer);
    refused(command, status)?;
    Ok(buffer)
}

fn refused(command: Command, status: Status) -> Result<(), HostError> {
    let refusal = |_| HostError::Command { command, status };
    status.ok().map_err(refusal)
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
        refused(Command::SNP_INIT, p.command(Command::SNP_INIT, &mut []))?;
        p.wbinvd_all();
        let flushed = p.command(Command::SNP_DF_FLUSH, &mut []);
        refused(Command::SNP_DF_FLUSH, flushed)?;
        p.rmpupdate(GCTX, &RmpUpdate::firmware())?;
        p.rmpupdate(RESPONSE, &RmpUpdate::firmware())?;
        let gctx = ("gctx_paddr", GCTX);
        run(p, Command::SNP_GCTX_CREATE, &[gctx])?;
        run(
            p,
            Command::SNP_LAUNCH_START,
            &[gctx, ("policy", POLICY_SNP)],
        )?;
        run(
            p,
            Command::SNP_ACTIVATE,
            &[gctx, ("asid", self.asid.into())],
        )?;
        for page in config.layout.launched() {
            let kind = if page.is_measured { NORMAL } else { ZERO };
            let spa = self.launch_page(world, page.gpa, kind, &page.bytes[..])?;
            world.map(page.gpa, spa, PageSize::Size4K);
        }
        if let Some(gpa) = config.secrets {
            let spa = self.launch_page(world, gpa, SECRETS, &[])?;
            world.map(gpa, spa, PageSize::Size4K);
        }
        run(p, Command::SNP_LAUNCH_FINISH, &[gctx])?;
        Ok(())
    }

    fn launch_page(
        &self,
        world: &mut World,
        gpa: u64,
        kind: u64,
        contents: &[u8],
    ) -> Result<u64, HostError> {
        let spa = world.free_page(PageSize::Size4K)?;
        self.p.host_write(spa, contents)?;
        let update = RmpUpdate::pre_guest(self.asid, gpa);
        self.p.rmpupdate(spa, &update)?;
        let fields = [("gctx_paddr", GCTX), ("flags", kind << 1), ("address", spa)];
        run(&self.p, Command::SNP_LAUNCH_UPDATE, &fields)?;
        Ok(spa)
    }

    fn launch_sev(&mut self, config: &Config, world: &mut World) -> Result<(), HostError> {
        let (policy, asid) = match config.technology {
            Technology::SevEs => (POLICY_ES, ASID),
            _ => (0, FIRST_SEV_ASID),
        };
        self.asid = asid;
        let p = &self.p;
        let tmr = [("flags", 1), ("tmr_address", TMR), ("tmr_len", TMR_LEN)];
        run(p, Command::INIT, &tmr)?;
        p.wbinvd_all();
        let flushed = p.command(Command::DF_FLUSH, &mut []);
        refused(Command::DF_FLUSH, flushed)?;
        let start = run(p, Command::LAUNCH_START, &[("policy", policy)])?;
        let handle = ("handle", start.get("handle").unwrap_or(0));
        run(p, Command::ACTIVATE, &[handle, ("asid", asid.into())])?;
        let launch = |spa, contents: &[u8]| {
            p.host_write(spa, contents)?;
            let fields = [handle, ("address", spa), ("len", contents.len() as u64)];
            run(p, Command::LAUNCH_UPDATE_DATA, &fields).map(|_| ())
        };
        // A launch measures something.
        launch(STAGING, &[0; 0x1000])?;
        for page in config.layout.launched() {
            let spa = world.free_page(PageSize::Size4K)?;
            launch(spa, &page.bytes[..])?;
            world.map(page.gpa, spa, PageSize::Size4K);
        }
        let out = [handle, ("address", STAGING), ("len", 48)];
        run(p, Command::LAUNCH_MEASURE, &out)?;
        run(p, Command::LAUNCH_FINISH, &[handle])?;
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
        let fields = [
            ("gctx_paddr", GCTX),
            ("req_paddr", REQUEST),
            ("res_paddr", RESPONSE),
        ];
        run(&self.p, Command::SNP_GUEST_REQUEST, &fields)?;
        self.p.host_read(RESPONSE, &mut page)?;
        Ok(page.to_vec())
    }
}
