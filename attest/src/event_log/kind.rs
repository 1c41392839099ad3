//! Types of events.

use std::fmt;

/// The type of an event (TCG PC Client Platform Firmware Profile, 10.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventKind(pub u32);

impl EventKind {
    /// A note that is not measured.
    pub const NO_ACTION: Self = Self(3);
    /// The end of a phase of the firmware.
    pub const SEPARATOR: Self = Self(4);
    /// A piece of data with a tag; Linux's EFI stub has its command line and initrd so.
    pub const EVENT_TAG: Self = Self(6);
    /// What a boot loader chose to measure.
    pub const IPL: Self = Self(0xd);
    /// An application that the firmware started: a boot loader, a kernel.
    pub const EFI_BOOT_SERVICES_APPLICATION: Self = Self(0x8000_0003);
    /// A string about an action of the firmware.
    pub const EFI_ACTION: Self = Self(0x8000_0007);

    /// Its name in the specification, without `EV_`.
    pub fn name(self) -> Option<&'static str> {
        let found = NAMES.iter().find(|(number, _)| *number == self.0);
        found.map(|(_, name)| *name)
    }

    /// Returns true if the digest is by definition that of the event's data, so that the two can be
    /// compared. For other types it is that of something the data describes.
    pub(super) fn measures_its_data(self) -> bool {
        // SEPARATOR, ACTION.
        let tcg = [4, 5];
        // EFI_VARIABLE_DRIVER_CONFIG, EFI_GPT_EVENT, EFI_ACTION, EFI_VARIABLE_AUTHORITY.
        let efi = [0x8000_0001, 0x8000_0006, 0x8000_0007, 0x8000_00e0];
        tcg.contains(&self.0) || efi.contains(&self.0)
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "EV_{name}"),
            None => write!(f, "{:#x}", self.0),
        }
    }
}

const NAMES: [(u32, &str); 34] = [
    (0x0, "PREBOOT_CERT"),
    (0x1, "POST_CODE"),
    (0x2, "UNUSED"),
    (0x3, "NO_ACTION"),
    (0x4, "SEPARATOR"),
    (0x5, "ACTION"),
    (0x6, "EVENT_TAG"),
    (0x7, "S_CRTM_CONTENTS"),
    (0x8, "S_CRTM_VERSION"),
    (0x9, "CPU_MICROCODE"),
    (0xa, "PLATFORM_CONFIG_FLAGS"),
    (0xb, "TABLE_OF_DEVICES"),
    (0xc, "COMPACT_HASH"),
    (0xd, "IPL"),
    (0xe, "IPL_PARTITION_DATA"),
    (0xf, "NONHOST_CODE"),
    (0x10, "NONHOST_CONFIG"),
    (0x11, "NONHOST_INFO"),
    (0x12, "OMIT_BOOT_DEVICE_EVENTS"),
    (0x8000_0001, "EFI_VARIABLE_DRIVER_CONFIG"),
    (0x8000_0002, "EFI_VARIABLE_BOOT"),
    (0x8000_0003, "EFI_BOOT_SERVICES_APPLICATION"),
    (0x8000_0004, "EFI_BOOT_SERVICES_DRIVER"),
    (0x8000_0005, "EFI_RUNTIME_SERVICES_DRIVER"),
    (0x8000_0006, "EFI_GPT_EVENT"),
    (0x8000_0007, "EFI_ACTION"),
    (0x8000_0008, "EFI_PLATFORM_FIRMWARE_BLOB"),
    (0x8000_0009, "EFI_HANDOFF_TABLES"),
    (0x8000_000a, "EFI_PLATFORM_FIRMWARE_BLOB2"),
    (0x8000_000b, "EFI_HANDOFF_TABLES2"),
    (0x8000_000c, "EFI_VARIABLE_BOOT2"),
    (0x8000_0010, "EFI_HCRTM_EVENT"),
    (0x8000_00e0, "EFI_VARIABLE_AUTHORITY"),
    (0x8000_00e1, "EFI_SPDM_FIRMWARE_BLOB"),
];
