//! Messages, reports and ID blocks of SNP guests.

mod common;

use common::guest::*;
use common::*;
use soft_amd_sp::attestation::{CertChain, Report, SigningKey, VerifyError, verify_report};
use soft_amd_sp::crypto::PrivateKey;
use soft_amd_sp::measure::{IdAuth, IdBlock, PageType, VMSA_GPA};
use soft_amd_sp::message::{
    GuestFieldSelect, KeyRequest, MessageError, MessageType, TscInfoRequest,
};
use soft_amd_sp::{Platform, RmpUpdate, RootOfTrust, Status, TcbVersion};

fn finish_with(p: &Platform, block: &IdBlock, auth: &IdAuth, flags: u64) -> Status {
    p.host_write(REQUEST, &block.to_bytes()).unwrap();
    p.host_write(REQUEST + 0x1000, auth.as_bytes()).unwrap();
    let finish = SnpLaunchFinish {
        gctx_paddr: page(GCTX),
        id_block_paddr: REQUEST.into(),
        id_auth_paddr: (REQUEST + 0x1000).into(),
        flags: SnpLaunchFinishFlags::from_raw(flags),
        host_data: [0xd; 32],
    };
    run(p, finish)
}

#[test]
fn id_block_must_match_launch_policy_and_signatures() {
    let p = snp(5);
    snp_launch(&p, GCTX, POLICY, ASID);
    snp_add(&p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    let id_key = PrivateKey::from_scalar(&[1, 2, 3]).unwrap();
    let author = PrivateKey::from_scalar(&[4, 5, 6]).unwrap();
    let good = IdBlock {
        guest_svn: 7,
        family_id: [8; 16],
        image_id: [9; 16],
        ..IdBlock::new(digest(&p), POLICY.bits())
    };
    let sign = |block: &IdBlock| IdAuth::sign(block, &id_key, Some(&author));
    let flip = |auth: &IdAuth, at: usize| {
        let mut bytes = Box::new(*auth.as_bytes());
        bytes[at] ^= 1;
        IdAuth::from_bytes(bytes)
    };
    let auth = sign(&good);
    let wrong_digest = IdBlock {
        launch_digest: [0; 48],
        ..good
    };
    let wrong_policy = IdBlock {
        policy: POLICY.bits() | 1,
        ..good
    };
    let wrong_version = IdBlock { version: 2, ..good };
    for (block, auth, flags, expected) in [
        (good, auth.clone(), 2, Status::INVALID_PARAM),
        (good, auth.clone(), 8, Status::INVALID_PARAM),
        (wrong_version, sign(&wrong_version), 3, Status::BAD_VERSION),
        (good, flip(&auth, 0), 3, Status::INVALID_PARAM),
        (good, flip(&auth, 4), 3, Status::INVALID_PARAM),
        (good, flip(&auth, 0x240), 3, Status::INVALID_KEY),
        (good, flip(&auth, 0x244), 3, Status::INVALID_KEY),
        (good, flip(&auth, 0x40), 3, Status::BAD_SIGNATURE),
        (good, flip(&auth, 0x680), 3, Status::BAD_SIGNATURE),
        (wrong_digest, auth.clone(), 3, Status::BAD_SIGNATURE),
        (
            wrong_digest,
            sign(&wrong_digest),
            3,
            Status::BAD_MEASUREMENT,
        ),
        (wrong_policy, sign(&wrong_policy), 3, Status::POLICY_FAILURE),
    ] {
        assert_eq!(
            finish_with(&p, &block, &auth, flags),
            expected,
            "{block:x?} {flags}"
        );
    }
    // The author's part does not count unless it is asked for.
    assert_eq!(p.snapshot().snp_guests[0].state as u8, 1);
    finish_with(&p, &good, &auth, 3).ok().unwrap();

    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    let mut guest = channel(&p, 0);
    let response = exchange(&p, &guest.report_request(&[1; 64], 0).unwrap()).unwrap();
    let (_, report) = guest.open_report(&response).unwrap();
    let root = RootOfTrust::default().ark();
    let report = verify_report(&report, &p.cert_chain(), &root).unwrap();
    assert_eq!(
        (report.guest_svn, report.family_id, report.image_id),
        (7, [8; 16], [9; 16])
    );
    assert_eq!(report.id_key_digest, auth.id_key_digest());
    assert_eq!(report.author_key_digest, auth.author_key_digest());
    assert!(report.author_key_enabled);
    assert_eq!(report.measurement, good.launch_digest);
    assert_eq!(report.host_data, [0xd; 32]);
    assert_eq!(report.policy, POLICY.bits());
}

#[test]
fn a_report_verifies_only_unchanged_and_up_to_the_trusted_root() {
    let p = snp_from(builder(6).tcb(TcbVersion::new(1, 2, 3, 4)));
    let mut guest = with_channel(&p, 0);
    let response = exchange(&p, &guest.report_request(&[1; 64], 2).unwrap()).unwrap();
    let (status, bytes) = guest.open_report(&response).unwrap();
    assert_eq!(status, 0);
    let (chain, root) = (p.cert_chain(), RootOfTrust::default().ark());
    let report = verify_report(&bytes, &chain, &root).unwrap();
    assert_eq!((report.vmpl, report.report_data), (2, [1; 64]));
    assert_eq!(report.current_tcb, TcbVersion::new(1, 2, 3, 4));
    assert_eq!(report.report_id_ma, [0xff; 32]);
    assert_eq!(Report::from_bytes(bytes[..].try_into().unwrap()), report);
    for bit in (0..Report::SIGNED * 8).step_by(331) {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(verify_report(&changed, &chain, &root).is_err(), "bit {bit}");
    }
    for at in [0, 72, 144, 0x1ff].map(|at| Report::SIGNED + at) {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        assert_eq!(
            verify_report(&changed, &chain, &root),
            Err(VerifyError::Signature)
        );
    }
    let other_root = RootOfTrust::from_seed(5).ark();
    assert_eq!(
        verify_report(&bytes, &chain, &other_root),
        Err(VerifyError::Root)
    );
    let other_chip = snp(7).cert_chain();
    assert_eq!(
        verify_report(&bytes, &other_chip, &root),
        Err(VerifyError::Signature)
    );
    let mixed = CertChain {
        vcek: snp_from(builder(6).root(RootOfTrust::from_seed(5)))
            .cert_chain()
            .vcek,
        ..chain.clone()
    };
    assert!(matches!(
        verify_report(&bytes, &mixed, &root),
        Err(VerifyError::Chain(_))
    ));
    assert_eq!(CertChain::from_bytes(&chain.to_bytes()).unwrap(), chain);
    assert!(matches!(
        verify_report(&bytes[1..], &chain, &root),
        Err(VerifyError::ReportLength(_))
    ));
}

#[test]
fn config_changes_what_reports_say_and_which_key_signs() {
    let p = snp_from(builder(8).tcb(TcbVersion::new(1, 2, 3, 4)));
    let mut guest = with_channel(&p, 0);
    let config = |tcb: TcbVersion, flags| {
        let config = SnpConfig {
            reported_tcb: tcb.0.into(),
            flags: SnpConfigFlags::from_raw(flags),
            ..Default::default()
        };
        run(&p, config)
    };
    let older = TcbVersion::new(1, 2, 3, 3);
    assert_eq!(
        config(TcbVersion::new(2, 0, 0, 0), 0),
        Status::INVALID_PARAM
    );
    assert_eq!(config(older, 4), Status::INVALID_PARAM);
    let newest_chain = p.cert_chain();
    config(older, 1).ok().unwrap();
    let root = RootOfTrust::default().ark();
    let mut ask = || {
        let response = exchange(&p, &guest.report_request(&[1; 64], 0).unwrap()).unwrap();
        guest.open_report(&response).unwrap().1
    };
    let bytes = ask();
    assert_eq!(
        verify_report(&bytes, &newest_chain, &root),
        Err(VerifyError::Signature)
    );
    let report = verify_report(&bytes, &p.cert_chain(), &root).unwrap();
    assert_eq!((report.reported_tcb, report.chip_id), (older, [0; 64]));
    config(older, 2).ok().unwrap();
    let bytes = ask();
    assert_eq!(
        verify_report(&bytes, &p.cert_chain(), &root),
        Err(VerifyError::Unsigned)
    );
    let report = Report::from_bytes(bytes[..].try_into().unwrap());
    assert_eq!(
        (report.signing_key, report.mask_chip_key),
        (SigningKey::None, true)
    );
}

#[test]
fn messages_are_answered_once_in_sequence_and_only_to_their_vmpl() {
    let p = snp(9);
    let mut guest = with_channel(&p, 1);
    let request = guest.report_request(&[3; 64], 1).unwrap();
    let response = exchange(&p, &request).unwrap();
    // Replayed, damaged, or out of order.
    assert_eq!(exchange(&p, &request), Err(Status::INVALID_PARAM));
    guest.open(&response).unwrap();
    assert_eq!(guest.open(&response), Err(MessageError::Authentication));
    let request = guest.report_request(&[3; 64], 1).unwrap();
    for at in [0, 0x20, 0x35, 0x60, 0x80] {
        let mut damaged = request.clone();
        damaged[at] ^= 1;
        assert_eq!(
            exchange(&p, &damaged),
            Err(Status::BAD_MEASUREMENT),
            "{at:#x}"
        );
    }
    for (at, value) in [(0x30, 0), (0x31, 2), (0x32, 0x61), (0x3c, 4), (0x37, 0x20)] {
        let mut damaged = request.clone();
        damaged[at] = value;
        assert_eq!(
            exchange(&p, &damaged),
            Err(Status::INVALID_PARAM),
            "{at:#x}"
        );
    }
    // A report for a VMPL above the key's is refused inside the message.
    let high = guest.report_request(&[3; 64], 0).unwrap();
    let (status, report) = guest.open_report(&exchange(&p, &high).unwrap()).unwrap();
    assert_eq!(
        (status, report.len()),
        (u32::from(Status::INVALID_PARAM.0), 0)
    );
    // The other message keys have separate sequences.
    let mut other = channel(&p, 0);
    let response = exchange(&p, &other.report_request(&[3; 64], 0).unwrap()).unwrap();
    assert_eq!(other.open_report(&response).unwrap().0, 0);
    let stray = guest
        .request(MessageType::ReportResponse, &[0; 0x60])
        .unwrap();
    assert_eq!(exchange(&p, &stray), Err(Status::INVALID_PARAM));
    // The response page must be the firmware's.
    p.host_write(REQUEST, &guest.report_request(&[3; 64], 1).unwrap())
        .unwrap();
    let status = guest_request(&p, REQUEST + 0x1000);
    assert_eq!(status, Status::INVALID_PAGE_STATE);
}

#[test]
fn derived_keys_depend_on_the_chosen_fields_and_the_chip() {
    let derive = |seed: u64, fields: u64, vmpl: u32, svn: u32| {
        let p = snp(seed);
        let mut guest = with_channel(&p, 0);
        let request = KeyRequest {
            guest_field_select: GuestFieldSelect::from_raw(fields),
            vmpl: vmpl.into(),
            guest_svn: svn.into(),
            ..Default::default()
        };
        let response = exchange(&p, &guest.ask(&request).unwrap()).unwrap();
        let answer = guest.answer::<KeyRequest>(&response).unwrap();
        (answer.status.get(), answer.derived_key)
    };
    let base = derive(10, 0, 0, 0);
    assert_eq!(base.0, 0);
    assert_eq!(derive(10, 0, 0, 0), base);
    for other in [
        derive(11, 0, 0, 0),
        derive(10, 1, 0, 0),
        derive(10, 8, 0, 0),
        derive(10, 0, 1, 0),
    ] {
        assert_eq!(other.0, 0);
        assert_ne!(other.1, base.1);
    }
    let invalid = Status::INVALID_PARAM.0.into();
    for refused in [
        derive(10, 1 << 6, 0, 0),
        derive(10, 0, 4, 0),
        derive(10, 1 << 4, 0, 1),
    ] {
        assert_eq!(refused, (invalid, [0; 32]));
    }
}

#[test]
fn tsc_info_is_for_guests_launched_with_a_secure_tsc() {
    let p = snp_from(builder(12).tsc_khz(2_000_000));
    gctx_create(&p, GCTX);
    let start = SnpLaunchStart {
        gctx_paddr: page(GCTX),
        policy: POLICY,
        desired_tsc_khz: 3_000_000.into(),
        ..Default::default()
    };
    run(&p, start).ok().unwrap();
    snp_activate(&p, GCTX, ASID).ok().unwrap();
    p.host_write(LARGE + 0x3b0, &[1, 2]).unwrap();
    snp_add(&p, GCTX, ASID, LARGE, VMSA_GPA, PageType::Vmsa)
        .ok()
        .unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    finish(&p).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    let mut guest = channel(&p, 0);
    let request = guest.ask(&TscInfoRequest::default()).unwrap();
    let response = exchange(&p, &request).unwrap();
    let answer = guest.answer::<TscInfoRequest>(&response).unwrap();
    assert_eq!((answer.status.get(), answer.tsc_scale.get()), (0, 3 << 31));

    let p = snp(13);
    let mut guest = with_channel(&p, 0);
    let request = guest.ask(&TscInfoRequest::default()).unwrap();
    let response = exchange(&p, &request).unwrap();
    let answer = guest.answer::<TscInfoRequest>(&response).unwrap();
    assert_eq!(answer.status, u32::from(Status::INVALID_PARAM.0));
}

#[test]
fn a_migration_agent_is_named_in_the_report_of_its_guest() {
    let p = snp(28);
    let agent = 0x9000;
    snp_launch(&p, agent, POLICY, 2);
    gctx_create(&p, GCTX);
    let start = |policy, agent| {
        let start = SnpLaunchStart {
            gctx_paddr: page(GCTX),
            policy,
            ma_gctx_paddr: page(agent),
            flags: SnpLaunchStartFlags::MA_EN,
            ..Default::default()
        };
        run(&p, start)
    };
    let with_agent = POLICY | SnpPolicy::MIGRATE_MA;
    assert_eq!(start(POLICY, agent), Status::POLICY_FAILURE);
    assert_eq!(start(with_agent, 0x7000), Status::INVALID_GUEST);
    assert_eq!(start(with_agent, GCTX), Status::INVALID_GUEST);
    start(with_agent, agent).ok().unwrap();
    snp_activate(&p, GCTX, ASID).ok().unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    finish(&p).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    let mut guest = channel(&p, 0);
    let response = exchange(&p, &guest.report_request(&[0; 64], 0).unwrap()).unwrap();
    let bytes = guest.open_report(&response).unwrap().1;
    let report = Report::from_bytes(bytes[..].try_into().unwrap());
    assert_ne!(report.report_id_ma, [0xff; 32]);
    assert_ne!(report.report_id_ma, report.report_id);
}

#[test]
fn a_guest_whose_vcek_is_disabled_gets_no_report() {
    let p = snp(29);
    snp_launch(&p, GCTX, POLICY, ASID);
    snp_add(&p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    let finish = SnpLaunchFinish {
        gctx_paddr: page(GCTX),
        flags: SnpLaunchFinishFlags::VCEK_DIS,
        ..Default::default()
    };
    run(&p, finish).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    let mut guest = channel(&p, 0);
    let response = exchange(&p, &guest.report_request(&[0; 64], 0).unwrap()).unwrap();
    let (status, report) = guest.open_report(&response).unwrap();
    assert_eq!(
        (status, report.len()),
        (u32::from(Status::INVALID_KEY.0), 0)
    );
}

#[test]
fn report_versions_differ_in_the_processor_they_name() {
    for (version, fms) in [(2, None), (3, Some((0x1a, 2, 1))), (5, Some((0x1a, 2, 1)))] {
        let p = snp_from(builder(30).report_version(version).cpuid_fms(0x1a, 2, 1));
        let mut guest = with_channel(&p, 0);
        let response = exchange(&p, &guest.report_request(&[0; 64], 0).unwrap()).unwrap();
        let bytes = guest.open_report(&response).unwrap().1;
        let root = RootOfTrust::default().ark();
        let report = verify_report(&bytes, &p.cert_chain(), &root).unwrap();
        assert_eq!((report.version, report.cpuid_fms), (version, fms));
        assert_eq!(bytes[0x188..0x18b] == [0, 0, 0], fms.is_none());
    }
}
