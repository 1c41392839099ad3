//! SEV and SEV-ES guests: launch, measurement, secrets, debugging, keys.

mod common;

use common::*;
use sha2::{Digest, Sha256};
use soft_amd_sp::attestation::LegacyReport;
use soft_amd_sp::measure::{ApiVersion, InitialVmsa, Launch, LaunchMeasure, Vmm};
use soft_amd_sp::{AccessFault, Command, GuestPage, Platform, Status, policy};

const SEV_ASID: u32 = 6;
const ES_ASID: u32 = 1;

fn measure(p: &Platform, handle: u32) -> LaunchMeasure {
    let fields = [("handle", handle.into()), ("address", SCRATCH), ("len", 48)];
    run(p, Command::LAUNCH_MEASURE, &fields).ok().unwrap();
    let mut bytes = [0; 48];
    p.host_read(SCRATCH, &mut bytes).unwrap();
    LaunchMeasure::from_bytes(&bytes)
}

fn update(p: &Platform, command: Command, handle: u32, address: u64, len: u64) -> Status {
    run(
        p,
        command,
        &[
            ("handle", handle.into()),
            ("address", address),
            ("len", len),
        ],
    )
}

#[test]
fn owner_can_check_the_measurement_of_an_es_launch_and_send_a_secret() {
    let p = sev(1);
    let policy = policy::ES | policy::NODBG;
    let guest_owner = owner(&p, policy);
    let (status, out) = run_out(
        &p,
        Command::LAUNCH_START,
        &owner_fields(&p, &guest_owner, policy),
    );
    status.ok().unwrap();
    let handle = out.get("handle").unwrap() as u32;
    activate(&p, handle, ES_ASID).ok().unwrap();

    let image: Vec<u8> = (0..0x3000_u32).map(|i| (i * 7) as u8).collect();
    p.host_write(GUEST, &image).unwrap();
    update(&p, Command::LAUNCH_UPDATE_DATA, handle, GUEST, 0x3000)
        .ok()
        .unwrap();
    let vmsa = InitialVmsa {
        eip: 0xffff_fff0,
        vcpu_sig: 0,
        sev_features: 0,
        vmm: Vmm::Qemu,
    };
    p.host_write(GUEST + 0x4000, &vmsa.page()[..]).unwrap();
    update(
        &p,
        Command::LAUNCH_UPDATE_VMSA,
        handle,
        GUEST + 0x4000,
        0x1000,
    )
    .ok()
    .unwrap();

    // The firmware's measurement equals the one that the owner computes from the image.
    let got = measure(&p, handle);
    let digest = Launch::new(&image).vcpus(1).sev_es().unwrap();
    let version = ApiVersion {
        major: 1,
        minor: 55,
        build: 40,
    };
    assert!(guest_owner.expects(version, &digest, &got));
    assert!(!guest_owner.expects(version, &[0; 32], &got));

    // A secret is accepted once it is authentic, and only the guest can read it.
    let mut secret = *b"the disk key is: correct horse!!";
    let header = guest_owner.seal_secret(&mut secret, [9; 16], &got);
    p.host_write(SCRATCH, &header.to_bytes()).unwrap();
    p.host_write(SCRATCH + 0x1000, &secret).unwrap();
    let fields = packet_fields(handle, GUEST + 0x100, 32);
    run(&p, Command::LAUNCH_UPDATE_SECRET, &fields)
        .ok()
        .unwrap();
    on(&p, Command::LAUNCH_FINISH, handle).ok().unwrap();
    let mut seen = [0; 32];
    let page = GuestPage::new(ES_ASID, 0x100, GUEST + 0x100);
    p.guest_read(&page, &mut seen).unwrap();
    assert_eq!(&seen, b"the disk key is: correct horse!!");
    p.host_read(GUEST + 0x100, &mut seen).unwrap();
    assert_ne!(&seen, b"the disk key is: correct horse!!");
}

