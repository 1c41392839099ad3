//! SNP guests: launch, identity, reports, pages, teardown.

mod common;

use common::*;
use soft_amd_sp::attestation::{CertChain, Report, SigningKey, VerifyError, verify_report};
use soft_amd_sp::crypto::PrivateKey;
use soft_amd_sp::measure::{
    IdAuth, IdBlock, PageInfo, PageType, SnpDigest, VMSA_GPA, VmplPermissions,
};
use soft_amd_sp::message::{GuestChannel, MessageError, MessageType};
use soft_amd_sp::{
    AccessFault, Command, CommandBuffer, CpuidLimit, GuestPage, PageSize, PageState, Platform,
    RmpUpdate, RootOfTrust, Status, TcbVersion, snp_policy,
};

const GCTX: u64 = 0x1000;
const ASID: u32 = 1;
const POLICY: u64 = 0x3_0000;
const SECRETS: u64 = 0x50_0000;
const REQUEST: u64 = 0x41_0000;
const RESPONSE: u64 = 0x42_0000;
const LARGE: u64 = 0x80_0000;

fn on_gctx(p: &Platform, command: Command, fields: &[(&str, u64)]) -> Status {
    let mut all = vec![("gctx_paddr", GCTX)];
    all.extend_from_slice(fields);
    run(p, command, &all)
}

fn finish(p: &Platform) -> Status {
    on_gctx(p, Command::SNP_LAUNCH_FINISH, &[])
}

fn digest(p: &Platform) -> [u8; 48] {
    p.snapshot().snp_guests[0].launch_digest
}

/// A running guest with a secrets page at guest address 0x8000, and its channel at a VMPL.
fn with_channel(p: &Platform, vmpl: u8) -> GuestChannel {
    snp_launch(p, GCTX, POLICY, ASID);
    snp_add(p, GCTX, ASID, SECRETS, 0x8000, 5).ok().unwrap();
    finish(p).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    channel(p, vmpl)
}

fn channel(p: &Platform, vmpl: u8) -> GuestChannel {
    let mut page = [0; 4096];
    p.guest_read(&GuestPage::new(ASID, 0x8000, SECRETS), &mut page)
        .unwrap();
    GuestChannel::from_secrets_page(&page, vmpl).unwrap()
}

fn exchange(p: &Platform, request: &[u8]) -> Result<Vec<u8>, Status> {
    p.host_write(REQUEST, request).unwrap();
    let fields = [("req_paddr", REQUEST), ("res_paddr", RESPONSE)];
    on_gctx(p, Command::SNP_GUEST_REQUEST, &fields).ok()?;
    let mut page = vec![0; 4096];
    p.host_read(RESPONSE, &mut page).unwrap();
    Ok(page)
}

#[test]
fn launch_digest_of_every_page_type_equals_the_off_line_one() {
    let p = snp(1);
    snp_launch(&p, GCTX, POLICY, ASID);
    let mut expected = SnpDigest::new();
    let mut content = [0; 4096];
    for (i, page_type) in PageType::ALL.into_iter().enumerate() {
        let spa = SECRETS + i as u64 * 0x1000;
        let gpa = if page_type == PageType::Vmsa {
            VMSA_GPA
        } else {
            spa + 0x1_0000
        };
        if page_type != PageType::Cpuid {
            content.fill(i as u8 + 1);
        } else {
            content.fill(0);
        }
        p.host_write(spa, &content).unwrap();
        expected.add_page(&PageInfo::new(page_type, gpa), &content);
        snp_add(&p, GCTX, ASID, spa, gpa, page_type as u64)
            .ok()
            .unwrap();
        assert_eq!(digest(&p), expected.value(), "{page_type:?}");

        let entry = p.rmpread(spa).unwrap();
        assert_eq!(entry.state, PageState::GuestValid);
        assert_eq!(entry.vmsa, page_type == PageType::Vmsa);
        let mut seen = [0; 4096];
        p.guest_read(&GuestPage::new(ASID, gpa, spa), &mut seen)
            .unwrap();
        match page_type {
            PageType::Zero => assert_eq!(seen, [0; 4096]),
            PageType::Secrets => assert_ne!(seen[0x20..0x40], seen[0x40..0x60]),
            _ => assert_eq!(seen, content),
        }
        p.host_read(spa, &mut seen).unwrap();
        assert_ne!(seen, content);
    }
}

