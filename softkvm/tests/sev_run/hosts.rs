//! SEV guests that go to another host by SEND_* and RECEIVE_*, with the memory and registers that user space carries.

use iced_x86::code_asm::*;
use kvm_ops_uapi::run::exit_reason;
use kvm_ops_uapi::sev::{
    self, SevCmd, SevGuestStatus, SevReceiveStart, SevSendStart, SevUpdateData,
};
use kvm_ops_uapi::state::{Regs, Sregs};
use kvm_ops_uapi::system::vm_type::SEV;
use kvm_ops_uapi::{Errno, U32, U64, ioctl};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::common::psp::{INVALID_LEN, bytes, certificates};
use crate::guest::*;

pub(crate) const INVALID_GUEST_STATE: u32 = 2;
pub(crate) const INVALID_ADDRESS: u32 = 9;
const POLICY_FAILURE: u32 = 7;
const BAD_MEASUREMENT: u32 = 0xb;
/// The policy bit by which a guest never leaves.
const NOSEND: u32 = 1 << 3;
/// States of a guest.
const RUNNING: u32 = 3;
const SENDING: u32 = 4;
const RECEIVING: u32 = 5;
const SENT: u32 = 6;
/// Where the guest counts.
const COUNTER: u64 = 0x3_0000;

/// Says how often it went round, by a number in memory.
fn counts(a: &mut CodeAssembler) -> Assembled {
    let mut again = a.create_label();
    a.mov(r12, COUNTER)?;
    a.set_label(&mut again)?;
    a.inc(dword_ptr(r12))?;
    a.mov(eax, dword_ptr(r12))?;
    a.out(u32::from(SAY), eax)?;
    a.jmp(again)
}

/// Errno and status of firmware, and the structure afterwards.
pub(crate) fn ask<T>(guest: &Guest, id: u32, args: &T) -> (Result<(), (Errno, u32)>, T)
where
    T: FromBytes + FromZeros + IntoBytes + Immutable,
{
    let at = guest.w.task.put(args);
    let (answer, cmd): (_, SevCmd) = guest.w.command_at(guest.vm, id, at);
    let failed = |refusal: kvm_ops_softkvm::Refusal| (refusal.errno(), cmd.error.get());
    (
        answer.map(drop).map_err(failed),
        guest.w.task.get(at).unwrap(),
    )
}

pub(crate) fn done<T>(guest: &Guest, id: u32, args: &T) -> T
where
    T: FromBytes + FromZeros + IntoBytes + Immutable,
{
    let (answer, told) = ask(guest, id, args);
    answer.unwrap();
    told
}

pub(crate) fn bare(guest: &Guest, id: u32) -> Result<(), (Errno, u32)> {
    ask(guest, id, &U64::ZERO).0
}

fn state(guest: &Guest) -> u32 {
    done(guest, sev::GUEST_STATUS, &SevGuestStatus::default())
        .state
        .get()
}

/// SEND_START towards a host without room for a session.
fn towards(from: &Guest, to: &Guest) -> SevSendStart {
    let (pdh, chain) = certificates(&to.w);
    let (pdh_cert, pdh_cert_len) = from.w.blob(&pdh);
    let (plat_certs, plat_certs_len) = from.w.blob(&chain);
    let (amd_certs, amd_certs_len) = from.w.blob(&[0; 16]);
    SevSendStart {
        pdh_cert,
        pdh_cert_len,
        plat_certs,
        plat_certs_len,
        amd_certs,
        amd_certs_len,
        ..SevSendStart::default()
    }
}

/// The session of a guest that begins to leave, and its policy.
fn send_start(from: &Guest, to: &Guest) -> (Vec<u8>, u32) {
    let mut args = towards(from, to);
    let (answer, told) = ask(from, sev::SEND_START, &args);
    assert_eq!(answer, Err((Errno::EIO, INVALID_LEN)), "a query");
    args.session_len = told.session_len;
    args.session = U64::new(from.w.task.map(told.session_len.get() as usize));
    let told = done(from, sev::SEND_START, &args);
    assert_eq!(told.session_len, args.session_len);
    let session = bytes(&from.w, args.session.get(), args.session_len.get());
    (session, told.policy.get())
}

fn receive_start(to: &Guest, from: &Guest, session: &[u8], policy: u32) -> SevReceiveStart {
    let (pdh, pdh_len) = to.w.blob(&certificates(&from.w).0);
    let (session, session_len) = to.w.blob(session);
    SevReceiveStart {
        policy: U32::new(policy),
        pdh,
        pdh_len,
        session,
        session_len,
        ..SevReceiveStart::default()
    }
}

