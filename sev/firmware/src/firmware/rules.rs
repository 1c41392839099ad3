//! The commands allowed in each state, and the changes they make. Nothing else decides this.

use crate::command::{Command, Field};
use std::fmt;

/// State of the platform for SEV and SEV-ES; the number is what PLATFORM_STATUS reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum PlatformState {
    /// Not initialised.
    Uninit = 0,
    /// Initialised, without guests.
    Init = 1,
    /// With guests.
    Working = 2,
}

/// State of an SEV or SEV-ES guest; the number is what GUEST_STATUS reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum GuestState {
    /// Being launched; memory is added.
    LaunchUpdate = 1,
    /// Measured; secrets are added.
    LaunchSecret = 2,
    /// May run.
    Running = 3,
    /// Being sent.
    SendUpdate = 4,
    /// Being received.
    ReceiveUpdate = 5,
    /// Sent; may not run here any more.
    Sent = 6,
}

impl GuestState {
    /// Every state a guest can be in.
    pub const ALL: [GuestState; 6] = [
        GuestState::LaunchUpdate,
        GuestState::LaunchSecret,
        GuestState::Running,
        GuestState::SendUpdate,
        GuestState::ReceiveUpdate,
        GuestState::Sent,
    ];
}

impl fmt::Display for GuestState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            GuestState::LaunchUpdate => "LUPDATE",
            GuestState::LaunchSecret => "LSECRET",
            GuestState::Running => "RUNNING",
            GuestState::SendUpdate => "SUPDATE",
            GuestState::ReceiveUpdate => "RUPDATE",
            GuestState::Sent => "SENT",
        })
    }
}

/// State of an SNP guest; the number is what SNP_GUEST_STATUS reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum SnpState {
    /// Created.
    Init = 0,
    /// Being launched.
    Launch = 1,
    /// May run.
    Running = 2,
}

impl SnpState {
    /// Every state.
    pub const ALL: [SnpState; 3] = [SnpState::Init, SnpState::Launch, SnpState::Running];
}

impl fmt::Display for SnpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            SnpState::Init => "INIT",
            SnpState::Launch => "LAUNCH",
            SnpState::Running => "RUNNING",
        })
    }
}

impl fmt::Display for PlatformState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PlatformState::Uninit => "UNINIT",
            PlatformState::Init => "INIT",
            PlatformState::Working => "WORKING",
        })
    }
}

/// Effect of an allowed command on the state of its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change<S> {
    /// Nothing, or the guest ends.
    None,
    /// The guest goes to this state.
    To(S),
}

/// Commands of which only the number is known to the model.
pub(crate) fn is_unsupported(command: Command) -> bool {
    use Command::*;
    matches!(command, DOWNLOAD_FIRMWARE | SNP_DOWNLOAD_FIRMWARE_EX)
}

pub(crate) fn platform_allows(command: Command, state: PlatformState) -> bool {
    use Command::*;
    use PlatformState::*;
    match command {
        SHUTDOWN | PLATFORM_STATUS | GET_ID | NOP => true,
        INIT | INIT_EX | FACTORY_RESET => state == Uninit,
        PEK_GEN | PEK_CERT_IMPORT => state == Init,
        PDH_GEN | PDH_CERT_EXPORT | PEK_CSR | DF_FLUSH | LAUNCH_START | RECEIVE_START => {
            state != Uninit
        }
        _ => state == Working,
    }
}

pub(crate) fn snp_platform_allows(command: Command, initialised: bool) -> bool {
    use Command::*;
    match command {
        SNP_SHUTDOWN | SNP_SHUTDOWN_EX | SNP_PLATFORM_STATUS | SNP_FEATURE_INFO => true,
        SNP_INIT | SNP_INIT_EX => !initialised,
        _ => initialised,
    }
}

/// The handle in the buffer of a command of an SEV or SEV-ES guest. The two commands that create a
/// guest have none to look up.
pub(crate) fn handle(command: Command) -> Option<&'static Field> {
    match command {
        Command::LAUNCH_START | Command::RECEIVE_START => None,
        _ => command.field("handle"),
    }
}

