//! SNP guests: launch, pages, debugging.

mod common;

use common::guest::*;
use common::*;
use soft_amd_sp::measure::{PageInfo, PageType, SnpDigest, VMSA_GPA, VmplPermissions};
use soft_amd_sp::{
    CpuidLimit, GuestPage, PageSize, PageState, Platform, RmpUpdate, Status, permission,
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
        snp_add(&p, GCTX, ASID, spa, gpa, page_type).ok().unwrap();
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
    let small = snp_update(GCTX, LARGE, PageType::Normal);
    let large = SnpLaunchUpdate {
        flags: small.flags | SnpLaunchUpdateFlags::PAGE_SIZE_2M,
        vmpl1_perms: VmplPerms::new(permission::READ | permission::WRITE).unwrap(),
        vmpl2_perms: VmplPerms::new(permission::READ).unwrap(),
        ..small
    };
    assert_eq!(run(&p, small), Status::INVALID_PAGE_SIZE);
    run(&p, large).ok().unwrap();
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
    let good = snp_update(GCTX, SECRETS, PageType::Normal);
    let flags = |bits, address| SnpLaunchUpdate {
        flags: SnpLaunchUpdateFlags::from_raw(bits),
        page_paddr: page(address),
        ..good
    };
    let address = |address| SnpLaunchUpdate {
        page_paddr: PageAddress::from_raw(address),
        ..good
    };
    let permissions = SnpLaunchUpdate {
        vmpl1_perms: VmplPerms::from_raw(16),
        ..good
    };
    let before = digest(&p);
    for (update, expected) in [
        (flags(0, SECRETS), Status::INVALID_PARAM),
        (flags(7 << 1, SECRETS), Status::INVALID_PARAM),
        (flags(1 << 1 | 1 << 4, SECRETS), Status::INVALID_PARAM),
        (flags(1 << 5 | 1 << 1, SECRETS), Status::INVALID_PARAM),
        (permissions, Status::INVALID_PARAM),
        (address(SECRETS + 8), Status::INVALID_ADDRESS),
        (flags(1 << 1 | 1, SECRETS), Status::INVALID_ADDRESS),
        (address(p.memory_len()), Status::INVALID_ADDRESS),
        (flags(2 << 1 | 1, LARGE), Status::INVALID_PAGE_SIZE),
        (good, Status::INVALID_PAGE_STATE),
    ] {
        assert_eq!(run(&p, update), expected, "{update:?}");
    }
    p.rmpupdate(SECRETS, &RmpUpdate::pre_guest(ASID + 1, 0))
        .unwrap();
    assert_eq!(run(&p, good), Status::INVALID_PAGE_OWNER);
    assert_eq!(p.rmpread(SECRETS).unwrap().state, PageState::PreGuest);
    assert_eq!(digest(&p), before);
    reclaim(&p, SECRETS).ok().unwrap();
    p.rmpupdate(SECRETS, &RmpUpdate::shared()).unwrap();
}

#[test]
fn policies_are_admitted_only_if_the_platform_can_keep_them() {
    let start = |p: &Platform, policy| snp_launch_start(p, GCTX, policy);
    let p = snp(4);
    gctx_create(&p, GCTX);
    for (policy, expected) in [
        (SnpPolicy::from_raw(1 << 16), Status::INVALID_PARAM),
        (
            SnpPolicy::from_raw(0x3_0000 | 1 << 26),
            Status::INVALID_PARAM,
        ),
        (
            SnpPolicy::from_raw(0x3_0000 | 1 << 63),
            Status::INVALID_PARAM,
        ),
        (SnpPolicy::default(), Status::POLICY_FAILURE),
        (POLICY.with_abi(2, 0), Status::POLICY_FAILURE),
        (POLICY.with_abi(1, 56), Status::POLICY_FAILURE),
        (POLICY | SnpPolicy::MEM_AES_256_XTS, Status::POLICY_FAILURE),
        (POLICY | SnpPolicy::RAPL_DIS, Status::POLICY_FAILURE),
        (
            POLICY | SnpPolicy::CIPHERTEXT_HIDING_DRAM,
            Status::POLICY_FAILURE,
        ),
        (
            POLICY | SnpPolicy::PAGE_SWAP_DISABLE,
            Status::POLICY_FAILURE,
        ),
        (
            POLICY.with_abi(1, 55) | SnpPolicy::DEBUG | SnpPolicy::SINGLE_SOCKET,
            Status::SUCCESS,
        ),
    ] {
        assert_eq!(start(&p, policy), expected, "{policy:?}");
    }
    // With RAPL off and ciphertext hiding on, guests may ask for both.
    let p = builder(4).build().unwrap();
    p.enable_snp_all();
    let init = SnpInitEx {
        flags: SnpInitFlags::INIT_RMP | SnpInitFlags::RAPL_DIS | SnpInitFlags::CIPHERTEXT_HIDING_EN,
        max_snp_asid: 3.into(),
        ..Default::default()
    };
    run(&p, init).ok().unwrap();
    gctx_create(&p, GCTX);
    start(
        &p,
        POLICY | SnpPolicy::RAPL_DIS | SnpPolicy::CIPHERTEXT_HIDING_DRAM,
    )
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
        snp_add(&p, GCTX, ASID, SECRETS, 0x9000, PageType::Cpuid),
        Status::INVALID_PARAM
    );
    assert_eq!(digest(&p), before);
    let mut corrected = [0; 4096];
    p.host_read(SECRETS, &mut corrected).unwrap();
    page[0x10 + 0x20 + 1] = 0;
    assert_eq!(corrected, page);
    // The firmware accepts the page it proposed.
    run(&p, snp_update(GCTX, SECRETS, PageType::Cpuid))
        .ok()
        .unwrap();
    page[0] = 65;
    p.host_write(LARGE, &page).unwrap();
    assert_eq!(
        snp_add(&p, GCTX, ASID, LARGE, 0xa000, PageType::Cpuid),
        Status::INVALID_PARAM
    );
}