#[test]
fn a_large_page_is_measured_as_its_small_pages_with_permissions() {
    let p = snp(2);
    snp_launch(&p, GCTX, POLICY, ASID);
    let data: Vec<u8> = (0..2_u32 << 20).map(|i| (i >> 8) as u8).collect();
    p.host_write(LARGE, &data).unwrap();
    let update = RmpUpdate::pre_guest(ASID, LARGE).size(PageSize::Size2M);
    p.rmpupdate(LARGE, &update).unwrap();
    let small = [("flags", 1 << 1), ("address", LARGE)];
    let large = [
        ("flags", 1 << 1 | 1),
        ("address", LARGE),
        ("vmpl1_perms", 3),
        ("vmpl2_perms", 1),
        ("vmpl3_perms", 0),
    ];
    assert_eq!(
        on_gctx(&p, Command::SNP_LAUNCH_UPDATE, &small),
        Status::INVALID_PAGE_SIZE
    );
    on_gctx(&p, Command::SNP_LAUNCH_UPDATE, &large)
        .ok()
        .unwrap();
    let mut expected = SnpDigest::new();
    for (i, page) in data.chunks_exact(4096).enumerate() {
        let info = PageInfo {
            permissions: VmplPermissions {
                vmpl1: 3,
                vmpl2: 1,
                vmpl3: 0,
            },
            ..PageInfo::new(PageType::Normal, LARGE + i as u64 * 0x1000)
        };
        expected.add_page(&info, page.try_into().unwrap());
    }
    assert_eq!(digest(&p), expected.value());
    assert_eq!(p.rmpread(LARGE).unwrap().permissions, [15, 3, 1, 0]);
}

#[test]
fn launch_update_checks_page_and_owner_and_leaves_failures_to_reclaim() {
    let p = snp(3);
    snp_launch(&p, GCTX, POLICY, ASID);
    let update = |fields: &[(&str, u64)]| on_gctx(&p, Command::SNP_LAUNCH_UPDATE, fields);
    let normal = ("flags", 1 << 1);
    let before = digest(&p);
    for (fields, expected) in [
        (
            vec![("flags", 0), ("address", SECRETS)],
            Status::INVALID_PARAM,
        ),
        (
            vec![("flags", 7 << 1), ("address", SECRETS)],
            Status::INVALID_PARAM,
        ),
        (
            vec![("flags", 1 << 1 | 1 << 4), ("address", SECRETS)],
            Status::INVALID_PARAM,
        ),
        (
            vec![("flags", 1 << 5 | 1 << 1), ("address", SECRETS)],
            Status::INVALID_PARAM,
        ),
        (
            vec![normal, ("address", SECRETS), ("vmpl1_perms", 16)],
            Status::INVALID_PARAM,
        ),
        (
            vec![normal, ("address", SECRETS + 8)],
            Status::INVALID_ADDRESS,
        ),
        (
            vec![("flags", 1 << 1 | 1), ("address", SECRETS)],
            Status::INVALID_ADDRESS,
        ),
        (
            vec![normal, ("address", p.memory_len())],
            Status::INVALID_ADDRESS,
        ),
        (
            vec![("flags", 2 << 1 | 1), ("address", LARGE)],
            Status::INVALID_PAGE_SIZE,
        ),
        (
            vec![normal, ("address", SECRETS)],
            Status::INVALID_PAGE_STATE,
        ),
    ] {
        assert_eq!(update(&fields), expected, "{fields:x?}");
    }
    p.rmpupdate(SECRETS, &RmpUpdate::pre_guest(ASID + 1, 0))
        .unwrap();
    let fields = [normal, ("address", SECRETS)];
    assert_eq!(update(&fields), Status::INVALID_PAGE_OWNER);
    assert_eq!(p.rmpread(SECRETS).unwrap().state, PageState::PreGuest);
    assert_eq!(digest(&p), before);
    run(&p, Command::SNP_PAGE_RECLAIM, &[("paddr", SECRETS)])
        .ok()
        .unwrap();
    p.rmpupdate(SECRETS, &RmpUpdate::shared()).unwrap();
}