/// The context page's address in the buffer of a command of an SNP guest. The command that creates
/// a guest has none to look up.
pub(crate) fn context(command: Command) -> Option<&'static Field> {
    match command {
        Command::SNP_GCTX_CREATE => None,
        _ => command.field("gctx_paddr"),
    }
}

/// Change that a command of an SEV or SEV-ES guest makes; `None` if the state forbids it.
pub(crate) fn guest_change(command: Command, state: GuestState) -> Option<Change<GuestState>> {
    use Command::*;
    use GuestState::*;
    let only = |wanted, change| (state == wanted).then_some(change);
    match command {
        LAUNCH_UPDATE_DATA | LAUNCH_UPDATE_VMSA => only(LaunchUpdate, Change::None),
        LAUNCH_MEASURE => only(LaunchUpdate, Change::To(LaunchSecret)),
        LAUNCH_UPDATE_SECRET => only(LaunchSecret, Change::None),
        LAUNCH_FINISH => only(LaunchSecret, Change::To(Running)),
        ATTESTATION => matches!(state, LaunchSecret | Running | SendUpdate).then_some(Change::None),
        SEND_START => only(Running, Change::To(SendUpdate)),
        SEND_UPDATE_DATA | SEND_UPDATE_VMSA => only(SendUpdate, Change::None),
        SEND_FINISH => only(SendUpdate, Change::To(Sent)),
        SEND_CANCEL => only(SendUpdate, Change::To(Running)),
        RECEIVE_UPDATE_DATA | RECEIVE_UPDATE_VMSA => only(ReceiveUpdate, Change::None),
        RECEIVE_FINISH => only(ReceiveUpdate, Change::To(Running)),
        ACTIVATE | ACTIVATE_EX | DBG_DECRYPT | DBG_ENCRYPT | COPY => {
            (state != Sent).then_some(Change::None)
        }
        DEACTIVATE | GUEST_STATUS | DECOMMISSION => Some(Change::None),
        _ => None,
    }
}

/// Change that a command of an SNP guest makes; `None` if the state forbids it.
pub(crate) fn snp_change(command: Command, state: SnpState) -> Option<Change<SnpState>> {
    use Command::*;
    use SnpState::*;
    let only = |wanted, change| (state == wanted).then_some(change);
    match command {
        SNP_LAUNCH_START => only(Init, Change::To(Launch)),
        SNP_ACTIVATE | SNP_ACTIVATE_EX | SNP_DBG_DECRYPT | SNP_DBG_ENCRYPT => {
            (state != Init).then_some(Change::None)
        }
        SNP_LAUNCH_UPDATE => only(Launch, Change::None),
        SNP_LAUNCH_FINISH => only(Launch, Change::To(Running)),
        SNP_GUEST_REQUEST | SNP_PAGE_MOVE | SNP_PAGE_SWAP_OUT | SNP_PAGE_SWAP_IN => {
            only(Running, Change::None)
        }
        SNP_GUEST_STATUS | SNP_DECOMMISSION => Some(Change::None),
        _ => None,
    }
}

/// Commands that touch guest memory through the memory controller, and so need an ASID.
pub(crate) fn needs_activation(command: Command) -> bool {
    use Command::*;
    matches!(
        command,
        LAUNCH_UPDATE_DATA
            | LAUNCH_UPDATE_VMSA
            | LAUNCH_UPDATE_SECRET
            | SEND_UPDATE_DATA
            | SEND_UPDATE_VMSA
            | RECEIVE_UPDATE_DATA
            | RECEIVE_UPDATE_VMSA
            | DBG_ENCRYPT
            | COPY
            | SNP_LAUNCH_UPDATE
            | SNP_GUEST_REQUEST
            | SNP_PAGE_MOVE
            | SNP_PAGE_SWAP_OUT
            | SNP_PAGE_SWAP_IN
    )
}
