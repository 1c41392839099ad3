//! A guest goes from one platform to another through its migration agents.

mod common;

use common::guest::{ASID, GCTX, POLICY, REQUEST, RESPONSE, SECRETS};
use common::*;
use proptest::prelude::*;
use soft_amd_sp::attestation::Report;
use soft_amd_sp::measure::PageType;
use soft_amd_sp::message::{
    EXPORTED_CONTEXT, ExportRequest, ExportResponse, GuestChannel, ImportRequest, KeyRequest,
    MessageType, Request, RootKeySelect, StatusResponse, VmrkRequest,
};
use soft_amd_sp::{GuestPage, PageSize, PageState, Platform, RmpUpdate, SnpState, Status};

/// The agent: its context, its ASID and its secrets page.
const AGENT: u64 = 0x2000;
const AGENT_ASID: u32 = 2;
const AGENT_SECRETS: u64 = 0x51_0000;
/// The guest's page, and its page of records.
const PAGE: u64 = 0x52_0000;
const RECORDS: u64 = 0x60_0000;
const OUT: u64 = 0xa0_0000;
const IN: u64 = 0xb0_0000;
const GPA: u64 = 0x9000;
const MIGRATABLE: SnpPolicy = SnpPolicy::from_raw(POLICY.bits() | SnpPolicy::MIGRATE_MA.bits());

/// A platform with an agent that runs.
fn with_agent(seed: u64) -> (Platform, GuestChannel) {
    let p = snp(seed);
    snp_launch(&p, AGENT, POLICY, AGENT_ASID);
    snp_add(
        &p,
        AGENT,
        AGENT_ASID,
        AGENT_SECRETS,
        0x8000,
        PageType::Secrets,
    )
    .ok()
    .unwrap();
    snp_finish(&p, AGENT).ok().unwrap();
    for at in [RESPONSE, OUT, OUT + 0x1000] {
        p.rmpupdate(at, &RmpUpdate::firmware()).unwrap();
    }
    let agent = channel(&p, AGENT_ASID, AGENT_SECRETS);
    (p, agent)
}

fn channel(p: &Platform, asid: u32, secrets: u64) -> GuestChannel {
    let mut page = [0; 4096];
    p.guest_read(&GuestPage::new(asid, 0x8000, secrets), &mut page)
        .unwrap();
    GuestChannel::from_secrets_page(&page, 0).unwrap()
}

/// One request of a guest, and its answer.
fn ask<R: Request>(p: &Platform, gctx: u64, guest: &mut GuestChannel, request: &R) -> R::Response {
    let message = guest.ask(request).unwrap();
    guest.answer::<R>(&send(p, gctx, &message)).unwrap()
}

fn send(p: &Platform, gctx: u64, message: &[u8]) -> Vec<u8> {
    p.host_write(REQUEST, message).unwrap();
    let request = SnpGuestRequest {
        gctx_paddr: page(gctx),
        request_paddr: page(REQUEST),
        response_paddr: page(RESPONSE),
    };
    run(p, request).ok().unwrap();
    let mut answer = vec![0; 4096];
    p.host_read(RESPONSE, &mut answer).unwrap();
    answer
}

/// A guest of that agent with a page of its own, launched with this policy.
fn launch(p: &Platform, agent: &mut GuestChannel, vmrk: Option<[u8; 32]>) {
    gctx_create(p, GCTX);
    let start = SnpLaunchStart {
        gctx_paddr: page(GCTX),
        policy: MIGRATABLE,
        ma_gctx_paddr: page(AGENT),
        flags: SnpLaunchStartFlags::MA_EN,
        ..Default::default()
    };
    run(p, start).ok().unwrap();
    if let Some(vmrk) = vmrk {
        let request = VmrkRequest {
            gctx_paddr: GCTX.into(),
            vmrk,
            ..Default::default()
        };
        assert_eq!(ask(p, AGENT, agent, &request).status.get(), 0);
    }
    snp_activate(p, GCTX, ASID).ok().unwrap();
    p.host_write(PAGE, &[0x5a; 4096]).unwrap();
    snp_add(p, GCTX, ASID, PAGE, GPA, PageType::Normal)
        .ok()
        .unwrap();
    snp_add(p, GCTX, ASID, SECRETS, 0x8000, PageType::Secrets)
        .ok()
        .unwrap();
    snp_finish(p, GCTX).ok().unwrap();
}

