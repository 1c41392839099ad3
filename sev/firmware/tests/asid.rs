//! ASIDs: activation, release, and the flushes between.

mod common;

use common::*;
use soft_amd_sp::{AsidState, Command, GuestId, Status};

const A: u32 = 6;

fn df_flush(p: &soft_amd_sp::Platform) -> Status {
    p.command(Command::DF_FLUSH, &mut [])
}

#[test]
fn an_asid_is_usable_only_after_wbinvd_on_every_core_and_df_flush() {
    let p = sev(1);
    let first = launch_start(&p, 0, A);
    let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
    let second = out.get("handle").unwrap() as u32;
    assert_eq!(activate(&p, first, A), Status::ACTIVE);
    assert_eq!(activate(&p, second, A), Status::ASID_OWNED);
    on(&p, Command::DEACTIVATE, first).ok().unwrap();
    assert_eq!(on(&p, Command::DEACTIVATE, first), Status::INACTIVE);
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
    let (a, b) = (launch_start(&p, 0, A), launch_start(&p, 0, A + 1));
    on(&p, Command::DEACTIVATE, a).ok().unwrap();
    p.wbinvd_all();
    on(&p, Command::DEACTIVATE, b).ok().unwrap();
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
    let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
    let handle = out.get("handle").unwrap() as u32;
    assert_eq!(activate(&p, handle, A), Status::DFFLUSH_REQUIRED);
    assert_eq!(df_flush(&p), Status::WBINVD_REQUIRED);
    flush(&p);
    activate(&p, handle, A).ok().unwrap();
}

#[test]
fn decommission_of_an_active_guest_is_refused_and_then_frees_the_handle() {
    let p = sev(4);
    let handle = launch_start(&p, 0, A);
    assert_eq!(on(&p, Command::DECOMMISSION, handle), Status::ACTIVE);
    assert_eq!(p.snapshot().owner_of(A), Some(GuestId::Handle(handle)));
    on(&p, Command::DEACTIVATE, handle).ok().unwrap();
    on(&p, Command::DECOMMISSION, handle).ok().unwrap();
    // Without guests the platform is INIT again, where no guest command is possible.
    assert_eq!(
        on(&p, Command::DECOMMISSION, handle),
        Status::INVALID_PLATFORM_STATE
    );
    let other = launch_start(&p, 0, A + 1);
    assert_ne!(other, handle);
    assert_eq!(on(&p, Command::GUEST_STATUS, handle), Status::INVALID_GUEST);
    let dirty = (A, AsidState::Dirty);
    assert!(p.snapshot().asids.contains(&dirty));
}

#[test]
fn guest_status_reports_asid_zero_while_inactive() {
    let p = sev(5);
    let handle = launch_start(&p, 0, A);
    let asid = |p| {
        let (status, out) = run_out(p, Command::GUEST_STATUS, &[("handle", handle.into())]);
        status.ok().unwrap();
        out.get("asid")
    };
    assert_eq!(asid(&p), Some(A.into()));
    on(&p, Command::DEACTIVATE, handle).ok().unwrap();
    assert_eq!(asid(&p), Some(0));
    let fields = [("handle", handle.into()), ("address", GUEST), ("len", 16)];
    assert_eq!(
        run(&p, Command::LAUNCH_UPDATE_DATA, &fields),
        Status::INACTIVE
    );
}

#[test]
fn ciphertext_hiding_splits_the_shared_asids() {
    let p = builder(6).build().unwrap();
    p.enable_snp_all();
    let start = |max: u64| {
        run(
            &p,
            Command::SNP_INIT_EX,
            &[("flags", 1 | 8), ("max_snp_asid", max)],
        )
    };
    assert_eq!(start(0), Status::INVALID_PARAM);
    assert_eq!(start(6), Status::INVALID_PARAM);
    start(2).ok().unwrap();
    for page in (TMR..TMR + (2 << 20)).step_by(4096) {
        p.rmpupdate(page, &soft_amd_sp::RmpUpdate::firmware())
            .unwrap();
    }
    let fields = [("flags", 1), ("tmr_address", TMR), ("tmr_len", 2 << 20)];
    run(&p, Command::INIT, &fields).ok().unwrap();
    flush(&p);
    let es = [("policy", 4)];
    let (status, out) = run_out(&p, Command::LAUNCH_START, &es);
    status.ok().unwrap();
    let handle = out.get("handle").unwrap() as u32;
    for asid in [1, 2, 6] {
        assert_eq!(activate(&p, handle, asid), Status::INVALID_ASID);
    }
    activate(&p, handle, 3).ok().unwrap();
    snp_launch(&p, 0x1000, 0x3_0000, 2);
    p.rmpupdate(0x2000, &soft_amd_sp::RmpUpdate::firmware())
        .unwrap();
    run(&p, Command::SNP_GCTX_CREATE, &[("gctx_paddr", 0x2000)])
        .ok()
        .unwrap();
    let fields = [("gctx_paddr", 0x2000), ("policy", 0x3_0000)];
    run(&p, Command::SNP_LAUNCH_START, &fields).ok().unwrap();
    for (asid, expected) in [
        (3, Status::INVALID_ASID),
        (2, Status::ASID_OWNED),
        (1, Status::SUCCESS),
    ] {
        let fields = [("gctx_paddr", 0x2000), ("asid", asid)];
        assert_eq!(run(&p, Command::SNP_ACTIVATE, &fields), expected, "{asid}");
    }
}

#[test]
fn activate_ex_checks_its_list_of_cores() {
    let p = sev(7);
    let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
    let handle = out.get("handle").unwrap();
    let mut fields = vec![
        ("ex_len", 0x18),
        ("handle", handle),
        ("asid", A.into()),
        ("numids", 2),
        ("ids_paddr", SCRATCH),
    ];
    p.host_write(SCRATCH, &[0, 0, 0, 0, 2, 0, 0, 0]).unwrap();
    assert_eq!(
        run(&p, Command::ACTIVATE_EX, &fields),
        Status::INVALID_PARAM
    );
    p.host_write(SCRATCH, &[0, 0, 0, 0, 1, 0, 0, 0]).unwrap();
    fields[0].1 = 0x17;
    assert_eq!(run(&p, Command::ACTIVATE_EX, &fields), Status::INVALID_LEN);
    fields[0].1 = 0x18;
    fields[3].1 = 3;
    assert_eq!(
        run(&p, Command::ACTIVATE_EX, &fields),
        Status::INVALID_PARAM
    );
    fields[3].1 = 2;
    run(&p, Command::ACTIVATE_EX, &fields).ok().unwrap();
}
