//! The launch of SEV and SEV-ES guests. The order among commands is for firmware to judge.

use kvm_ops_uapi::U32;
use kvm_ops_uapi::checks::{
    guest_status, launch_finish, launch_measure, launch_secret, launch_start, launch_update_data,
    launch_update_vmsa,
};
use kvm_ops_uapi::sev::{
    self as uapi, BLOB_MAX, SevAttestation, SevGuestStatus, SevLaunchSecret, SevLaunchStart,
    SevRange,
};
use kvm_ops_uapi::{Errno, U64};
use zerocopy::IntoBytes;

use super::blobs::Blobs;
use super::command::{Answer, Call, Sent, bare};
use super::engine::Failed;
use super::require_fd;
use crate::arg;
use crate::refusal::{Result, ensure};
use crate::vm::State;

/// The firmware's status for a buffer that is too short.
const INVALID_LEN: u32 = 4;
/// Bytes of a measurement with its nonce.
const MEASUREMENT: u32 = 48;
/// Bytes of an attestation report.
const REPORT: u32 = 0xd0;

pub(super) fn start(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_start::{COPY, COPY_BACK, DH, DH_LEN, SESSION, SESSION_LEN, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let given: SevLaunchStart = call.read(COPY)?;
    let mut args = Blobs::new(given);
    args.head.dh = match given.dh.get() {
        0 => U64::ZERO,
        _ => args.push_from(call.process, (given.dh, given.dh_len), (DH_LEN, DH))?,
    };
    args.head.session = match given.session.get() {
        0 => U64::ZERO,
        _ => {
            let blob = (given.session, given.session_len);
            args.push_from(call.process, blob, (SESSION_LEN, SESSION))?
        }
    };
    // A length without an address is not looked at.
    if given.dh.get() == 0 {
        args.head.dh_len = U32::ZERO;
    }
    if given.session.get() == 0 {
        args.head.session_len = U32::ZERO;
    }
    require_fd(call.process, call.sev_fd, SEV_FD)?;
    let mut data = args.to_bytes();
    state
        .sev
        .engine(SEV)?
        .command(uapi::LAUNCH_START, &mut data)?;
    let answer = Blobs::<SevLaunchStart>::head_of(&data).unwrap_or(given);
    state.sev.sev_fd = call.sev_fd;
    let back = SevLaunchStart {
        handle: answer.handle,
        ..given
    };
    call.write(&back, COPY_BACK)?;
    Ok(Sent::Yes)
}

pub(super) fn update_data(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_update_data::{COPY, PINNED, RANGE, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let args: SevRange = call.read(COPY)?;
    let (address, len) = (args.uaddr.get(), u64::from(args.len.get()));
    ensure(len != 0 && address.checked_add(len).is_some(), RANGE)?;
    // Firmware measures and encrypts; what could not be written back then would be lost.
    ensure(call.process.is_writable(address, len), PINNED)?;
    state.sev.require_fd(call.process, SEV_FD)?;
    let contents = arg::read_bytes(call.process, address, len as usize, PINNED)?;
    let mut data = [args.as_bytes(), &contents].concat();
    state
        .sev
        .engine(SEV)?
        .command(uapi::LAUNCH_UPDATE_DATA, &mut data)?;
    // In place: the caller's memory has ciphertext from now on.
    let encrypted = call.process.write(address, &data[size_of::<SevRange>()..]);
    encrypted.map_err(|_| PINNED)?;
    Ok(Sent::Yes)
}

pub(super) fn update_vmsa(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_update_vmsa::{DEBUGGED, DR7, ES, PROTECTED, SEV_FD, SIGNAL};
    ensure(state.sev.is_es(), ES)?;
    ensure(!call.process.signal_pending(), SIGNAL)?;
    if state.vcpus.is_empty() {
        return Ok(Sent::No);
    }
    let fresh = state.vcpus.keys().all(|id| !state.sev.is_protected(*id));
    ensure(fresh, PROTECTED)?;
    call.check_debugging((DEBUGGED, DR7))?;
    state.sev.require_fd(call.process, SEV_FD)?;
    state
        .sev
        .engine(ES)?
        .command(uapi::LAUNCH_UPDATE_VMSA, &mut [])?;
    state.sev.protected.extend(state.vcpus.keys());
    Ok(Sent::Yes)
}

pub(super) fn secret(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_secret::{COPY, HDR, HDR_LEN, PINNED, RANGE, SEV, SEV_FD, TRANS, TRANS_LEN};
    ensure(state.sev.is_active(), SEV)?;
    let given: SevLaunchSecret = call.read(COPY)?;
    let (guest, len) = (given.guest.get(), u64::from(given.guest_len.get()));
    ensure(len != 0 && guest.checked_add(len).is_some(), RANGE)?;
    ensure(call.process.is_mapped(guest, len), PINNED)?;
    let mut args = Blobs::new(given);
    let trans = (given.trans, given.trans_len);
    args.head.trans = args.push_from(call.process, trans, (TRANS_LEN, TRANS))?;
    let hdr = (given.hdr, given.hdr_len);
    args.head.hdr = args.push_from(call.process, hdr, (HDR_LEN, HDR))?;
    state.sev.require_fd(call.process, SEV_FD)?;
    state
        .sev
        .engine(SEV)?
        .command(uapi::LAUNCH_SECRET, &mut args.to_bytes())?;
    Ok(Sent::Yes)
}

/// A buffer of the caller's for a measurement.
struct Room {
    address: U64,
    len: U32,
}

/// What LAUNCH_MEASURE and GET_ATTESTATION_REPORT share: the query, the limits, and the copy of as
/// many bytes as the caller said, of which those beyond the measurement are zero.
fn measured(
    state: &mut State,
    call: &Call<'_>,
    room: &Room,
    bytes: u32,
    ask: impl FnOnce(&mut State) -> Result<Vec<u8>, Failed>,
) -> Result<(), Failed> {
    use launch_measure::{BUFFER, LEN, SEV_FD};
    let len = room.len.get();
    ensure(room.address.get() == 0 || len <= BLOB_MAX, LEN)?;
    state.sev.require_fd(call.process, SEV_FD)?;
    if len < bytes || room.address.get() == 0 {
        return Err(Failed {
            refusal: Errno::EIO.into(),
            status: Some(INVALID_LEN),
        });
    }
    let mut answer = ask(state)?;
    answer.resize(len as usize, 0);
    let written = call.process.write(room.address.get(), &answer);
    written.map_err(|_| BUFFER)?;
    Ok(())
}

pub(super) fn measure(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_measure::{COPY, COPY_BACK, SEV};
    ensure(state.sev.is_active(), SEV)?;
    let mut args: SevRange = call.read(COPY)?;
    let room = Room {
        address: args.uaddr,
        len: args.len,
    };
    let done = measured(state, call, &room, MEASUREMENT, |state| {
        let mut query = Blobs::new(args);
        query.head.uaddr = query.push(&[0; MEASUREMENT as usize]);
        query.head.len = U32::new(MEASUREMENT);
        let mut data = query.to_bytes();
        state
            .sev
            .engine(SEV)?
            .command(uapi::LAUNCH_MEASURE, &mut data)?;
        Ok(data.split_off(size_of::<SevRange>()))
    });
    if done.is_ok() || args.len.get() == 0 {
        args.len = U32::new(MEASUREMENT);
        call.write(&args, COPY_BACK)?;
    }
    done.map(|()| Sent::Yes)
}

pub(super) fn attestation(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_measure::{COPY, COPY_BACK, SEV};
    ensure(state.sev.is_active(), SEV)?;
    let mut args: SevAttestation = call.read(COPY)?;
    let room = Room {
        address: args.uaddr,
        len: args.len,
    };
    let done = measured(state, call, &room, REPORT, |state| {
        let mut query = Blobs::new(args);
        query.head.uaddr = query.push(&[0; REPORT as usize]);
        query.head.len = U32::new(REPORT);
        let mut data = query.to_bytes();
        state
            .sev
            .engine(SEV)?
            .command(uapi::GET_ATTESTATION_REPORT, &mut data)?;
        Ok(data.split_off(size_of::<SevAttestation>()))
    });
    if done.is_ok() || args.len.get() == 0 {
        args.len = U32::new(REPORT);
        call.write(&args, COPY_BACK)?;
    }
    done.map(|()| Sent::Yes)
}

pub(super) fn finish(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_finish::{SEV, SEV_FD};
    bare(state, call, uapi::LAUNCH_FINISH, (SEV, SEV_FD))
}

pub(super) fn status(state: &mut State, call: &Call<'_>) -> Answer {
    use guest_status::{COPY_BACK, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    state.sev.require_fd(call.process, SEV_FD)?;
    let mut data = SevGuestStatus::default();
    state
        .sev
        .engine(SEV)?
        .command(uapi::GUEST_STATUS, data.as_mut_bytes())?;
    call.write(&data, COPY_BACK)?;
    Ok(Sent::Yes)
}
