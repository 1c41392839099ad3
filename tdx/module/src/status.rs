//! The completion status word a leaf returns in RAX.

use core::fmt;

/// The upper half of a status word: error flags (bits 63:60), class and code (bits 47:32).
///
/// The values are those of the Intel TDX module ABI, table "Interface function completion status codes".
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(pub u32);

macro_rules! codes {
    ($($name:ident = $value:literal,)*) => {
        impl Code {
            $(#[doc = concat!("`TDX_", stringify!($name), "`")] pub const $name: Code = Code($value);)*

            /// Every code this module can return.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// Position in [`Code::ALL`].
            pub(crate) const fn index(self) -> Option<usize> {
                #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
                enum Position { $($name,)* }
                match self.0 {
                    $($value => Some(Position::$name as usize),)*
                    _ => None,
                }
            }

            /// The name without the `TDX_` prefix, or `None` for a code this module never returns.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    SUCCESS = 0x0000_0000,
    NON_RECOVERABLE_VCPU = 0x4000_0001,
    NON_RECOVERABLE_TD = 0x6000_0002,
    INTERRUPTED_RESUMABLE = 0x8000_0003,
    INTERRUPTED_RESTARTABLE = 0x8000_0004,
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005,
    INVALID_RESUMPTION = 0xC000_0006,
    CROSS_TD_FAULT = 0x8000_0008,
    CROSS_TD_TRAP = 0x9000_0009,
    OPERAND_INVALID = 0xC000_0100,
    OPERAND_ADDR_RANGE_ERROR = 0xC000_0101,
    OPERAND_BUSY = 0x8000_0200,
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201,
    SYS_BUSY = 0x8000_0202,
    RND_NO_ENTROPY = 0x8000_0203,
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205,
    PAGE_METADATA_INCORRECT = 0xC000_0300,
    TD_ASSOCIATED_PAGES_EXIST = 0xC000_0400,
    SYS_INIT_NOT_PENDING = 0xC000_0500,
    SYS_LP_INIT_NOT_DONE = 0xC000_0502,
    SYS_LP_INIT_DONE = 0xC000_0503,
    SYS_NOT_READY = 0xC000_0505,
    SYS_SHUTDOWN = 0xC000_0506,
    SYS_KEY_CONFIG_NOT_PENDING = 0xC000_0507,
    SYS_STATE_INCORRECT = 0xC000_0508,
    SYS_LP_INIT_NOT_PENDING = 0xC000_050B,
    SYS_CONFIG_NOT_PENDING = 0xC000_050C,
    TD_FATAL = 0xE000_0604,
    TD_NON_DEBUG = 0xC000_0605,
    TDCS_NOT_ALLOCATED = 0xC000_0606,
    LIFECYCLE_STATE_INCORRECT = 0xC000_0607,
    OP_STATE_INCORRECT = 0xC000_0608,
    NO_VCPUS = 0xC000_0609,
    TDCX_NUM_INCORRECT = 0xC000_0610,
    X2APIC_ID_NOT_UNIQUE = 0xC000_0621,
    VCPU_STATE_INCORRECT = 0xC000_0700,
    VCPU_ASSOCIATED = 0x8000_0701,
    VCPU_NOT_ASSOCIATED = 0x8000_0702,
    NO_VALID_VE_INFO = 0xC000_0704,
    MAX_VCPUS_EXCEEDED = 0xC000_0705,
    TSC_ROLLBACK = 0xC000_0706,
    TD_VMCS_FIELD_NOT_INITIALIZED = 0xC000_0730,
    KEY_GENERATION_FAILED = 0x8000_0800,
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810,
    KEY_CONFIGURED = 0x0000_0815,
    WBCACHE_NOT_COMPLETE = 0x8000_0817,
    HKID_NOT_FREE = 0xC000_0820,
    NO_HKID_READY_TO_WBCACHE = 0x0000_0821,
    WBCACHE_RESUME_ERROR = 0xC000_0823,
    FLUSHVP_NOT_DONE = 0x8000_0824,
    LIMIT_CPUID_MAXVAL_SET = 0xC000_0901,
    CPUID_LEAF_1F_FORMAT_UNRECOGNIZED = 0xC000_0904,
    INCONSISTENT_MSR = 0xC000_0920,
    INCORRECT_MSR_VALUE = 0xC000_0921,
    INVALID_TDMR = 0xC000_0A00,
    NON_ORDERED_TDMR = 0xC000_0A01,
    TDMR_OUTSIDE_CMRS = 0xC000_0A02,
    TDMR_ALREADY_INITIALIZED = 0x0000_0A03,
    INVALID_PAMT = 0xC000_0A10,
    PAMT_OUTSIDE_CMRS = 0xC000_0A11,
    PAMT_OVERLAP = 0xC000_0A12,
    INVALID_RESERVED_IN_TDMR = 0xC000_0A20,
    NON_ORDERED_RESERVED_IN_TDMR = 0xC000_0A21,
    EPT_WALK_FAILED = 0xC000_0B00,
    EPT_ENTRY_NOT_FREE = 0xC000_0B02,
    EPT_ENTRY_NOT_PRESENT = 0xC000_0B03,
    GPA_RANGE_NOT_BLOCKED = 0xC000_0B06,
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07,
    TLB_TRACKING_NOT_DONE = 0xC000_0B08,
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09,
    PAGE_ALREADY_ACCEPTED = 0x0000_0B0A,
    PAGE_SIZE_MISMATCH = 0xC000_0B0B,
    EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D,
    EPT_PAGE_NOT_FREE = 0xC000_0B0E,
    L2_SEPT_WALK_FAILED = 0xC000_0B0F,
    L2_SEPT_ENTRY_NOT_FREE = 0xC000_0B10,
    PAGE_ATTR_INVALID = 0xC000_0B11,
    L2_SEPT_PAGE_NOT_PROVIDED = 0xC000_0B12,
    METADATA_FIELD_ID_INCORRECT = 0xC000_0C00,
    METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01,
    METADATA_FIELD_NOT_READABLE = 0xC000_0C02,
    METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03,
    METADATA_LIST_OVERFLOW = 0xC000_0C04,
    INVALID_METADATA_LIST_HEADER = 0xC000_0C05,
    REQUIRED_METADATA_FIELD_MISSING = 0xC000_0C06,
    METADATA_WR_MASK_NOT_VALID = 0xC000_0C0A,
    METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B,
    METADATA_FIELD_SKIP = 0x0000_0C0C,
    SERVTD_ALREADY_BOUND_FOR_TYPE = 0xC000_0D00,
    SERVTD_TYPE_MISMATCH = 0xC000_0D01,
    SERVTD_ATTR_MISMATCH = 0xC000_0D02,
    SERVTD_INFO_HASH_MISMATCH = 0xC000_0D03,
    SERVTD_UUID_MISMATCH = 0xC000_0D04,
    SERVTD_NOT_BOUND = 0xC000_0D05,
    SERVTD_BOUND = 0xC000_0D06,
    TARGET_UUID_MISMATCH = 0xC000_0D07,
    TARGET_UUID_UPDATED = 0xC000_0D08,
    INVALID_MBMD = 0xC000_0E00,
    INCORRECT_MBMD_MAC = 0xC000_0E01,
    NOT_WRITE_BLOCKED = 0xC000_0E02,
    ALREADY_WRITE_BLOCKED = 0x0000_0E03,
    NOT_EXPORTED = 0xC000_0E04,
    MIGRATION_STREAM_STATE_INCORRECT = 0xC000_0E05,
    MAX_MIGS_NUM_EXCEEDED = 0xC000_0E06,
    EXPORTED_DIRTY_PAGES_REMAIN = 0xC000_0E07,
    MIGRATION_DECRYPTION_KEY_NOT_SET = 0xC000_0E08,
    TD_NOT_MIGRATABLE = 0xC000_0E09,
    PREVIOUS_EXPORT_CLEANUP_INCOMPLETE = 0xC000_0E0A,
    NUM_MIGS_HIGHER_THAN_CREATED = 0xC000_0E0B,
    IMPORT_MISMATCH = 0xC000_0E0C,
    MIGRATION_EPOCH_OVERFLOW = 0xC000_0E0D,
    MAX_EXPORTS_EXCEEDED = 0xC000_0E0E,
    INVALID_PAGE_MAC = 0xC000_0E0F,
    MIGRATED_IN_CURRENT_EPOCH = 0xC000_0E10,
    DISALLOWED_IMPORT_OVER_REMOVED = 0xC000_0E11,
    SOME_VCPUS_NOT_MIGRATED = 0xC000_0E12,
    ALL_VCPUS_IMPORTED = 0xC000_0E13,
    MIN_MIGS_NOT_CREATED = 0xC000_0E14,
    VCPU_ALREADY_EXPORTED = 0xC000_0E15,
    INVALID_MIGRATION_DECRYPTION_KEY = 0xC000_0E16,
    L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100,
    L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101,
    L2_EXIT_PENDING_INTERRUPT = 0x0000_1102,
    PENDING_INTERRUPT = 0x0000_1120,
    TD_EXIT_BEFORE_L2_ENTRY = 0x0000_1140,
    TD_EXIT_ON_L2_VM_EXIT = 0x0000_1141,
    TD_EXIT_ON_L2_TO_L1 = 0x0000_1142,
    GLA_NOT_CANONICAL = 0xC000_1160,
}

impl Code {
    /// A status word without detail.
    #[must_use]
    pub const fn status(self) -> Status {
        Status((self.0 as u64) << 32)
    }

    /// A status word with `detail` in bits 31:0.
    #[must_use]
    pub const fn detail(self, detail: u32) -> Status {
        Status((self.0 as u64) << 32 | detail as u64)
    }

    /// A status word that blames an operand.
    #[must_use]
    pub const fn on(self, operand: Operand) -> Status {
        self.detail(operand.0)
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}

/// An operand id, the detail of a status word that blames a register, a field or a lock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Operand(pub u32);

macro_rules! operands {
    ($($name:ident = $value:literal,)*) => {
        impl Operand {
            $(#[doc = concat!("Operand id of `", stringify!($name), "`")] pub const $name: Operand = Operand($value);)*

            /// The operand's name, if it has one.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

operands! {
    RAX = 0,
    RCX = 1,
    RDX = 2,
    RBX = 3,
    RBP = 5,
    RSI = 6,
    RDI = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
    ATTRIBUTES = 64,
    XFAM = 65,
    EXEC_CONTROLS = 66,
    EPTP_CONTROLS = 67,
    MAX_VCPUS = 68,
    CPUID_CONFIG = 69,
    TSC_FREQUENCY = 70,
    NUM_L2_VMS = 71,
    IA32_ARCH_CAPABILITIES_CONFIG = 72,
    PAGE = 95,
    TDMR_INFO_PA = 96,
    GPA_LIST_ENTRY = 97,
    MIG_BUFF_LIST_ENTRY = 98,
    NEW_PAGE_LIST_ENTRY = 99,
    TDR = 128,
    TDCX = 129,
    TDVPR = 130,
    REG_PAGE = 132,
    TDCS = 144,
    TDVPS = 145,
    SEPT_TREE = 146,
    SEPT_ENTRY = 147,
    RTMR = 168,
    TD_EPOCH = 169,
    L2_VAPIC_GPA = 170,
    MIGSC = 171,
    OP_STATE = 172,
    MIG = 173,
    SERVTD_BINDINGS = 174,
    METADATA_FIELD = 176,
    SYS = 184,
    TDMR = 185,
    KOT = 186,
    KET = 187,
    WBCACHE = 188,
}

/// Bit 61 of a status: the failure is fatal to the object that the function worked on.
const FATAL: u32 = 1 << 29;

/// A completion status word.
///
/// ```
/// use soft_tdx_module::{Code, Operand, Status};
/// let busy = Code::OPERAND_BUSY.on(Operand::SEPT_TREE);
/// assert!(busy.is_error());
/// assert_eq!(busy.to_string(), "TDX_OPERAND_BUSY|SEPT_TREE");
/// assert_eq!(Status(0).to_string(), "TDX_SUCCESS");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Status(pub u64);

impl Status {
    /// Success, without detail.
    pub const SUCCESS: Status = Status(0);

    /// Bits 63:32: flags, class and code. Compare this, never the whole word.
    #[must_use]
    pub const fn code(self) -> Code {
        Code((self.0 >> 32) as u32)
    }

    /// Bits 31:0.
    #[must_use]
    pub const fn detail(self) -> u32 {
        self.0 as u32
    }

    /// Sets bit 61: the failure is fatal to the object that the function worked on.
    #[must_use]
    pub(crate) const fn fatal(self) -> Status {
        Status(self.0 | (FATAL as u64) << 32)
    }

    /// Bit 63: the function did not complete.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 >> 63 != 0
    }

    /// The name of the operand the detail designates, for the codes whose detail is an operand id.
    #[must_use]
    pub fn operand(self) -> Option<Operand> {
        match Code(self.code().0 & !FATAL) {
            Code::OPERAND_INVALID
            | Code::OPERAND_ADDR_RANGE_ERROR
            | Code::OPERAND_BUSY
            | Code::PAGE_METADATA_INCORRECT
            | Code::EPT_WALK_FAILED
            | Code::EPT_ENTRY_NOT_PRESENT
            | Code::EPT_ENTRY_STATE_INCORRECT
            | Code::EPT_PAGE_NOT_FREE
            | Code::EPT_INVALID_PROMOTE_CONDITIONS
            | Code::GPA_RANGE_NOT_BLOCKED
            | Code::GPA_RANGE_ALREADY_BLOCKED
            | Code::TLB_TRACKING_NOT_DONE => Some(Operand(self.detail())),
            _ => None,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code();
        match (code.name(), Code(code.0 & !FATAL).name()) {
            (Some(name), _) => write!(f, "TDX_{name}")?,
            (None, Some(name)) => write!(f, "TDX_{name}(fatal)")?,
            (None, None) => return write!(f, "{:#018x}", self.0),
        }
        match self.operand() {
            Some(op) => match op.name() {
                Some(name) => write!(f, "|{name}"),
                None => write!(f, "|{:#x}", op.0),
            },
            None if self.detail() != 0 => write!(f, "|{:#x}", self.detail()),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} ({:#018x})", self.0)
    }
}
