//! Configuration of a platform.

/// A physical range.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Range {
    /// `[base, base + size)`.
    #[must_use]
    pub const fn new(base: u64, size: u64) -> Self {
        Range { base, size }
    }

    /// One past the last address, saturating.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.base.saturating_add(self.size)
    }

    pub(crate) const fn overlaps(self, other: Range) -> bool {
        self.size != 0 && other.size != 0 && self.base < other.end() && other.base < self.end()
    }

    pub(crate) const fn contains(self, other: Range) -> bool {
        other.base >= self.base && other.end() <= self.end()
    }
}

/// A trust domain memory region, as `TDMR_INFO` describes it to `TDH.SYS.CONFIG`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tdmr {
    /// The region; base and size are multiples of 1 GiB.
    pub range: Range,
    /// Metadata of 1 GiB pages.
    pub pamt_1g: Range,
    /// Metadata of 2 MiB pages.
    pub pamt_2m: Range,
    /// Metadata of 4 KiB pages.
    pub pamt_4k: Range,
    /// Up to 16 holes: offset into the region and size, ascending.
    pub reserved: Vec<Range>,
}

/// Size in bytes of one `TDMR_INFO`.
pub const TDMR_INFO_SIZE: usize = 512;
/// Reserved areas a `TDMR_INFO` can hold.
pub const MAX_RESERVED_AREAS: usize = 16;

impl Tdmr {
    /// A region whose metadata fills `pamt_base` upwards: 4K, then 2M, then 1G entries of 16 bytes each.
    #[must_use]
    pub fn with_pamt_at(range: Range, pamt_base: u64) -> Self {
        let size = |entries: u64| (entries * 16).next_multiple_of(4096);
        let pamt_4k = Range::new(pamt_base, size(range.size >> 12));
        let pamt_2m = Range::new(pamt_4k.end(), size(range.size >> 21));
        let pamt_1g = Range::new(pamt_2m.end(), size(range.size >> 30));
        Tdmr {
            range,
            pamt_1g,
            pamt_2m,
            pamt_4k,
            reserved: Vec::new(),
        }
    }

    /// The structure in memory. Reserved areas beyond the sixteenth are left out.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; TDMR_INFO_SIZE] {
        let mut bytes = [0; TDMR_INFO_SIZE];
        let ranges = [self.range, self.pamt_1g, self.pamt_2m, self.pamt_4k];
        let all = ranges
            .iter()
            .chain(self.reserved.iter().take(MAX_RESERVED_AREAS));
        for (slot, r) in bytes.chunks_exact_mut(16).zip(all) {
            slot[..8].copy_from_slice(&r.base.to_le_bytes());
            slot[8..].copy_from_slice(&r.size.to_le_bytes());
        }
        bytes
    }
}

/// Native CPUID values of a sub-leaf, without the parts that depend on the executing processor or its state. Leaves
/// without a row return 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NativeCpuid {
    /// CPUID leaf.
    pub leaf: u32,
    /// Sub-leaf, or `u32::MAX` where it does not matter.
    pub subleaf: u32,
    /// EAX, EBX, ECX, EDX.
    pub values: [u32; 4],
}

/// One CPUID sub-leaf of `TD_PARAMS` that a host may configure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuidConfig {
    /// CPUID leaf.
    pub leaf: u32,
    /// Sub-leaf, or `u32::MAX` for a leaf without.
    pub subleaf: u32,
    /// Place in the order in which TDH.MNG.INIT checks the rows.
    pub rank: u32,
    /// Bits of EAX, EBX, ECX, EDX that may be set.
    pub permitted: [u32; 4],
}

/// Everything a platform is made of; [`crate::PlatformBuilder`] fills it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PlatformConfig {
    /// Package of each logical processor; its length is their number.
    pub lp_package: Vec<usize>,
    /// Number of packages, at most 64.
    pub packages: usize,
    /// Width of the key id: key id = PA bits 51..52−keyid_bits.
    pub keyid_bits: u32,
    /// First and last private key id.
    pub private_hkids: (u16, u16),
    /// RAM, from address 0.
    pub memory_bytes: u64,
    /// Range registers of the SEAM memory.
    pub seamrr: Range,
    /// Convertible memory ranges, ascending.
    pub cmrs: Vec<Range>,
    /// Regions and global key id a bring-up uses ([`crate::Platform::bring_up`]); the host is free to
    /// configure others.
    pub tdmrs: Vec<Tdmr>,
    /// Key id for the module's own data.
    pub global_hkid: u16,
    /// Steps in which TDH.PHYMEM.CACHE.WB writes a package's caches back.
    pub cache_wb_blocks: u32,
    /// BUILD_DATE of the module, as a decimal number of the form yyyymmdd.
    pub build_date: u32,
    /// Native CPUID(1).EAX.
    pub fms: u32,
    /// Frequency of the TSC.
    pub tsc_hz: u64,
    /// Largest MAX_VCPUS.
    pub max_vcpus: u16,
    /// ATTRIBUTES bits that may be 1.
    pub attributes_fixed0: u64,
    /// ATTRIBUTES bits that must be 1.
    pub attributes_fixed1: u64,
    /// XFAM bits that may be 1.
    pub xfam_fixed0: u64,
    /// XFAM bits that must be 1.
    pub xfam_fixed1: u64,
    /// CONFIG_FLAGS bits that may be 1.
    pub config_flags_fixed0: u64,
    /// Smallest and largest TSC_FREQUENCY, in units of 25 MHz.
    pub tsc_frequency: (u16, u16),
    /// IA32_ARCH_CAPABILITIES_CONFIG bits that may be 1.
    pub arch_capabilities_config_mask: u64,
    /// Native CPUID values.
    pub cpuid: Vec<NativeCpuid>,
    /// Native MSRs at power-on, as address and value. Absent ones are 0.
    pub msrs: Vec<(u32, u64)>,
    /// Configurable CPUID sub-leaves in TD_PARAMS order.
    pub cpuid_configs: Vec<CpuidConfig>,
    /// Attempts at RDSEED before TDH.MNG.CREATE and TDH.MNG.ADDCX give up.
    pub rdseed_tries: u32,
    /// Encrypt private memory and check its integrity.
    pub encrypt_memory: bool,
    /// Fill in what the processor adds to a TD's report: CPUSVN, TEE_TCB_INFO and the MAC.
    pub seal_reports: bool,
    /// Keep keys of dead key ids, for observation alone ([`crate::Platform::peek_memory`]).
    pub escrow_keys: bool,
    /// Seed of keys; `None` takes one from the operating system.
    pub seed: Option<u64>,
    /// State at power-on of the SplitMix64 behind RDRAND and RDSEED, from which UUIDs and migration keys
    /// come; `None` takes it from where `seed` comes from.
    pub rng_seed: Option<u64>,
    /// Ticks the TSC moves at each guest event (TDCALL or VM exit).
    pub ticks_per_guest_event: u64,
    /// Guest program steps after which a timer interrupt ends a VP.ENTER.
    pub guest_steps_per_entry: u32,
    /// Calls the trace keeps; 0 switches it off.
    pub trace_depth: usize,
}

