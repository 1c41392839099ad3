//! `/dev/sev`: a descriptor that SEV commands ask for. Its own commands are not served: EINVAL, as
//! for a command that the kernel does not know.

use kvm_ops_uapi::Errno;
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::psp::IssueCmd;
use zerocopy::IntoBytes;

use crate::refusal::Result;
use crate::{Kernel, Process};

pub(crate) fn device_ioctl(
    kernel: &Kernel,
    process: &dyn Process,
    ioctl: Option<Ioctl>,
    argument: u64,
) -> Result<i64> {
    if ioctl != Some(ioctl::SEV_ISSUE_CMD) {
        return Err(Errno::EINVAL.into());
    }
    if !kernel.has_sev() {
        return Err(Errno::ENODEV.into());
    }
    let mut cmd = IssueCmd::default();
    let read = process.read(argument, cmd.as_mut_bytes());
    read.map_err(|_| Errno::EFAULT)?;
    Err(Errno::EINVAL.into())
}
