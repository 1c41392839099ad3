//! SEND and RECEIVE between two platforms.

mod common;

use common::*;
use soft_amd_sp::{GuestPage, Platform, RootOfTrust, Status};

const ASID: u32 = 6;
const ES_ASID: u32 = 1;
const LEN: u32 = 0x1000;

/// Sends one packet and carries header and data over, without delivering it.
fn carry<C: Packet>(from: &Platform, to: &Platform, handle: u32, guest: u64) -> Status {
    let status = run(from, packet::<C>(handle, guest, LEN));
    let mut bytes = vec![0; 0x2000];
    from.host_read(SCRATCH, &mut bytes).unwrap();
    to.host_write(SCRATCH, &bytes).unwrap();
    status
}

fn start(from: &Platform, to: &Platform, handle: u32) -> Status {
    run(from, send_start(from, to, handle))
}

#[test]
fn a_sent_guest_runs_on_the_other_platform_with_its_memory_and_policy() {
    let (a, b) = (sev(1), sev(2));
    let content: Vec<u8> = (0..0x3000_u32).map(|i| (i / 3) as u8).collect();
    let source = running(&a, SevPolicy::SEV, ASID, &content);
    start(&a, &b, source).ok().unwrap();
    let (status, target) = receive_start(&a, &b, SevPolicy::SEV);
    status.ok().unwrap();
    activate(&b, target, ASID + 1).ok().unwrap();
    let there = 0x80_0000;
    for page in (0..0x3000).step_by(0x1000) {
        carry::<SendUpdateData>(&a, &b, source, GUEST + page)
            .ok()
            .unwrap();
        run(&b, packet::<ReceiveUpdateData>(target, there + page, LEN))
            .ok()
            .unwrap();
    }
    run(
        &a,
        SendFinish {
            handle: source.into(),
        },
    )
    .ok()
    .unwrap();
    run(
        &b,
        ReceiveFinish {
            handle: target.into(),
        },
    )
    .ok()
    .unwrap();
    assert_eq!((guest_state(&a, source), guest_state(&b, target)), (6, 3));
    let mut seen = vec![0; 0x3000];
    for (i, part) in seen.chunks_mut(0x1000).enumerate() {
        let at = i as u64 * 0x1000;
        b.guest_read(&GuestPage::new(ASID + 1, at, there + at), part)
            .unwrap();
    }
    assert_eq!(seen, content);
    assert_eq!(b.snapshot().guests[0].policy, SevPolicy::SEV.bits());
    // The source can only be taken down.
    assert_eq!(
        run(
            &a,
            SendCancel {
                handle: source.into()
            }
        ),
        Status::INVALID_GUEST_STATE
    );
    deactivate(&a, source).ok().unwrap();
    decommission(&a, source).ok().unwrap();
}