/// The pages of the guest, by system and guest address.
const PAGES: [(u64, u64); 2] = [(PAGE, GPA), (SECRETS, 0x8000)];
const ROOT: SnpPageSwapFlags = SnpPageSwapFlags::ROOT_MDATA_EN;

fn kind(kind: SwapType) -> SnpPageSwapFlags {
    SnpPageSwapFlags::of(kind, PageSize::Size4K)
}

/// Takes the guest out with its records. Returns its pages, and the page of records.
fn swap_out(p: &Platform) -> Vec<Vec<u8>> {
    p.rmpupdate(RECORDS, &RmpUpdate::firmware()).unwrap();
    let page_paddr = small(RECORDS);
    run(p, SnpPageMdInit { page_paddr }).ok().unwrap();
    let out = |src: u64, record: u64, flags| {
        let leave = SnpPageSwapOut {
            gctx_paddr: page(GCTX),
            src_paddr: page(src),
            dst_paddr: page(OUT),
            mdata_paddr: record.into(),
            flags,
            ..Default::default()
        };
        run(p, leave).ok().unwrap();
        let mut bytes = vec![0; 4096];
        p.host_read(OUT, &mut bytes).unwrap();
        bytes
    };
    let mut all = Vec::new();
    for ((spa, gpa), record) in PAGES.into_iter().zip((RECORDS..).step_by(64)) {
        p.rmpupdate(spa, &RmpUpdate::pre_guest(ASID, gpa)).unwrap();
        all.push(out(spa, record, kind(SwapType::Data)));
    }
    all.push(out(RECORDS, 0, kind(SwapType::Metadata) | ROOT));
    all
}

/// Brings it in, at the same system addresses. Returns the first status that is not success.
fn swap_in(p: &Platform, gctx: u64, asid: u32, pages: &[Vec<u8>]) -> Status {
    let come = |bytes: &[u8], dst: u64, record: u64, flags| {
        p.host_write(IN, bytes).unwrap();
        let come = SnpPageSwapIn {
            gctx_paddr: page(gctx),
            src_paddr: page(IN),
            dst_paddr: page(dst),
            mdata_paddr: record.into(),
            flags,
            ..Default::default()
        };
        run(p, come).ok()
    };
    let all = || {
        p.rmpupdate(RECORDS, &RmpUpdate::firmware()).unwrap();
        come(&pages[2], RECORDS, 0, kind(SwapType::Metadata) | ROOT)?;
        for (n, (spa, gpa)) in PAGES.into_iter().enumerate() {
            p.rmpupdate(spa, &RmpUpdate::pre_guest(asid, gpa)).unwrap();
            come(
                &pages[n],
                spa,
                RECORDS + 64 * n as u64,
                kind(SwapType::Data),
            )?;
        }
        Ok(())
    };
    all().err().unwrap_or(Status::SUCCESS)
}

fn export(p: &Platform, agent: &mut GuestChannel, gctx: u64) -> ExportResponse {
    let request = ExportRequest {
        gctx_paddr: gctx.into(),
        ..Default::default()
    };
    ask(p, AGENT, agent, &request)
}

fn import_of(gctx: u64, exported: &ExportResponse) -> ImportRequest {
    ImportRequest {
        gctx_paddr: gctx.into(),
        in_gctx_size: exported.gctx_size,
        in_gctx_version: exported.gctx_version,
        incoming_gctx: exported.gctx,
        ..Default::default()
    }
}

fn status(response: StatusResponse) -> Status {
    Status(response.status.get() as u16)
}

/// The fields of a report that say who the guest is, and the agent that it names.
fn report(p: &Platform, gctx: u64, guest: &mut GuestChannel) -> (Vec<u8>, [u8; 32]) {
    let request = guest.report_request(&[7; 64], 0).unwrap();
    let (code, bytes) = guest.open_report(&send(p, gctx, &request)).unwrap();
    assert_eq!(code, 0);
    let report = Report::from_bytes(bytes[..Report::LEN].try_into().unwrap());
    let mut same = report.measurement.to_vec();
    same.extend_from_slice(&report.report_id);
    same.extend_from_slice(&report.host_data);
    same.extend_from_slice(&report.policy.to_le_bytes());
    same.extend_from_slice(&report.launch_tcb.0.to_le_bytes());
    (same, report.report_id_ma)
}

