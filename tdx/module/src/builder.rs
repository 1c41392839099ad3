//! Making platforms.

use crate::config::{PlatformConfig, Range, Tdmr};
use crate::leaf::HostLeaf;
use crate::native;
use crate::platform::{LpError, Platform, SysState};
use crate::regs::Regs;
use crate::status::Status;
use core::fmt;

/// Makes a [`Platform`]. The default machine has 4 processors in 2 packages, 64 key ids of which 32..63 are
/// private, 4 GiB of RAM, and one TDMR of 1 GiB at 1 GiB whose metadata lies at 2 GiB.
#[derive(Clone, Debug)]
pub struct PlatformBuilder {
    cfg: PlatformConfig,
}

impl Default for PlatformBuilder {
    fn default() -> Self {
        const GIB: u64 = 1 << 30;
        PlatformBuilder {
            cfg: PlatformConfig {
                lp_package: vec![0, 0, 1, 1],
                packages: 2,
                keyid_bits: 6,
                private_hkids: (32, 63),
                memory_bytes: 4 * GIB,
                seamrr: Range::new(0x2000_0000, 0x200_0000),
                cmrs: vec![Range::new(GIB, 3 * GIB)],
                tdmrs: vec![Tdmr::with_pamt_at(Range::new(GIB, GIB), 2 * GIB)],
                global_hkid: 32,
                cache_wb_blocks: 4,
                build_date: 20_240_129,
                fms: 0x0008_06F8,
                tsc_hz: 2_000_000_000,
                max_vcpus: 576,
                attributes_fixed0: 0x8000_0000_7000_0001,
                attributes_fixed1: 0,
                xfam_fixed0: 0x0006_DBE7,
                xfam_fixed1: 3,
                config_flags_fixed0: 7,
                tsc_frequency: (4, 400),
                arch_capabilities_config_mask: 0x0118_0010,
                cpuid: native::default_cpuid(),
                msrs: native::default_msrs(),
                cpuid_configs: PlatformConfig::default_cpuid_configs(),
                rdseed_tries: 6,
                encrypt_memory: true,
                seal_reports: true,
                escrow_keys: false,
                seed: None,
                rng_seed: None,
                ticks_per_guest_event: 1_000_000,
                guest_steps_per_entry: 1 << 20,
                trace_depth: 0,
            },
        }
    }
}

/// Errors of building a platform.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum BuildError {
    /// There must be 1 to 64 packages, and each must have a processor.
    Packages,
    /// A processor lies in a package that does not exist.
    LpPackage,
    /// There must be 1 to 4096 processors.
    Lps,
    /// Key ids are 1 to 15 bits wide, and the private ones a non-empty range without id 0 within them.
    KeyIds,
    /// RAM must not exceed the addresses left beside the key id.
    Memory,
    /// There may be 32 CMRs, ascending and within RAM.
    Cmrs,
    /// TD_PARAMS has room for 32 configurable CPUID sub-leaves, and leaf 1F has six.
    CpuidConfigs,
    /// Cache write-back takes 1 to 65536 blocks.
    CacheWbBlocks,
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BuildError::Packages => "there must be 1 to 64 packages, each with a processor",
            BuildError::LpPackage => "a processor lies in a package that does not exist",
            BuildError::Lps => "there must be 1 to 4096 processors",
            BuildError::KeyIds => "key ids must be 1 to 15 bits wide, with a private range in them",
            BuildError::Memory => "memory exceeds the physical addresses",
            BuildError::Cmrs => "there may be 32 ascending cmrs within memory",
            BuildError::CpuidConfigs => "there may be 32 configurable cpuid sub-leaves",
            BuildError::CacheWbBlocks => "cache write-back takes 1 to 65536 blocks",
        })
    }
}

impl std::error::Error for BuildError {}

impl PlatformBuilder {
    /// The default machine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Processors and packages: the package of each processor. There are as many packages as the largest
    /// number says.
    #[must_use]
    pub fn processors(mut self, lp_package: impl IntoIterator<Item = usize>) -> Self {
        self.cfg.lp_package = lp_package.into_iter().collect();
        self.cfg.packages = self
            .cfg
            .lp_package
            .iter()
            .max()
            .map_or(0, |m| m.saturating_add(1));
        self
    }