/// A range of guest memory as header and packet.
fn pack(from: &Guest, gpa: u64, len: u32) -> [Vec<u8>; 2] {
    let (answer, told) = ask(from, sev::SEND_UPDATE_DATA, &SevUpdateData::default());
    assert_eq!(answer, Err((Errno::EIO, INVALID_LEN)), "a query");
    let hdr_len = told.hdr_len.get();
    let args = SevUpdateData {
        hdr: U64::new(from.w.task.map(hdr_len as usize)),
        hdr_len: told.hdr_len,
        guest: U64::new(from.ram + gpa),
        guest_len: U32::new(len),
        trans: U64::new(from.w.task.map(len as usize)),
        trans_len: U32::new(len),
        ..SevUpdateData::default()
    };
    done(from, sev::SEND_UPDATE_DATA, &args);
    [
        bytes(&from.w, args.hdr.get(), hdr_len),
        bytes(&from.w, args.trans.get(), len),
    ]
}

fn unpack(to: &Guest, gpa: u64, [header, packet]: &[Vec<u8>; 2]) -> Result<(), (Errno, u32)> {
    let ((hdr, hdr_len), (trans, trans_len)) = (to.w.blob(header), to.w.blob(packet));
    let args = SevUpdateData {
        hdr,
        hdr_len,
        guest: U64::new(to.ram + gpa),
        guest_len: trans_len,
        trans,
        trans_len,
        ..SevUpdateData::default()
    };
    ask(to, sev::RECEIVE_UPDATE_DATA, &args).0
}

/// Completes the exit under way, so that registers are those behind it.
fn complete(guest: &Guest) {
    guest.area().write(1, &[1]);
    assert_eq!(guest.try_run().unwrap_err().errno(), Errno::EINTR);
    guest.area().write(1, &[0]);
}

fn carry_registers(from: &Guest, to: &Guest) {
    let regs: Regs = from.regs();
    let sregs: Sregs = from.get(from.vcpu, ioctl::KVM_GET_SREGS);
    to.w.call(to.vcpu, ioctl::KVM_SET_SREGS, &sregs).unwrap();
    to.w.call(to.vcpu, ioctl::KVM_SET_REGS, &regs).unwrap();
}

fn pair() -> (Guest, Guest) {
    let from = Guest::new(SEV, counts);
    let to = Guest::prepared(SEV, |a| a.ud2());
    (from, to)
}

#[test]
fn a_guest_goes_on_at_another_host_where_it_left() {
    let (from, to) = pair();
    assert_eq!((from.says(), from.says()), (1, 2));
    complete(&from);
    let (session, policy) = send_start(&from, &to);
    assert_eq!(state(&from), SENDING);
    let start = done(
        &to,
        sev::RECEIVE_START,
        &receive_start(&to, &from, &session, policy),
    );
    assert_ne!(start.handle.get(), 0);
    assert_eq!(state(&to), RECEIVING);
    for page in (0..OPEN).step_by(PAGE as usize) {
        unpack(&to, page, &pack(&from, page, PAGE as u32)).unwrap();
    }
    carry_registers(&from, &to);
    bare(&from, sev::SEND_FINISH).unwrap();
    assert_eq!(state(&from), SENT);
    assert_eq!(to.run(), exit_reason::FAIL_ENTRY, "not received as a whole");
    bare(&to, sev::RECEIVE_FINISH).unwrap();
    assert_eq!(state(&to), RUNNING);
    assert_eq!((to.says(), to.says()), (3, 4));
    // Nobody keeps it from running here too: its key stays until the VM ends.
    assert_eq!((from.says(), from.says()), (3, 4));
}

#[test]
fn a_journey_that_is_given_up_leaves_the_guest_where_it_is() {
    let (from, to) = pair();
    assert_eq!(from.says(), 1);
    send_start(&from, &to);
    pack(&from, CODE, PAGE as u32);
    bare(&from, sev::SEND_CANCEL).unwrap();
    assert_eq!(state(&from), RUNNING);
    assert_eq!(from.says(), 2);
}

#[test]
fn a_packet_that_was_changed_is_refused_and_may_come_again() {
    let (from, to) = pair();
    let (session, policy) = send_start(&from, &to);
    let args = receive_start(&to, &from, &session, policy);
    done(&to, sev::RECEIVE_START, &args);
    let good = pack(&from, CODE, PAGE as u32);
    for part in 0..2 {
        let mut bad = good.clone();
        let last = bad[part].len() - 1;
        bad[part][last] ^= 1;
        assert_eq!(unpack(&to, CODE, &bad), Err((Errno::EIO, BAD_MEASUREMENT)));
    }
    unpack(&to, CODE, &good).unwrap();
    unpack(&to, CODE, &good).unwrap();
}