#[test]
fn any_flipped_bit_in_a_secret_packet_is_refused_and_memory_is_unchanged() {
    let p = sev(2);
    let guest_owner = owner(&p, 0);
    let (_, out) = run_out(
        &p,
        Command::LAUNCH_START,
        &owner_fields(&p, &guest_owner, 0),
    );
    let handle = out.get("handle").unwrap() as u32;
    activate(&p, handle, SEV_ASID).ok().unwrap();
    p.host_write(GUEST, &[3; 64]).unwrap();
    update(&p, Command::LAUNCH_UPDATE_DATA, handle, GUEST, 64)
        .ok()
        .unwrap();
    let got = measure(&p, handle);
    let mut data = [5; 16];
    let header = guest_owner.seal_secret(&mut data, [9; 16], &got);
    let mut before = [0; 64];
    p.host_read(GUEST, &mut before).unwrap();
    let packet: Vec<u8> = header.to_bytes().into_iter().chain(data).collect();
    for bit in 0..packet.len() * 8 {
        // Bit 0 of the flags asks for something else that the firmware cannot do.
        let expected = if bit == 0 {
            Status::UNSUPPORTED
        } else {
            Status::BAD_MEASUREMENT
        };
        let mut packet = packet.clone();
        packet[bit / 8] ^= 1 << (bit % 8);
        p.host_write(SCRATCH, &packet[..52]).unwrap();
        p.host_write(SCRATCH + 0x1000, &packet[52..]).unwrap();
        let fields = packet_fields(handle, GUEST, 16);
        assert_eq!(
            run(&p, Command::LAUNCH_UPDATE_SECRET, &fields),
            expected,
            "bit {bit}"
        );
        let mut after = [0; 64];
        p.host_read(GUEST, &mut after).unwrap();
        assert_eq!(before, after);
    }
    p.host_write(SCRATCH, &packet[..52]).unwrap();
    p.host_write(SCRATCH + 0x1000, &packet[52..]).unwrap();
    run(
        &p,
        Command::LAUNCH_UPDATE_SECRET,
        &packet_fields(handle, GUEST, 16),
    )
    .ok()
    .unwrap();
}

#[test]
fn a_session_with_any_flipped_bit_or_another_policy_is_refused() {
    let p = sev(3);
    let guest_owner = owner(&p, 0);
    let fields = owner_fields(&p, &guest_owner, 0);
    for bit in (0..128 * 8).step_by(13) {
        let mut session = guest_owner.session().to_bytes();
        session[bit / 8] ^= 1 << (bit % 8);
        p.host_write(SCRATCH + 0x1000, &session).unwrap();
        assert_eq!(
            run(&p, Command::LAUNCH_START, &fields),
            Status::BAD_MEASUREMENT,
            "bit {bit}"
        );
    }
    p.host_write(SCRATCH + 0x1000, &guest_owner.session().to_bytes())
        .unwrap();
    let mut other = fields;
    other[0].1 = 1;
    assert_eq!(
        run(&p, Command::LAUNCH_START, &other),
        Status::BAD_MEASUREMENT
    );
    run(&p, Command::LAUNCH_START, &fields).ok().unwrap();
    assert_eq!(p.snapshot().guests.len(), 1);
}

#[test]
fn session_parameters_are_checked_in_order() {
    let p = sev(4);
    let guest_owner = owner(&p, 0);
    let good = owner_fields(&p, &guest_owner, 0);
    for (field, value, expected) in [
        ("dh_cert", 0, Status::INVALID_ADDRESS),
        ("session", 0, Status::INVALID_ADDRESS),
        ("dh_cert_len", 0x823, Status::INVALID_LEN),
        ("session_len", 129, Status::INVALID_LEN),
        ("dh_cert", 1 << 40, Status::INVALID_ADDRESS),
        ("dh_cert", GUEST, Status::INVALID_CERTIFICATE),
        ("policy", policy::RESERVED as u64, Status::POLICY_FAILURE),
        ("policy", 2 << 16, Status::POLICY_FAILURE),
        ("policy", 1 << 16 | 56 << 24, Status::POLICY_FAILURE),
    ] {
        let mut fields = good;
        fields.iter_mut().find(|(n, _)| *n == field).unwrap().1 = value;
        assert_eq!(
            run(&p, Command::LAUNCH_START, &fields),
            expected,
            "{field} {value:#x}"
        );
    }
    assert_eq!(p.snapshot().guests.len(), 0);
}