    /// RAM, from address 0.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.cfg.memory_bytes = bytes;
        self
    }

    /// Convertible memory ranges.
    #[must_use]
    pub fn cmrs(mut self, cmrs: impl IntoIterator<Item = Range>) -> Self {
        self.cfg.cmrs = cmrs.into_iter().collect();
        self
    }

    /// SEAM range registers.
    #[must_use]
    pub fn seamrr(mut self, range: Range) -> Self {
        self.cfg.seamrr = range;
        self
    }

    /// The regions [`Platform::bring_up`] configures.
    #[must_use]
    pub fn tdmrs(mut self, tdmrs: impl IntoIterator<Item = Tdmr>) -> Self {
        self.cfg.tdmrs = tdmrs.into_iter().collect();
        self
    }

    /// Key-id width, first and last private key id, and the id [`Platform::bring_up`] uses for the module.
    #[must_use]
    pub fn keyids(mut self, bits: u32, private: (u16, u16), global: u16) -> Self {
        self.cfg.keyid_bits = bits;
        self.cfg.private_hkids = private;
        self.cfg.global_hkid = global;
        self
    }

    /// Steps of one cache write-back, after each of which it can be interrupted.
    #[must_use]
    pub fn cache_wb_blocks(mut self, blocks: u32) -> Self {
        self.cfg.cache_wb_blocks = blocks;
        self
    }

    /// Encrypts private memory and protects its integrity (the default). If off, memory is flat.
    #[must_use]
    pub fn encrypt_memory(mut self, on: bool) -> Self {
        self.cfg.encrypt_memory = on;
        self
    }

    /// Fills in CPUSVN, TEE_TCB_INFO and the MAC of a TD's report, as SEAMREPORT does (the default). If
    /// off, they are zero, and [`Platform::verify_report`] refuses the report.
    #[must_use]
    pub fn seal_reports(mut self, on: bool) -> Self {
        self.cfg.seal_reports = on;
        self
    }

    /// Keeps dead keys so that [`Platform::peek_memory`] can still show what was written under them.
    #[must_use]
    pub fn escrow_keys(mut self, on: bool) -> Self {
        self.cfg.escrow_keys = on;
        self
    }

    /// Seed of the memory keys; without, the operating system gives one.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.cfg.seed = Some(seed);
        self
    }

    /// Operations of a guest program after which the host's timer ends a TDH.VP.ENTER.
    #[must_use]
    pub fn guest_steps_per_entry(mut self, steps: u32) -> Self {
        self.cfg.guest_steps_per_entry = steps;
        self
    }

    /// Keeps the last `depth` calls of each processor.
    #[must_use]
    pub fn trace(mut self, depth: usize) -> Self {
        self.cfg.trace_depth = depth;
        self
    }

    /// Anything else.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut PlatformConfig)) -> Self {
        change(&mut self.cfg);
        self
    }

    /// The machine, just after reset.
    ///
    /// # Errors
    /// The parts do not fit together.
    pub fn build(self) -> Result<Platform, BuildError> {
        let cfg = self.cfg;
        let check = |ok: bool, e: BuildError| if ok { Ok(()) } else { Err(e) };
        check((1..=4096).contains(&cfg.lp_package.len()), BuildError::Lps)?;
        check((1..=64).contains(&cfg.packages), BuildError::Packages)?;
        check(
            cfg.lp_package.iter().all(|p| *p < cfg.packages),
            BuildError::LpPackage,
        )?;
        let populated = (0..cfg.packages).all(|p| cfg.lp_package.contains(&p));
        check(populated, BuildError::Packages)?;
        let (first, last) = cfg.private_hkids;
        let keyids = (1..=15).contains(&cfg.keyid_bits)
            && (1..=last).contains(&first)
            && u32::from(last) < 1 << cfg.keyid_bits;
        check(keyids, BuildError::KeyIds)?;
        check(
            cfg.memory_bytes <= 1 << (52 - cfg.keyid_bits),
            BuildError::Memory,
        )?;
        let ascending = cfg.cmrs.windows(2).all(|w| w[0].end() <= w[1].base);
        let inside = cfg.cmrs.iter().all(|c| c.end() <= cfg.memory_bytes);
        check(
            cfg.cmrs.len() <= 32 && ascending && inside,
            BuildError::Cmrs,
        )?;
        check(cfg.cpuid_configs.len() <= 32, BuildError::CpuidConfigs)?;
        check(
            (1..=1 << 16).contains(&cfg.cache_wb_blocks),
            BuildError::CacheWbBlocks,
        )?;
        Ok(Platform::new(cfg))
    }
}