#[test]
fn policies_are_admitted_only_if_the_platform_can_keep_them() {
    use snp_policy::*;
    let start = |p: &Platform, policy: u64| {
        let fields = [("gctx_paddr", GCTX), ("policy", policy)];
        run(p, Command::SNP_LAUNCH_START, &fields)
    };
    let p = snp(4);
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    run(&p, Command::SNP_GCTX_CREATE, &[("gctx_paddr", GCTX)])
        .ok()
        .unwrap();
    for (policy, expected) in [
        (SMT, Status::INVALID_PARAM),
        (POLICY | 1 << 26, Status::INVALID_PARAM),
        (POLICY | 1 << 63, Status::INVALID_PARAM),
        (RESERVED_ONE, Status::POLICY_FAILURE),
        (POLICY | 2 << 8, Status::POLICY_FAILURE),
        (POLICY | 1 << 8 | 56, Status::POLICY_FAILURE),
        (POLICY | MEM_AES_256_XTS, Status::POLICY_FAILURE),
        (POLICY | RAPL_DIS, Status::POLICY_FAILURE),
        (POLICY | CIPHERTEXT_HIDING_DRAM, Status::POLICY_FAILURE),
        (POLICY | PAGE_SWAP_DISABLE, Status::POLICY_FAILURE),
        (
            POLICY | 1 << 8 | 55 | DEBUG | SINGLE_SOCKET,
            Status::SUCCESS,
        ),
    ] {
        assert_eq!(start(&p, policy), expected, "{policy:#x}");
    }
    // With RAPL off and ciphertext hiding on, guests may ask for both.
    let p = builder(4).build().unwrap();
    p.enable_snp_all();
    let fields = [("flags", 1 | 4 | 8), ("max_snp_asid", 3)];
    run(&p, Command::SNP_INIT_EX, &fields).ok().unwrap();
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    run(&p, Command::SNP_GCTX_CREATE, &[("gctx_paddr", GCTX)])
        .ok()
        .unwrap();
    start(&p, POLICY | RAPL_DIS | CIPHERTEXT_HIDING_DRAM)
        .ok()
        .unwrap();
}

fn finish_with(p: &Platform, block: &IdBlock, auth: &IdAuth, flags: u64) -> Status {
    p.host_write(REQUEST, &block.to_bytes()).unwrap();
    p.host_write(REQUEST + 0x1000, auth.as_bytes()).unwrap();
    let mut buffer = CommandBuffer::new(Command::SNP_LAUNCH_FINISH)
        .with("gctx_paddr", GCTX)
        .with("id_block_paddr", REQUEST)
        .with("id_auth_paddr", REQUEST + 0x1000)
        .with("flags", flags)
        .with_bytes("host_data", &[0xd; 32]);
    p.run(&mut buffer)
}