fn derived(p: &Platform, gctx: u64, guest: &mut GuestChannel, root: RootKeySelect) -> [u8; 32] {
    let request = KeyRequest {
        root_key_select: root,
        ..Default::default()
    };
    ask(p, gctx, guest, &request).derived_key
}

#[test]
fn a_guest_goes_on_at_another_platform_as_it_was() {
    for vmrk in [None, Some([0x77; 32])] {
        let (from, mut agent) = with_agent(51);
        let (to, mut peer) = with_agent(52);
        launch(&from, &mut agent, vmrk);
        let mut guest = channel(&from, ASID, SECRETS);
        let before = report(&from, GCTX, &mut guest);
        let roots = [RootKeySelect::VMRK, RootKeySelect::default()];
        let keys = roots.map(|root| derived(&from, GCTX, &mut guest, root));
        let pages = swap_out(&from);
        let exported = export(&from, &mut agent, GCTX);
        assert_eq!(exported.status.get(), 0);

        // At another place, with another ASID.
        let (there, asid) = (0x5000, 3);
        gctx_create(&to, there);
        let import = import_of(there, &exported);
        assert_eq!(status(ask(&to, AGENT, &mut peer, &import)), Status::SUCCESS);
        snp_activate(&to, there, asid).ok().unwrap();
        assert_eq!(swap_in(&to, there, asid, &pages), Status::SUCCESS);
        let mut bytes = [0; 4096];
        to.guest_read(&GuestPage::new(asid, GPA, PAGE), &mut bytes)
            .unwrap();
        assert_eq!(bytes, [0x5a; 4096]);
        assert_eq!(to.rmpread(PAGE).unwrap().state, PageState::GuestValid);

        // Its message keys and their numbers go on, and its reports name the agent there.
        let after = report(&to, there, &mut guest);
        assert_eq!(after.0, before.0);
        assert_ne!(after.1, before.1);
        let [migrates, chips] = roots.map(|root| derived(&to, there, &mut guest, root));
        assert_eq!(migrates, keys[0], "the root goes with the guest");
        assert_ne!(chips, keys[1], "the chip's does not");
        // The context took the place of a fresh one, once.
        assert_eq!(
            status(ask(&to, AGENT, &mut peer, &import)),
            Status::INVALID_GUEST_STATE
        );
    }
}

#[test]
fn only_the_guests_own_agent_gets_its_context_and_only_while_it_is_out() {
    let (p, mut agent) = with_agent(53);
    launch(&p, &mut agent, None);
    let mut guest = channel(&p, ASID, SECRETS);
    let refused = |response: ExportResponse| {
        assert_eq!(response.gctx, [0; EXPORTED_CONTEXT]);
        Status(response.status.get() as u16)
    };
    assert_eq!(
        refused(export(&p, &mut agent, GCTX)),
        Status::INVALID_GUEST_STATE
    );
    swap_out(&p);
    let own = ExportRequest {
        gctx_paddr: GCTX.into(),
        ..Default::default()
    };
    assert_eq!(
        refused(ask(&p, GCTX, &mut guest, &own)),
        Status::INVALID_GUEST
    );
    for (gctx, expected) in [
        (AGENT, Status::INVALID_GUEST),
        (0x7000, Status::INVALID_GUEST),
        (u64::MAX, Status::INVALID_GUEST),
    ] {
        assert_eq!(refused(export(&p, &mut agent, gctx)), expected, "{gctx:#x}");
    }
    let late = VmrkRequest {
        gctx_paddr: GCTX.into(),
        ..Default::default()
    };
    assert_eq!(
        status(ask(&p, AGENT, &mut agent, &late)),
        Status::INVALID_GUEST_STATE
    );
    assert_eq!(
        status(ask(&p, GCTX, &mut guest, &late)),
        Status::INVALID_GUEST
    );
    assert_eq!(export(&p, &mut agent, GCTX).status.get(), 0);
}

