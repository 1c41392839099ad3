//! SEV guests: the software AMD SP below the ports.
//!
//! A frame of a SEV guest is in one of two places. Its private contents are in a page of the AMD
//! SP's memory, where its back end put it (`SevPort::map_encrypted`); accesses go through the ASID's
//! key, and for SNP the RMP checks them. A frame without such a page is in the slots, as with a
//! normal VM.
//!
//! | | with the C-bit | without |
//! |---|---|---|
//! | SEV, SEV-ES, page | through the key | the back end is asked to let its bytes lie in the slot; or the slot as it is (`SimVm::show_slots_without_c_bit`) |
//! | SNP, page | RMP check, through the key | violation |
//! | no page | the back end is asked for one | slot, or MMIO |

mod access;
mod guest;
mod port;
mod processor;
mod protocol;
mod psp;
mod steps;

pub(crate) use access::first_touch;
pub(crate) use guest::Guest;
pub(crate) use port::port;
pub(crate) use processor::{Pending, Side, change_cpuid, controls, cpuid, surround};
pub use psp::SoftPsp;
pub(crate) use steps::Converting;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ops::{AsidPools, Error, Hpa, OpName, PspPort, Result, SnpAsids, Tech};
use soft_amd_sp::command::{
    CommandStruct, DfFlush, FactoryReset, Init, InitFlags, PlatformStatus, Shutdown, SnpDfFlush,
    SnpInitEx, SnpInitFlags,
};
use soft_amd_sp::{AccessFault, Builder, PageSize, Platform, RmpUpdate, Status};

use crate::frames::Frames;
use crate::pages::{HostMemory, SoftPages, no_memory_at};
use crate::{BuildError, SimHost, SimHostBuilder};

static ENCRYPTED: OpName = OpName("a guest with encrypted memory");

/// Place and length of the firmware's trusted memory region, which SEV-ES needs.
const TMR: u64 = 2 << 20;
const TMR_LEN: u32 = 2 << 20;

/// Memory of a machine that was built without a setup: the guests of a fleet find room. It costs what is written.
const MEMORY: u64 = 8 << 30;

/// The state of a platform that is not initialised for SEV (PLATFORM_STATUS).
const UNINIT: u8 = 0;

/// A certificate table without an entry: the header of zeros that ends each table.
const NO_CERTIFICATES: [u8; 24] = [0; 24];

/// The setup of the AMD SP of a software machine.
#[derive(Clone, Debug, Default)]
pub struct SevSetup {
    platform: Builder,
    without_snp: bool,
    max_snp_asid: Option<u16>,
}

impl SevSetup {
    /// On this platform: SNP first, then SEV and SEV-ES, as Linux does.
    pub fn new(platform: Builder) -> Self {
        Self {
            platform,
            ..Self::default()
        }
    }

    /// Leaves SNP out: no RMP is in force, and there are no SNP guests.
    #[must_use]
    pub fn without_snp(mut self) -> Self {
        self.without_snp = true;
        self
    }

    /// With ciphertext hiding: ASIDs 1 to this number are for SNP guests, those of SEV-ES lie above.
    #[must_use]
    pub fn ciphertext_hiding(mut self, max_snp_asid: u16) -> Self {
        self.max_snp_asid = Some(max_snp_asid);
        self
    }
}

pub(crate) use SevSetup as Setup;

impl SimHost {
    /// Gives the AMD SP a new identity, as from its factory (FACTORY_RESET). SEV is shut down then, until it is initialised
    /// again ([`initialise_sev_platform`](Self::initialise_sev_platform)). SNP stays as it is.
    ///
    /// # Errors
    /// The status of the command that firmware refuses. On Intel, and while SEV guests exist, it is
    /// INVALID_PLATFORM_STATE.
    pub fn reset_sev_platform(&self) -> Result<(), Status> {
        let sev = self.machine.sev().ok_or(Status::INVALID_PLATFORM_STATE)?;
        let _turn = sev.turn();
        let status = sev.status()?;
        if status.guest_count.get() != 0 {
            return Err(Status::INVALID_PLATFORM_STATE);
        }
        if status.state != UNINIT {
            sev.platform.run(&mut Shutdown).ok()?;
        }
        sev.platform.run(&mut FactoryReset).ok()
    }

    /// Initialises the AMD SP for SEV and SEV-ES where it is not.
    ///
    /// # Errors
    /// The status of the command that firmware refuses; on Intel it is INVALID_PLATFORM_STATE.
    pub fn initialise_sev_platform(&self) -> Result<(), Status> {
        let sev = self.machine.sev().ok_or(Status::INVALID_PLATFORM_STATE)?;
        let _turn = sev.turn();
        match sev.status()?.state {
            UNINIT => initialise(&sev.platform),
            _ => Ok(()),
        }
    }

    /// Calls a function while the AMD SP is initialised for SEV, as Linux' driver does for commands of the platform: one that was
    /// not is shut down again afterwards.
    ///
    /// # Errors
    /// The status of the initialisation that firmware refuses; on Intel it is INVALID_PLATFORM_STATE.
    pub fn with_sev_platform<T>(&self, body: impl FnOnce() -> T) -> Result<T, Status> {
        let sev = self.machine.sev().ok_or(Status::INVALID_PLATFORM_STATE)?;
        let _turn = sev.turn();
        let is_down = sev.status()?.state == UNINIT;
        if is_down {
            initialise(&sev.platform)?;
        }
        let done = body();
        if is_down && let Err(status) = sev.platform.run(&mut Shutdown).ok() {
            tracing::warn!(%status, "the AMD SP stays initialised for SEV");
        }
        Ok(done)
    }

