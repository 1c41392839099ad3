//! SNP's part of the platform.

use kvm_ops_uapi::checks::{snp_platform_status, snp_set_config, snp_vlek_load};
use kvm_ops_uapi::psp as uapi;
use soft_amd_sp::command::{SnpCommit, SnpConfig, SnpPlatformStatus, SnpVlekLoad};
use zerocopy::IntoBytes;

use super::Call;
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::sev::Failed;

/// Bytes of a wrapped key (`struct sev_user_data_snp_wrapped_vlek_hashstick`).
const WRAPPED_VLEK: usize = 432;

pub(super) fn platform_status(call: &Call<'_>) -> Result<(), Failed> {
    use snp_platform_status::{COPY_BACK, GIVEN};
    ensure(call.data != 0, GIVEN)?;
    let area = call.area()?;
    call.run(&mut SnpPlatformStatus {
        status_paddr: area.out(0)?.into(),
    })?;
    let bytes = area.read(0, size_of::<uapi::SnpStatus>() as u32)?;
    Ok(call.write(&bytes[..], COPY_BACK)?)
}

pub(super) fn commit(call: &Call<'_>) -> Result<(), Failed> {
    call.run(&mut SnpCommit::default())
}

pub(super) fn set_config(call: &Call<'_>) -> Result<(), Failed> {
    use snp_set_config::{COPY, GIVEN, WRITABLE};
    ensure(call.data != 0, GIVEN)?;
    call.require_writable(WRITABLE)?;
    let args: uapi::SnpConfig = call.read(COPY)?;
    let mut config = SnpConfig::default();
    config.as_mut_bytes().copy_from_slice(args.as_bytes());
    call.run(&mut config)
}

pub(super) fn vlek_load(call: &Call<'_>) -> Result<(), Failed> {
    use snp_vlek_load::{BLOB, COPY, GIVEN, VERSION, WRITABLE};
    ensure(call.data != 0, GIVEN)?;
    call.require_writable(WRITABLE)?;
    let args: uapi::SnpVlekLoad = call.read(COPY)?;
    let right = args.len.get() as usize == size_of::<uapi::SnpVlekLoad>();
    ensure(right && args.vlek_wrapped_version == 0, VERSION)?;
    let wrapped = arg::read_bytes(call.process, args.vlek_wrapped.get(), WRAPPED_VLEK, BLOB)?;
    let area = call.area()?;
    call.run(&mut SnpVlekLoad {
        vlek_wrapped_address: area.put(0, &wrapped)?.into(),
        ..SnpVlekLoad::default()
    })
}