#[test]
fn a_context_that_does_not_fit_is_refused_and_leaves_the_fresh_one_alone() {
    let (p, mut agent) = with_agent(54);
    launch(&p, &mut agent, None);
    swap_out(&p);
    let good = import_of(0x5000, &export(&p, &mut agent, GCTX));
    gctx_create(&p, 0x5000);
    let with = |change: fn(&mut ImportRequest)| {
        let mut import = good;
        change(&mut import);
        import
    };
    // The policy is at the start of the context, the root record's flags are at 0x68.
    let policy = |bits: u64| {
        let mut import = good;
        import.incoming_gctx[..8].copy_from_slice(&bits.to_le_bytes());
        import
    };
    let cases = [
        (
            with(|i| i.gctx_paddr = 0x7000.into()),
            Status::INVALID_GUEST,
        ),
        (
            with(|i| i.gctx_paddr = GCTX.into()),
            Status::INVALID_GUEST_STATE,
        ),
        (
            with(|i| i.in_gctx_size = 0x2d0.into()),
            Status::INVALID_PARAM,
        ),
        (
            with(|i| i.in_gctx_version = 2.into()),
            Status::INVALID_PARAM,
        ),
        (with(|i| i.incoming_gctx[0x68] = 0), Status::INVALID_PARAM),
        (
            with(|i| i.incoming_gctx[0x13] = 0x80),
            Status::INVALID_PARAM,
        ),
        (
            with(|i| i.incoming_gctx[EXPORTED_CONTEXT - 1] = 1),
            Status::INVALID_PARAM,
        ),
        (policy(POLICY.bits()), Status::POLICY_FAILURE),
        (policy(MIGRATABLE.bits() | 0xffff), Status::POLICY_FAILURE),
        (policy(MIGRATABLE.bits() | 1 << 63), Status::INVALID_PARAM),
    ];
    for (n, (import, expected)) in cases.into_iter().enumerate() {
        assert_eq!(
            status(ask(&p, AGENT, &mut agent, &import)),
            expected,
            "case {n}"
        );
        let fresh = p.snapshot().snp_guests;
        let fresh = fresh.iter().find(|guest| guest.context == 0x5000).unwrap();
        let bare = SnpPolicy::default().bits();
        assert_eq!(
            (fresh.state, fresh.policy),
            (SnpState::Init, bare),
            "case {n}"
        );
    }
    assert_eq!(status(ask(&p, AGENT, &mut agent, &good)), Status::SUCCESS);
}

#[test]
fn a_message_of_another_length_is_refused_as_a_message() {
    let (p, agent) = with_agent(55);
    for (kind, len) in [
        (MessageType::ExportRequest, 8),
        (MessageType::ImportRequest, 0x20),
        (MessageType::VmrkRequest, 0x41),
    ] {
        let message = agent.request(kind, &vec![0; len]).unwrap();
        p.host_write(REQUEST, &message).unwrap();
        let request = SnpGuestRequest {
            gctx_paddr: page(AGENT),
            request_paddr: page(REQUEST),
            response_paddr: page(RESPONSE),
        };
        assert_eq!(run(&p, request), Status::INVALID_LEN);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..Default::default() })]

    /// The context is of one state of the guest: with it no other pages come in, wherever it went.
    #[test]
    fn no_page_comes_that_is_not_of_the_exported_guest(page in 0..3usize, at in 0..4096usize, bit in 0..8u32) {
        let (from, mut agent) = with_agent(56);
        let (to, mut peer) = with_agent(57);
        launch(&from, &mut agent, None);
        let mut pages = swap_out(&from);
        let exported = export(&from, &mut agent, GCTX);
        pages[page][at] ^= 1 << bit;
        gctx_create(&to, GCTX);
        let import = import_of(GCTX, &exported);
        prop_assert_eq!(status(ask(&to, AGENT, &mut peer, &import)), Status::SUCCESS);
        snp_activate(&to, GCTX, ASID).ok().unwrap();
        prop_assert_eq!(swap_in(&to, GCTX, ASID, &pages), Status::BAD_MEASUREMENT);
    }
}
