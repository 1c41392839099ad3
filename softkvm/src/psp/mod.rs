//! `/dev/sev`: the commands of the AMD SP that are the host's, and no VM's.

mod area;
mod keys;
mod snp;
mod status;

use kvm_ops_uapi::U32;
use kvm_ops_uapi::checks::Check;
use kvm_ops_uapi::checks::issue::{COPY, COPY_BACK, KNOWN, NUMBER};
use kvm_ops_uapi::ioctl::{self, Ioctl};
use kvm_ops_uapi::psp::{self as uapi, IssueCmd};
use soft_amd_sp::{CommandStruct, Platform, Status};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use area::Area;

use crate::refusal::{Result, ensure};
use crate::sev::Failed;
use crate::{Kernel, Process, arg};
use kvm_ops_uapi::Errno;

/// An open file of `/dev/sev`.
pub(crate) struct SevDevice {
    pub(crate) kernel: Kernel,
    pub(crate) writable: bool,
}

/// What a command works on.
struct Call<'a> {
    device: &'a SevDevice,
    platform: &'a Platform,
    process: &'a dyn Process,
    /// The address of the command's structure.
    data: u64,
}

impl Call<'_> {
    fn require_writable(&self, check: Check) -> Result<()> {
        ensure(self.device.writable, check)
    }

    /// Memory for the command's blobs.
    fn area(&self) -> Result<Area<'_>> {
        Area::new(self.device.kernel.host(), self.platform)
    }

    /// The command's structure.
    fn read<T: FromBytes + IntoBytes>(&self, copy: Check) -> Result<T> {
        arg::read(self.process, self.data, copy)
    }

    /// Writes the answer into its place.
    fn write<T: IntoBytes + Immutable + ?Sized>(&self, answer: &T, copy_back: Check) -> Result<()> {
        arg::write(self.process, self.data, answer, copy_back)
    }

    /// Calls a function while the platform is initialised.
    fn initialised<T>(&self, body: impl FnOnce() -> Result<T, Failed>) -> Result<T, Failed> {
        let host = self.device.kernel.host();
        host.with_sev_platform(body).map_err(refused)?
    }

    /// Runs a command of firmware: EIO with its status where it fails.
    fn run<C: CommandStruct>(&self, buffer: &mut C) -> Result<(), Failed> {
        answered(self.platform.run(buffer))
    }
}

/// A status of firmware as the driver answers it.
fn answered(status: Status) -> Result<(), Failed> {
    match status {
        Status::SUCCESS => Ok(()),
        status => Err(refused(status)),
    }
}

fn refused(Status(status): Status) -> Failed {
    Failed {
        refusal: Errno::EIO.into(),
        status: Some(status.into()),
    }
}

type Handler = fn(&Call<'_>) -> Result<(), Failed>;

fn handler(command: u32) -> Option<Handler> {
    Some(match command {
        uapi::FACTORY_RESET => status::factory_reset,
        uapi::PLATFORM_STATUS => status::platform,
        uapi::PEK_GEN => keys::pek_gen,
        uapi::PEK_CSR => keys::pek_csr,
        uapi::PDH_GEN => keys::pdh_gen,
        uapi::PDH_CERT_EXPORT => keys::pdh_cert_export,
        uapi::PEK_CERT_IMPORT => keys::pek_cert_import,
        uapi::GET_ID => status::id,
        uapi::GET_ID2 => status::id2,
        uapi::SNP_PLATFORM_STATUS => snp::platform_status,
        uapi::SNP_COMMIT => snp::commit,
        uapi::SNP_SET_CONFIG => snp::set_config,
        uapi::SNP_VLEK_LOAD => snp::vlek_load,
        _ => return None,
    })
}

/// The command's own status is written back also where it fails.
pub(crate) fn ioctl(
    device: &SevDevice,
    process: &dyn Process,
    ioctl: Option<Ioctl>,
    argument: u64,
) -> Result<i64> {
    let platform = device.kernel.host().sev_platform();
    let platform = platform.ok_or(Errno::ENODEV)?;
    ensure(ioctl == Some(ioctl::SEV_ISSUE_CMD), NUMBER)?;
    let mut cmd: IssueCmd = arg::read(process, argument, COPY)?;
    let run = handler(cmd.cmd.get()).ok_or(KNOWN)?;
    let call = Call {
        device,
        platform,
        process,
        data: cmd.data.get(),
    };
    let done = run(&call);
    cmd.error = match &done {
        Ok(()) => U32::ZERO,
        Err(Failed { status, .. }) => status.map_or(cmd.error, U32::new),
    };
    arg::write(process, argument, &cmd, COPY_BACK)?;
    done.map(|()| 0).map_err(|failed| failed.refusal)
}
