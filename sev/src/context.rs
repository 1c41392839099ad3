//! The encryption context of a guest: what names it to firmware, and how far its launch came.
//!
//! Moving a guest ([`crate::migrate`]) moves this value, the frames of [`crate::memory`] and the
//! VMSAs of [`crate::cell`].

use kvm_ops::{Asid, Pfn};

use crate::digest::SnpDigest;
use crate::migrate::Charge;

/// What names a guest to firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// The handle of an SEV or SEV-ES guest.
    Handle(u32),
    /// The context page (GCTX) of an SNP guest.
    Gctx(Pfn),
}

/// How far a guest came. For SEV and SEV-ES the numbers are those of GUEST_STATUS; an SNP guest is
/// in [`LaunchUpdate`](Self::LaunchUpdate) or [`Running`](Self::Running).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum GuestState {
    /// The VM has an ASID at most: no guest is known to firmware.
    Uninit = 0,
    /// Memory is measured and encrypted.
    LaunchUpdate = 1,
    /// Measured; the owner's secrets may be put in.
    LaunchSecret = 2,
    /// It may run.
    Running = 3,
    /// It is being sent.
    SendUpdate = 4,
    /// It is being received.
    ReceiveUpdate = 5,
    /// It was sent, and never runs here again.
    Sent = 6,
}

impl GuestState {
    /// The state of that number, as GUEST_STATUS gives it.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Uninit,
            1 => Self::LaunchUpdate,
            2 => Self::LaunchSecret,
            3 => Self::Running,
            4 => Self::SendUpdate,
            5 => Self::ReceiveUpdate,
            6 => Self::Sent,
            _ => return None,
        })
    }
}

/// What firmware says of a guest (GUEST_STATUS, SNP_GUEST_STATUS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStatus {
    /// The policy it was launched with.
    pub policy: u64,
    /// Its ASID, 0 while it has none.
    pub asid: u32,
    /// Its state, as the firmware numbers it.
    pub state: u8,
}

/// The encryption context: everything that moves when a guest's key changes its VM, but for its
/// pages.
#[derive(Debug)]
pub(crate) struct Context {
    /// The lease. `None` between an undone launch and the next.
    pub(crate) asid: Option<Asid>,
    /// Whether firmware was ever told of that ASID: it needs a flush before its next guest then.
    pub(crate) soiled: bool,
    /// Known to firmware from LAUNCH_START or RECEIVE_START on.
    pub(crate) identity: Option<Identity>,
    pub(crate) state: GuestState,
    pub(crate) policy: u64,
    pub(crate) vmsa_features: u64,
    /// The GHCB protocol that the guest was told.
    pub(crate) ghcb_version: u16,
    /// Who pays for the ASID.
    pub(crate) charge: Option<Charge>,
    /// SNP: the digest of the pages added so far.
    pub(crate) digest: SnpDigest,
    /// What the launch measured, at its end.
    pub(crate) measurement: Option<[u8; 48]>,
}

impl Context {
    pub(crate) fn new(asid: Asid, policy: u64, vmsa_features: u64, ghcb_version: u16) -> Self {
        Self {
            asid: Some(asid),
            soiled: false,
            identity: None,
            state: GuestState::Uninit,
            policy,
            vmsa_features,
            ghcb_version,
            charge: None,
            digest: SnpDigest::new(),
            measurement: None,
        }
    }

    /// A mirror's copy: it names the guest, and has no key of its own to pay for or give back.
    pub(crate) fn mirrored(&self) -> Self {
        Self {
            charge: None,
            asid: None,
            digest: self.digest,
            ..*self
        }
    }

    pub(crate) fn handle(&self) -> Option<u32> {
        match self.identity {
            Some(Identity::Handle(handle)) => Some(handle),
            _ => None,
        }
    }

    pub(crate) fn gctx(&self) -> Option<Pfn> {
        match self.identity {
            Some(Identity::Gctx(page)) => Some(page),
            _ => None,
        }
    }
}