#[test]
fn a_part_of_a_page_travels_by_itself_and_leaves_the_rest() {
    let (from, to) = pair();
    let (session, policy) = send_start(&from, &to);
    let args = receive_start(&to, &from, &session, policy);
    done(&to, sev::RECEIVE_START, &args);
    from.write(CODE + 0x800, b"not encrypted, so not the guest's");
    unpack(&to, CODE, &pack(&from, CODE, PAGE as u32)).unwrap();
    let part = pack(&from, CODE + 0x20, 0x40);
    assert_eq!(part[1].len(), 0x40);
    unpack(&to, CODE + 0x20, &part).unwrap();
    unpack(&to, CODE + 0x800, &part).unwrap();
    assert_eq!(
        plain(&to, CODE + 0x20, 0x40),
        plain(&from, CODE + 0x20, 0x40)
    );
    assert_eq!(
        plain(&to, CODE + 0x800, 0x40),
        plain(&from, CODE + 0x20, 0x40)
    );
    assert_eq!(
        plain(&to, CODE + 0x60, 0x40),
        plain(&from, CODE + 0x60, 0x40)
    );
}

/// What the guest has in its memory, by DBG_DECRYPT.
fn plain(guest: &Guest, gpa: u64, len: u32) -> Vec<u8> {
    let room = guest.w.task.map(len as usize);
    let args = sev::SevDbg {
        src: U64::new(guest.ram + gpa),
        dst: U64::new(room),
        len: U32::new(len),
        ..sev::SevDbg::default()
    };
    done(guest, sev::DBG_DECRYPT, &args);
    bytes(&guest.w, room, len)
}

/// KVM looks at the page alone.
#[test]
fn blocks_of_another_size_are_firmwares_to_refuse() {
    let (from, to) = pair();
    let (session, policy) = send_start(&from, &to);
    let args = receive_start(&to, &from, &session, policy);
    done(&to, sev::RECEIVE_START, &args);
    let good = pack(&from, CODE, 16);
    let (hdr, hdr_len) = from.w.blob(&good[0]);
    let trans = U64::new(from.w.task.map(64));
    for (at, len, status) in [(CODE + 8, 16, INVALID_ADDRESS), (CODE, 24, INVALID_LEN)] {
        let args = SevUpdateData {
            hdr,
            hdr_len,
            guest: U64::new(from.ram + at),
            guest_len: U32::new(len),
            trans,
            trans_len: U32::new(64),
            ..SevUpdateData::default()
        };
        let refused = Err((Errno::EIO, status));
        assert_eq!(ask(&from, sev::SEND_UPDATE_DATA, &args).0, refused);
        let packet = [good[0].clone(), vec![0; len as usize]];
        assert_eq!(unpack(&to, at, &packet), refused, "{len}");
    }
}

/// Firmware judges the order, and who may leave.
#[test]
fn firmware_refuses_what_its_states_and_policies_do_not_allow() {
    let (from, to) = pair();
    let wrong_state = Err((Errno::EIO, INVALID_GUEST_STATE));
    for id in [sev::SEND_FINISH, sev::SEND_CANCEL, sev::RECEIVE_FINISH] {
        assert_eq!(
            bare(&from, id),
            wrong_state,
            "{}",
            sev::command_name(id).unwrap()
        );
    }
    let (answer, _) = ask(&from, sev::SEND_UPDATE_DATA, &SevUpdateData::default());
    assert_eq!(answer, wrong_state, "nothing is being sent");
    let staying = Guest::prepared(SEV, counts);
    staying.launch(NOSEND);
    let mut args = towards(&staying, &to);
    args.session = U64::new(staying.w.task.map(512));
    args.session_len = U32::new(512);
    let (answer, told) = ask(&staying, sev::SEND_START, &args);
    assert_eq!(answer, Err((Errno::EIO, POLICY_FAILURE)));
    assert_eq!(told.policy.get(), NOSEND, "told although it failed");
    assert_eq!(staying.says(), 1);

    let (session, policy) = send_start(&from, &to);
    let other = receive_start(&to, &from, &session, policy ^ 1);
    let (answer, _) = ask(&to, sev::RECEIVE_START, &other);
    assert_eq!(answer, Err((Errno::EIO, BAD_MEASUREMENT)), "another policy");
    done(
        &to,
        sev::RECEIVE_START,
        &receive_start(&to, &from, &session, policy),
    );
    let twice = receive_start(&to, &from, &session, policy);
    let (answer, _) = ask(&to, sev::RECEIVE_START, &twice);
    assert_eq!(answer.map_err(|(errno, _)| errno), Err(Errno::EINVAL));
}

/// Memory that no guest encrypted travels as what firmware makes of it.
#[test]
fn memory_that_the_guest_never_encrypted_travels_and_stays_as_it_is() {
    let (from, to) = pair();
    from.write(OPEN, b"for both to see");
    let (session, policy) = send_start(&from, &to);
    let args = receive_start(&to, &from, &session, policy);
    done(&to, sev::RECEIVE_START, &args);
    unpack(&to, OPEN, &pack(&from, OPEN, PAGE as u32)).unwrap();
    assert_eq!(&from.read::<15>(OPEN), b"for both to see");
    assert_ne!(&plain(&to, OPEN, 16)[..15], b"for both to see");
}
