//! SEND_* and RECEIVE_*: a guest's way from host to host. The order among commands is for firmware to judge.

use kvm_ops_uapi::checks::{
    receive_finish, receive_start, receive_update_data, send_end, send_start, send_update_data,
};
use kvm_ops_uapi::sev::{self as uapi, BLOB_MAX, SevReceiveStart, SevSendStart, SevUpdateData};
use kvm_ops_uapi::{U32, U64};

use super::blobs::Blobs;
use super::command::{Answer, Call, Sent, bare};
use super::pin::{self, Use};
use super::require_fd;
use crate::arg;
use crate::refusal::ensure;
use crate::vm::State;

const PAGE: u64 = 4096;
/// The largest piece of memory that the kernel allocates at once, in bytes (KMALLOC_MAX_SIZE).
const ALLOCATION: u32 = 4 << 20;

pub(super) fn send_start(state: &mut State, call: &Call<'_>) -> Answer {
    use send_start::{BLOBS, COPY, COPY_BACK, GIVEN, READABLE, SESSION, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let given: SevSendStart = call.read(COPY)?;
    let room = given.session_len.get();
    let mut args = Blobs::new(SevSendStart {
        session_len: given.session_len,
        ..SevSendStart::default()
    });
    if room != 0 {
        let key = given.pdh_cert.get() != 0 && given.pdh_cert_len.get() != 0;
        let session = given.session.get() != 0 && room <= BLOB_MAX;
        ensure(key && session, GIVEN)?;
        let mut take = |address: U64, len: U32| {
            let offset = args.push_from(call.process, (address, len), (BLOBS, READABLE))?;
            Ok::<_, crate::Refusal>((offset, len))
        };
        let pdh = take(given.pdh_cert, given.pdh_cert_len)?;
        let plat = take(given.plat_certs, given.plat_certs_len)?;
        let amd = take(given.amd_certs, given.amd_certs_len)?;
        let head = &mut args.head;
        (head.pdh_cert, head.pdh_cert_len) = pdh;
        (head.plat_certs, head.plat_certs_len) = plat;
        (head.amd_certs, head.amd_certs_len) = amd;
        args.head.session = args.push(&vec![0; room as usize]);
    }
    state.sev.require_fd(call.process, SEV_FD)?;
    let mut data = args.to_bytes();
    let done = state.sev.engine(SEV)?.command(uapi::SEND_START, &mut data);
    let told = Blobs::<SevSendStart>::head_of(&data).unwrap_or(given);
    if done.is_ok() {
        let at = args.head.session.get() as usize;
        arg::write(call.process, given.session.get(), &data[at..], SESSION)?;
    }
    let back = SevSendStart {
        policy: told.policy,
        session_len: told.session_len,
        ..given
    };
    call.write(&back, COPY_BACK)?;
    done.map(|()| Sent::Yes)
}

fn lies_in_one_page(args: &SevUpdateData) -> bool {
    let (offset, len) = (args.guest.get() % PAGE, u64::from(args.guest_len.get()));
    offset + len <= PAGE
}

/// The page of the guest's range, address and length.
fn page(args: &SevUpdateData) -> (u64, u64) {
    (args.guest.get() & !(PAGE - 1), PAGE)
}

pub(super) fn send_update_data(state: &mut State, call: &Call<'_>) -> Answer {
    use send_update_data::{BUFFERS, COPY, GIVEN, MEMORY, PAGE, PINNED, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let given: SevUpdateData = call.read(COPY)?;
    let (hdr_len, trans_len) = (given.hdr_len.get(), given.trans_len.get());
    if hdr_len == 0 || trans_len == 0 {
        return packet_lengths(state, call, &given);
    }
    let has_addresses = given.trans.get() != 0 && given.guest.get() != 0 && given.hdr.get() != 0;
    ensure(has_addresses && given.guest_len.get() != 0, GIVEN)?;
    ensure(lies_in_one_page(&given), PAGE)?;
    let pinned = (PAGE, PINNED);
    pin::for_command(state, call, page(&given), Use::Read, pinned)?;
    ensure(hdr_len <= ALLOCATION && trans_len <= ALLOCATION, MEMORY)?;
    call.vm.kernel().faults().allocate(MEMORY)?;
    state.sev.require_fd(call.process, SEV_FD)?;

    let mut args = Blobs::new(given);
    args.head.hdr = args.push(&vec![0; hdr_len as usize]);
    args.head.trans = args.push(&vec![0; trans_len as usize]);
    let mut data = args.to_bytes();
    let engine = state.sev.engine(SEV)?;
    engine.command(uapi::SEND_UPDATE_DATA, &mut data)?;
    let (hdr, trans) = data[size_of::<SevUpdateData>()..].split_at(hdr_len as usize);
    arg::write(call.process, given.trans.get(), trans, BUFFERS)?;
    arg::write(call.process, given.hdr.get(), hdr, BUFFERS)?;
    Ok(Sent::Yes)
}

/// SEND_UPDATE_DATA without room: firmware refuses, and tells the lengths.
fn packet_lengths(state: &mut State, call: &Call<'_>, given: &SevUpdateData) -> Answer {
    use send_update_data::{BUFFERS, SEV, SEV_FD};
    state.sev.require_fd(call.process, SEV_FD)?;
    let mut query = Blobs::new(SevUpdateData::default()).to_bytes();
    let engine = state.sev.engine(SEV)?;
    let done = engine.command(uapi::SEND_UPDATE_DATA, &mut query);
    let told = Blobs::<SevUpdateData>::head_of(&query).unwrap_or(*given);
    let back = SevUpdateData {
        hdr_len: told.hdr_len,
        trans_len: told.trans_len,
        ..*given
    };
    call.write(&back, BUFFERS)?;
    done.map(|()| Sent::Yes)
}

pub(super) fn send_finish(state: &mut State, call: &Call<'_>) -> Answer {
    bare(
        state,
        call,
        uapi::SEND_FINISH,
        (send_end::SEV, send_end::SEV_FD),
    )
}

pub(super) fn send_cancel(state: &mut State, call: &Call<'_>) -> Answer {
    bare(
        state,
        call,
        uapi::SEND_CANCEL,
        (send_end::SEV, send_end::SEV_FD),
    )
}

pub(super) fn receive_start(state: &mut State, call: &Call<'_>) -> Answer {
    use receive_start::{BLOBS, COPY, COPY_BACK, GIVEN, READABLE, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let given: SevReceiveStart = call.read(COPY)?;
    let key = given.pdh.get() != 0 && given.pdh_len.get() != 0;
    let session = given.session.get() != 0 && given.session_len.get() != 0;
    ensure(key && session, GIVEN)?;
    let mut args = Blobs::new(given);
    let pdh = (given.pdh, given.pdh_len);
    args.head.pdh = args.push_from(call.process, pdh, (BLOBS, READABLE))?;
    let session = (given.session, given.session_len);
    args.head.session = args.push_from(call.process, session, (BLOBS, READABLE))?;
    require_fd(call.process, call.sev_fd, SEV_FD)?;
    let mut data = args.to_bytes();
    let engine = state.sev.engine(SEV)?;
    engine.command(uapi::RECEIVE_START, &mut data)?;
    let told = Blobs::<SevReceiveStart>::head_of(&data).unwrap_or(given);
    let back = SevReceiveStart {
        handle: told.handle,
        ..given
    };
    if let Err(refusal) = call.write(&back, COPY_BACK) {
        engine.undo_start()?;
        return Err(refusal.into());
    }
    state.sev.sev_fd = call.sev_fd;
    Ok(Sent::Yes)
}

pub(super) fn receive_update_data(state: &mut State, call: &Call<'_>) -> Answer {
    use receive_update_data::{BLOBS, COPY, GIVEN, PAGE, PINNED, READABLE, SEV, SEV_FD};
    ensure(state.sev.is_active(), SEV)?;
    let given: SevUpdateData = call.read(COPY)?;
    let addresses = [given.hdr, given.guest, given.trans];
    let lengths = [given.hdr_len, given.guest_len, given.trans_len];
    let is_given = addresses.iter().all(|address| address.get() != 0)
        && lengths.iter().all(|length| length.get() != 0);
    ensure(is_given, GIVEN)?;
    ensure(lies_in_one_page(&given), PAGE)?;
    let mut args = Blobs::new(given);
    let hdr = (given.hdr, given.hdr_len);
    args.head.hdr = args.push_from(call.process, hdr, (BLOBS, READABLE))?;
    let trans = (given.trans, given.trans_len);
    args.head.trans = args.push_from(call.process, trans, (BLOBS, READABLE))?;
    let pinned = (PAGE, PINNED);
    pin::for_command(state, call, page(&given), Use::Write, pinned)?;
    state.sev.require_fd(call.process, SEV_FD)?;
    let engine = state.sev.engine(SEV)?;
    engine.command(uapi::RECEIVE_UPDATE_DATA, &mut args.to_bytes())?;
    Ok(Sent::Yes)
}

pub(super) fn receive_finish(state: &mut State, call: &Call<'_>) -> Answer {
    use receive_finish::{SEV, SEV_FD};
    bare(state, call, uapi::RECEIVE_FINISH, (SEV, SEV_FD))
}
