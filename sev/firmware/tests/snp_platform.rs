//! The SNP platform: initialisation, contexts, status, teardown.

mod common;

use common::guest::*;
use common::*;
use soft_amd_sp::{AccessFault, GuestPage, PageState, Platform, RmpUpdate, Status};
use zerocopy::FromBytes;

fn init_with(flags: SnpInitFlags) -> SnpInitEx {
    SnpInitEx {
        flags,
        ..Default::default()
    }
}

fn shutdown_ex(p: &Platform, flags: SnpShutdownFlags) -> Status {
    let shutdown = SnpShutdownEx {
        flags,
        ..Default::default()
    };
    run(p, shutdown)
}

#[test]
fn contexts_are_identified_by_pages_the_firmware_owns() {
    let p = snp(18);
    let create = |at| {
        let gctx_paddr = PageAddress::from_raw(at);
        run(&p, SnpGctxCreate { gctx_paddr })
    };
    assert_eq!(create(GCTX), Status::INVALID_PAGE_STATE);
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    assert_eq!(create(GCTX + 8), Status::INVALID_ADDRESS);
    create(GCTX).ok().unwrap();
    assert_eq!(create(GCTX), Status::INVALID_PAGE_STATE);
    let status = |at| {
        let gctx_paddr = PageAddress::from_raw(at);
        run(&p, SnpDecommission { gctx_paddr })
    };
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
    let status = |at: u64| {
        let status = SnpGuestStatus {
            gctx_paddr: page(GCTX),
            status_paddr: at.into(),
        };
        run(&p, status)
    };
    assert_eq!(status(SECRETS), Status::INVALID_PAGE_STATE);
    p.rmpupdate(SECRETS, &RmpUpdate::firmware()).unwrap();
    status(SECRETS).ok().unwrap();
    let mut out = [0; 16];
    p.host_read(SECRETS, &mut out).unwrap();
    let expected = SnpGuestStatusPage {
        policy: POLICY,
        asid: ASID.into(),
        state: 1,
        ..Default::default()
    };
    assert_eq!(SnpGuestStatusPage::read_from_bytes(&out), Ok(expected));

    let platform = |p: &Platform| {
        let status_paddr = SECRETS.into();
        run(p, SnpPlatformStatus { status_paddr })
    };
    platform(&p).ok().unwrap();
    assert_eq!(p.rmpread(SECRETS).unwrap().state, PageState::Reclaim);
    let mut out = [0; 32];
    p.host_read(SECRETS, &mut out).unwrap();
    let status = SnpPlatformStatusPage::read_from_bytes(&out).unwrap();
    assert_eq!((status.api_major, status.api_minor), (1, 55));
    assert_eq!((status.state, status.is_rmp_init), (1, 1));
    assert_eq!((status.build.get(), status.guest_count.get()), (40, 1));
    let capabilities = SnpStatusFlags::FEATURE_INFO | SnpStatusFlags::CIPHERTEXT_HIDING_CAP;
    assert_eq!(status.flags, capabilities);
    assert_eq!(platform(&p), Status::INVALID_PAGE_STATE);
    // Before initialisation no page is asked for.
    let q = builder(19).build().unwrap();
    platform(&q).ok().unwrap();
    q.host_read(SECRETS, &mut out).unwrap();
    assert_eq!(out[2..4], [0, 0]);
}

#[test]
fn initialisation_demands_the_documented_order() {
    let p = builder(20).build().unwrap();
    let start = || p.run(&mut SnpInit);
    assert_eq!(start(), Status::INVALID_CONFIG);
    p.enable_snp(0);
    assert_eq!(start(), Status::INVALID_CONFIG);
    p.enable_snp(1);
    init(&p).ok().unwrap();
    assert_eq!(start(), Status::INVALID_PLATFORM_STATE);
    p.run(&mut Shutdown).ok().unwrap();
    for (flags, expected) in [
        (SnpInitFlags::default(), Status::RMP_INIT_REQUIRED),
        (
            SnpInitFlags::INIT_RMP | SnpInitFlags::TIO_EN,
            Status::UNSUPPORTED,
        ),
        (SnpInitFlags::from_raw(33), Status::INVALID_PARAM),
    ] {
        assert_eq!(run(&p, init_with(flags)), expected, "{flags:?}");
    }
    start().ok().unwrap();
    assert_eq!(start(), Status::INVALID_PLATFORM_STATE);
    let flush = || p.run(&mut SnpDfFlush);
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
    let init = SnpInitEx {
        list_paddr: REQUEST.into(),
        ..init_with(SnpInitFlags::INIT_RMP | SnpInitFlags::LIST_PADDR_EN)
    };
    run(&p, init).ok().unwrap();
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
    p.run(&mut SnpDfFlush).ok().unwrap();
    p.run(&mut SnpShutdown).ok().unwrap();
    p.run(&mut SnpInit).ok().unwrap();
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
        common::reclaim(&p, at).ok().unwrap();
        p.rmpupdate(at, &RmpUpdate::shared()).unwrap();
    };
    for private in [SECRETS, 0x60_0000] {
        p.rmpupdate(private, &RmpUpdate::shared()).unwrap();
    }
    reclaim(RESPONSE);
    snp_decommission(&p, GCTX).ok().unwrap();
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
    let shutdown = || shutdown_ex(&p, SnpShutdownFlags::IOMMU_SNP_SHUTDOWN);
    assert_eq!(shutdown(), Status::DFFLUSH_REQUIRED);
    p.wbinvd_all();
    p.run(&mut SnpDfFlush).ok().unwrap();
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
    snp_decommission(&p, GCTX).ok().unwrap();
    p.wbinvd_all();
    p.run(&mut SnpDfFlush).ok().unwrap();
    snp_launch(&p, 0x3000, POLICY, ASID);
    // The page was never taken back, so the mapping holds; but the key is another.
    let mut after = [0; 32];
    p.guest_read(&page, &mut after).unwrap();
    assert_ne!(before, after);
}

