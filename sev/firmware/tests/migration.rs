//! SEND and RECEIVE between two platforms.

mod common;

use common::*;
use soft_amd_sp::{Command, GuestPage, Platform, RootOfTrust, Status, policy};

const ASID: u32 = 6;
const ES_ASID: u32 = 1;
const LEN: u64 = 0x1000;

/// Sends one packet and carries header and data over, without delivering it.
fn carry(from: &Platform, to: &Platform, command: Command, handle: u32, guest: u64) -> Status {
    let status = run(from, command, &packet_fields(handle, guest, LEN));
    let mut bytes = vec![0; 0x2000];
    from.host_read(SCRATCH, &mut bytes).unwrap();
    to.host_write(SCRATCH, &bytes).unwrap();
    status
}

fn start(from: &Platform, to: &Platform, handle: u32) -> Status {
    run(from, Command::SEND_START, &send_fields(from, to, handle))
}

#[test]
fn a_sent_guest_runs_on_the_other_platform_with_its_memory_and_policy() {
    let (a, b) = (sev(1), sev(2));
    let content: Vec<u8> = (0..0x3000_u32).map(|i| (i / 3) as u8).collect();
    let source = running(&a, policy::SEV, ASID, &content);
    start(&a, &b, source).ok().unwrap();
    let (status, target) = receive_start(&a, &b, policy::SEV);
    status.ok().unwrap();
    activate(&b, target, ASID + 1).ok().unwrap();
    let there = 0x80_0000;
    for page in (0..0x3000).step_by(0x1000) {
        carry(&a, &b, Command::SEND_UPDATE_DATA, source, GUEST + page)
            .ok()
            .unwrap();
        let fields = packet_fields(target, there + page, LEN);
        run(&b, Command::RECEIVE_UPDATE_DATA, &fields).ok().unwrap();
    }
    on(&a, Command::SEND_FINISH, source).ok().unwrap();
    on(&b, Command::RECEIVE_FINISH, target).ok().unwrap();
    assert_eq!((guest_state(&a, source), guest_state(&b, target)), (6, 3));
    let mut seen = vec![0; 0x3000];
    for (i, part) in seen.chunks_mut(0x1000).enumerate() {
        let at = i as u64 * 0x1000;
        b.guest_read(&GuestPage::new(ASID + 1, at, there + at), part)
            .unwrap();
    }
    assert_eq!(seen, content);
    assert_eq!(b.snapshot().guests[0].policy, policy::SEV);
    // The source can only be taken down.
    assert_eq!(
        on(&a, Command::SEND_CANCEL, source),
        Status::INVALID_GUEST_STATE
    );
    on(&a, Command::DEACTIVATE, source).ok().unwrap();
    on(&a, Command::DECOMMISSION, source).ok().unwrap();
}

