//! Commands of SEV-SNP.

use super::super::common::{self, *};
use super::cell;
use soft_amd_sp::measure::PageType;
use soft_amd_sp::{Platform, RmpUpdate, SnpState, Status, VlekSeed};

const GCTX: u64 = 0x1000;
const PAGE: u64 = 0x50_0000;

fn platform_cell(command: Command, initialised: bool) -> String {
    let p = if initialised {
        snp(1)
    } else {
        let p = builder(1).build().unwrap();
        p.enable_snp_all();
        p
    };
    let name = |p: &Platform| Some(if p.snapshot().snp { "INIT" } else { "UNINIT" }.to_owned());
    let before = name(&p);
    let large = 0x80_0000;
    p.host_write(SCRATCH, &[0; 8]).unwrap();
    p.rmpupdate(PAGE, &RmpUpdate::firmware()).unwrap();
    let status = match command {
        Command::SNP_DF_FLUSH => {
            p.wbinvd_all();
            run(&p, SnpDfFlush)
        }
        Command::SNP_INIT_EX => {
            let init = SnpInitEx {
                flags: SnpInitFlags::INIT_RMP,
                ..Default::default()
            };
            run(&p, init)
        }
        Command::SNP_SHUTDOWN_EX => run(&p, SnpShutdownEx::default()),
        Command::SNP_PLATFORM_STATUS => {
            let status_paddr = PAGE.into();
            run(&p, SnpPlatformStatus { status_paddr })
        }
        Command::SNP_FEATURE_INFO => {
            let info = SnpFeatureInfo {
                feature_info_paddr: PAGE.into(),
                ..Default::default()
            };
            run(&p, info)
        }
        Command::SNP_PAGE_RECLAIM => reclaim(&p, PAGE),
        Command::SNP_PAGE_UNSMASH => {
            for i in 0..512 {
                let at = large + i * 0x1000;
                p.rmpupdate(at, &RmpUpdate::pre_guest(1, at)).unwrap();
            }
            let page_paddr = small(large);
            run(&p, SnpPageUnsmash { page_paddr })
        }
        Command::SNP_PAGE_MD_INIT => {
            let page_paddr = small(PAGE);
            run(&p, SnpPageMdInit { page_paddr })
        }
        Command::SNP_PAGE_SET_STATE => {
            let fix = SnpPageSetState {
                list_paddr: SCRATCH.into(),
                ..Default::default()
            };
            run(&p, fix)
        }
        Command::SNP_COMMIT => run(&p, SnpCommit::default()),
        Command::SNP_VLEK_LOAD => run(&p, vlek_load(&p, &VlekSeed::from_seed(1))),
        Command::SNP_GCTX_CREATE => {
            let gctx_paddr = page(PAGE);
            run(&p, SnpGctxCreate { gctx_paddr })
        }
        // Zeros are valid, or the command takes none.
        _ => run_zeros(&p, command),
    };
    cell(status, before, name(&p))
}

/// An SNP guest in a state, active where that is possible.
fn guest_in(state: SnpState, active: bool) -> Platform {
    let p = snp(1);
    gctx_create(&p, GCTX);
    if state == SnpState::Init {
        return p;
    }
    let policy = SnpPolicy::SMT | SnpPolicy::DEBUG;
    snp_launch_start(&p, GCTX, policy).ok().unwrap();
    if active {
        snp_activate(&p, GCTX, 1).ok().unwrap();
        snp_add(&p, GCTX, 1, PAGE, 0x8000, PageType::Secrets)
            .ok()
            .unwrap();
    }
    if state == SnpState::Running {
        snp_finish(&p, GCTX).ok().unwrap();
    }
    p
}

