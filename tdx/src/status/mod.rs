//! Status words of the TDX module.

mod names;

use core::fmt;

use kvm_ops::FirmwareCall;

use crate::Leaf;
use names::{OPERANDS, STATUSES};

/// The completion status that a leaf returns in RAX.
///
/// Bit 63 says that the function did not complete, bit 62 that it never will; bits 47:40 are the
/// class, 39:32 the code; bits 31:0 are detail, such as the operand blamed. Two statuses are the
/// same condition if their [`class`](Self::class) is the same: the whole words are never compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompletionStatus(u64);

/// Bits 63:32 of a status word, the part that names the condition.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(u32);

/// The part of a status word that names the condition.
pub const CLASS_MASK: u64 = 0xffff_ffff_0000_0000;

/// Bit 61 of a status word: the failure is fatal to the object that the function worked on. The name
/// is that of the word without the bit.
const FATAL: u32 = 1 << 29;

macro_rules! classes {
    ($($name:ident = $value:literal;)*) => {
        impl Class {
            $(#[doc = concat!("`TDX_", stringify!($name), "`")] pub const $name: Class = Class($value);)*

            /// Every class that this back end tells apart.
            pub const ALL: &'static [Class] = &[$(Class::$name,)*];
        }
    };
}

classes! {
    SUCCESS = 0x0000_0000;
    NON_RECOVERABLE_VCPU = 0x4000_0001;
    NON_RECOVERABLE_TD = 0x6000_0002;
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005;
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205;
    INTERRUPTED_RESUMABLE = 0x8000_0003;
    INTERRUPTED_RESTARTABLE = 0x8000_0004;
    OPERAND_INVALID = 0xc000_0100;
    OPERAND_BUSY = 0x8000_0200;
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201;
    SYS_BUSY = 0x8000_0202;
    RND_NO_ENTROPY = 0x8000_0203;
    PAGE_METADATA_INCORRECT = 0xc000_0300;
    TD_ASSOCIATED_PAGES_EXIST = 0xc000_0400;
    TD_FATAL = 0xe000_0604;
    LIFECYCLE_STATE_INCORRECT = 0xc000_0607;
    OP_STATE_INCORRECT = 0xc000_0608;
    VCPU_ASSOCIATED = 0x8000_0701;
    VCPU_NOT_ASSOCIATED = 0x8000_0702;
    KEY_GENERATION_FAILED = 0x8000_0800;
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810;
    KEY_CONFIGURED = 0x0000_0815;
    WBCACHE_NOT_COMPLETE = 0x8000_0817;
    HKID_NOT_FREE = 0xc000_0820;
    NO_HKID_READY_TO_WBCACHE = 0x0000_0821;
    WBCACHE_RESUME_ERROR = 0xc000_0823;
    FLUSHVP_NOT_DONE = 0x8000_0824;
    EPT_WALK_FAILED = 0xc000_0b00;
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0b07;
    TLB_TRACKING_NOT_DONE = 0xc000_0b08;
    EPT_ENTRY_STATE_INCORRECT = 0xc000_0b0d;
}

/// Classes that this back end does not tell apart: their details are operands.
impl Class {
    const OPERAND_ADDR_RANGE_ERROR: Class = Class(0xc000_0101);
    const EPT_ENTRY_NOT_PRESENT: Class = Class(0xc000_0b03);
    const GPA_RANGE_NOT_BLOCKED: Class = Class(0xc000_0b06);
    const EPT_INVALID_PROMOTE_CONDITIONS: Class = Class(0xc000_0b09);
    const EPT_PAGE_NOT_FREE: Class = Class(0xc000_0b0e);
}

/// The classes whose detail is an operand.
const BLAMING: [Class; 12] = [
    Class::OPERAND_INVALID,
    Class::OPERAND_ADDR_RANGE_ERROR,
    Class::OPERAND_BUSY,
    Class::PAGE_METADATA_INCORRECT,
    Class::EPT_WALK_FAILED,
    Class::EPT_ENTRY_NOT_PRESENT,
    Class::EPT_ENTRY_STATE_INCORRECT,
    Class::EPT_PAGE_NOT_FREE,
    Class::EPT_INVALID_PROMOTE_CONDITIONS,
    Class::GPA_RANGE_NOT_BLOCKED,
    Class::GPA_RANGE_ALREADY_BLOCKED,
    Class::TLB_TRACKING_NOT_DONE,
];

/// The operand that bits 31:0 of an OPERAND_INVALID or OPERAND_BUSY blame: a register, or an
/// implicit operand.
#[allow(missing_docs)] // Each is the operand of its name.
pub mod operand {
    pub const RCX: u32 = 1;
    pub const RDX: u32 = 2;
    pub const R8: u32 = 8;
    pub const R9: u32 = 9;
    /// The TDR of a page given, as TDH.PHYMEM.PAGE.RECLAIM finds it. It is not RCX, though the page
    /// is.
    pub const TDR: u32 = 128;
    pub const SEPT_TREE: u32 = 146;
    pub const TD_EPOCH: u32 = 169;
    pub const OP_STATE: u32 = 172;
    pub const KOT: u32 = 186;
    pub const KET: u32 = 187;
    pub const WBCACHE: u32 = 188;
}

impl CompletionStatus {
    /// Wraps RAX.
    pub const fn new(rax: u64) -> Self {
        Self(rax)
    }

    /// The whole word.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The condition, without detail.
    pub const fn class(self) -> Class {
        Class(((self.0 & CLASS_MASK) >> 32) as u32)
    }

    /// Bits 31:0: an [`operand`], or what the class says.
    pub const fn detail(self) -> u32 {
        self.0 as u32
    }

    /// Returns whether the function did not complete.
    pub const fn is_error(self) -> bool {
        self.0 >> 63 != 0
    }

    /// Returns whether the failure ended the object that the function worked on: the TD of an import.
    pub const fn is_fatal(self) -> bool {
        (self.0 >> 32) as u32 & FATAL != 0
    }
}

impl CompletionStatus {
    /// The name of the operand that bits 31:0 blame, where the class says that they blame one.
    pub fn operand(self) -> Option<&'static str> {
        let class = self.class();
        // Operand 0 is RAX, which holds the leaf: only the check of the leaf blames it.
        let blames =
            class.blames_an_operand() && (self.detail() != 0 || class == Class::OPERAND_INVALID);
        if !blames {
            return None;
        }
        let found = OPERANDS.binary_search_by_key(&self.detail(), |(number, _)| *number);
        found.ok().map(|at| OPERANDS[at].1)
    }

    /// The call of `leaf` that was answered so, by name.
    pub fn answer_of(self, leaf: Leaf) -> FirmwareCall {
        self.answer_of_call(leaf.name())
    }

    pub(crate) fn answer_of_call(self, name: &'static str) -> FirmwareCall {
        FirmwareCall {
            name,
            status: self.0,
            status_name: self.class().full_name(),
            operand: self.operand(),
        }
    }
}

