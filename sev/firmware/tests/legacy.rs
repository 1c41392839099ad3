//! SEV and SEV-ES guests: launch, measurement, secrets, debugging, keys.

mod common;

use common::*;
use sha2::{Digest, Sha256};
use soft_amd_sp::attestation::LegacyReport;
use soft_amd_sp::measure::{self, ApiVersion, InitialVmsa, Launch, Vmm};
use soft_amd_sp::{AccessFault, GuestPage, Platform, Status};

const SEV_ASID: u32 = 6;
const ES_ASID: u32 = 1;

fn measure(p: &Platform, handle: u32) -> measure::LaunchMeasure {
    launch_measure(p, handle, SCRATCH).ok().unwrap();
    let mut bytes = [0; 48];
    p.host_read(SCRATCH, &mut bytes).unwrap();
    measure::LaunchMeasure::from_bytes(&bytes)
}

fn dbg_decrypt(handle: u32, src: u64, dst: u64, len: u32) -> DbgDecrypt {
    DbgDecrypt {
        handle: handle.into(),
        src_paddr: src.into(),
        dst_paddr: dst.into(),
        length: len.into(),
        ..Default::default()
    }
}

fn dbg_encrypt(handle: u32, src: u64, dst: u64, len: u32) -> DbgEncrypt {
    DbgEncrypt {
        handle: handle.into(),
        src_paddr: src.into(),
        dst_paddr: dst.into(),
        length: len.into(),
        ..Default::default()
    }
}

#[test]
fn owner_can_check_the_measurement_of_an_es_launch_and_send_a_secret() {
    let p = sev(1);
    let policy = SevPolicy::ES | SevPolicy::NODBG;
    let guest_owner = owner(&p, policy);
    let (status, out) = run_out(&p, owner_start(&p, &guest_owner, policy));
    status.ok().unwrap();
    let handle = out.handle.get();
    activate(&p, handle, ES_ASID).ok().unwrap();

    let image: Vec<u8> = (0..0x3000_u32).map(|i| (i * 7) as u8).collect();
    p.host_write(GUEST, &image).unwrap();
    update_data(&p, handle, GUEST, 0x3000).ok().unwrap();
    let vmsa = InitialVmsa {
        eip: 0xffff_fff0,
        vcpu_sig: 0,
        sev_features: 0,
        vmm: Vmm::Qemu,
    };
    p.host_write(GUEST + 0x4000, &vmsa.page()[..]).unwrap();
    update_vmsa(&p, handle, GUEST + 0x4000, 0x1000)
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
    run(&p, packet::<LaunchSecret>(handle, GUEST + 0x100, 32))
        .ok()
        .unwrap();
    launch_finish(&p, handle).ok().unwrap();
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
    let guest_owner = owner(&p, OPEN);
    let (_, out) = run_out(&p, owner_start(&p, &guest_owner, OPEN));
    let handle = out.handle.get();
    activate(&p, handle, SEV_ASID).ok().unwrap();
    p.host_write(GUEST, &[3; 64]).unwrap();
    update_data(&p, handle, GUEST, 64).ok().unwrap();
    let got = measure(&p, handle);
    let mut data = [5; 16];
    let header = guest_owner.seal_secret(&mut data, [9; 16], &got);
    let mut before = [0; 64];
    p.host_read(GUEST, &mut before).unwrap();
    let sealed: Vec<u8> = header.to_bytes().into_iter().chain(data).collect();
    for bit in 0..sealed.len() * 8 {
        // Bit 0 of the flags asks for something else that the firmware cannot do.
        let expected = if bit == 0 {
            Status::UNSUPPORTED
        } else {
            Status::BAD_MEASUREMENT
        };
        let mut sealed = sealed.clone();
        sealed[bit / 8] ^= 1 << (bit % 8);
        p.host_write(SCRATCH, &sealed[..52]).unwrap();
        p.host_write(SCRATCH + 0x1000, &sealed[52..]).unwrap();
        let secret: LaunchSecret = packet(handle, GUEST, 16);
        assert_eq!(run(&p, secret), expected, "bit {bit}");
        let mut after = [0; 64];
        p.host_read(GUEST, &mut after).unwrap();
        assert_eq!(before, after);
    }
    p.host_write(SCRATCH, &sealed[..52]).unwrap();
    p.host_write(SCRATCH + 0x1000, &sealed[52..]).unwrap();
    run(&p, packet::<LaunchSecret>(handle, GUEST, 16))
        .ok()
        .unwrap();
}