#[test]
fn es_policy_needs_an_es_platform_and_an_es_asid() {
    let p = builder(5).build().unwrap();
    run(&p, Command::INIT, &[]).ok().unwrap();
    flush(&p);
    let es = [("policy", policy::ES.into())];
    assert_eq!(run(&p, Command::LAUNCH_START, &es), Status::POLICY_FAILURE);

    let p = sev(5);
    for (policy, good, bad) in [(policy::ES, 5, 6), (0, 6, 5)] {
        let (_, out) = run_out(&p, Command::LAUNCH_START, &[("policy", policy.into())]);
        let handle = out.get("handle").unwrap() as u32;
        for asid in [0, bad, 13, u32::MAX] {
            assert_eq!(activate(&p, handle, asid), Status::INVALID_ASID);
        }
        activate(&p, handle, good).ok().unwrap();
    }
}

#[test]
fn vmsa_updates_are_for_es_guests_and_whole_pages() {
    let p = sev(6);
    let plain = launch_start(&p, 0, SEV_ASID);
    let es = launch_start(&p, policy::ES, ES_ASID);
    let vmsa = |handle, at, len| update(&p, Command::LAUNCH_UPDATE_VMSA, handle, at, len);
    assert_eq!(vmsa(plain, GUEST, 0x1000), Status::POLICY_FAILURE);
    assert_eq!(vmsa(es, GUEST, 0x800), Status::INVALID_LEN);
    assert_eq!(vmsa(es, GUEST + 16, 0x1000), Status::INVALID_ADDRESS);
    vmsa(es, GUEST, 0x1000).ok().unwrap();
}

#[test]
fn length_queries_return_the_length_and_change_nothing() {
    let (p, q) = (sev(7), sev(8));
    let handle = launch_start(&p, 0, SEV_ASID);
    let query = |command, fields: &[(&str, u64)], names: &[(&str, u64)]| {
        let before = guest_state(&p, handle);
        let (status, out) = run_out(&p, command, fields);
        assert_eq!(status, Status::INVALID_LEN, "{command}");
        for (name, value) in names {
            assert_eq!(out.get(name), Some(*value), "{command}");
        }
        assert_eq!(guest_state(&p, handle), before, "{command}");
    };
    let h = ("handle", handle.into());
    query(Command::LAUNCH_MEASURE, &[h], &[("len", 48)]);
    let fields = [h, ("address", SCRATCH), ("len", 47)];
    query(Command::LAUNCH_MEASURE, &fields, &[("len", 48)]);
    measure(&p, handle);
    query(Command::ATTESTATION, &[h], &[("len", 0xd0)]);
    on(&p, Command::LAUNCH_FINISH, handle).ok().unwrap();
    query(
        Command::SEND_START,
        &[h],
        &[("session_len", 128), ("policy", 0)],
    );
    run(&p, Command::SEND_START, &send_fields(&p, &q, handle))
        .ok()
        .unwrap();
    let fields = [h, ("guest_address", GUEST), ("guest_len", 64)];
    query(
        Command::SEND_UPDATE_DATA,
        &fields,
        &[("hdr_len", 52), ("trans_len", 64)],
    );
}

#[test]
fn attestation_reports_the_launch_and_is_signed_by_the_platform() {
    let p = sev(9);
    let content = [0x11; 0x1000];
    let handle = running(&p, 0, SEV_ASID, &content);
    let fields = [
        ("handle", handle.into()),
        ("address", SCRATCH),
        ("len", 0xd0),
    ];
    let mut buffer = soft_amd_sp::CommandBuffer::new(Command::ATTESTATION);
    for (name, value) in fields {
        buffer = buffer.with(name, value);
    }
    buffer = buffer.with_bytes("mnonce", &[6; 16]);
    p.run(&mut buffer).ok().unwrap();
    let mut bytes = [0; LegacyReport::LEN];
    p.host_read(SCRATCH, &mut bytes).unwrap();
    let report = LegacyReport::from_bytes(&bytes);
    assert_eq!(report.mnonce, [6; 16]);
    assert_eq!(
        report.launch_digest,
        <[u8; 32]>::from(Sha256::digest(content))
    );
    assert!(report.is_signed_by(&p.pek_cert()));
    assert!(!report.is_signed_by(&sev(10).pek_cert()));
    bytes[0x12] ^= 1;
    assert!(!LegacyReport::from_bytes(&bytes).is_signed_by(&p.pek_cert()));
}

