//! Configuration of a platform.

use crate::identity::RootOfTrust;
use crate::machine::entry::PageSize;
use crate::platform::Platform;
use thiserror::Error;

/// Security version of the firmware's parts, as reports carry it (layout of Milan and Genoa):
/// boot loader in byte 0, TEE in byte 1, SNP firmware in byte 6, microcode in byte 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct TcbVersion(pub u64);

impl TcbVersion {
    /// Packs the four versions.
    pub const fn new(boot_loader: u8, tee: u8, snp: u8, microcode: u8) -> Self {
        Self(u64::from_le_bytes([
            boot_loader,
            tee,
            0,
            0,
            0,
            0,
            snp,
            microcode,
        ]))
    }

    /// Returns true if no part is newer than in `other`.
    pub fn is_at_most(self, other: TcbVersion) -> bool {
        let pairs = self.0.to_le_bytes().into_iter().zip(other.0.to_le_bytes());
        pairs.into_iter().all(|(a, b)| a <= b)
    }
}

/// A CPUID leaf whose values a guest's CPUID page may not exceed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLimit {
    /// EAX of the query.
    pub eax_in: u32,
    /// ECX of the query.
    pub ecx_in: u32,
    /// Bits of EAX, EBX, ECX and EDX that the guest may be shown. A bit that is not here must be
    /// clear in the page.
    pub allowed: [u32; 4],
}

/// Features that need support of the processor and firmware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Ciphertext hiding for DRAM: SNP_INIT_EX may ask for it.
    pub ciphertext_hiding: bool,
    /// RAPL can be disabled.
    pub rapl_disable: bool,
    /// Memory is encrypted with AES-256-XTS.
    pub aes_256_xts: bool,
    /// CXL memory is present.
    pub cxl: bool,
    /// Page swapping can be disabled by policy.
    pub page_swap_disable: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) regions: usize,
    pub(crate) cores: u32,
    pub(crate) min_sev_asid: u32,
    pub(crate) max_asid: u32,
    pub(crate) c_bit: u32,
    pub(crate) api: (u8, u8, u8),
    pub(crate) tcb: TcbVersion,
    pub(crate) smt: bool,
    pub(crate) features: Features,
    pub(crate) fms: (u8, u8, u8),
    pub(crate) tsc_khz: u32,
    pub(crate) report_version: u32,
    pub(crate) max_guests: usize,
    pub(crate) cpuid: Vec<CpuidLimit>,
    pub(crate) trace_capacity: usize,
    pub(crate) seed: Option<u64>,
    pub(crate) root: RootOfTrust,
}

impl Config {
    /// Family 0x1a (Turin) has chip ids of 8 bytes, earlier ones of 64.
    pub(crate) const fn chip_id_len(&self) -> usize {
        if self.fms.0 >= 0x1a { 8 } else { 64 }
    }

    /// Family, model and stepping as CPUID packs them (leaf 1, EAX).
    pub(crate) fn cpuid_signature(&self) -> u32 {
        let (family, model, stepping) = self.fms;
        crate::measure::signature_of(family.into(), model.into(), stepping.into())
    }
}

/// Errors of building a platform.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Memory must be a multiple of 2 MiB, at least one and at most 1 TiB.
    #[error("memory of {0:#x} bytes is not a multiple of 2 MiB up to 1 TiB")]
    Memory(u64),
    /// There must be 1 to 4096 cores.
    #[error("{0} cores are not between 1 and 4096")]
    Cores(u32),
    /// ASIDs must satisfy 1 <= lowest SEV ASID <= highest ASID + 1 <= 65536.
    #[error("lowest SEV asid {min_sev:#x} and highest asid {max:#x} make no sense")]
    Asids {
        /// Lowest ASID for guests without SEV-ES.
        min_sev: u32,
        /// Highest ASID.
        max: u32,
    },
    /// The C-bit must lie above memory and below bit 64.
    #[error("c-bit position {0} lies in the address of memory")]
    CBit(u32),
    /// Report versions are 2, 3 and 5.
    #[error("report version {0} is not 2, 3 or 5")]
    ReportVersion(u32),
    /// The operating system gave no random numbers.
    #[error("no random numbers from the operating system: {0}")]
    Random(String),
}

/// Builds a [`Platform`].
#[derive(Clone, Debug)]
pub struct Builder(Config);

impl Default for Builder {
    fn default() -> Self {
        Self(Config {
            regions: 128,
            cores: 4,
            min_sev_asid: 100,
            max_asid: 509,
            c_bit: 51,
            api: (1, 55, 40),
            tcb: TcbVersion::new(4, 0, 22, 213),
            smt: true,
            features: Features {
                ciphertext_hiding: true,
                rapl_disable: true,
                ..Features::default()
            },
            fms: (0x19, 0x11, 0x01),
            tsc_khz: 2_400_000,
            report_version: 3,
            max_guests: 1024,
            cpuid: Vec::new(),
            trace_capacity: 1024,
            seed: None,
            root: RootOfTrust::default(),
        })
    }
}