#[test]
fn a_session_with_any_flipped_bit_or_another_policy_is_refused() {
    let p = sev(3);
    let guest_owner = owner(&p, OPEN);
    let good = owner_start(&p, &guest_owner, OPEN);
    for bit in (0..128 * 8).step_by(13) {
        let mut session = guest_owner.session().to_bytes();
        session[bit / 8] ^= 1 << (bit % 8);
        p.host_write(SCRATCH + 0x1000, &session).unwrap();
        assert_eq!(run(&p, good), Status::BAD_MEASUREMENT, "bit {bit}");
    }
    p.host_write(SCRATCH + 0x1000, &guest_owner.session().to_bytes())
        .unwrap();
    let other = LaunchStart {
        policy: SevPolicy::NODBG,
        ..good
    };
    assert_eq!(run(&p, other), Status::BAD_MEASUREMENT);
    run(&p, good).ok().unwrap();
    assert_eq!(p.snapshot().guests.len(), 1);
}

#[test]
fn session_parameters_are_checked_in_order() {
    let p = sev(4);
    let guest_owner = owner(&p, OPEN);
    let good = owner_start(&p, &guest_owner, OPEN);
    type Edit = fn(&mut LaunchStart);
    let edits: [(Edit, Status); 9] = [
        (|s| s.dh_cert_paddr = 0.into(), Status::INVALID_ADDRESS),
        (|s| s.session_paddr = 0.into(), Status::INVALID_ADDRESS),
        (|s| s.dh_cert_len = 0x823.into(), Status::INVALID_LEN),
        (|s| s.session_len = 129.into(), Status::INVALID_LEN),
        (
            |s| s.dh_cert_paddr = (1 << 40).into(),
            Status::INVALID_ADDRESS,
        ),
        (
            |s| s.dh_cert_paddr = GUEST.into(),
            Status::INVALID_CERTIFICATE,
        ),
        (
            |s| s.policy = SevPolicy::from_raw(0xffc0),
            Status::POLICY_FAILURE,
        ),
        (|s| s.policy = OPEN.with_api(2, 0), Status::POLICY_FAILURE),
        (|s| s.policy = OPEN.with_api(1, 56), Status::POLICY_FAILURE),
    ];
    for (edit, expected) in edits {
        let mut start = good;
        edit(&mut start);
        assert_eq!(run(&p, start), expected, "{start:?}");
    }
    assert_eq!(p.snapshot().guests.len(), 0);
}

#[test]
fn es_policy_needs_an_es_platform_and_an_es_asid() {
    let p = builder(5).build().unwrap();
    run(&p, Init::default()).ok().unwrap();
    flush(&p);
    let es = LaunchStart {
        policy: SevPolicy::ES,
        ..Default::default()
    };
    assert_eq!(run(&p, es), Status::POLICY_FAILURE);

    let p = sev(5);
    for (policy, good, bad) in [(SevPolicy::ES, 5, 6), (OPEN, 6, 5)] {
        let handle = new_guest(&p, policy);
        for asid in [0, bad, 13, u32::MAX] {
            assert_eq!(activate(&p, handle, asid), Status::INVALID_ASID);
        }
        activate(&p, handle, good).ok().unwrap();
    }
}

#[test]
fn vmsa_updates_are_for_es_guests_and_whole_pages() {
    let p = sev(6);
    let plain = launch_start(&p, OPEN, SEV_ASID);
    let es = launch_start(&p, SevPolicy::ES, ES_ASID);
    let vmsa = |handle, at, len| update_vmsa(&p, handle, at, len);
    assert_eq!(vmsa(plain, GUEST, 0x1000), Status::POLICY_FAILURE);
    assert_eq!(vmsa(es, GUEST, 0x800), Status::INVALID_LEN);
    assert_eq!(vmsa(es, GUEST + 16, 0x1000), Status::INVALID_ADDRESS);
    vmsa(es, GUEST, 0x1000).ok().unwrap();
}

#[test]
fn length_queries_return_the_length_and_change_nothing() {
    let (p, q) = (sev(7), sev(8));
    let handle = launch_start(&p, OPEN, SEV_ASID);
    let h = handle.into();
    let query = LaunchMeasure {
        handle: h,
        ..Default::default()
    };
    let out = refused_for_length(&p, handle, query);
    assert_eq!(out.measure_len, 48);
    let measure_len = 47.into();
    let short = LaunchMeasure {
        measure_paddr: SCRATCH.into(),
        measure_len,
        ..query
    };
    assert_eq!(refused_for_length(&p, handle, short).measure_len, 48);
    measure(&p, handle);
    let query = Attestation {
        handle: h,
        ..Default::default()
    };
    assert_eq!(refused_for_length(&p, handle, query).length, 0xd0);
    launch_finish(&p, handle).ok().unwrap();
    let query = SendStart {
        handle: h,
        ..Default::default()
    };
    let out = refused_for_length(&p, handle, query);
    assert_eq!((out.session_len.get(), out.policy), (128, OPEN));
    run(&p, send_start(&p, &q, handle)).ok().unwrap();
    let query = SendUpdateData {
        handle: h,
        guest_paddr: GUEST.into(),
        guest_len: 64.into(),
        ..Default::default()
    };
    let out = refused_for_length(&p, handle, query);
    assert_eq!((out.hdr_len.get(), out.trans_len.get()), (52, 64));
}

