//! State and identity of the platform.

use kvm_ops_uapi::checks::{factory_reset, get_id, get_id2, platform_status};
use kvm_ops_uapi::psp::{Blob, Ids, Status as StatusAnswer};
use kvm_ops_uapi::{U32, U64};
use soft_amd_sp::command::{GetId, PlatformStatus};
use zerocopy::IntoBytes;

use super::area::BLOB_MAX;
use super::{Call, answered};
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::sev::Failed;

/// A state of the platform: guests exist.
const WORKING: u8 = 2;

/// The platform is initialised again when it is used next.
pub(super) fn factory_reset(call: &Call<'_>) -> Result<(), Failed> {
    use factory_reset::{IDLE, WRITABLE};
    call.require_writable(WRITABLE)?;
    let mut status = PlatformStatus::default();
    call.run(&mut status)?;
    ensure(status.state != WORKING, IDLE)?;
    match call.device.kernel.host().reset_sev_platform() {
        Ok(()) => Ok(()),
        Err(status) => answered(status),
    }
}

pub(super) fn platform(call: &Call<'_>) -> Result<(), Failed> {
    let mut status = PlatformStatus::default();
    call.run(&mut status)?;
    let mut answer = StatusAnswer::default();
    answer.as_mut_bytes().copy_from_slice(status.as_bytes());
    Ok(call.write(&answer, platform_status::COPY_BACK)?)
}

/// The answer of GET_ID, whose length is told with a failure too.
struct Identity {
    bytes: Vec<u8>,
    len: u32,
    done: Result<(), Failed>,
}

/// The identity, into as many bytes, or its length.
fn identity(call: &Call<'_>, room: u32) -> Result<Identity, Failed> {
    let area = call.area()?;
    let mut get = GetId::default();
    if room != 0 {
        (get.id_paddr, get.id_length) = (area.out(0)?.into(), room.into());
    }
    let done = call.run(&mut get);
    let len = get.id_length.get();
    let bytes = match &done {
        Ok(()) => area.read(0, len)?,
        Err(_) => Vec::new(),
    };
    Ok(Identity { bytes, len, done })
}

pub(super) fn id(call: &Call<'_>) -> Result<(), Failed> {
    let Identity { bytes, done, .. } = identity(call, size_of::<Ids>() as u32)?;
    done?;
    let mut ids = Ids::default();
    let len = bytes.len().min(size_of::<Ids>());
    ids.as_mut_bytes()[..len].copy_from_slice(&bytes[..len]);
    Ok(call.write(&ids, get_id::COPY_BACK)?)
}

pub(super) fn id2(call: &Call<'_>) -> Result<(), Failed> {
    use get_id2::{BUFFER, COPY, COPY_BACK, MEMORY};
    let mut args: Blob = call.read(COPY)?;
    let (address, len) = (args.address.get(), args.length.get());
    let room = if address == 0 { 0 } else { len };
    // The kernel takes any length that it has memory for.
    ensure(room <= 1 << 22, MEMORY)?;
    call.device.kernel.faults().allocate(MEMORY)?;
    let Identity { bytes, len, done } = identity(call, room.min(BLOB_MAX))?;
    args.length = U32::new(len);
    call.write(&args, COPY_BACK)?;
    if room != 0 {
        arg::write(call.process, U64::get(args.address), &bytes[..], BUFFER)?;
    }
    done
}