    /// The software AMD SP below, for faults, traces and counts. `None` on Intel.
    pub fn sev_platform(&self) -> Option<&Arc<Platform>> {
        self.machine.sev().map(|sev| &sev.platform)
    }

    /// The certificate table that SNP guests get with the answer to an extended guest request (GHCB specification, "SNP
    /// Extended Guest Request"), as `/dev/sev` took it with `SNP_SET_EXT_CONFIG`. Without one the table has no entry. Ignored on
    /// Intel.
    pub fn set_snp_certificates(&self, table: impl Into<Arc<[u8]>>) {
        if let Some(sev) = self.machine.sev() {
            *sev.certificates
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = table.into();
        }
    }
}

impl SimHostBuilder {
    /// The setup of the AMD SP; a default one for a machine without. Ignored on Intel.
    #[must_use]
    pub fn sev(mut self, setup: impl Into<SevSetup>) -> Self {
        self.sev = Some(setup.into());
        self
    }
}

impl From<Builder> for SevSetup {
    fn from(platform: Builder) -> Self {
        Self::new(platform)
    }
}

/// A software machine with an AMD SP that is up.
#[derive(Debug)]
pub(crate) struct Sev {
    pub(crate) platform: Arc<Platform>,
    psp: SoftPsp,
    pages: SoftPages,
    /// The certificate table for SNP guests.
    certificates: Mutex<Arc<[u8]>>,
    /// Held while the platform is initialised or shut down.
    turn: Mutex<()>,
}

impl Sev {
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> Result<PlatformStatus, Status> {
        let mut status = PlatformStatus::default();
        self.platform.run(&mut status).ok()?;
        Ok(status)
    }

    pub(crate) fn certificates(&self) -> Arc<[u8]> {
        let table = self.certificates.lock();
        Arc::clone(&table.unwrap_or_else(PoisonError::into_inner))
    }

    /// The AMD SP of a machine that was built without a setup.
    pub(crate) fn up_default() -> Option<Self> {
        Self::up_or_log(SevSetup::new(Builder::default().memory(MEMORY)))
    }

    /// As [`up`](Self::up); `None`, and a log entry, if the firmware does not come up.
    pub(crate) fn up_or_log(setup: SevSetup) -> Option<Self> {
        Self::up(setup).map_err(BuildError::log).ok()
    }

    pub(crate) fn offers(&self, tech: Tech) -> bool {
        !self.psp.asid_pools().range(tech).is_empty()
    }

    pub(crate) fn psp(&self) -> &SoftPsp {
        &self.psp
    }

    pub(crate) fn pages(&self) -> &SoftPages {
        &self.pages
    }

    /// Builds the platform and initialises its firmware in Linux's order: WBINVD and a flush after
    /// each of SNP_INIT_EX and INIT.
    pub(crate) fn up(setup: SevSetup) -> Result<Self, BuildError> {
        let platform = Arc::new(setup.platform.build().map_err(BuildError::machine)?);
        let mut snp = SnpAsids::Off;
        if !setup.without_snp {
            platform.enable_snp_all();
            let mut init = SnpInitEx {
                flags: SnpInitFlags::INIT_RMP,
                ..Default::default()
            };
            snp = SnpAsids::Shared;
            if let Some(top) = setup.max_snp_asid {
                init.flags = init.flags | SnpInitFlags::CIPHERTEXT_HIDING_EN;
                init.max_snp_asid = top.into();
                snp = SnpAsids::UpTo(top.into());
            }
            run(&platform, init)?;
            platform.wbinvd_all();
            run(&platform, SnpDfFlush)?;
            let tmr = RmpUpdate::firmware().size(PageSize::Size2M);
            // A machine too small for it is refused by INIT.
            let _ = platform.rmpupdate(TMR, &tmr);
        }
        initialise(&platform).map_err(BuildError::firmware)?;
        let asids = platform.sev_asids();
        let pools = AsidPools::new(*asids.end(), *asids.start(), snp);
        // Without page 0, whose address would look like none.
        let frames = Frames::new([
            1..TMR >> 12,
            (TMR + u64::from(TMR_LEN)) >> 12..platform.memory_len() >> 12,
        ]);
        Ok(Self {
            psp: SoftPsp::new(Arc::clone(&platform), pools),
            pages: SoftPages::new(frames, Memory(Arc::clone(&platform))),
            certificates: Mutex::new(NO_CERTIFICATES.into()),
            turn: Mutex::new(()),
            platform,
        })
    }
}

/// INIT for SEV and SEV-ES, WBINVD and a flush.
fn initialise(platform: &Platform) -> Result<(), Status> {
    let mut init = Init {
        options: InitFlags::SEV_ES,
        tmr_paddr: TMR.into(),
        tmr_length: TMR_LEN.into(),
        ..Default::default()
    };
    platform.run(&mut init).ok()?;
    platform.wbinvd_all();
    platform.run(&mut DfFlush).ok()
}

fn run(platform: &Platform, mut buffer: impl CommandStruct) -> Result<(), BuildError> {
    let status = platform.run(&mut buffer);
    status.ok().map_err(BuildError::firmware)
}

struct Memory(Arc<Platform>);

fn refused(at: Hpa, fault: AccessFault) -> Error {
    match fault {
        AccessFault::HostWrite { .. } => Error::Busy,
        _ => no_memory_at(at),
    }
}

impl HostMemory for Memory {
    fn write(&self, at: Hpa, data: &[u8]) -> Result<()> {
        let done = self.0.host_write(at.get(), data);
        done.map_err(|fault| refused(at, fault))
    }

    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()> {
        let done = self.0.host_read(at.get(), data);
        done.map_err(|fault| refused(at, fault))
    }
}