#[test]
fn register_state_travels_for_es_guests_only_and_not_as_memory() {
    let (a, b) = (sev(3), sev(4));
    let plain = running(&a, 0, ASID, &[1; 16]);
    start(&a, &b, plain).ok().unwrap();
    let fields = packet_fields(plain, GUEST, LEN);
    assert_eq!(
        run(&a, Command::SEND_UPDATE_VMSA, &fields),
        Status::POLICY_FAILURE
    );

    let source = running(&a, policy::ES, ES_ASID, &[7; 0x1000]);
    start(&a, &b, source).ok().unwrap();
    let (_, target) = receive_start(&a, &b, policy::ES);
    activate(&b, target, ES_ASID).ok().unwrap();
    carry(&a, &b, Command::SEND_UPDATE_VMSA, source, GUEST)
        .ok()
        .unwrap();
    let fields = packet_fields(target, GUEST, LEN);
    assert_eq!(
        run(&b, Command::RECEIVE_UPDATE_DATA, &fields),
        Status::BAD_MEASUREMENT
    );
    run(&b, Command::RECEIVE_UPDATE_VMSA, &fields).ok().unwrap();
    let mut seen = [0; 16];
    b.guest_read(&GuestPage::new(ES_ASID, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [7; 16]);
}

#[test]
fn a_cancelled_send_leaves_the_guest_running_and_can_begin_again() {
    let (a, b) = (sev(5), sev(6));
    let source = running(&a, 0, ASID, &[9; 0x1000]);
    start(&a, &b, source).ok().unwrap();
    assert_eq!(start(&a, &b, source), Status::INVALID_GUEST_STATE);
    let (_, lost) = receive_start(&a, &b, 0);
    on(&a, Command::SEND_CANCEL, source).ok().unwrap();
    let mut seen = [0; 16];
    a.guest_read(&GuestPage::new(ASID, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [9; 16]);
    on(&b, Command::DECOMMISSION, lost).ok().unwrap();

    start(&a, &b, source).ok().unwrap();
    let (_, target) = receive_start(&a, &b, 0);
    activate(&b, target, ASID).ok().unwrap();
    carry(&a, &b, Command::SEND_UPDATE_DATA, source, GUEST)
        .ok()
        .unwrap();
    run(
        &b,
        Command::RECEIVE_UPDATE_DATA,
        &packet_fields(target, GUEST, LEN),
    )
    .ok()
    .unwrap();
}

#[test]
fn a_damaged_packet_or_session_is_refused_and_changes_nothing() {
    let (a, b) = (sev(7), sev(8));
    let source = running(&a, 0, ASID, &[9; 0x1000]);
    start(&a, &b, source).ok().unwrap();
    // A session for another policy, or for another platform.
    assert_eq!(receive_start(&a, &b, 1).0, Status::BAD_MEASUREMENT);
    assert_eq!(receive_start(&a, &sev(9), 0).0, Status::BAD_MEASUREMENT);
    let (_, target) = receive_start(&a, &b, 0);
    activate(&b, target, ASID).ok().unwrap();
    carry(&a, &b, Command::SEND_UPDATE_DATA, source, GUEST)
        .ok()
        .unwrap();
    let mut before = [0; 16];
    b.host_read(GUEST, &mut before).unwrap();
    let fields = packet_fields(target, GUEST, LEN);
    for (at, bit) in [
        (SCRATCH + 3, 7),
        (SCRATCH + 4, 0),
        (SCRATCH + 51, 3),
        (SCRATCH + 0x1800, 1),
    ] {
        let mut byte = [0];
        b.host_read(at, &mut byte).unwrap();
        b.host_write(at, &[byte[0] ^ 1 << bit]).unwrap();
        assert_eq!(
            run(&b, Command::RECEIVE_UPDATE_DATA, &fields),
            Status::BAD_MEASUREMENT
        );
        b.host_write(at, &byte).unwrap();
    }
    let mut after = [0; 16];
    b.host_read(GUEST, &mut after).unwrap();
    assert_eq!(before, after);
    run(&b, Command::RECEIVE_UPDATE_DATA, &fields).ok().unwrap();
}

#[test]
fn policies_decide_where_a_guest_may_go() {
    let a = sev(10);
    let stranger = sev_from(builder(11).root(RootOfTrust::from_seed(99)));
    let old = sev_from(builder(12).api_version(0, 17, 1));
    let genuine = sev(13);
    let newest = 1 << 16 | 55 << 24;
    for (n, (policy, target, expected)) in [
        (policy::NOSEND, &genuine, Status::POLICY_FAILURE),
        (0, &genuine, Status::SUCCESS),
        (policy::SEV, &genuine, Status::SUCCESS),
        (policy::SEV, &stranger, Status::INVALID_CERTIFICATE),
        (0, &stranger, Status::SUCCESS),
        (policy::DOMAIN, &genuine, Status::POLICY_FAILURE),
        (policy::DOMAIN, &a, Status::SUCCESS),
        (newest, &old, Status::POLICY_FAILURE),
        (newest, &genuine, Status::SUCCESS),
    ]
    .into_iter()
    .enumerate()
    {
        let source = running(&a, policy, ASID, &[9; 16]);
        assert_eq!(start(&a, target, source), expected, "case {n}");
        on(&a, Command::DEACTIVATE, source).ok().unwrap();
        on(&a, Command::DECOMMISSION, source).ok().unwrap();
        flush(&a);
    }
}

#[test]
fn broken_certificate_chains_are_refused_with_the_right_status() {
    let (a, b) = (sev(14), sev(15));
    let source = running(&a, policy::SEV, ASID, &[9; 16]);
    let fields = send_fields(&a, &b, source);
    let flip = |at: u64| {
        let mut byte = [0];
        a.host_read(at, &mut byte).unwrap();
        a.host_write(at, &[byte[0] ^ 1]).unwrap();
    };
    let (pdh, chain, vendor) = (SCRATCH, SCRATCH + 0x1000, SCRATCH + 0x4000);
    let (signature, usage) = (0x41c, 8);
    for (at, expected) in [
        (pdh + usage, Status::INVALID_CERTIFICATE),
        (pdh + signature, Status::BAD_SIGNATURE),
        (chain + usage, Status::INVALID_CERTIFICATE),
        (chain + signature, Status::BAD_SIGNATURE),
        (chain + 0x624, Status::BAD_SIGNATURE),
        (chain + 0x824 + signature, Status::BAD_SIGNATURE),
        (chain + 2 * 0x824 + signature, Status::BAD_SIGNATURE),
        (vendor + signature, Status::BAD_SIGNATURE),
        (vendor + 0x824 + 0x14, Status::INVALID_CERTIFICATE),
    ] {
        flip(at);
        assert_eq!(run(&a, Command::SEND_START, &fields), expected, "{at:#x}");
        flip(at);
    }
    for (name, expected) in [
        ("pdh_cert_len", Status::INVALID_LEN),
        ("plat_certs_len", Status::INVALID_LEN),
        ("amd_certs_len", Status::INVALID_LEN),
    ] {
        let mut short = fields.clone();
        short.iter_mut().find(|(n, _)| *n == name).unwrap().1 -= 1;
        assert_eq!(run(&a, Command::SEND_START, &short), expected);
    }
    assert_eq!(guest_state(&a, source), 3);
    run(&a, Command::SEND_START, &fields).ok().unwrap();
}