#[test]
fn debug_commands_honour_nodbg_and_move_plain_text() {
    let p = sev(11);
    let handle = running(&p, 0, SEV_ASID, &[0x22; 0x2000]);
    let debug = |command, src: u64, dst: u64, len: u64| {
        run(
            &p,
            command,
            &[
                ("handle", handle.into()),
                ("src", src),
                ("dst", dst),
                ("len", len),
            ],
        )
    };
    debug(Command::DBG_DECRYPT, GUEST + 0x10, SCRATCH, 0x1800)
        .ok()
        .unwrap();
    let mut plain = [0; 0x1800];
    p.host_read(SCRATCH, &mut plain).unwrap();
    assert_eq!(plain, [0x22; 0x1800]);
    p.host_write(SCRATCH, &[0x33; 32]).unwrap();
    debug(Command::DBG_ENCRYPT, SCRATCH, GUEST + 0xff0, 32)
        .ok()
        .unwrap();
    let mut seen = [0; 16];
    for (at, expected) in [(0xfe0, 0x22), (0xff0, 0x33), (0x1000, 0x33), (0x1010, 0x22)] {
        p.guest_read(&GuestPage::new(SEV_ASID, at, GUEST + at), &mut seen)
            .unwrap();
        assert_eq!(seen, [expected; 16]);
    }
    assert_eq!(
        debug(Command::DBG_DECRYPT, GUEST + 8, SCRATCH, 16),
        Status::INVALID_ADDRESS
    );
    assert_eq!(
        debug(Command::DBG_DECRYPT, GUEST, SCRATCH, 15),
        Status::INVALID_LEN
    );
    assert_eq!(
        debug(Command::DBG_DECRYPT, GUEST, SCRATCH, 0),
        Status::INVALID_LEN
    );

    let closed = running(&p, NODBG, SEV_ASID + 1, &[0x22; 16]);
    for command in [Command::DBG_DECRYPT, Command::DBG_ENCRYPT] {
        let fields = [
            ("handle", closed.into()),
            ("src", GUEST),
            ("dst", SCRATCH),
            ("len", 16),
        ];
        assert_eq!(run(&p, command, &fields), Status::POLICY_FAILURE);
    }
}

#[test]
fn copy_moves_guest_memory_so_that_the_guest_reads_it_at_the_new_place() {
    let p = sev(12);
    let content: Vec<u8> = (0..0x2000_u32).map(|i| (i / 16) as u8).collect();
    let handle = running(&p, 0, SEV_ASID, &content);
    let copy = |src: u64, dst: u64, len: u64| {
        let fields = [
            ("handle", handle.into()),
            ("length", len),
            ("src", src),
            ("dst", dst),
        ];
        run(&p, Command::COPY, &fields)
    };
    copy(GUEST, GUEST + 0x8010, 0x1ff0).ok().unwrap();
    let mut seen = [0; 16];
    p.guest_read(&GuestPage::new(SEV_ASID, 0x8010, GUEST + 0x8010), &mut seen)
        .unwrap();
    assert_eq!(seen[..], content[..16]);
    assert_eq!(copy(GUEST, GUEST + 0x10, 0x20), Status::INVALID_ADDRESS);
    // A plain move of cipher text gives noise.
    let mut raw = [0; 16];
    p.host_read(GUEST, &mut raw).unwrap();
    p.host_write(GUEST + 0x20_0000, &raw).unwrap();
    p.guest_read(&GuestPage::new(SEV_ASID, 0, GUEST + 0x20_0000), &mut seen)
        .unwrap();
    assert_ne!(seen[..], content[..16]);
}

