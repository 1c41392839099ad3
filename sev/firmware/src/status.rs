//! Status codes of the AMD SP.

use std::fmt;

/// Result of a command: bits 15:0 of the mailbox's command register.
///
/// Any 16-bit number can be held, because a driver must cope with any; the numbers that have a
/// name are constants. Names and numbers: Linux `include/uapi/linux/psp-sev.h`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Status(pub u16);

macro_rules! statuses {
    ($($name:ident = $code:literal $doc:literal)*) => {
        impl Status {
            $(#[doc = $doc] pub const $name: Status = Status($code);)*

            /// Every status that has a name, by number.
            pub const NAMED: &'static [Status] = &[$(Status::$name),*];

            /// The name, or `None` for a number without one.
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $(Status::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    SUCCESS = 0x00 "The command did what it says."
    INVALID_PLATFORM_STATE = 0x01 "The platform is not in a state for this command."
    INVALID_GUEST_STATE = 0x02 "The guest is not in a state for this command."
    INVALID_CONFIG = 0x03 "The machine is not set up for it."
    INVALID_LEN = 0x04 "A length is too small, too large, or a query; the right one is written back."
    ALREADY_OWNED = 0x05 "The platform has an owner."
    INVALID_CERTIFICATE = 0x06 "A certificate cannot be read or has the wrong use."
    POLICY_FAILURE = 0x07 "The guest's policy forbids it."
    INACTIVE = 0x08 "The guest has no ASID."
    INVALID_ADDRESS = 0x09 "An address is unaligned or outside memory."
    BAD_SIGNATURE = 0x0a "A signature does not verify."
    BAD_MEASUREMENT = 0x0b "A measurement or authentication code does not match."
    ASID_OWNED = 0x0c "The ASID is bound to another guest."
    INVALID_ASID = 0x0d "The ASID is out of range for this kind of guest."
    WBINVD_REQUIRED = 0x0e "Caches must be written back on every core first."
    DFFLUSH_REQUIRED = 0x0f "The data fabric must be flushed first."
    INVALID_GUEST = 0x10 "No such guest."
    INVALID_COMMAND = 0x11 "No such command."
    ACTIVE = 0x12 "The guest has an ASID."
    HWERROR_PLATFORM = 0x13 "A hardware error; buffers may be used again."
    HWERROR_UNSAFE = 0x14 "A hardware error; buffers are lost."
    UNSUPPORTED = 0x15 "The firmware does not have this."
    INVALID_PARAM = 0x16 "A parameter is wrong."
    RESOURCE_LIMIT = 0x17 "The firmware is out of a resource."
    SECURE_DATA_INVALID = 0x18 "The stored data is damaged."
    INVALID_PAGE_SIZE = 0x19 "The RMP entry has another page size."
    INVALID_PAGE_STATE = 0x1a "The RMP entry is in the wrong state."
    INVALID_MDATA_ENTRY = 0x1b "A metadata entry is wrong."
    INVALID_PAGE_OWNER = 0x1c "The page belongs to another guest."
    AEAD_OFLOW = 0x1d "A message sequence number would overflow."
    EXIT_RING_BUFFER = 0x1f "Ring buffer mode ended."
    RMP_INIT_REQUIRED = 0x20 "The RMP must be initialised."
    BAD_SVN = 0x21 "The security version is too low."
    BAD_VERSION = 0x22 "A version is not supported."
    SHUTDOWN_REQUIRED = 0x23 "A shutdown must come first."
    UPDATE_FAILED = 0x24 "A firmware update failed."
    RESTORE_REQUIRED = 0x25 "The previous firmware must be restored."
    RMP_INITIALIZATION_FAILED = 0x26 "The RMP could not be initialised."
    INVALID_KEY = 0x27 "A key is not valid."
    SHUTDOWN_INCOMPLETE = 0x28 "The shutdown did not finish."
    IN_USE = 0x3a "The object is in use."
}

impl Status {
    /// Returns true if the command succeeded.
    pub fn is_success(self) -> bool {
        self == Status::SUCCESS
    }

    /// `Ok` on success, the status as the error otherwise.
    pub fn ok(self) -> Result<(), Status> {
        if self.is_success() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#x})", self.0),
            None => write!(f, "status {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Status {}

impl From<Result<(), Status>> for Status {
    fn from(result: Result<(), Status>) -> Self {
        result.err().unwrap_or(Status::SUCCESS)
    }
}