/// The outputs of a command whose length is refused without a change of state.
fn refused_for_length<C: CommandStruct>(p: &Platform, handle: u32, command: C) -> C {
    let before = guest_state(p, handle);
    let (status, out) = run_out(p, command);
    assert_eq!(status, Status::INVALID_LEN, "{}", C::COMMAND);
    assert_eq!(guest_state(p, handle), before, "{}", C::COMMAND);
    out
}

#[test]
fn attestation_reports_the_launch_and_is_signed_by_the_platform() {
    let p = sev(9);
    let content = [0x11; 0x1000];
    let handle = running(&p, OPEN, SEV_ASID, &content);
    let mnonce = [6; 16];
    let ask = Attestation {
        mnonce,
        ..attestation(handle)
    };
    run(&p, ask).ok().unwrap();
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
    let handle = running(&p, OPEN, SEV_ASID, &[0x22; 0x2000]);
    let decrypt = |src, dst, len| run(&p, dbg_decrypt(handle, src, dst, len));
    decrypt(GUEST + 0x10, SCRATCH, 0x1800).ok().unwrap();
    let mut plain = [0; 0x1800];
    p.host_read(SCRATCH, &mut plain).unwrap();
    assert_eq!(plain, [0x22; 0x1800]);
    p.host_write(SCRATCH, &[0x33; 32]).unwrap();
    run(&p, dbg_encrypt(handle, SCRATCH, GUEST + 0xff0, 32))
        .ok()
        .unwrap();
    let mut seen = [0; 16];
    for (at, expected) in [(0xfe0, 0x22), (0xff0, 0x33), (0x1000, 0x33), (0x1010, 0x22)] {
        p.guest_read(&GuestPage::new(SEV_ASID, at, GUEST + at), &mut seen)
            .unwrap();
        assert_eq!(seen, [expected; 16]);
    }
    assert_eq!(decrypt(GUEST + 8, SCRATCH, 16), Status::INVALID_ADDRESS);
    assert_eq!(decrypt(GUEST, SCRATCH, 15), Status::INVALID_LEN);
    assert_eq!(decrypt(GUEST, SCRATCH, 0), Status::INVALID_LEN);

    let closed = running(&p, SevPolicy::NODBG, SEV_ASID + 1, &[0x22; 16]);
    let decrypt = dbg_decrypt(closed, GUEST, SCRATCH, 16);
    assert_eq!(run(&p, decrypt), Status::POLICY_FAILURE);
    let encrypt = dbg_encrypt(closed, GUEST, SCRATCH, 16);
    assert_eq!(run(&p, encrypt), Status::POLICY_FAILURE);
}

