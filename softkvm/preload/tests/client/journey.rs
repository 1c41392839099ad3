//! A guest that goes from VM to VM as between hosts, by commands with their blobs behind the structures.

use kvm_ops::sev::migrate::Mailbox;
use kvm_ops::{EncCmd, Result, SevParams, Step, Tech, create};
use kvm_ops_uapi::sev::{
    self, SevDbg, SevGuestStatus, SevReceiveStart, SevSendStart, SevUpdateData,
};
use kvm_ops_uapi::{U32, U64};
use vm_memory::MmapRegion;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::common::inside;
use crate::errors::Guest;
use crate::guest::*;

/// More bytes than a session has.
const SESSION: usize = 512;
/// Bytes of a packet's header (SEV API, SEND_UPDATE_DATA).
const HEADER: usize = 52;

/// Blobs behind a structure of that many bytes, and the offset and length of each.
fn behind(head: usize, blobs: &[&[u8]]) -> (Vec<u8>, Vec<(U64, U32)>) {
    let (mut tail, mut places) = (Vec::new(), Vec::new());
    for blob in blobs {
        let place = (head + tail.len()) as u64;
        places.push((U64::new(place), U32::new(blob.len() as u32)));
        tail.extend_from_slice(blob);
    }
    (tail, places)
}

/// Runs a command on a structure and what stands behind it.
fn run<T>(vm: &mut Guest, id: u32, head: &T, tail: &[u8]) -> Result<(T, Vec<u8>)>
where
    T: FromBytes + IntoBytes + Immutable,
{
    let mut data = [head.as_bytes(), tail].concat();
    let mut cmd = EncCmd {
        id,
        flags: 0,
        data: &mut data,
        firmware_status: 0,
    };
    vm.mem_enc_op(&mut cmd)?;
    let tail = data.split_off(size_of::<T>());
    Ok((T::read_from_bytes(&data).expect("its size"), tail))
}

/// The host address of a page.
fn page(memory: &MmapRegion<()>, number: u64) -> U64 {
    U64::new(memory.as_ptr() as u64 + (FIRST - START) + number * 4096)
}

fn send_start(from: &mut Guest, twin: &Twin) -> (SevSendStart, Vec<u8>) {
    let certs = Mailbox::new(twin.host()).unwrap().certs().unwrap();
    let blobs: [&[u8]; 4] = [&certs.pdh, &certs.chain, &[0; 16], &[0; SESSION]];
    let (tail, at) = behind(size_of::<SevSendStart>(), &blobs);
    let args = SevSendStart {
        pdh_cert: at[0].0,
        pdh_cert_len: at[0].1,
        plat_certs: at[1].0,
        plat_certs_len: at[1].1,
        amd_certs: at[2].0,
        amd_certs_len: at[2].1,
        session: at[3].0,
        session_len: at[3].1,
        ..SevSendStart::default()
    };
    let (told, tail) = run(from, sev::SEND_START, &args, &tail).unwrap();
    let session = &tail[tail.len() - SESSION..][..told.session_len.get() as usize];
    (told, session.to_vec())
}

fn receive_start(to: &mut Guest, twin: &Twin, told: &SevSendStart, session: &[u8]) {
    let pdh = Mailbox::new(twin.host()).unwrap().certs().unwrap().pdh;
    let (tail, at) = behind(size_of::<SevReceiveStart>(), &[&pdh, session]);
    let args = SevReceiveStart {
        policy: told.policy,
        pdh: at[0].0,
        pdh_len: at[0].1,
        session: at[1].0,
        session_len: at[1].1,
        ..SevReceiveStart::default()
    };
    let (told, _) = run(to, sev::RECEIVE_START, &args, &tail).unwrap();
    assert_ne!(told.handle.get(), 0);
}

/// A page as a packet with its header, or a packet into a page.
fn carry(vm: &mut Guest, id: u32, guest: U64, packet: &[u8]) -> Result<Vec<u8>> {
    let (header, contents) = packet.split_at(HEADER);
    let (tail, at) = behind(size_of::<SevUpdateData>(), &[header, contents]);
    let args = SevUpdateData {
        hdr: at[0].0,
        hdr_len: at[0].1,
        guest,
        guest_len: U32::new(4096),
        trans: at[1].0,
        trans_len: at[1].1,
        ..SevUpdateData::default()
    };
    Ok(run(vm, id, &args, &tail)?.1)
}

fn state(vm: &mut Guest) -> u32 {
    let args = SevGuestStatus::new_zeroed();
    let (told, _) = run(vm, sev::GUEST_STATUS, &args, &[]).unwrap();
    told.state.get()
}

#[test]
fn a_guest_is_sent_and_received_by_commands() {
    if !inside("journey::a_guest_is_sent_and_received_by_commands") {
        return;
    }
    let (host, here, there, twin) = (host(), memory(), memory(), Twin::new());
    let mut from = launched(&host, Tech::Sev, &here);
    let mut to = create(&host, &config(Tech::Sev, SevParams::default())).unwrap();
    to.set_memory_slot(slot(&there)).unwrap();
    let (told, session) = send_start(&mut from, &twin);
    receive_start(&mut to, &twin, &told, &session);
    for number in 0..PAGES {
        let empty = [0; HEADER + 4096];
        let source = page(&here, number);
        let mut packet = carry(&mut from, sev::SEND_UPDATE_DATA, source, &empty).unwrap();
        assert_ne!(packet[HEADER..], contents(number));
        let target = page(&there, number);
        carry(&mut to, sev::RECEIVE_UPDATE_DATA, target, &packet).unwrap();
        packet[HEADER] ^= 1;
        let refused = carry(&mut to, sev::RECEIVE_UPDATE_DATA, target, &packet);
        let text = to.explain(refused.unwrap_err()).to_string();
        assert!(
            text.contains("RECEIVE_UPDATE_DATA answered BAD_MEASUREMENT"),
            "{text}"
        );
    }
    assert_eq!(to.step(), Step::Initialized);
    run(&mut to, sev::RECEIVE_FINISH, &[0_u8; 0], &[]).unwrap();
    assert_eq!((to.step(), state(&mut to)), (Step::Runnable, 3));
    run(&mut from, sev::SEND_FINISH, &[0_u8; 0], &[]).unwrap();
    assert_eq!(state(&mut from), 6);
    let (tail, at) = behind(size_of::<SevDbg>(), &[&[0; 32]]);
    let args = SevDbg {
        src: page(&there, 1),
        dst: at[0].0,
        len: at[0].1,
        ..SevDbg::default()
    };
    let (_, plain) = run(&mut to, sev::DBG_DECRYPT, &args, &tail).unwrap();
    assert_eq!(plain, contents(1)[..32]);
    for vm in [from, to] {
        let report = vm.destroy();
        assert!(report.is_clean(), "{report:?}");
    }
}
