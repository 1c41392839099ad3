//! Commands of the platform for SEV and SEV-ES.

use super::super::common::*;
use super::{by_row, cell};
use soft_amd_sp::crypto::CERT_LEN;
use soft_amd_sp::{Platform, PlatformState, Status};

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
        handle = new_guest(&p, OPEN);
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
    let len = CERT_LEN as u32;
    match command {
        Command::INIT => init(p),
        Command::INIT_EX => run(p, InitEx::default()),
        Command::PEK_CSR => {
            let csr = PekCsr {
                csr_paddr: SCRATCH.into(),
                csr_length: len.into(),
            };
            run(p, csr)
        }
        Command::GET_ID => {
            let get = GetId {
                id_paddr: SCRATCH.into(),
                id_length: 64.into(),
            };
            run(p, get)
        }
        Command::PDH_CERT_EXPORT => run(p, pdh_cert_export()),
        Command::PEK_CERT_IMPORT => {
            // The certificates that the platform made for itself are good enough to import.
            attempt(p, peer, Command::PDH_CERT_EXPORT, handle);
            let import = PekCertImport {
                pek_cert_paddr: (SCRATCH + 0x1000).into(),
                pek_cert_length: len.into(),
                oca_cert_paddr: (SCRATCH + 0x1000 + u64::from(len)).into(),
                oca_cert_length: len.into(),
                ..Default::default()
            };
            run(p, import)
        }
        Command::RECEIVE_START => {
            let source = running(peer, OPEN, 6, &[0; 16]);
            let p_initialised = p.snapshot().platform != PlatformState::Uninit;
            if p_initialised {
                run(peer, send_start(peer, p, source)).ok().unwrap();
            }
            let status = receive_start(peer, p, OPEN).0;
            deactivate(peer, source).ok().unwrap();
            decommission(peer, source).ok().unwrap();
            flush(peer);
            status
        }
        Command::GUEST_STATUS => {
            let status = GuestStatus {
                handle: handle.into(),
                ..Default::default()
            };
            run(p, status)
        }
        Command::DECOMMISSION => decommission(p, handle),
        Command::DF_FLUSH => {
            p.wbinvd_all();
            run(p, DfFlush)
        }
        // Zeros are valid, or the command takes none.
        _ => run_zeros(p, command),
    }
}

/// The rows of these commands.
pub(super) fn rows(commands: &[Command]) -> Vec<(Command, Vec<String>)> {
    let peer = sev(2);
    by_row(commands, |c| STATES.map(|s| model(c, s, &peer)).to_vec())
}