#[test]
fn copy_moves_guest_memory_so_that_the_guest_reads_it_at_the_new_place() {
    let p = sev(12);
    let content: Vec<u8> = (0..0x2000_u32).map(|i| (i / 16) as u8).collect();
    let handle = running(&p, OPEN, SEV_ASID, &content);
    let copy = |src: u64, dst: u64, len: u32| {
        let copy = CopyMemory {
            handle: handle.into(),
            length: len.into(),
            src_paddr: src.into(),
            dst_paddr: dst.into(),
        };
        run(&p, copy)
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
    let first = launch_start(&p, OPEN, SEV_ASID);
    let start = |share: u32, policy| {
        let handle = share.into();
        let start = LaunchStart {
            handle,
            policy,
            ..Default::default()
        };
        let (status, out) = run_out(&p, start);
        status.ok().map(|()| out.handle.get())
    };
    assert_eq!(start(99, OPEN), Err(Status::INVALID_GUEST));
    assert_eq!(start(first, SevPolicy::NODBG), Err(Status::POLICY_FAILURE));
    let closed = launch_start(&p, SevPolicy::NOKS, SEV_ASID + 1);
    assert_eq!(start(closed, SevPolicy::NOKS), Err(Status::POLICY_FAILURE));
    let second = start(first, OPEN).unwrap();
    let stranger = start(0, OPEN).unwrap();
    assert_eq!(activate(&p, stranger, SEV_ASID), Status::ASID_OWNED);
    activate(&p, second, SEV_ASID).ok().unwrap();

    // The ASID stays bound until the last of them leaves it.
    deactivate(&p, first).ok().unwrap();
    assert_eq!(activate(&p, stranger, SEV_ASID), Status::ASID_OWNED);
    let page = GuestPage::new(SEV_ASID, 0, GUEST);
    p.guest_write(&page, &[1; 16]).unwrap();
    deactivate(&p, second).ok().unwrap();
    assert_eq!(
        p.guest_write(&page, &[1; 16]),
        Err(AccessFault::NotActive(SEV_ASID))
    );
    assert_eq!(activate(&p, stranger, SEV_ASID), Status::DFFLUSH_REQUIRED);
}

#[test]
fn shutdown_forgets_every_guest_and_factory_reset_changes_the_identity() {
    let p = sev(14);
    running(&p, OPEN, SEV_ASID, &[0; 16]);
    let before = (p.pek_cert(), p.cert_chain());
    let reset = |p: &Platform| p.run(&mut FactoryReset);
    assert_eq!(reset(&p), Status::INVALID_PLATFORM_STATE);
    p.run(&mut Shutdown).ok().unwrap();
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
    let good = init_es(1 << 20);
    let reserved = Init {
        options: InitFlags::from_raw(2),
        ..good
    };
    assert_eq!(run(&p, reserved), Status::INVALID_PARAM);
    assert_eq!(run(&p, init_es(0xf_ffff)), Status::INVALID_LEN);
    for tmr in [TMR + 0x1000, p.memory_len()] {
        let tmr_paddr = tmr.into();
        let elsewhere = Init { tmr_paddr, ..good };
        assert_eq!(run(&p, elsewhere), Status::INVALID_ADDRESS, "{tmr:#x}");
    }
    run(&p, good).ok().unwrap();
    let expected = PlatformStatus {
        api_major: 1,
        api_minor: 55,
        build: 40,
        state: 1,
        flags: PlatformFlags::CONFIG_ES,
        guest_count: 0.into(),
    };
    assert_eq!(run_out(&p, PlatformStatus::default()).1, expected);
}

#[test]
fn a_launch_update_that_cannot_finish_changes_nothing() {
    let p = sev(16);
    let handle = launch_start(&p, OPEN, SEV_ASID);
    let end = p.memory_len();
    p.host_write(end - 0x1000, &[1; 0x1000]).unwrap();
    let go = |at, len| update_data(&p, handle, at, len);
    assert_eq!(go(end - 0x1000, 0x2000), Status::INVALID_ADDRESS);
    assert_eq!(go(end - 0x1000, 0), Status::INVALID_LEN);
    assert_eq!(go(end - 0x1000, 24), Status::INVALID_LEN);
    assert_eq!(go(end - 0xff8, 16), Status::INVALID_ADDRESS);
    let mut seen = [0; 0x1000];
    p.host_read(end - 0x1000, &mut seen).unwrap();
    assert_eq!(seen, [1; 0x1000]);
    assert_eq!(
        launch_measure(&p, handle, end - 16),
        Status::INVALID_ADDRESS
    );
    assert_eq!(guest_state(&p, handle), 1);
    // The digest is still that of nothing.
    let got = measure(&p, handle);
    launch_finish(&p, handle).ok().unwrap();
    assert_ne!(got.measure, [0; 32]);
    run(&p, attestation(handle)).ok().unwrap();
    let mut report = [0; LegacyReport::LEN];
    p.host_read(SCRATCH, &mut report).unwrap();
    let empty: [u8; 32] = Sha256::digest([]).into();
    assert_eq!(LegacyReport::from_bytes(&report).launch_digest, empty);
}

#[test]
fn addresses_may_carry_the_c_bit() {
    let p = sev(17);
    let handle = launch_start(&p, OPEN, SEV_ASID);
    p.host_write(GUEST, &[5; 16]).unwrap();
    let c_bit = 1 << p.c_bit();
    update_data(&p, handle, GUEST | c_bit, 16).ok().unwrap();
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
    let finished = running(&p, OPEN, SEV_ASID, &[0; 16]);
    assert_eq!(attempt(99, 1, 1), Status::INVALID_GUEST);
    assert_eq!(attempt(finished, 1, 1), Status::INVALID_GUEST_STATE);
    let fresh = new_guest(&p, OPEN);
    assert_eq!(attempt(fresh, 1, 1), Status::INVALID_PARAM);
    assert_eq!(attempt(fresh, 0, 1), Status::INACTIVE);
    activate(&p, fresh, SEV_ASID + 1).ok().unwrap();
    assert_eq!(attempt(fresh, 0, 1), Status::INVALID_LEN);
    assert_eq!(attempt(fresh, 0, 16), Status::SUCCESS);
}
