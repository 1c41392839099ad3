//! Tries every command in every state, beside what public sources say.

mod guest;
mod page;
mod platform;
mod reference;
mod snp;

use soft_amd_sp::{Command, GuestState, Status};

pub use page::Comparison;

/// The lists of commands, by what they are done to.
mod lists {
    use soft_amd_sp::Command::{self, *};

    /// Of the platform for SEV and SEV-ES.
    pub(super) const PLATFORM: &[Command] = &[
        INIT,
        INIT_EX,
        SHUTDOWN,
        FACTORY_RESET,
        PLATFORM_STATUS,
        PEK_GEN,
        PEK_CSR,
        PEK_CERT_IMPORT,
        PDH_CERT_EXPORT,
        PDH_GEN,
        DF_FLUSH,
        DOWNLOAD_FIRMWARE,
        GET_ID,
        NOP,
        LAUNCH_START,
        RECEIVE_START,
        GUEST_STATUS,
        DECOMMISSION,
    ];

    /// Of an SEV or SEV-ES guest.
    pub(super) const GUEST: &[Command] = &[
        LAUNCH_UPDATE_DATA,
        LAUNCH_UPDATE_VMSA,
        LAUNCH_MEASURE,
        LAUNCH_UPDATE_SECRET,
        LAUNCH_FINISH,
        ATTESTATION,
        SEND_START,
        SEND_UPDATE_DATA,
        SEND_UPDATE_VMSA,
        SEND_FINISH,
        SEND_CANCEL,
        RECEIVE_UPDATE_DATA,
        RECEIVE_UPDATE_VMSA,
        RECEIVE_FINISH,
        ACTIVATE,
        ACTIVATE_EX,
        DEACTIVATE,
        GUEST_STATUS,
        DECOMMISSION,
        DBG_DECRYPT,
        DBG_ENCRYPT,
        COPY,
    ];

    /// Of the SNP platform.
    pub(super) const SNP_PLATFORM: &[Command] = &[
        SNP_INIT,
        SNP_INIT_EX,
        SNP_SHUTDOWN,
        SNP_SHUTDOWN_EX,
        SNP_PLATFORM_STATUS,
        SNP_FEATURE_INFO,
        SNP_DF_FLUSH,
        SNP_PAGE_RECLAIM,
        SNP_PAGE_UNSMASH,
        SNP_PAGE_SET_STATE,
        SNP_PAGE_MD_INIT,
        SNP_CONFIG,
        SNP_DOWNLOAD_FIRMWARE_EX,
        SNP_COMMIT,
        SNP_VLEK_LOAD,
        SNP_GCTX_CREATE,
    ];

    /// Of an SNP guest.
    pub(super) const SNP_GUEST: &[Command] = &[
        SNP_LAUNCH_START,
        SNP_ACTIVATE,
        SNP_ACTIVATE_EX,
        SNP_LAUNCH_UPDATE,
        SNP_LAUNCH_FINISH,
        SNP_GUEST_REQUEST,
        SNP_PAGE_SWAP_OUT,
        SNP_PAGE_SWAP_IN,
        SNP_PAGE_MOVE,
        SNP_DBG_DECRYPT,
        SNP_DBG_ENCRYPT,
        SNP_GUEST_STATUS,
        SNP_DECOMMISSION,
    ];
}

/// A table as the model fills it: a row for each command, a cell for each state.
#[derive(Debug)]
pub struct Table {
    pub title: &'static str,
    pub states: Vec<String>,
    pub rows: Vec<(Command, Vec<String>)>,
    /// Answers of public sources, in the notation of [`reference`].
    pub reference: &'static str,
    /// The status that `.` means in the reference.
    pub wrong_state: &'static str,
}

/// A cell that cannot be.
pub const NONE: &str = "-";

/// Effect of a command: `=` leaves the state, `->X` leads to X, `free` ends the guest, and a number
/// is the status of a failure.
fn cell(status: Status, before: Option<String>, after: Option<String>) -> String {
    match (status, after) {
        (Status::SUCCESS, None) if before.is_some() => "free".to_owned(),
        (Status::SUCCESS, after) if after == before => "=".to_owned(),
        (Status::SUCCESS, Some(after)) => format!("->{after}"),
        (status, after) => {
            assert_eq!(before, after, "{status} changed the state");
            format!("{:#04x}", status.0)
        }
    }
}

fn names(states: &[&dyn std::fmt::Display]) -> Vec<String> {
    states.iter().map(ToString::to_string).collect()
}

fn by_row(
    commands: &[Command],
    row: impl Fn(Command) -> Vec<String>,
) -> Vec<(Command, Vec<String>)> {
    commands.iter().map(|c| (*c, row(*c))).collect()
}

/// Every table, filled by the running model.
pub fn tables() -> Vec<Table> {
    let columns = GuestState::ALL.map(guest::column);
    let guest_row = |i: usize| columns.iter().map(|c| c[i].clone()).collect();
    vec![
        Table {
            title: "Platform, SEV and SEV-ES",
            states: platform::STATES.map(|s| s.to_string()).to_vec(),
            rows: platform::rows(lists::PLATFORM),
            reference: reference::PLATFORM,
            wrong_state: "0x01",
        },
        Table {
            title: "SEV and SEV-ES guest",
            states: GuestState::ALL.map(|s| s.to_string()).to_vec(),
            rows: (0..)
                .map(guest_row)
                .zip(lists::GUEST)
                .map(|(r, c)| (*c, r))
                .collect(),
            reference: reference::GUEST,
            wrong_state: "0x02",
        },
        Table {
            title: "SEV and SEV-ES guest, where no state forbids the command",
            states: names(&[
                &"active",
                &"not active",
                &"no such guest",
                &"platform INIT",
                &"platform UNINIT",
            ]),
            rows: by_row(lists::GUEST, guest::presence),
            reference: reference::GUEST_PRESENCE,
            wrong_state: "0x02",
        },
        Table {
            title: "Platform, SEV-SNP",
            states: names(&[&"UNINIT", &"INIT"]),
            rows: by_row(lists::SNP_PLATFORM, snp::platform_row),
            reference: reference::SNP_PLATFORM,
            wrong_state: "0x01",
        },
        Table {
            title: "SEV-SNP guest",
            states: names(&[&"INIT", &"LAUNCH", &"RUNNING"]),
            rows: by_row(lists::SNP_GUEST, snp::guest_row),
            reference: reference::SNP_GUEST,
            wrong_state: "0x02",
        },
        Table {
            title: "SEV-SNP guest, where no state forbids the command",
            states: names(&[
                &"active",
                &"not active",
                &"no such guest",
                &"platform UNINIT",
            ]),
            rows: by_row(lists::SNP_GUEST, snp::presence),
            reference: reference::SNP_PRESENCE,
            wrong_state: "0x02",
        },
    ]
}
