//! `/dev/sev`: whether launches can use it, and what firmware is behind it.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::psp::{IssueCmd, PLATFORM_STATUS, Status};
use kvm_ops_uapi::{U32, U64};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// `/dev/sev` of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SevDevice {
    /// The reason why it cannot be opened for reading and writing, as a launch does. `None` if it can, or if the machine
    /// has no AMD processors.
    pub refused: Option<String>,
    /// The firmware behind it, if it tells.
    pub firmware: Option<SevFirmware>,
}

/// The answer of SEV_PLATFORM_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SevFirmware {
    /// The version of the SEV API, major and minor.
    pub api: (u8, u8),
    /// The build of the firmware.
    pub build: u8,
    /// SEV and SEV-ES guests that it knows.
    pub guests: u32,
}

impl SevDevice {
    pub(crate) fn probe(path: &Path) -> Self {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(device) => Self {
                refused: None,
                firmware: status(&device).ok(),
            },
            Err(error) => Self {
                refused: Some(format!("{} cannot be opened: {error}", path.display())),
                firmware: None,
            },
        }
    }
}

/// Asks for the platform's status, which starts nothing.
fn status(device: &File) -> io::Result<SevFirmware> {
    let mut status = Status::default();
    let mut cmd = IssueCmd {
        cmd: U32::new(PLATFORM_STATUS),
        data: U64::new((&raw mut status).expose_provenance() as u64),
        ..Default::default()
    };
    let request = ioctl::SEV_ISSUE_CMD.number().into();
    // SAFETY: the kernel reads and writes the command, and writes the structure of PLATFORM_STATUS that it points to;
    // both live until the call is over.
    match unsafe { ioctl_with_mut_ref(device, request, &mut cmd) } {
        0 => Ok(SevFirmware {
            api: (status.api_major, status.api_minor),
            build: status.build,
            guests: status.guest_count.get(),
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_or_another_file_is_no_firmware() {
        let missing = SevDevice::probe(Path::new("/nonexistent/sev"));
        let why = missing.refused.unwrap();
        assert!(
            why.starts_with("/nonexistent/sev cannot be opened: "),
            "{why}"
        );
        let other = SevDevice::probe(Path::new("/dev/null"));
        assert_eq!(other, SevDevice::default());
    }
}