#[test]
fn id_block_must_match_launch_policy_and_signatures() {
    let p = snp(5);
    snp_launch(&p, GCTX, POLICY, ASID);
    snp_add(&p, GCTX, ASID, SECRETS, 0x8000, 5).ok().unwrap();
    let id_key = PrivateKey::from_scalar(&[1, 2, 3]).unwrap();
    let author = PrivateKey::from_scalar(&[4, 5, 6]).unwrap();
    let good = IdBlock {
        guest_svn: 7,
        family_id: [8; 16],
        image_id: [9; 16],
        ..IdBlock::new(digest(&p), POLICY)
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
        policy: POLICY | 1,
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
    assert_eq!(report.policy, POLICY);
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
    for at in [Report::SIGNED, Report::SIGNED + 72] {
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
    let config = |tcb: TcbVersion, flags: u64| {
        run(
            &p,
            Command::SNP_CONFIG,
            &[("reported_tcb", tcb.0), ("flags", flags)],
        )
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
    // The other message keys have sequences of their own.
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
    let fields = [("req_paddr", REQUEST), ("res_paddr", REQUEST + 0x1000)];
    let status = on_gctx(&p, Command::SNP_GUEST_REQUEST, &fields);
    assert_eq!(status, Status::INVALID_PAGE_STATE);
}

#[test]
fn derived_keys_depend_on_the_chosen_fields_and_the_chip() {
    let derive = |seed: u64, fields: u64, vmpl: u32, svn: u32| {
        let p = snp(seed);
        let mut guest = with_channel(&p, 0);
        let mut payload = [0; 0x20];
        payload[8..16].copy_from_slice(&fields.to_le_bytes());
        payload[16..20].copy_from_slice(&vmpl.to_le_bytes());
        payload[20..24].copy_from_slice(&svn.to_le_bytes());
        let request = guest.request(MessageType::KeyRequest, &payload).unwrap();
        let answer = guest.open(&exchange(&p, &request).unwrap()).unwrap();
        (answer[0], answer[0x20..0x40].to_vec())
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
    let invalid = Status::INVALID_PARAM.0 as u8;
    for refused in [
        derive(10, 1 << 6, 0, 0),
        derive(10, 0, 4, 0),
        derive(10, 1 << 4, 0, 1),
    ] {
        assert_eq!(refused, (invalid, vec![0; 32]));
    }
}

#[test]
fn tsc_info_is_for_guests_launched_with_a_secure_tsc() {
    let p = snp_from(builder(12).tsc_khz(2_000_000));
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    run(&p, Command::SNP_GCTX_CREATE, &[("gctx_paddr", GCTX)])
        .ok()
        .unwrap();
    let fields = [("policy", POLICY), ("desired_tsc_khz", 3_000_000)];
    on_gctx(&p, Command::SNP_LAUNCH_START, &fields)
        .ok()
        .unwrap();
    on_gctx(&p, Command::SNP_ACTIVATE, &[("asid", ASID.into())])
        .ok()
        .unwrap();
    p.host_write(LARGE + 0x3b0, &[1, 2]).unwrap();
    snp_add(&p, GCTX, ASID, LARGE, VMSA_GPA, 2).ok().unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x8000, 5).ok().unwrap();
    finish(&p).ok().unwrap();
    p.rmpupdate(RESPONSE, &RmpUpdate::firmware()).unwrap();
    let mut guest = channel(&p, 0);
    let request = guest
        .request(MessageType::TscInfoRequest, &[0; 128])
        .unwrap();
    let answer = guest.open(&exchange(&p, &request).unwrap()).unwrap();
    let scale = u64::from_le_bytes(answer[8..16].try_into().unwrap());
    assert_eq!((answer[0], scale), (0, 3 << 31));

    let p = snp(13);
    let mut guest = with_channel(&p, 0);
    let request = guest
        .request(MessageType::TscInfoRequest, &[0; 128])
        .unwrap();
    let answer = guest.open(&exchange(&p, &request).unwrap()).unwrap();
    assert_eq!(answer[0], Status::INVALID_PARAM.0 as u8);
}

#[test]
fn cpuid_pages_beyond_the_platform_are_corrected_and_refused() {
    let limit = CpuidLimit {
        eax_in: 1,
        ecx_in: 0,
        allowed: [!0, !0, 0xff, !0],
    };
    let p = snp_from(builder(14).cpuid_limits(vec![limit]));
    snp_launch(&p, GCTX, POLICY, ASID);
    let mut page = [0; 4096];
    page[0] = 2;
    page[0x10] = 1; // leaf 1
    page[0x10 + 0x20..][..4].copy_from_slice(&0x1ff_u32.to_le_bytes()); // ECX
    page[0x40] = 7; // leaf 7 is not limited
    page[0x40 + 0x20] = 0xff;
    p.host_write(SECRETS, &page).unwrap();
    let before = digest(&p);
    assert_eq!(
        snp_add(&p, GCTX, ASID, SECRETS, 0x9000, 6),
        Status::INVALID_PARAM
    );
    assert_eq!(digest(&p), before);
    let mut corrected = [0; 4096];
    p.host_read(SECRETS, &mut corrected).unwrap();
    page[0x10 + 0x20 + 1] = 0;
    assert_eq!(corrected, page);
    // What the firmware proposed is accepted.
    let fields = [("flags", 6 << 1), ("address", SECRETS)];
    on_gctx(&p, Command::SNP_LAUNCH_UPDATE, &fields)
        .ok()
        .unwrap();
    page[0] = 65;
    p.host_write(LARGE, &page).unwrap();
    assert_eq!(
        snp_add(&p, GCTX, ASID, LARGE, 0xa000, 6),
        Status::INVALID_PARAM
    );
}

#[test]
fn debug_needs_the_policy_and_moves_whole_pages() {
    let p = snp(15);
    snp_launch(&p, GCTX, POLICY | snp_policy::DEBUG, ASID);
    p.host_write(SECRETS, &[0x77; 4096]).unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x9000, 1).ok().unwrap();
    finish(&p).ok().unwrap();
    let debug = |command, src: u64, dst: u64| on_gctx(&p, command, &[("src", src), ("dst", dst)]);
    let decrypt = Command::SNP_DBG_DECRYPT;
    assert_eq!(debug(decrypt, SECRETS, LARGE), Status::INVALID_PAGE_STATE);
    p.rmpupdate(LARGE, &RmpUpdate::firmware()).unwrap();
    debug(decrypt, SECRETS, LARGE).ok().unwrap();
    let mut page = [0; 4096];
    p.host_read(LARGE, &mut page).unwrap();
    assert_eq!(page, [0x77; 4096]);
    assert_eq!(debug(decrypt, LARGE, LARGE), Status::INVALID_PAGE_STATE);
    p.host_write(REQUEST, &[0x88; 4096]).unwrap();
    debug(Command::SNP_DBG_ENCRYPT, REQUEST, SECRETS)
        .ok()
        .unwrap();
    p.guest_read(&GuestPage::new(ASID, 0x9000, SECRETS), &mut page)
        .unwrap();
    assert_eq!(page, [0x88; 4096]);

    let p = snp(16);
    snp_launch(&p, GCTX, POLICY, ASID);
    let fields = [("src", SECRETS), ("dst", LARGE)];
    assert_eq!(on_gctx(&p, decrypt, &fields), Status::POLICY_FAILURE);
}

#[test]
fn a_page_moves_to_another_place_without_the_guest_noticing() {
    let p = snp(17);
    snp_launch(&p, GCTX, POLICY, ASID);
    p.host_write(SECRETS, &[0x77; 4096]).unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x9000, 1).ok().unwrap();
    finish(&p).ok().unwrap();
    let go = || {
        on_gctx(
            &p,
            Command::SNP_PAGE_MOVE,
            &[("src", SECRETS), ("dst", LARGE)],
        )
    };
    assert_eq!(go(), Status::INVALID_PAGE_STATE);
    p.rmpupdate(SECRETS, &RmpUpdate::pre_guest(ASID, 0x9000))
        .unwrap();
    p.rmpupdate(LARGE, &RmpUpdate::pre_guest(ASID, 0xa000))
        .unwrap();
    assert_eq!(go(), Status::INVALID_PAGE_OWNER);
    run(&p, Command::SNP_PAGE_RECLAIM, &[("paddr", LARGE)])
        .ok()
        .unwrap();
    p.rmpupdate(LARGE, &RmpUpdate::pre_guest(ASID, 0x9000))
        .unwrap();
    // While it is fixed for the move the guest can read but not write.
    let old = GuestPage::new(ASID, 0x9000, SECRETS);
    p.guest_read(&old, &mut [0; 8]).unwrap();
    assert!(p.guest_write(&old, &[0; 8]).is_err());
    go().ok().unwrap();
    let new = GuestPage::new(ASID, 0x9000, LARGE);
    let mut page = [0; 4096];
    p.guest_read(&new, &mut page).unwrap();
    assert_eq!(page, [0x77; 4096]);
    assert!(p.guest_read(&old, &mut page).is_err());
    run(&p, Command::SNP_PAGE_RECLAIM, &[("paddr", SECRETS)])
        .ok()
        .unwrap();
    p.rmpupdate(SECRETS, &RmpUpdate::shared()).unwrap();
}

#[test]
fn contexts_are_identified_by_pages_the_firmware_owns() {
    let p = snp(18);
    let create = |at: u64| run(&p, Command::SNP_GCTX_CREATE, &[("gctx_paddr", at)]);
    assert_eq!(create(GCTX), Status::INVALID_PAGE_STATE);
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    assert_eq!(create(GCTX + 8), Status::INVALID_ADDRESS);
    create(GCTX).ok().unwrap();
    assert_eq!(create(GCTX), Status::INVALID_PAGE_STATE);
    let status = |at: u64| run(&p, Command::SNP_DECOMMISSION, &[("gctx_paddr", at)]);
    assert_eq!(status(0x2000), Status::INVALID_GUEST);
    assert_eq!(status(0x2008), Status::INVALID_ADDRESS);
    assert_eq!(status(1 << 45), Status::INVALID_ADDRESS);
    // The C-bit is not part of the address.
    status(GCTX | 1 << p.c_bit()).ok().unwrap();
    p.limit_guests(0);
    p.rmpupdate(0x3000, &RmpUpdate::firmware()).unwrap();
    assert_eq!(create(0x3000), Status::RESOURCE_LIMIT);
}

#[test]
fn guest_and_platform_status_are_written_to_firmware_pages() {
    let p = snp(19);
    snp_launch(&p, GCTX, POLICY, ASID);
    let status = |at: u64| on_gctx(&p, Command::SNP_GUEST_STATUS, &[("address", at)]);
    assert_eq!(status(SECRETS), Status::INVALID_PAGE_STATE);
    p.rmpupdate(SECRETS, &RmpUpdate::firmware()).unwrap();
    status(SECRETS).ok().unwrap();
    let mut out = [0; 16];
    p.host_read(SECRETS, &mut out).unwrap();
    assert_eq!(out[..8], POLICY.to_le_bytes());
    assert_eq!((out[8], out[12]), (ASID as u8, 1));

    let platform = || {
        run(
            &p,
            Command::SNP_PLATFORM_STATUS,
            &[("status_paddr", SECRETS)],
        )
    };
    platform().ok().unwrap();
    assert_eq!(p.rmpread(SECRETS).unwrap().state, PageState::Reclaim);
    let mut out = [0; 32];
    p.host_read(SECRETS, &mut out).unwrap();
    assert_eq!(out[..5], [1, 55, 1, 1, 40]);
    assert_eq!(out[12], 1);
    assert_eq!(platform(), Status::INVALID_PAGE_STATE);
    // Before initialisation no page is asked for.
    let q = builder(19).build().unwrap();
    run(
        &q,
        Command::SNP_PLATFORM_STATUS,
        &[("status_paddr", SECRETS)],
    )
    .ok()
    .unwrap();
    q.host_read(SECRETS, &mut out).unwrap();
    assert_eq!(out[2..4], [0, 0]);
}

#[test]
fn initialisation_demands_the_documented_order() {
    let p = builder(20).build().unwrap();
    let start = || p.command(Command::SNP_INIT, &mut []);
    assert_eq!(start(), Status::INVALID_CONFIG);
    p.enable_snp(0);
    assert_eq!(start(), Status::INVALID_CONFIG);
    p.enable_snp(1);
    init(&p).ok().unwrap();
    assert_eq!(start(), Status::INVALID_PLATFORM_STATE);
    p.command(Command::SHUTDOWN, &mut []).ok().unwrap();
    let without_rmp = run(&p, Command::SNP_INIT_EX, &[("flags", 0)]);
    assert_eq!(without_rmp, Status::RMP_INIT_REQUIRED);
    assert_eq!(
        run(&p, Command::SNP_INIT_EX, &[("flags", 17)]),
        Status::UNSUPPORTED
    );
    assert_eq!(
        run(&p, Command::SNP_INIT_EX, &[("flags", 33)]),
        Status::INVALID_PARAM
    );
    start().ok().unwrap();
    assert_eq!(start(), Status::INVALID_PLATFORM_STATE);
    let flush = || p.command(Command::SNP_DF_FLUSH, &mut []);
    assert_eq!(flush(), Status::WBINVD_REQUIRED);
    p.wbinvd_all();
    flush().ok().unwrap();
}

#[test]
fn listed_pages_are_fixed_to_the_hypervisor_until_reboot() {
    let p = builder(21).build().unwrap();
    p.enable_snp_all();
    let mut list = [0; 40];
    list[0] = 2;
    list[8..16].copy_from_slice(&0x70_0000_u64.to_le_bytes());
    list[16] = 2;
    // Ranges of the address map without memory are listed too.
    list[24..32].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    list[32] = 9;
    p.host_write(REQUEST, &list).unwrap();
    let fields = [("flags", 3), ("list_paddr", REQUEST)];
    run(&p, Command::SNP_INIT_EX, &fields).ok().unwrap();
    for (spa, fixed) in [
        (0x6f_f000, false),
        (0x70_0000, true),
        (0x70_1000, true),
        (0x70_2000, false),
    ] {
        let state = if fixed {
            PageState::HvFixed
        } else {
            PageState::Hypervisor
        };
        assert_eq!(p.rmpread(spa).unwrap().state, state);
        p.host_write(spa, &[1]).unwrap();
        assert_eq!(p.rmpupdate(spa, &RmpUpdate::firmware()).is_err(), fixed);
    }
    p.wbinvd_all();
    p.command(Command::SNP_DF_FLUSH, &mut []).ok().unwrap();
    p.command(Command::SNP_SHUTDOWN, &mut []).ok().unwrap();
    p.command(Command::SNP_INIT, &mut []).ok().unwrap();
    assert_eq!(p.rmpread(0x70_0000).unwrap().state, PageState::HvFixed);
    assert_eq!(p.rmpread(0x6f_f000).unwrap().state, PageState::Hypervisor);
}

/// The order of a hypervisor's teardown; nothing is left in the RMP.
#[test]
fn teardown_gives_every_page_and_the_asid_back() {
    let p = snp(22);
    let guest = with_channel(&p, 0);
    exchange(&p, &guest.report_request(&[1; 64], 0).unwrap()).unwrap();
    p.rmpupdate(0x60_0000, &RmpUpdate::guest(ASID, 0x10_0000))
        .unwrap();
    let reclaim = |at: u64| {
        run(&p, Command::SNP_PAGE_RECLAIM, &[("paddr", at)])
            .ok()
            .unwrap();
        p.rmpupdate(at, &RmpUpdate::shared()).unwrap();
    };
    for private in [SECRETS, 0x60_0000] {
        p.rmpupdate(private, &RmpUpdate::shared()).unwrap();
    }
    reclaim(RESPONSE);
    on_gctx(&p, Command::SNP_DECOMMISSION, &[]).ok().unwrap();
    let page = GuestPage::new(ASID, 0x8000, SECRETS);
    assert_eq!(
        p.guest_read(&page, &mut [0]),
        Err(AccessFault::NotActive(ASID))
    );
    assert_eq!(p.rmpread(GCTX).unwrap().state, PageState::Firmware);
    reclaim(GCTX);
    assert!(p.snapshot().rmp.is_empty());
    assert!(p.snapshot().snp_guests.is_empty());

    // Shutdown needs the flush that the released ASID needs.
    let shutdown = || run(&p, Command::SNP_SHUTDOWN_EX, &[("len", 8), ("flags", 1)]);
    assert_eq!(shutdown(), Status::DFFLUSH_REQUIRED);
    p.wbinvd_all();
    p.command(Command::SNP_DF_FLUSH, &mut []).ok().unwrap();
    shutdown().ok().unwrap();
    shutdown().ok().unwrap();
}

#[test]
fn a_reused_asid_does_not_open_the_pages_of_its_former_guest() {
    let p = snp(23);
    with_channel(&p, 0);
    let mut before = [0; 32];
    let page = GuestPage::new(ASID, 0x8000, SECRETS);
    p.guest_read(&page, &mut before).unwrap();
    on_gctx(&p, Command::SNP_DECOMMISSION, &[]).ok().unwrap();
    p.wbinvd_all();
    p.command(Command::SNP_DF_FLUSH, &mut []).ok().unwrap();
    snp_launch(&p, 0x3000, POLICY, ASID);
    // The page was never taken back, so the mapping holds; but the key is another.
    let mut after = [0; 32];
    p.guest_read(&page, &mut after).unwrap();
    assert_ne!(before, after);
}

#[test]
fn legacy_outputs_go_to_firmware_pages_while_snp_is_initialised() {
    let p = snp(24);
    let init = [("flags", 1), ("tmr_address", TMR), ("tmr_len", 2 << 20)];
    assert_eq!(run(&p, Command::INIT, &init), Status::INVALID_PAGE_STATE);
    for page in (TMR..TMR + (2 << 20)).step_by(4096) {
        p.rmpupdate(page, &RmpUpdate::firmware()).unwrap();
    }
    let short = [("flags", 1), ("tmr_address", TMR), ("tmr_len", 1 << 20)];
    assert_eq!(run(&p, Command::INIT, &short), Status::INVALID_LEN);
    run(&p, Command::INIT, &init).ok().unwrap();
    flush(&p);
    let handle = launch_start(&p, 0, 6);
    let fields = [("handle", handle.into()), ("address", GUEST), ("len", 4096)];
    let update = || run(&p, Command::LAUNCH_UPDATE_DATA, &fields);
    assert_eq!(update(), Status::INVALID_PAGE_STATE);
    p.host_write(GUEST, &[0x66; 4096]).unwrap();
    p.rmpupdate(GUEST, &RmpUpdate::firmware()).unwrap();
    update().ok().unwrap();
    let reclaim = |at: u64| {
        run(&p, Command::SNP_PAGE_RECLAIM, &[("paddr", at)])
            .ok()
            .unwrap();
        p.rmpupdate(at, &RmpUpdate::shared()).unwrap();
    };
    reclaim(GUEST);
    let mut seen = [0; 16];
    p.guest_read(&GuestPage::new(6, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [0x66; 16]);
    let measure = [("handle", handle.into()), ("address", LARGE), ("len", 48)];
    assert_eq!(
        run(&p, Command::LAUNCH_MEASURE, &measure),
        Status::INVALID_PAGE_STATE
    );
    assert_eq!(guest_state(&p, handle), 1);
    p.rmpupdate(LARGE, &RmpUpdate::firmware()).unwrap();
    run(&p, Command::LAUNCH_MEASURE, &measure).ok().unwrap();

    // Through the mailbox the command buffer itself is such an output.
    let (status, get) = (Command::GUEST_STATUS, |at| {
        let mut out = [0; 13];
        p.host_read(at, &mut out).unwrap();
        out
    });
    p.host_write(0x60_0000, &handle.to_le_bytes()).unwrap();
    assert_eq!(p.mailbox(status, 0x60_0000), Status::INVALID_PAGE_STATE);
    p.rmpupdate(0x60_0000, &RmpUpdate::firmware()).unwrap();
    p.mailbox(status, 0x60_0000).ok().unwrap();
    assert_eq!(get(0x60_0000)[12], 2);
    assert_eq!(p.mailbox(status, p.memory_len()), Status::INVALID_ADDRESS);
    // Commands without a buffer do not look at the address.
    p.mailbox(Command::NOP, u64::MAX).ok().unwrap();
}
