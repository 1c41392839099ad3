//! The encryption context of a guest: its name in firmware, its ASID, and the state of its launch.
//!
//! Moving a guest ([`crate::migrate`]) moves this value, the frames of [`crate::memory`] and the
//! VMSAs of [`crate::cell`].

use kvm_ops::moves::GuestName;
use kvm_ops::{AsidLease, Page, Pfn};

use crate::digest::SnpDigest;
use crate::migrate::Charge;

/// The name of a guest in firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Identity {
    /// The handle of an SEV or SEV-ES guest.
    Handle(u32),
    /// The context page (GCTX) of an SNP guest.
    Gctx(Pfn),
}

/// The state of a guest in firmware. For SEV and SEV-ES the numbers are those of GUEST_STATUS; an SNP guest is
/// in [`LaunchUpdate`](Self::LaunchUpdate) or [`Running`](Self::Running).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum GuestState {
    /// The VM has an ASID at most: firmware knows no guest.
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
    /// The state of a number of GUEST_STATUS.
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

/// The answer of GUEST_STATUS or SNP_GUEST_STATUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestStatus {
    /// The policy it was launched with.
    pub policy: u64,
    /// The ASID, 0 for none.
    pub asid: u32,
    /// The state, as the firmware numbers it.
    pub state: u8,
}

/// A guest in firmware, with the page that it occupies there.
#[derive(Debug)]
pub(crate) enum Guest {
    Handle(u32),
    Gctx(Page),
}

/// The encryption context: everything that moves with a guest's key, except its pages.
#[derive(Debug)]
pub(crate) struct Context {
    /// `None` between an undone launch and the next, and in a mirror, whose owner has the lease.
    pub(crate) lease: Option<AsidLease>,
    /// Firmware was given the ASID at least once: it needs a flush before its next guest.
    pub(crate) soiled: bool,
    /// Known to firmware from LAUNCH_START or RECEIVE_START on.
    pub(crate) guest: Option<Guest>,
    pub(crate) state: GuestState,
    pub(crate) policy: u64,
    pub(crate) vmsa_features: u64,
    /// The version of the GHCB protocol.
    pub(crate) ghcb_version: u16,
    /// The payment for the ASID.
    pub(crate) charge: Option<Charge>,
    /// SNP: the digest of the pages added so far.
    pub(crate) digest: SnpDigest,
    /// The launch measurement, from the end of the launch on.
    pub(crate) measurement: Option<[u8; 48]>,
}

impl Context {
    pub(crate) fn new(
        lease: AsidLease,
        policy: u64,
        vmsa_features: u64,
        ghcb_version: u16,
    ) -> Self {
        Self {
            lease: Some(lease),
            soiled: false,
            guest: None,
            state: GuestState::Uninit,
            policy,
            vmsa_features,
            ghcb_version,
            charge: None,
            digest: SnpDigest::new(),
            measurement: None,
        }
    }

    /// A mirror's copy: it names the guest, and has no key to pay for or give back.
    pub(crate) fn mirrored(&self) -> Self {
        Self {
            lease: None,
            soiled: false,
            guest: self.handle().map(Guest::Handle),
            charge: None,
            digest: SnpDigest::new(),
            ..*self
        }
    }

    pub(crate) fn identity(&self) -> Option<Identity> {
        match self.guest.as_ref()? {
            Guest::Handle(handle) => Some(Identity::Handle(*handle)),
            Guest::Gctx(page) => Some(Identity::Gctx(page.pfn())),
        }
    }

    pub(crate) fn handle(&self) -> Option<u32> {
        match self.guest {
            Some(Guest::Handle(handle)) => Some(handle),
            _ => None,
        }
    }

    /// The guest's name, as the receiver of a token gets it.
    pub(crate) fn name(&self) -> Option<GuestName> {
        Some(match self.guest.as_ref()? {
            Guest::Handle(handle) => GuestName::Handle(*handle),
            Guest::Gctx(page) => GuestName::Page(page.hpa()),
        })
    }

    pub(crate) fn gctx(&self) -> Option<Pfn> {
        match &self.guest {
            Some(Guest::Gctx(page)) => Some(page.pfn()),
            _ => None,
        }
    }
}
