//! Commands of the platform for SEV and SEV-ES.

use super::super::common::*;
use super::{by_row, cell};
use soft_amd_sp::{Command, Platform, PlatformState, Status};

/// Every state of the platform.
pub(super) const STATES: [PlatformState; 3] = [
    PlatformState::Uninit,
    PlatformState::Init,
    PlatformState::Working,
];

fn platform_in(state: PlatformState) -> (Platform, u32) {
    let p = builder(1).build().unwrap();
    let mut handle = 1;
    if state != PlatformState::Uninit {
        init(&p).ok().unwrap();
        flush(&p);
    }
    if state == PlatformState::Working {
        let (_, out) = run_out(&p, Command::LAUNCH_START, &[]);
        handle = out.get("handle").unwrap() as u32;
    }
    (p, handle)
}

fn model(command: Command, state: PlatformState, peer: &Platform) -> String {
    let (p, handle) = platform_in(state);
    let before = p.snapshot().platform.to_string();
    let status = attempt(&p, peer, command, handle);
    cell(
        status,
        Some(before),
        Some(p.snapshot().platform.to_string()),
    )
}

fn attempt(p: &Platform, peer: &Platform, command: Command, handle: u32) -> Status {
    let len = soft_amd_sp::crypto::CERT_LEN as u64;
    match command {
        Command::INIT => init(p),
        Command::INIT_EX => run(p, command, &[("length", 0x24)]),
        Command::PEK_CSR => run(p, command, &[("address", SCRATCH), ("len", len)]),
        Command::GET_ID => run(p, command, &[("address", SCRATCH), ("len", 64)]),
        Command::PDH_CERT_EXPORT => {
            let fields = [
                ("pdh_cert_address", SCRATCH),
                ("pdh_cert_len", len),
                ("cert_chain_address", SCRATCH + 0x1000),
                ("cert_chain_len", 3 * len),
            ];
            run(p, command, &fields)
        }
        Command::PEK_CERT_IMPORT => {
            // The certificates that the platform made for itself are good enough to import.
            attempt(p, peer, Command::PDH_CERT_EXPORT, handle);
            let fields = [
                ("pek_cert_address", SCRATCH + 0x1000),
                ("pek_cert_len", len),
                ("oca_cert_address", SCRATCH + 0x1000 + len),
                ("oca_cert_len", len),
            ];
            run(p, command, &fields)
        }
        Command::RECEIVE_START => {
            let source = running(peer, 0, 6, &[0; 16]);
            let p_initialised = p.snapshot().platform != PlatformState::Uninit;
            if p_initialised {
                let fields = send_fields(peer, p, source);
                run(peer, Command::SEND_START, &fields).ok().unwrap();
            }
            let status = receive_start(peer, p, 0).0;
            on(peer, Command::DEACTIVATE, source).ok().unwrap();
            on(peer, Command::DECOMMISSION, source).ok().unwrap();
            flush(peer);
            status
        }
        Command::GUEST_STATUS | Command::DECOMMISSION => on(p, command, handle),
        Command::DF_FLUSH => {
            p.wbinvd_all();
            run(p, command, &[])
        }
        _ => run(p, command, &[]),
    }
}

/// The rows of these commands.
pub(super) fn rows(commands: &[Command]) -> Vec<(Command, Vec<String>)> {
    let peer = sev(2);
    by_row(commands, |c| STATES.map(|s| model(c, s, &peer)).to_vec())
}
