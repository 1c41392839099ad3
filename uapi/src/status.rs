//! The statuses of the AMD secure processor's firmware.

use core::fmt;

macro_rules! statuses {
    ($($name:ident = $code:literal)*) => {
        /// Bits 15:0 of the mailbox's command register (Linux `include/uapi/linux/psp-sev.h`).
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct Status(pub u32);

        #[allow(missing_docs)] // Each is the code of its name.
        impl Status {
            $(pub const $name: Status = Status($code);)*

            /// Every status that has a name, by number.
            pub const NAMED: &'static [(Status, &'static str)] =
                &[$((Status::$name, stringify!($name))),*];
        }
    };
}

statuses! {
    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LEN = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0a
    BAD_MEASUREMENT = 0x0b
    ASID_OWNED = 0x0c
    INVALID_ASID = 0x0d
    WBINVD_REQUIRED = 0x0e
    DFFLUSH_REQUIRED = 0x0f
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1a
    INVALID_MDATA_ENTRY = 0x1b
    INVALID_PAGE_OWNER = 0x1c
    AEAD_OFLOW = 0x1d
    EXIT_RING_BUFFER = 0x1f
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27
    SHUTDOWN_INCOMPLETE = 0x28
    IN_USE = 0x3a
}

impl Status {
    /// The name, or `None` for a number without one.
    pub fn name(self) -> Option<&'static str> {
        let named = Self::NAMED.iter().find(|(status, _)| *status == self);
        named.map(|(_, name)| *name)
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