#[test]
fn keys_are_shared_only_by_equal_policies_that_allow_it() {
    let p = sev(13);
    let first = launch_start(&p, 0, SEV_ASID);
    let start = |share: u32, policy: u32| {
        let fields = [("handle", share.into()), ("policy", policy.into())];
        let (status, out) = run_out(&p, Command::LAUNCH_START, &fields);
        status.ok().map(|()| out.get("handle").unwrap() as u32)
    };
    assert_eq!(start(99, 0), Err(Status::INVALID_GUEST));
    assert_eq!(start(first, policy::NODBG), Err(Status::POLICY_FAILURE));
    let closed = launch_start(&p, policy::NOKS, SEV_ASID + 1);
    assert_eq!(start(closed, policy::NOKS), Err(Status::POLICY_FAILURE));
    let second = start(first, 0).unwrap();
    let stranger = start(0, 0).unwrap();
    assert_eq!(activate(&p, stranger, SEV_ASID), Status::ASID_OWNED);
    activate(&p, second, SEV_ASID).ok().unwrap();

    // The ASID stays bound until the last of them leaves it.
    on(&p, Command::DEACTIVATE, first).ok().unwrap();
    assert_eq!(activate(&p, stranger, SEV_ASID), Status::ASID_OWNED);
    let page = GuestPage::new(SEV_ASID, 0, GUEST);
    p.guest_write(&page, &[1; 16]).unwrap();
    on(&p, Command::DEACTIVATE, second).ok().unwrap();
    assert_eq!(
        p.guest_write(&page, &[1; 16]),
        Err(AccessFault::NotActive(SEV_ASID))
    );
    assert_eq!(activate(&p, stranger, SEV_ASID), Status::DFFLUSH_REQUIRED);
}

#[test]
fn shutdown_forgets_every_guest_and_factory_reset_changes_the_identity() {
    let p = sev(14);
    running(&p, 0, SEV_ASID, &[0; 16]);
    let before = (p.pek_cert(), p.cert_chain());
    let reset = |p: &Platform| p.command(Command::FACTORY_RESET, &mut []);
    assert_eq!(reset(&p), Status::INVALID_PLATFORM_STATE);
    p.command(Command::SHUTDOWN, &mut []).ok().unwrap();
    assert!(p.snapshot().guests.is_empty());
    let page = GuestPage::new(SEV_ASID, 0, GUEST);
    assert_eq!(
        p.guest_read(&page, &mut [0]),
        Err(AccessFault::NotActive(SEV_ASID))
    );
    assert_eq!(p.pek_cert(), before.0);
    reset(&p).ok().unwrap();
    assert_ne!(p.pek_cert(), before.0);
    // The chip's own key is not an owner's to reset.
    assert_eq!(p.cert_chain(), before.1);
}

#[test]
fn init_checks_its_flags_and_the_trusted_memory_region() {
    let p = builder(15).build().unwrap();
    let init = |flags: u64, tmr: u64, len: u64| {
        let fields = [("flags", flags), ("tmr_address", tmr), ("tmr_len", len)];
        run(&p, Command::INIT, &fields)
    };
    assert_eq!(init(2, TMR, 1 << 20), Status::INVALID_PARAM);
    assert_eq!(init(1, TMR, 0xf_ffff), Status::INVALID_LEN);
    assert_eq!(init(1, TMR + 0x1000, 1 << 20), Status::INVALID_ADDRESS);
    assert_eq!(init(1, p.memory_len(), 1 << 20), Status::INVALID_ADDRESS);
    init(1, TMR, 1 << 20).ok().unwrap();
    let out = run_out(&p, Command::PLATFORM_STATUS, &[]).1;
    for (name, value) in [
        ("api_major", 1),
        ("api_minor", 55),
        ("build", 40),
        ("state", 1),
        ("flags", 1 << 8),
        ("guest_count", 0),
    ] {
        assert_eq!(out.get(name), Some(value), "{name}");
    }
}