impl Builder {
    /// Size of system memory in bytes, a multiple of 2 MiB. Only pages that are written take
    /// memory of the process. Default 256 MiB.
    pub fn memory(mut self, bytes: u64) -> Self {
        self.0.regions = usize::try_from(bytes / PageSize::Size2M.bytes()).unwrap_or(usize::MAX);
        if !bytes.is_multiple_of(PageSize::Size2M.bytes()) {
            self.0.regions = 0;
        }
        self
    }

    /// Number of cores that must run WBINVD. Default 4.
    pub fn cores(mut self, n: u32) -> Self {
        self.0.cores = n;
        self
    }

    /// ASIDs: the lowest for guests without SEV-ES (CPUID 0x8000001F EDX) and the highest (ECX).
    /// Defaults 100 and 509.
    pub fn asids(mut self, min_sev: u32, max: u32) -> Self {
        self.0.min_sev_asid = min_sev;
        self.0.max_asid = max;
        self
    }

    /// Position of the C-bit (CPUID 0x8000001F EBX bits 5 to 0). Default 51.
    pub fn c_bit(mut self, bit: u32) -> Self {
        self.0.c_bit = bit;
        self
    }

    /// Version and build of the firmware. Default 1.55 build 40.
    pub fn api_version(mut self, major: u8, minor: u8, build: u8) -> Self {
        self.0.api = (major, minor, build);
        self
    }

    /// Security version of the firmware.
    pub fn tcb(mut self, tcb: TcbVersion) -> Self {
        self.0.tcb = tcb;
        self
    }

    /// Switches SMT on or off. Default on.
    pub fn smt(mut self, on: bool) -> Self {
        self.0.smt = on;
        self
    }

    /// Optional features. Default: ciphertext hiding and RAPL disable.
    pub fn features(mut self, features: Features) -> Self {
        self.0.features = features;
        self
    }

    /// CPUID family, model and stepping, as reports carry them. Default 0x19, 0x11, 1.
    pub fn cpuid_fms(mut self, family: u8, model: u8, stepping: u8) -> Self {
        self.0.fms = (family, model, stepping);
        self
    }

    /// Frequency of the processor's TSC. Default 2.4 GHz.
    pub fn tsc_khz(mut self, khz: u32) -> Self {
        self.0.tsc_khz = khz;
        self
    }

    /// Version of attestation reports: 2, 3 or 5. Default 3.
    pub fn report_version(mut self, version: u32) -> Self {
        self.0.report_version = version;
        self
    }

    /// Number of guest contexts the firmware can hold, SEV and SNP together. Default 1024.
    pub fn max_guests(mut self, n: usize) -> Self {
        self.0.max_guests = n;
        self
    }

    /// Limits for the CPUID pages of SNP guests. Default none: only the form is checked.
    pub fn cpuid_limits(mut self, limits: Vec<CpuidLimit>) -> Self {
        self.0.cpuid = limits;
        self
    }

    /// Number of calls the trace keeps. Default 1024.
    pub fn trace_capacity(mut self, calls: usize) -> Self {
        self.0.trace_capacity = calls;
        self
    }

    /// Makes every random number of the platform, identity included, follow from `seed`. Without
    /// it they come from the operating system.
    pub fn seed(mut self, seed: u64) -> Self {
        self.0.seed = Some(seed);
        self
    }

    /// The vendor whose keys sign the chip's. Platforms of the same root accept each other as
    /// genuine. The default root is the same for all.
    pub fn root(mut self, root: RootOfTrust) -> Self {
        self.0.root = root;
        self
    }

    /// Builds the platform.
    pub fn build(self) -> Result<Platform, BuildError> {
        let c = self.0;
        let bytes = (c.regions as u64).saturating_mul(PageSize::Size2M.bytes());
        if c.regions == 0 || bytes > 1 << 40 {
            return Err(BuildError::Memory(bytes));
        }
        if !(1..=4096).contains(&c.cores) {
            return Err(BuildError::Cores(c.cores));
        }
        let (min_sev, max) = (c.min_sev_asid, c.max_asid);
        if min_sev == 0 || max == 0 || max > 0xffff || min_sev > max + 1 {
            return Err(BuildError::Asids { min_sev, max });
        }
        if c.c_bit > 63 || bytes > 1 << c.c_bit {
            return Err(BuildError::CBit(c.c_bit));
        }
        if ![2, 3, 5].contains(&c.report_version) {
            return Err(BuildError::ReportVersion(c.report_version));
        }
        let mut seed = [0; 32];
        match c.seed {
            Some(n) => seed[..8].copy_from_slice(&n.to_le_bytes()),
            None => {
                getrandom::getrandom(&mut seed).map_err(|e| BuildError::Random(e.to_string()))?
            }
        }
        Ok(Platform::new(c, seed))
    }
}