#[test]
fn debug_needs_the_policy_and_moves_whole_pages() {
    let p = snp(15);
    snp_launch(&p, GCTX, POLICY | SnpPolicy::DEBUG, ASID);
    p.host_write(SECRETS, &[0x77; 4096]).unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x9000, PageType::Normal)
        .ok()
        .unwrap();
    finish(&p).ok().unwrap();
    let decrypt = |p: &Platform, src| {
        let decrypt = SnpDbgDecrypt {
            gctx_paddr: common::page(GCTX),
            src_paddr: common::page(src),
            dst_paddr: common::page(LARGE),
        };
        run(p, decrypt)
    };
    assert_eq!(decrypt(&p, SECRETS), Status::INVALID_PAGE_STATE);
    p.rmpupdate(LARGE, &RmpUpdate::firmware()).unwrap();
    decrypt(&p, SECRETS).ok().unwrap();
    let mut page = [0; 4096];
    p.host_read(LARGE, &mut page).unwrap();
    assert_eq!(page, [0x77; 4096]);
    assert_eq!(decrypt(&p, LARGE), Status::INVALID_PAGE_STATE);
    p.host_write(REQUEST, &[0x88; 4096]).unwrap();
    let encrypt = SnpDbgEncrypt {
        gctx_paddr: common::page(GCTX),
        src_paddr: common::page(REQUEST),
        dst_paddr: common::page(SECRETS),
    };
    run(&p, encrypt).ok().unwrap();
    p.guest_read(&GuestPage::new(ASID, 0x9000, SECRETS), &mut page)
        .unwrap();
    assert_eq!(page, [0x88; 4096]);

    let p = snp(16);
    snp_launch(&p, GCTX, POLICY, ASID);
    assert_eq!(decrypt(&p, SECRETS), Status::POLICY_FAILURE);
}

#[test]
fn a_page_moves_to_another_place_without_the_guest_noticing() {
    let p = snp(17);
    snp_launch(&p, GCTX, POLICY, ASID);
    p.host_write(SECRETS, &[0x77; 4096]).unwrap();
    snp_add(&p, GCTX, ASID, SECRETS, 0x9000, PageType::Normal)
        .ok()
        .unwrap();
    finish(&p).ok().unwrap();
    let go = || {
        let go = SnpPageMove {
            gctx_paddr: common::page(GCTX),
            src_paddr: common::page(SECRETS),
            dst_paddr: common::page(LARGE),
            ..Default::default()
        };
        run(&p, go)
    };
    assert_eq!(go(), Status::INVALID_PAGE_STATE);
    p.rmpupdate(SECRETS, &RmpUpdate::pre_guest(ASID, 0x9000))
        .unwrap();
    p.rmpupdate(LARGE, &RmpUpdate::pre_guest(ASID, 0xa000))
        .unwrap();
    assert_eq!(go(), Status::INVALID_PAGE_OWNER);
    reclaim(&p, LARGE).ok().unwrap();
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
    reclaim(&p, SECRETS).ok().unwrap();
    p.rmpupdate(SECRETS, &RmpUpdate::shared()).unwrap();
}