#[test]
fn a_launch_update_that_cannot_finish_changes_nothing() {
    let p = sev(16);
    let handle = launch_start(&p, 0, SEV_ASID);
    let end = p.memory_len();
    p.host_write(end - 0x1000, &[1; 0x1000]).unwrap();
    let go = |at, len| update(&p, Command::LAUNCH_UPDATE_DATA, handle, at, len);
    assert_eq!(go(end - 0x1000, 0x2000), Status::INVALID_ADDRESS);
    assert_eq!(go(end - 0x1000, 0), Status::INVALID_LEN);
    assert_eq!(go(end - 0x1000, 24), Status::INVALID_LEN);
    assert_eq!(go(end - 0xff8, 16), Status::INVALID_ADDRESS);
    let mut seen = [0; 0x1000];
    p.host_read(end - 0x1000, &mut seen).unwrap();
    assert_eq!(seen, [1; 0x1000]);
    let fields = [
        ("handle", handle.into()),
        ("address", end - 16),
        ("len", 48),
    ];
    assert_eq!(
        run(&p, Command::LAUNCH_MEASURE, &fields),
        Status::INVALID_ADDRESS
    );
    assert_eq!(guest_state(&p, handle), 1);
    // The digest is still that of nothing.
    let got = measure(&p, handle);
    on(&p, Command::LAUNCH_FINISH, handle).ok().unwrap();
    assert_ne!(got.measure, [0; 32]);
    let fields = [
        ("handle", handle.into()),
        ("address", SCRATCH),
        ("len", 0xd0),
    ];
    run(&p, Command::ATTESTATION, &fields).ok().unwrap();
    let mut report = [0; LegacyReport::LEN];
    p.host_read(SCRATCH, &mut report).unwrap();
    let empty: [u8; 32] = Sha256::digest([]).into();
    assert_eq!(LegacyReport::from_bytes(&report).launch_digest, empty);
}

#[test]
fn addresses_may_carry_the_c_bit() {
    let p = sev(17);
    let handle = launch_start(&p, 0, SEV_ASID);
    p.host_write(GUEST, &[5; 16]).unwrap();
    let c_bit = 1 << p.c_bit();
    update(&p, Command::LAUNCH_UPDATE_DATA, handle, GUEST | c_bit, 16)
        .ok()
        .unwrap();
    let mut seen = [0; 16];
    p.guest_read(&GuestPage::new(SEV_ASID, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [5; 16]);
}

#[test]
fn checks_come_in_order_platform_guest_state_reserved_activation_parameters() {
    let p = builder(18).build().unwrap();
    let attempt = |handle: u32, reserved: u8, len: u32| {
        let mut bytes = vec![0; Command::LAUNCH_UPDATE_DATA.buffer_len()];
        bytes[..4].copy_from_slice(&handle.to_le_bytes());
        bytes[4] = reserved;
        bytes[8..16].copy_from_slice(&GUEST.to_le_bytes());
        bytes[16..20].copy_from_slice(&len.to_le_bytes());
        p.command(Command::LAUNCH_UPDATE_DATA, &mut bytes)
    };
    // Everything is wrong; one thing after another is put right.
    assert_eq!(attempt(99, 1, 1), Status::INVALID_PLATFORM_STATE);
    init(&p).ok().unwrap();
    flush(&p);
    assert_eq!(attempt(99, 1, 1), Status::INVALID_PLATFORM_STATE);
    let finished = running(&p, 0, SEV_ASID, &[0; 16]);
    assert_eq!(attempt(99, 1, 1), Status::INVALID_GUEST);
    assert_eq!(attempt(finished, 1, 1), Status::INVALID_GUEST_STATE);
    let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
    let fresh = out.get("handle").unwrap() as u32;
    assert_eq!(attempt(fresh, 1, 1), Status::INVALID_PARAM);
    assert_eq!(attempt(fresh, 0, 1), Status::INACTIVE);
    activate(&p, fresh, SEV_ASID + 1).ok().unwrap();
    assert_eq!(attempt(fresh, 0, 1), Status::INVALID_LEN);
    assert_eq!(attempt(fresh, 0, 16), Status::SUCCESS);
}
