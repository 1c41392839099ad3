//! Commands of SEV-SNP.

use super::super::common::*;
use super::cell;
use soft_amd_sp::{Command, CommandBuffer, Platform, RmpUpdate, SnpState, Status, snp_policy};

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
    let fields: &[_] = match command {
        Command::SNP_INIT_EX => &[("flags", 1)],
        Command::SNP_SHUTDOWN_EX => &[("len", 8)],
        Command::SNP_PLATFORM_STATUS => &[("status_paddr", PAGE)],
        Command::SNP_FEATURE_INFO => &[("length", 16), ("feature_info_paddr", PAGE)],
        Command::SNP_PAGE_RECLAIM => &[("paddr", PAGE)],
        Command::SNP_PAGE_UNSMASH => {
            for i in 0..512 {
                let at = large + i * 0x1000;
                p.rmpupdate(at, &RmpUpdate::pre_guest(1, at)).unwrap();
            }
            &[("paddr", large)]
        }
        Command::SNP_PAGE_SET_STATE => &[("length", 16), ("list_paddr", SCRATCH)],
        Command::SNP_COMMIT => &[("length", 4)],
        Command::SNP_GCTX_CREATE => &[("gctx_paddr", PAGE)],
        _ => &[],
    };
    if command == Command::SNP_DF_FLUSH {
        p.wbinvd_all();
    }
    let status = run(&p, command, fields);
    cell(status, before, name(&p))
}

/// An SNP guest in a state, active where that is possible.
fn guest_in(state: SnpState, active: bool) -> Platform {
    let p = snp(1);
    p.rmpupdate(GCTX, &RmpUpdate::firmware()).unwrap();
    let on = |command, fields: &[(&'static str, u64)]| {
        let mut all = vec![("gctx_paddr", GCTX)];
        all.extend_from_slice(fields);
        run(&p, command, &all).ok().unwrap();
    };
    on(Command::SNP_GCTX_CREATE, &[]);
    if state == SnpState::Init {
        return p;
    }
    on(
        Command::SNP_LAUNCH_START,
        &[("policy", 0x3_0000 | snp_policy::DEBUG)],
    );
    if active {
        on(Command::SNP_ACTIVATE, &[("asid", 1)]);
        snp_add(&p, GCTX, 1, PAGE, 0x8000, 5).ok().unwrap();
    }
    if state == SnpState::Running {
        on(Command::SNP_LAUNCH_FINISH, &[]);
    }
    p
}

/// Runs the command on the guest of a context page with parameters that are valid.
fn attempt(p: &Platform, command: Command, gctx: u64) -> Status {
    use Command::*;
    let (next, out, gpa) = (PAGE + 0x1000, PAGE + 0x2000, 0x8000);
    p.rmpupdate(out, &RmpUpdate::firmware()).unwrap();
    let buffer = CommandBuffer::new(command);
    if matches!(command, SNP_PAGE_SWAP_OUT | SNP_PAGE_SWAP_IN) {
        return p.run(&mut buffer.clone());
    }
    let buffer = buffer.with("gctx_paddr", gctx);
    let mut buffer = match command {
        SNP_LAUNCH_START => buffer.with("policy", 0x3_0000),
        SNP_ACTIVATE => buffer.with("asid", 2),
        SNP_ACTIVATE_EX => buffer.with("asid", 2).with("ex_len", 0x20),
        SNP_LAUNCH_UPDATE => {
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, 0x9000)).unwrap();
            buffer.with("flags", 3 << 1).with("address", next)
        }
        SNP_GUEST_REQUEST => {
            let mut page = [0; 4096];
            let at = soft_amd_sp::GuestPage::new(1, gpa, PAGE);
            if p.guest_read(&at, &mut page).is_ok() {
                let channel = soft_amd_sp::message::GuestChannel::from_secrets_page(&page, 0);
                let request = channel.unwrap().report_request(&[0; 64], 0).unwrap();
                p.host_write(SCRATCH, &request).unwrap();
            }
            buffer.with("req_paddr", SCRATCH).with("res_paddr", out)
        }
        SNP_PAGE_MOVE => {
            p.rmpupdate(next, &RmpUpdate::pre_guest(1, gpa)).unwrap();
            // Refused where there is no page to fix.
            let _ = p.rmpupdate(PAGE, &RmpUpdate::pre_guest(1, gpa));
            buffer.with("src", PAGE).with("dst", next)
        }
        SNP_DBG_DECRYPT => buffer.with("src", PAGE).with("dst", out),
        SNP_DBG_ENCRYPT => buffer.with("src", SCRATCH).with("dst", PAGE),
        SNP_GUEST_STATUS => buffer.with("address", out),
        _ => buffer,
    };
    p.run(&mut buffer)
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