/// Errors of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum CallError {
    /// The leaf returned an error status.
    Leaf {
        /// The leaf.
        leaf: HostLeaf,
        /// Processor that made the call.
        lp: usize,
        /// Status it returned.
        status: Status,
    },
    /// A processor could not execute.
    Lp(LpError),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Leaf { leaf, lp, status } => {
                write!(f, "{} on processor {lp} returned {status}", leaf.name())
            }
            CallError::Lp(_) => f.write_str("a processor could not execute"),
        }
    }
}

impl std::error::Error for CallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            CallError::Lp(e) => Some(e),
            CallError::Leaf { .. } => None,
        }
    }
}

impl From<LpError> for CallError {
    fn from(e: LpError) -> Self {
        CallError::Lp(e)
    }
}

impl Platform {
    /// The default machine's builder.
    #[must_use]
    pub fn builder() -> PlatformBuilder {
        PlatformBuilder::new()
    }

    /// Executes a leaf (version 0) with the given operands, and takes an error status as an error. For hosts
    /// that expect success; [`Platform::seamcall`] is the call itself.
    ///
    /// # Errors
    /// The leaf returned an error status, or the processor could not execute.
    pub fn call(&self, lp: usize, leaf: HostLeaf, operands: Regs) -> Result<Regs, CallError> {
        let mut regs = Regs {
            rax: leaf.number(),
            ..operands
        };
        let status = self.seamcall(lp, &mut regs)?;
        if status.is_error() {
            return Err(CallError::Leaf { leaf, lp, status });
        }
        Ok(regs)
    }

    /// Brings the module up as a host does: SYS.INIT, SYS.LP.INIT on every processor, SYS.CONFIG with the
    /// platform's TDMRs, SYS.KEY.CONFIG on every package, SYS.TDMR.INIT to the end. The TDMR descriptions
    /// are written to the first pages of memory, which are zeroed afterwards.
    ///
    /// # Errors
    /// A leaf fails.
    pub fn bring_up(&self) -> Result<(), CallError> {
        const ARRAY: u64 = 0x1000;
        const INFOS: u64 = 0x2000;
        self.call(0, HostLeaf::SysInit, Regs::default())?;
        for lp in 0..self.lps.len() {
            self.call(lp, HostLeaf::SysLpInit, Regs::default())?;
        }
        let tdmrs = &self.cfg.tdmrs;
        for (at, tdmr) in (INFOS..).step_by(512).zip(tdmrs) {
            let index = (at - INFOS) / 512;
            self.mem.host_write(ARRAY + index * 8, &at.to_le_bytes());
            self.mem.host_write(at, &tdmr.to_bytes());
        }
        let operands = Regs {
            rcx: ARRAY,
            rdx: tdmrs.len() as u64,
            r8: u64::from(self.cfg.global_hkid),
            ..Regs::default()
        };
        let configured = self.call(0, HostLeaf::SysConfig, operands);
        self.mem
            .zero_pages(ARRAY, 1 + (tdmrs.len() as u64).div_ceil(8), None);
        configured?;
        for package in 0..self.packages.len() {
            let lp = self
                .lps
                .iter()
                .position(|lp| lp.package == package)
                .unwrap_or(0);
            self.call(lp, HostLeaf::SysKeyConfig, Regs::default())?;
        }
        for tdmr in tdmrs {
            let end = tdmr.range.end();
            while self
                .call(
                    0,
                    HostLeaf::SysTdmrInit,
                    Regs {
                        rcx: tdmr.range.base,
                        ..Regs::default()
                    },
                )?
                .rdx
                < end
            {}
        }
        debug_assert_eq!(self.sys_state(), SysState::Ready);
        Ok(())
    }
}