/// Pages of TDCS without L2 VMs.
pub(crate) const TDCS_BASE_PAGES: u32 = 6;
/// Pages TDCS may have.
pub(crate) const TDCS_MAX_PAGES: u32 = 9;
/// TDVPS pages without L2 VMs, TDVPR included.
pub(crate) const TDVPS_BASE_PAGES: u32 = 6;
/// TDVPS pages each L2 VM adds.
pub(crate) const TDVPS_PAGES_PER_L2: u32 = 3;
/// TDVPS pages at most.
pub(crate) const TDVPS_MAX_PAGES: u32 = 15;
/// L2 VMs at most.
pub(crate) const MAX_L2_VMS: u8 = 3;
/// TDMRs at most.
pub(crate) const MAX_TDMRS: u64 = 64;

impl PlatformConfig {
    /// The key id bits of a physical address.
    pub(crate) fn keyid_mask(&self) -> u64 {
        ((1u64 << self.keyid_bits) - 1) << (52 - self.keyid_bits)
    }

    pub(crate) fn keyid_of(&self, pa: u64) -> u64 {
        (pa & self.keyid_mask()) >> (52 - self.keyid_bits)
    }

    /// `pa` without key id.
    pub(crate) fn strip(&self, pa: u64) -> u64 {
        pa & ((1 << 52) - 1) & !self.keyid_mask()
    }

    pub(crate) fn is_private_hkid(&self, id: u64) -> bool {
        (u64::from(self.private_hkids.0)..=u64::from(self.private_hkids.1)).contains(&id)
    }

    /// The sub-leaves the module publishes as configurable.
    pub(crate) fn default_cpuid_configs() -> Vec<CpuidConfig> {
        const NONE: u32 = u32::MAX;
        #[rustfmt::skip]
        const ROWS: [(u32, u32, u32, [u32; 4]); 18] = [
            (0x1, NONE, 0, [0x0FFF_3FFF, 0x00FF_0000, 0x3104_4D88, 0xB844_0000]),
            (0x4, 0, 1, [0xFFFF_C3FF, 0xFFFF_F000, 0xFFFF_FFFF, 0xFFFF_FFFB]),
            (0x4, 1, 2, [0xFFFF_C3FF, 0xFFFF_F000, 0xFFFF_FFFF, 0xFFFF_FFFB]),
            (0x4, 2, 3, [0xFFFF_C3FF, 0xFFFF_F000, 0xFFFF_FFFF, 0xFFFF_FFFB]),
            (0x4, 3, 4, [0xFFFF_C3FF, 0xFFFF_F000, 0xFFFF_FFFF, 0x0000_0007]),
            (0x7, 0, 5, [0, 0xDC2B_9B18, 0x0241_7F65, 0x0005_411C]),
            (0x7, 1, 6, [0x0400_1D30, 0, 0, 0x0000_0430]),
            (0xA, NONE, 7, [0, 0, 0, 0]),
            (0x1C, NONE, 8, [0xFF, 0, 0, 0]),
            (0x8000_0008, NONE, 9, [0, 0x200, 0, 0]),
            (0x7, 2, 10, [0, 0, 0, 0x28]),
            (0x23, 0, 17, [0xF, 0, 0, 0]),
            (0x1F, 0, 11, [0x1F, 0xFFFF, 0xFFFF, 0]),
            (0x1F, 1, 12, [0x1F, 0xFFFF, 0xFFFF, 0]),
            (0x1F, 2, 13, [0x1F, 0xFFFF, 0xFFFF, 0]),
            (0x1F, 3, 14, [0x1F, 0xFFFF, 0xFFFF, 0]),
            (0x1F, 4, 15, [0x1F, 0xFFFF, 0xFFFF, 0]),
            (0x1F, 5, 16, [0x1F, 0xFFFF, 0xFFFF, 0]),
        ];
        ROWS.iter()
            .map(|&(leaf, subleaf, rank, permitted)| CpuidConfig {
                leaf,
                subleaf,
                rank,
                permitted,
            })
            .collect()
    }
}