/// `TDX_OPERAND_BUSY (0x8000020000000092) because of SEPT_TREE`.
impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.class().full_name() {
            Some(name) => write!(f, "{name} ({:#018x})", self.0)?,
            None => write!(f, "{:#018x}", self.0)?,
        }
        self.operand()
            .map_or(Ok(()), |operand| write!(f, " because of {operand}"))
    }
}

impl Class {
    /// Every status that the manuals name, by number, with its name.
    pub const NAMED: &'static [(Class, &'static str)] = STATUSES;

    /// The manuals' name without `TDX_`. `None` for a number that they do not name.
    pub fn name(self) -> Option<&'static str> {
        self.full_name()?.strip_prefix("TDX_")
    }

    /// The manuals' name. Bit 61 does not matter.
    pub fn full_name(self) -> Option<&'static str> {
        let at = |class: Class| STATUSES.binary_search_by_key(&class, |(class, _)| *class);
        let found = at(self).or_else(|_| at(Class(self.0 & !FATAL)));
        found.ok().map(|at| STATUSES[at].1)
    }

    /// True if the detail of the class is an operand.
    fn blames_an_operand(self) -> bool {
        BLAMING.contains(&Class(self.0 & !FATAL))
    }

    /// A status word of this class with that detail.
    pub const fn with(self, detail: u32) -> CompletionStatus {
        CompletionStatus((self.0 as u64) << 32 | detail as u64)
    }
}

impl fmt::Debug for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}
