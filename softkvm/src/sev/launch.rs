//! The launch of SEV and SEV-ES guests. The order among commands is for firmware to judge.

use kvm_ops_uapi::checks::{
    guest_status, launch_finish, launch_measure, launch_secret, launch_start, launch_update_data,
    launch_update_vmsa,
};
use kvm_ops_uapi::sev::{
    self as uapi, BLOB_MAX, SevAttestation, SevGuestStatus, SevLaunchSecret, SevLaunchStart,
    SevRange,
};
use kvm_ops_uapi::{U32, U64};
use zerocopy::IntoBytes;

use super::blobs::Blobs;
use super::command::{Answer, Call, Sent, bare};
use super::engine::Failed;
use super::pin::{self, Use};
use super::require_fd;
use crate::refusal::{Result, ensure};
use crate::vm::State;

const PAGE: u64 = 4096;

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
    let engine = state.sev.engine(SEV)?;
    let is_first = !engine.knows_guest();
    engine.command(uapi::LAUNCH_START, &mut data)?;
    let answer = Blobs::<SevLaunchStart>::head_of(&data).unwrap_or(given);
    let back = SevLaunchStart {
        handle: answer.handle,
        ..given
    };
    if let Err(refusal) = call.write(&back, COPY_BACK) {
        if is_first {
            engine.undo_start()?;
        }
        return Err(refusal.into());
    }
    state.sev.sev_fd = call.sev_fd;
    Ok(Sent::Yes)
}

pub(super) fn update_data(state: &mut State, call: &Call<'_>) -> Answer {
    use launch_update_data::{COPY, PINNED, RANGE, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let args: SevRange = call.read(COPY)?;
    let (address, len) = (args.uaddr.get(), u64::from(args.len.get()));
    // Firmware measures and encrypts; what could not be written back then would be lost.
    pin::for_command(state, call, (address, len), Use::Write, (RANGE, PINNED))?;
    state.sev.require_fd(call.process, SEV_FD)?;
    // Whole pages, of which the command takes the range.
    let start = size_of::<SevRange>() + (address % PAGE) as usize;
    let end = start + len as usize;
    let pages = (end - size_of::<SevRange>()).next_multiple_of(PAGE as usize);
    let mut data = args.as_bytes().to_vec();
    data.resize(size_of::<SevRange>() + pages, 0);
    let range = &mut data[start..end];
    let read = call.process.read(address, range);
    read.map_err(|_| PINNED)?;
    let engine = state.sev.engine(SEV)?;
    let done = engine.command(uapi::LAUNCH_UPDATE_DATA, &mut data);
    // In place: what was done is ciphertext from now on, also where firmware refused the rest.
    let encrypted = call.process.write(address, &data[start..end]);
    encrypted.map_err(|_| PINNED)?;
    done.map(|()| Sent::Yes)
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
    let range = (given.guest.get(), given.guest_len.get().into());
    pin::for_command(state, call, range, Use::Write, (RANGE, PINNED))?;
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

/// What LAUNCH_MEASURE and GET_ATTESTATION_REPORT share: the limits, and the copy of as many bytes as the caller said, of which
/// those beyond the measurement are zero. `ask` gives firmware as much room as that, and none where the caller has no buffer.
fn measured(
    state: &mut State,
    call: &Call<'_>,
    room: &Room,
    ask: impl FnOnce(&mut State, u32) -> Result<Vec<u8>, Failed>,
) -> Result<(), Failed> {
    use launch_measure::{BUFFER, LEN, SEV_FD};
    let len = room.len.get();
    ensure(room.address.get() == 0 || len <= BLOB_MAX, LEN)?;
    state.sev.require_fd(call.process, SEV_FD)?;
    let given = if room.address.get() == 0 { 0 } else { len };
    let mut answer = ask(state, given)?;
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
    let mut told = args;
    let done = measured(state, call, &room, |state, len| {
        let mut query = Blobs::new(args);
        query.head.uaddr = query.push(&vec![0; len as usize]);
        query.head.len = U32::new(len);
        let mut data = query.to_bytes();
        let engine = state.sev.engine(SEV)?;
        let done = engine.command(uapi::LAUNCH_MEASURE, &mut data);
        told = Blobs::<SevRange>::head_of(&data).unwrap_or(args);
        done.map(|()| data.split_off(size_of::<SevRange>()))
    });
    if done.is_ok() || args.len.get() == 0 {
        args.len = told.len;
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
    let mut told = args;
    let done = measured(state, call, &room, |state, len| {
        let mut query = Blobs::new(args);
        query.head.uaddr = query.push(&vec![0; len as usize]);
        query.head.len = U32::new(len);
        let mut data = query.to_bytes();
        let engine = state.sev.engine(SEV)?;
        let done = engine.command(uapi::GET_ATTESTATION_REPORT, &mut data);
        told = Blobs::<SevAttestation>::head_of(&data).unwrap_or(args);
        done.map(|()| data.split_off(size_of::<SevAttestation>()))
    });
    if done.is_ok() || args.len.get() == 0 {
        args.len = told.len;
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
