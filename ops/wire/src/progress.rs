//! The progress of a migration.

use core::fmt;

/// The end that may run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The end that the guest leaves.
    Source,
    /// The end that it comes to.
    Target,
}

/// The steps of a migration, as both ends go through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing is agreed yet.
    New,
    /// Pages travel and the guest runs at the source.
    Copying,
    /// The guest is stopped; the rest travels.
    Stopped,
    /// The target has everything; the guest is still the source's.
    Prepared,
    /// The source has given the guest up: it is the target's.
    Committed,
    /// The guest runs at the target, and pages of it still follow.
    PostCopy,
    /// Both ends know it.
    Done,
    /// Given up; the guest is the source's.
    Cancelled,
    /// The guest ran at the target, and pages of it cannot follow: no end can run it any more.
    Lost,
}

impl Phase {
    /// The owner of the guest. There is one in every phase: a lost guest is the target's, to be torn down there.
    pub const fn owner(self) -> Owner {
        match self {
            Self::New | Self::Copying | Self::Stopped | Self::Prepared | Self::Cancelled => {
                Owner::Source
            }
            Self::Committed | Self::PostCopy | Self::Done | Self::Lost => Owner::Target,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "new",
            Self::Copying => "copying",
            Self::Stopped => "stopped",
            Self::Prepared => "prepared",
            Self::Committed => "committed",
            Self::PostCopy => "post-copy",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Lost => "lost",
        })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// A moment of a migration.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// The round: 0 copies everything, later ones what was written since.
    pub round: u32,
    /// Pages sent or received so far, with repetitions.
    pub pages: u64,
    /// Pages that are still to be sent in this round; at the target 0, and in [`Phase::PostCopy`] as many as the
    /// source said last.
    pub left: u64,
    /// Pages sent or received since the guest runs at its target, with repetitions.
    pub late: u64,
    /// Pages among those for which the guest waited there.
    pub on_demand: u64,
    /// Bytes on the link so far, over all links of the session.
    pub bytes: u64,
}

impl Progress {
    /// Nothing has travelled in this phase yet.
    pub const fn new(phase: Phase) -> Self {
        Self {
            phase,
            round: 0,
            pages: 0,
            left: 0,
            late: 0,
            on_demand: 0,
            bytes: 0,
        }
    }
}

/// The decision of a migration's watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    GoOn,
    /// Cancel. Without effect once the guest is the target's.
    Cancel,
}
