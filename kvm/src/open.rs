//! Opening the KVM device, and hints for its failures.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DESTROY_MEMORY_REGION_WORKS, KVM_CAP_EXT_CPUID,
    KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_USER_MEMORY,
};
use kvm_ioctls::Kvm;

/// The reason why `/dev/kvm` cannot be used. [`hint`](Self::hint) names the remedy.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("no KVM device at {}", path.display())]
    Missing {
        /// The path that was tried.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The device file exists, but no driver is behind it.
    #[error("no driver behind {}", path.display())]
    NoDriver {
        /// The device file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The user may not open it.
    #[error("no permission to open {}", path.display())]
    Denied {
        /// The device file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// It cannot be opened for another reason.
    #[error("cannot open {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The file is something else.
    #[error("{} is not KVM", path.display())]
    NotKvm {
        /// The file.
        path: PathBuf,
    },
    /// KVM has another version of its API; every Linux since 2.6.22 has version 12.
    #[error("KVM API version {found}, and only {KVM_API_VERSION} is supported")]
    ApiVersion {
        /// The version of the kernel.
        found: i32,
    },
    /// KVM lacks a capability that is always needed.
    #[error("KVM lacks the capability {name} ({number})")]
    LacksCapability {
        /// Its name in `linux/kvm.h`.
        name: &'static str,
        /// Its number there.
        number: u32,
    },
    /// A query that every KVM answers was refused.
    #[error("{call} failed")]
    Query {
        /// The query.
        call: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// The processors are of a vendor whose virtualisation is not known here.
    #[error("unknown processor vendor {name:?}")]
    UnknownVendor {
        /// The string of CPUID leaf 0.
        name: String,
    },
}

impl OpenError {
    /// The remedy, in one or two sentences.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Missing { .. } => {
                "load the module (modprobe kvm_intel or kvm_amd) and switch virtualisation on in \
                 the firmware set-up; inside a virtual machine ask its host for nested \
                 virtualisation, inside a container pass the device in (--device /dev/kvm)"
            }
            Self::NoDriver { .. } => {
                "the kvm module is not loaded: modprobe kvm_intel or kvm_amd, and see in dmesg \
                 whether it was refused (virtualisation off in the firmware set-up, or no nested \
                 virtualisation)"
            }
            Self::Denied { .. } => {
                "add the user to the group that owns the device, mostly kvm (usermod -aG kvm USER, \
                 then log in again); if ls -l shows no access for that group, have it set to mode \
                 660; inside a container let its device rules allow the device"
            }
            Self::Io { .. } => "see the cause; the device should be a character device 10:232",
            Self::NotKvm { .. } => "name the KVM device, which is /dev/kvm on every distribution",
            Self::ApiVersion { .. } | Self::LacksCapability { .. } => {
                "update the kernel: version 4.11 or later has all that is needed"
            }
            Self::Query { .. } => {
                "a sandbox (seccomp filter) may forbid KVM's ioctls; allow them, or run outside it"
            }
            Self::UnknownVendor { .. } => {
                "only Intel (VMX) and AMD or Hygon (SVM) processors are supported"
            }
        }
    }
}

/// The capabilities that are always needed. `KVM_CAP_IMMEDIATE_EXIT` (Linux 4.11) is the youngest.
const REQUIRED: [(&str, u32); 4] = [
    ("KVM_CAP_USER_MEMORY", KVM_CAP_USER_MEMORY),
    (
        "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
        KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
    ),
    ("KVM_CAP_EXT_CPUID", KVM_CAP_EXT_CPUID),
    ("KVM_CAP_IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT),
];

/// Opens the device and checks its version and capabilities.
pub(crate) fn open(path: &Path) -> Result<Kvm, OpenError> {
    let file = open_device(path)?;
    // SAFETY: `into_raw_fd` gives up the ownership of an open descriptor, and `Kvm` takes it.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    check_version(path, kvm.get_api_version())?;
    check_required(|number| kvm.check_extension_raw(number.into()))?;
    Ok(kvm)
}

fn open_device(path: &Path) -> Result<File, OpenError> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    let file = opened.map_err(|source| {
        let path = path.to_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => OpenError::Missing { path, source },
            Some(libc::ENODEV | libc::ENXIO) => OpenError::NoDriver { path, source },
            Some(libc::EACCES | libc::EPERM) => OpenError::Denied { path, source },
            _ => OpenError::Io { path, source },
        }
    })?;
    // No ioctl goes to another kind of file, where its number might mean something else.
    match file.metadata() {
        Ok(metadata) if metadata.file_type().is_char_device() => Ok(file),
        _ => Err(OpenError::NotKvm {
            path: path.to_owned(),
        }),
    }
}

fn check_version(path: &Path, version: i32) -> Result<(), OpenError> {
    if version == KVM_API_VERSION as i32 {
        Ok(())
    } else if version < 0 {
        // Mostly ENOTTY: the device has no such request.
        Err(OpenError::NotKvm {
            path: path.to_owned(),
        })
    } else {
        Err(OpenError::ApiVersion { found: version })
    }
}

fn check_required(check_extension: impl Fn(u32) -> i32) -> Result<(), OpenError> {
    match REQUIRED
        .into_iter()
        .find(|(_, number)| check_extension(*number) <= 0)
    {
        Some((name, number)) => Err(OpenError::LacksCapability { name, number }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_required_capability_is_named_when_it_alone_is_lacking() {
        assert!(check_required(|_| 1).is_ok());
        for (name, number) in REQUIRED {
            let error = check_required(|n| i32::from(n != number)).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            assert!(!error.hint().is_empty());
        }
        // An ioctl that fails answers -1, which is not a yes.
        assert!(check_required(|_| -1).is_err());
    }

    #[test]
    fn only_version_12_passes() {
        let path = Path::new("/dev/kvm");
        assert!(check_version(path, 12).is_ok());
        for version in [0, 11, 13] {
            let error = check_version(path, version).unwrap_err();
            assert!(matches!(error, OpenError::ApiVersion { found } if found == version));
        }
        assert!(matches!(
            check_version(path, -1),
            Err(OpenError::NotKvm { .. })
        ));
    }
}