/// Runs the command on the guest of a context page with parameters that are valid.
fn attempt(p: &Platform, command: Command, gctx: u64) -> Status {
    use Command::*;
    let (next, out, gpa) = (PAGE + 0x1000, PAGE + 0x2000, 0x8000);
    p.rmpupdate(out, &RmpUpdate::firmware()).unwrap();
    let gctx_paddr = page(gctx);
    match command {
        SNP_LAUNCH_START => snp_launch_start(p, gctx, SnpPolicy::SMT),
        SNP_ACTIVATE => snp_activate(p, gctx, 2),
        SNP_ACTIVATE_EX => {
            let activate = SnpActivateEx {
                gctx_paddr,
                asid: 2.into(),
                ..Default::default()
            };
            run(p, activate)
        }
        SNP_LAUNCH_UPDATE => {
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, 0x9000)).unwrap();
            run(p, snp_update(gctx, next, PageType::Zero))
        }
        SNP_LAUNCH_FINISH => snp_finish(p, gctx),
        SNP_GUEST_REQUEST => {
            let mut page = [0; 4096];
            let at = soft_amd_sp::GuestPage::new(1, gpa, PAGE);
            if p.guest_read(&at, &mut page).is_ok() {
                let channel = soft_amd_sp::message::GuestChannel::from_secrets_page(&page, 0);
                let request = channel.unwrap().report_request(&[0; 64], 0).unwrap();
                p.host_write(SCRATCH, &request).unwrap();
            }
            let request = SnpGuestRequest {
                gctx_paddr,
                request_paddr: common::page(SCRATCH),
                response_paddr: common::page(out),
            };
            run(p, request)
        }
        SNP_PAGE_MOVE => {
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, gpa)).unwrap();
            // Refused where there is no page to fix.
            let _ = p.rmpupdate(PAGE, &RmpUpdate::pre_guest(1, gpa));
            let go = SnpPageMove {
                gctx_paddr,
                src_paddr: page(PAGE),
                dst_paddr: page(next),
                ..Default::default()
            };
            run(p, go)
        }
        SNP_DBG_DECRYPT => {
            let decrypt = SnpDbgDecrypt {
                gctx_paddr,
                src_paddr: page(PAGE),
                dst_paddr: page(out),
            };
            run(p, decrypt)
        }
        SNP_DBG_ENCRYPT => {
            let encrypt = SnpDbgEncrypt {
                gctx_paddr,
                src_paddr: page(SCRATCH),
                dst_paddr: page(PAGE),
            };
            run(p, encrypt)
        }
        SNP_GUEST_STATUS => {
            let status = SnpGuestStatus {
                gctx_paddr,
                status_paddr: out.into(),
            };
            run(p, status)
        }
        SNP_DECOMMISSION => run(p, SnpDecommission { gctx_paddr }),
        SNP_PAGE_SWAP_OUT | SNP_PAGE_SWAP_IN => {
            let records = PAGE + 0x3000;
            p.rmpupdate(records, &RmpUpdate::firmware()).unwrap();
            let page_paddr = small(records);
            // Refused where SNP is not initialised, and where there is no page to fix.
            let _ = run(p, SnpPageMdInit { page_paddr });
            let _ = p.rmpupdate(PAGE, &RmpUpdate::pre_guest(1, gpa));
            let leave = SnpPageSwapOut {
                gctx_paddr,
                src_paddr: page(PAGE),
                dst_paddr: page(out),
                mdata_paddr: records.into(),
                ..Default::default()
            };
            let left = run(p, leave);
            if command == SNP_PAGE_SWAP_OUT {
                return left;
            }
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, gpa)).unwrap();
            let come = SnpPageSwapIn {
                gctx_paddr,
                src_paddr: page(out),
                dst_paddr: page(next),
                mdata_paddr: records.into(),
                ..Default::default()
            };
            run(p, come)
        }
        other => unreachable!("{other} is not a command of an SNP guest"),
    }
}

fn guest_cell(p: &Platform, command: Command, gctx: u64) -> String {
    let name = |p: &Platform| p.snapshot().snp_guests.first().map(|g| g.state.to_string());
    let before = name(p);
    let status = attempt(p, command, gctx);
    cell(status, before, name(p))
}

fn is_activating(command: Command) -> bool {
    matches!(command, Command::SNP_ACTIVATE | Command::SNP_ACTIVATE_EX)
}

/// Tries a command of the platform.
pub(super) fn platform_row(command: Command) -> Vec<String> {
    [false, true].map(|s| platform_cell(command, s)).to_vec()
}

/// Tries a command on a guest in each state, active where the command and the state let it be.
pub(super) fn guest_row(command: Command) -> Vec<String> {
    SnpState::ALL
        .map(|s| guest_cell(&guest_in(s, !is_activating(command)), command, GCTX))
        .to_vec()
}

/// Tries the command on a guest that is active, is not, is not there, and before SNP_INIT.
pub(super) fn presence(command: Command) -> Vec<String> {
    use Command::*;
    let home = match command {
        SNP_LAUNCH_START => SnpState::Init,
        SNP_GUEST_REQUEST | SNP_PAGE_MOVE | SNP_PAGE_SWAP_OUT | SNP_PAGE_SWAP_IN => {
            SnpState::Running
        }
        _ => SnpState::Launch,
    };
    let active = match home {
        // It cannot have an ASID yet.
        SnpState::Init => super::NONE.to_owned(),
        _ => guest_cell(&guest_in(home, true), command, GCTX),
    };
    let uninit = builder(1).build().unwrap();
    uninit.enable_snp_all();
    vec![
        active,
        guest_cell(&guest_in(home, false), command, GCTX),
        guest_cell(&guest_in(home, true), command, GCTX + 0x1000),
        guest_cell(&uninit, command, GCTX),
    ]
}
