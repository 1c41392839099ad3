//! SNP guests: launch, pages, debugging.

mod common;

use common::guest::*;
use common::*;
use soft_amd_sp::measure::{PageInfo, PageType, SnpDigest, VMSA_GPA, VmplPermissions};
use soft_amd_sp::{
    Command, CpuidLimit, GuestPage, PageSize, PageState, Platform, RmpUpdate, Status, snp_policy,
};

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
    // The firmware accepts the page it proposed.
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