#[test]
fn legacy_outputs_go_to_firmware_pages_while_snp_is_initialised() {
    let p = snp(24);
    let init = init_es(2 << 20);
    assert_eq!(run(&p, init), Status::INVALID_PAGE_STATE);
    for page in (TMR..TMR + (2 << 20)).step_by(4096) {
        p.rmpupdate(page, &RmpUpdate::firmware()).unwrap();
    }
    assert_eq!(run(&p, init_es(1 << 20)), Status::INVALID_LEN);
    run(&p, init).ok().unwrap();
    flush(&p);
    let handle = launch_start(&p, OPEN, 6);
    let update = || update_data(&p, handle, GUEST, 4096);
    assert_eq!(update(), Status::INVALID_PAGE_STATE);
    p.host_write(GUEST, &[0x66; 4096]).unwrap();
    p.rmpupdate(GUEST, &RmpUpdate::firmware()).unwrap();
    update().ok().unwrap();
    let reclaim = |at: u64| {
        common::reclaim(&p, at).ok().unwrap();
        p.rmpupdate(at, &RmpUpdate::shared()).unwrap();
    };
    reclaim(GUEST);
    let mut seen = [0; 16];
    p.guest_read(&GuestPage::new(6, 0, GUEST), &mut seen)
        .unwrap();
    assert_eq!(seen, [0x66; 16]);
    let measure = || launch_measure(&p, handle, LARGE);
    assert_eq!(measure(), Status::INVALID_PAGE_STATE);
    assert_eq!(guest_state(&p, handle), 1);
    p.rmpupdate(LARGE, &RmpUpdate::firmware()).unwrap();
    measure().ok().unwrap();

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

#[test]
fn shutdown_with_guests_forgets_them_and_their_pages_can_be_reclaimed_later() {
    let p = snp(25);
    with_channel(&p, 0);
    let reserved = SnpShutdownFlags::from_raw(4);
    assert_eq!(shutdown_ex(&p, reserved), Status::INVALID_PARAM);
    let short = SnpShutdownEx {
        length: Length::from_raw(7),
        ..Default::default()
    };
    assert_eq!(run(&p, short), Status::INVALID_LEN);
    shutdown_ex(&p, SnpShutdownFlags::default()).ok().unwrap();
    assert!(p.snapshot().snp_guests.is_empty());
    let page = GuestPage::new(ASID, 0x8000, SECRETS);
    assert_eq!(
        p.guest_read(&page, &mut [0]),
        Err(AccessFault::NotActive(ASID))
    );
    // The RMP stays in force: the host still does not own what it gave away.
    assert!(p.host_write(GCTX, &[0]).is_err());
    let reclaim = || common::reclaim(&p, GCTX);
    assert_eq!(reclaim(), Status::INVALID_PLATFORM_STATE);
    run(&p, SnpInitEx::default()).ok().unwrap();
    reclaim().ok().unwrap();
    p.rmpupdate(GCTX, &RmpUpdate::shared()).unwrap();
    p.host_write(GCTX, &[0]).unwrap();
    // The former ASID must be flushed before it is bound again.
    gctx_create(&p, GCTX);
    snp_launch_start(&p, GCTX, POLICY).ok().unwrap();
    let activate = || snp_activate(&p, GCTX, ASID);
    assert_eq!(activate(), Status::DFFLUSH_REQUIRED);
    p.wbinvd_all();
    p.run(&mut SnpDfFlush).ok().unwrap();
    activate().ok().unwrap();
}

#[test]
fn x86_shutdown_takes_the_rmp_out_of_force() {
    let p = snp(26);
    shutdown_ex(&p, SnpShutdownFlags::X86_SNP_SHUTDOWN)
        .ok()
        .unwrap();
    let update = RmpUpdate::firmware();
    assert_eq!(
        p.rmpupdate(0x1000, &update),
        Err(soft_amd_sp::RmpError::NotEnabled)
    );
    assert_eq!(p.run(&mut SnpInit), Status::INVALID_CONFIG);
    p.enable_snp_all();
    p.run(&mut SnpInit).ok().unwrap();
}

#[test]
fn feature_info_reports_what_the_builder_gave() {
    for (features, ecx) in [
        (soft_amd_sp::Features::default(), 0),
        (
            soft_amd_sp::Features {
                ciphertext_hiding: true,
                rapl_disable: true,
                ..Default::default()
            },
            0xc,
        ),
    ] {
        let p = builder(27).features(features).build().unwrap();
        let info = |ecx_in: u32| {
            let info = SnpFeatureInfo {
                ecx_in: ecx_in.into(),
                feature_info_paddr: 0x1000.into(),
                ..Default::default()
            };
            run(&p, info)
        };
        assert_eq!(info(1), Status::INVALID_PARAM);
        info(0).ok().unwrap();
        let mut out = [0xff; 16];
        p.host_read(0x1000, &mut out).unwrap();
        assert_eq!(out, [0, 0, 0, 0, 0, 0, 0, 0, ecx, 0, 0, 0, 0, 0, 0, 0]);
        p.enable_snp_all();
        let init = SnpInitEx {
            max_snp_asid: 1.into(),
            ..init_with(SnpInitFlags::INIT_RMP | SnpInitFlags::CIPHERTEXT_HIDING_EN)
        };
        let hiding = run(&p, init);
        let expected = if ecx == 0 {
            Status::UNSUPPORTED
        } else {
            Status::SUCCESS
        };
        assert_eq!(hiding, expected);
    }
}
