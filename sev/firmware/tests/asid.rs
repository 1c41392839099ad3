//! ASIDs: activation, release, and the flushes between.

mod common;

use common::*;
use soft_amd_sp::{AsidState, GuestId, Status};

const A: u32 = 6;

fn df_flush(p: &soft_amd_sp::Platform) -> Status {
    p.run(&mut DfFlush)
}

#[test]
fn an_asid_is_usable_only_after_wbinvd_on_every_core_and_df_flush() {
    let p = sev(1);
    let first = launch_start(&p, OPEN, A);
    let second = new_guest(&p, OPEN);
    assert_eq!(activate(&p, first, A), Status::ACTIVE);
    assert_eq!(activate(&p, second, A), Status::ASID_OWNED);
    deactivate(&p, first).ok().unwrap();
    assert_eq!(deactivate(&p, first), Status::INACTIVE);
    assert_eq!(activate(&p, second, A), Status::DFFLUSH_REQUIRED);
    assert_eq!(df_flush(&p), Status::WBINVD_REQUIRED);
    assert!(p.wbinvd(0));
    assert_eq!(df_flush(&p), Status::WBINVD_REQUIRED);
    assert!(p.wbinvd(1) && !p.wbinvd(2));
    df_flush(&p).ok().unwrap();
    activate(&p, second, A).ok().unwrap();
}

#[test]
fn a_deactivate_between_wbinvd_and_df_flush_voids_the_wbinvd() {
    let p = sev(2);
    let (a, b) = (launch_start(&p, OPEN, A), launch_start(&p, OPEN, A + 1));
    deactivate(&p, a).ok().unwrap();
    p.wbinvd_all();
    deactivate(&p, b).ok().unwrap();
    assert_eq!(df_flush(&p), Status::WBINVD_REQUIRED);
    flush(&p);
    // One flush cleans every released ASID.
    activate(&p, a, A + 1).ok().unwrap();
    activate(&p, b, A).ok().unwrap();
}

#[test]
fn initialisation_leaves_every_asid_in_need_of_a_flush() {
    let p = builder(3).build().unwrap();
    init(&p).ok().unwrap();
    let handle = new_guest(&p, OPEN);
    assert_eq!(activate(&p, handle, A), Status::DFFLUSH_REQUIRED);
    assert_eq!(df_flush(&p), Status::WBINVD_REQUIRED);
    flush(&p);
    activate(&p, handle, A).ok().unwrap();
}

#[test]
fn decommission_of_an_active_guest_is_refused_and_then_frees_the_handle() {
    let p = sev(4);
    let handle = launch_start(&p, OPEN, A);
    assert_eq!(decommission(&p, handle), Status::ACTIVE);
    assert_eq!(p.snapshot().owner_of(A), Some(GuestId::Handle(handle)));
    deactivate(&p, handle).ok().unwrap();
    decommission(&p, handle).ok().unwrap();
    // Without guests the platform is INIT again, where no guest command is possible.
    assert_eq!(decommission(&p, handle), Status::INVALID_PLATFORM_STATE);
    let other = launch_start(&p, OPEN, A + 1);
    assert_ne!(other, handle);
    assert_eq!(
        run(
            &p,
            GuestStatus {
                handle: handle.into(),
                ..Default::default()
            }
        ),
        Status::INVALID_GUEST
    );
    let dirty = (A, AsidState::Dirty);
    assert!(p.snapshot().asids.contains(&dirty));
}

#[test]
fn guest_status_reports_asid_zero_while_inactive() {
    let p = sev(5);
    let handle = launch_start(&p, OPEN, A);
    assert_eq!(guest_status(&p, handle).asid, A);
    deactivate(&p, handle).ok().unwrap();
    assert_eq!(guest_status(&p, handle).asid, 0);
    assert_eq!(update_data(&p, handle, GUEST, 16), Status::INACTIVE);
}

#[test]
fn ciphertext_hiding_splits_the_shared_asids() {
    let p = builder(6).build().unwrap();
    p.enable_snp_all();
    let start = |max: u16| {
        let init = SnpInitEx {
            flags: SnpInitFlags::INIT_RMP | SnpInitFlags::CIPHERTEXT_HIDING_EN,
            max_snp_asid: max.into(),
            ..Default::default()
        };
        run(&p, init)
    };
    assert_eq!(start(0), Status::INVALID_PARAM);
    assert_eq!(start(6), Status::INVALID_PARAM);
    start(2).ok().unwrap();
    for page in (TMR..TMR + (2 << 20)).step_by(4096) {
        p.rmpupdate(page, &soft_amd_sp::RmpUpdate::firmware())
            .unwrap();
    }
    run(&p, init_es(2 << 20)).ok().unwrap();
    flush(&p);
    let handle = new_guest(&p, SevPolicy::ES);
    for asid in [1, 2, 6] {
        assert_eq!(activate(&p, handle, asid), Status::INVALID_ASID);
    }
    activate(&p, handle, 3).ok().unwrap();
    snp_launch(&p, 0x1000, SnpPolicy::SMT, 2);
    gctx_create(&p, 0x2000);
    snp_launch_start(&p, 0x2000, SnpPolicy::SMT).ok().unwrap();
    for (asid, expected) in [
        (3, Status::INVALID_ASID),
        (2, Status::ASID_OWNED),
        (1, Status::SUCCESS),
    ] {
        assert_eq!(snp_activate(&p, 0x2000, asid), expected, "{asid}");
    }
}

#[test]
fn activate_ex_checks_its_list_of_cores() {
    let p = sev(7);
    let list = ActivateEx {
        handle: new_guest(&p, OPEN).into(),
        asid: A.into(),
        numids: 2.into(),
        ids_paddr: SCRATCH.into(),
        ..Default::default()
    };
    p.host_write(SCRATCH, &[0, 0, 0, 0, 2, 0, 0, 0]).unwrap();
    assert_eq!(run(&p, list), Status::INVALID_PARAM);
    p.host_write(SCRATCH, &[0, 0, 0, 0, 1, 0, 0, 0]).unwrap();
    let short = ActivateEx {
        ex_len: Length::from_raw(0x17),
        ..list
    };
    assert_eq!(run(&p, short), Status::INVALID_LEN);
    let numids = 3.into();
    let long = ActivateEx { numids, ..list };
    assert_eq!(run(&p, long), Status::INVALID_PARAM);
    run(&p, list).ok().unwrap();
}