#[test]
fn register_state_travels_for_es_guests_only_and_not_as_memory() {
    let (a, b) = (sev(3), sev(4));
    let plain = running(&a, OPEN, ASID, &[1; 16]);
    start(&a, &b, plain).ok().unwrap();
    assert_eq!(
        run(&a, packet::<SendUpdateVmsa>(plain, GUEST, LEN)),
        Status::POLICY_FAILURE
    );

    let source = running(&a, SevPolicy::ES, ES_ASID, &[7; 0x1000]);
    start(&a, &b, source).ok().unwrap();
    let (_, target) = receive_start(&a, &b, SevPolicy::ES);
    activate(&b, target, ES_ASID).ok().unwrap();
    carry::<SendUpdateVmsa>(&a, &b, source, GUEST).ok().unwrap();
    assert_eq!(
        run(&b, packet::<ReceiveUpdateData>(target, GUEST, LEN)),
        Status::BAD_MEASUREMENT
    );
    run(&b, packet::<ReceiveUpdateVmsa>(target, GUEST, LEN))
        .ok()
        .unwrap();
    let mut seen = [0; 16];
    b.guest_read(&GuestPage::new(ES_ASID, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [7; 16]);
}

#[test]
fn a_cancelled_send_leaves_the_guest_running_and_can_begin_again() {
    let (a, b) = (sev(5), sev(6));
    let source = running(&a, OPEN, ASID, &[9; 0x1000]);
    start(&a, &b, source).ok().unwrap();
    assert_eq!(start(&a, &b, source), Status::INVALID_GUEST_STATE);
    let (_, lost) = receive_start(&a, &b, OPEN);
    run(
        &a,
        SendCancel {
            handle: source.into(),
        },
    )
    .ok()
    .unwrap();
    let mut seen = [0; 16];
    a.guest_read(&GuestPage::new(ASID, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [9; 16]);
    decommission(&b, lost).ok().unwrap();

    start(&a, &b, source).ok().unwrap();
    let (_, target) = receive_start(&a, &b, OPEN);
    activate(&b, target, ASID).ok().unwrap();
    carry::<SendUpdateData>(&a, &b, source, GUEST).ok().unwrap();
    run(&b, packet::<ReceiveUpdateData>(target, GUEST, LEN))
        .ok()
        .unwrap();
}

#[test]
fn a_damaged_packet_or_session_is_refused_and_changes_nothing() {
    let (a, b) = (sev(7), sev(8));
    let source = running(&a, OPEN, ASID, &[9; 0x1000]);
    start(&a, &b, source).ok().unwrap();
    // A session for another policy, or for another platform.
    assert_eq!(
        receive_start(&a, &b, SevPolicy::NODBG).0,
        Status::BAD_MEASUREMENT
    );
    assert_eq!(receive_start(&a, &sev(9), OPEN).0, Status::BAD_MEASUREMENT);
    let (_, target) = receive_start(&a, &b, OPEN);
    activate(&b, target, ASID).ok().unwrap();
    carry::<SendUpdateData>(&a, &b, source, GUEST).ok().unwrap();
    let mut before = [0; 16];
    b.host_read(GUEST, &mut before).unwrap();
    let receive: ReceiveUpdateData = packet(target, GUEST, LEN);
    for (at, bit) in [
        (SCRATCH + 3, 7),
        (SCRATCH + 4, 0),
        (SCRATCH + 51, 3),
        (SCRATCH + 0x1800, 1),
    ] {
        let mut byte = [0];
        b.host_read(at, &mut byte).unwrap();
        b.host_write(at, &[byte[0] ^ 1 << bit]).unwrap();
        assert_eq!(run(&b, receive), Status::BAD_MEASUREMENT);
        b.host_write(at, &byte).unwrap();
    }
    let mut after = [0; 16];
    b.host_read(GUEST, &mut after).unwrap();
    assert_eq!(before, after);
    run(&b, receive).ok().unwrap();
}

#[test]
fn policies_decide_where_a_guest_may_go() {
    let a = sev(10);
    let stranger = sev_from(builder(11).root(RootOfTrust::from_seed(99)));
    let old = sev_from(builder(12).api_version(0, 17, 1));
    let genuine = sev(13);
    let newest = OPEN.with_api(1, 55);
    for (n, (policy, target, expected)) in [
        (SevPolicy::NOSEND, &genuine, Status::POLICY_FAILURE),
        (OPEN, &genuine, Status::SUCCESS),
        (SevPolicy::SEV, &genuine, Status::SUCCESS),
        (SevPolicy::SEV, &stranger, Status::INVALID_CERTIFICATE),
        (OPEN, &stranger, Status::SUCCESS),
        (SevPolicy::DOMAIN, &genuine, Status::POLICY_FAILURE),
        (SevPolicy::DOMAIN, &a, Status::SUCCESS),
        (newest, &old, Status::POLICY_FAILURE),
        (newest, &genuine, Status::SUCCESS),
    ]
    .into_iter()
    .enumerate()
    {
        let source = running(&a, policy, ASID, &[9; 16]);
        assert_eq!(start(&a, target, source), expected, "case {n}");
        deactivate(&a, source).ok().unwrap();
        decommission(&a, source).ok().unwrap();
        flush(&a);
    }
}

#[test]
fn broken_certificate_chains_are_refused_with_the_right_status() {
    let (a, b) = (sev(14), sev(15));
    let source = running(&a, SevPolicy::SEV, ASID, &[9; 16]);
    let good = send_start(&a, &b, source);
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
        assert_eq!(run(&a, good), expected, "{at:#x}");
        flip(at);
    }
    let shorter: [fn(&mut SendStart) -> &mut U32; 3] = [
        |s| &mut s.pdh_cert_len,
        |s| &mut s.plat_cert_len,
        |s| &mut s.amd_cert_len,
    ];
    for len in shorter {
        let mut short = good;
        *len(&mut short) -= 1;
        assert_eq!(run(&a, short), Status::INVALID_LEN, "{short:?}");
    }
    assert_eq!(guest_state(&a, source), 3);
    run(&a, good).ok().unwrap();
}
