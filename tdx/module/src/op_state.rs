//! Operation states of a TD and the leaves allowed in each.

/// Operation state of a TD, which decides on the leaves that work on it.
///
/// The order of the numbers is the architecture's; [`OpState::name`] is the name in the manuals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OpState {
    /// Before TDH.MNG.INIT or an import.
    Uninitialized = 0,
    /// Being built and measured.
    Initialized = 1,
    /// After TDH.MR.FINALIZE.
    Runnable = 2,
    /// Runs while its memory is exported.
    LiveExport = 3,
    /// Exported further, without running.
    PausedExport = 4,
    /// The destination may start the TD.
    PostExport = 5,
    /// Immutable state imported; memory and the TD state follow.
    MemoryImport = 6,
    /// TD state imported; vCPUs follow.
    StateImport = 7,
    /// Imported as far as needed to run; not committed.
    PostImport = 8,
    /// Runs, while the rest of its memory is imported.
    LiveImport = 9,
    /// An import failed; the TD can only be torn down.
    FailedImport = 10,
}

impl OpState {
    /// Every state, in the order of their numbers.
    pub const ALL: [OpState; 11] = [
        OpState::Uninitialized,
        OpState::Initialized,
        OpState::Runnable,
        OpState::LiveExport,
        OpState::PausedExport,
        OpState::PostExport,
        OpState::MemoryImport,
        OpState::StateImport,
        OpState::PostImport,
        OpState::LiveImport,
        OpState::FailedImport,
    ];

    /// The name in the manuals.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            OpState::Uninitialized => "UNINITIALIZED",
            OpState::Initialized => "INITIALIZED",
            OpState::Runnable => "RUNNABLE",
            OpState::LiveExport => "LIVE_EXPORT",
            OpState::PausedExport => "PAUSED_EXPORT",
            OpState::PostExport => "POST_EXPORT",
            OpState::MemoryImport => "MEMORY_IMPORT",
            OpState::StateImport => "STATE_IMPORT",
            OpState::PostImport => "POST_IMPORT",
            OpState::LiveImport => "LIVE_IMPORT",
            OpState::FailedImport => "FAILED_IMPORT",
        }
    }

    /// The state with a number; an unknown number becomes a failed import, in which nothing runs.
    pub(crate) fn from_number(n: u8) -> Self {
        Self::ALL
            .get(usize::from(n))
            .copied()
            .unwrap_or(OpState::FailedImport)
    }

    /// Between the first bundle of an import and its end.
    pub(crate) const fn is_import_in_progress(self) -> bool {
        matches!(
            self,
            OpState::MemoryImport
                | OpState::StateImport
                | OpState::PostImport
                | OpState::LiveImport
        )
    }

    /// Tracking applies to the TD's pages: its vCPUs run or have run.
    pub(crate) const fn needs_tlb_tracking(self) -> bool {
        TLB_TRACKING_REQUIRED & 1 << self as u16 != 0
    }
}

/// Returns true if a host leaf, by its number, works on a TD in this state. Leaves that do not check the state have
/// no row and are allowed.
pub(crate) fn allows(leaf: u16, state: OpState) -> bool {
    ALLOWED
        .iter()
        .find(|(number, _)| *number == leaf)
        .is_none_or(|(_, states)| states & 1 << state as u16 != 0)
}

/// Returns true if a TD in this state can be bound as a service TD.
pub(crate) fn can_serve(state: OpState) -> bool {
    SERVICE_TD & 1 << state as u16 != 0
}

/// Returns true if a service TD can write fields of a target in this state. It can always read them.
pub(crate) fn can_be_written_by_service(state: OpState) -> bool {
    SERVTD_WR & 1 << state as u16 != 0
}

const SERVICE_TD: u16 = 0b01100111100;
const SERVTD_WR: u16 = 0b11111001111;

/// Host leaf number, states it works in (bit n is the state of number n).
#[rustfmt::skip]
const ALLOWED: &[(u16, u16)] = &[
    (0, 0b01000001100), // TDH.VP.ENTER
    (1, 0b00000000001), // TDH.MNG.ADDCX
    (2, 0b00000000010), // TDH.MEM.PAGE.ADD
    (3, 0b01111001110), // TDH.MEM.SEPT.ADD
    (4, 0b00010000010), // TDH.VP.ADDCX
    (5, 0b01100111110), // TDH.MEM.PAGE.RELOCATE
    (6, 0b01000001110), // TDH.MEM.PAGE.AUG
    (7, 0b01100111110), // TDH.MEM.RANGE.BLOCK
    (10, 0b00010000010), // TDH.VP.CREATE
    (11, 0b11111111110), // TDH.MNG.RD
    (12, 0b11111111110), // TDH.MEM.RD
    (13, 0b11111001110), // TDH.MNG.WR
    (14, 0b11111001110), // TDH.MEM.WR
    (15, 0b01100111110), // TDH.MEM.PAGE.DEMOTE
    (16, 0b00000000010), // TDH.MR.EXTEND
    (17, 0b00000000010), // TDH.MR.FINALIZE
    (18, 0b11111111111), // TDH.VP.FLUSH
    (21, 0b00000000001), // TDH.MNG.INIT
    (22, 0b00000000010), // TDH.VP.INIT
    (23, 0b01100111110), // TDH.MEM.PAGE.PROMOTE
    (25, 0b11111111110), // TDH.MEM.SEPT.RD
    (26, 0b11111111110), // TDH.VP.RD
    (29, 0b11100111110), // TDH.MEM.PAGE.REMOVE
    (30, 0b11111111110), // TDH.MEM.SEPT.REMOVE
    (38, 0b01111111110), // TDH.MEM.TRACK
    (39, 0b01100111110), // TDH.MEM.RANGE.UNBLOCK
    (43, 0b11111001110), // TDH.VP.WR
    (48, 0b01100001111), // TDH.SERVTD.BIND
    (49, 0b00000000011), // TDH.SERVTD.PREBIND
    (64, 0b00000111000), // TDH.EXPORT.ABORT
    (65, 0b00000001000), // TDH.EXPORT.BLOCKW
    (66, 0b00000000100), // TDH.EXPORT.RESTORE
    (68, 0b00000111000), // TDH.EXPORT.MEM
    (70, 0b00000001000), // TDH.EXPORT.PAUSE
    (71, 0b00000011000), // TDH.EXPORT.TRACK
    (72, 0b01000000100), // TDH.EXPORT.STATE.IMMUTABLE
    (73, 0b00000010000), // TDH.EXPORT.STATE.TD
    (74, 0b00000010000), // TDH.EXPORT.STATE.VP
    (75, 0b00000111100), // TDH.EXPORT.UNBLOCKW
    (80, 0b10111000000), // TDH.IMPORT.ABORT
    (81, 0b01100000000), // TDH.IMPORT.END
    (82, 0b00100000000), // TDH.IMPORT.COMMIT
    (83, 0b01111000000), // TDH.IMPORT.MEM
    (84, 0b00011000000), // TDH.IMPORT.TRACK
    (85, 0b00000000001), // TDH.IMPORT.STATE.IMMUTABLE
    (86, 0b00001000000), // TDH.IMPORT.STATE.TD
    (87, 0b00010000000), // TDH.IMPORT.STATE.VP
    (96, 0b00000000111), // TDH.MIG.STREAM.CREATE
];

const TLB_TRACKING_REQUIRED: u16 = 0b01000001100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_states_correspond() {
        for (n, state) in OpState::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, n);
            assert_eq!(OpState::from_number(n as u8), state);
        }
        assert_eq!(OpState::from_number(0xFF), OpState::FailedImport);
    }

    #[test]
    fn every_leaf_has_one_row_and_only_known_states() {
        let mut leaves: Vec<u16> = ALLOWED.iter().map(|(leaf, _)| *leaf).collect();
        leaves.sort_unstable();
        leaves.dedup();
        assert_eq!(leaves.len(), ALLOWED.len());
        assert!(
            ALLOWED
                .iter()
                .all(|(_, states)| states >> OpState::ALL.len() == 0)
        );
    }

    #[test]
    fn a_td_is_entered_only_in_the_states_it_runs_in() {
        let entered: Vec<_> = OpState::ALL.into_iter().filter(|s| allows(0, *s)).collect();
        let running = [OpState::Runnable, OpState::LiveExport, OpState::LiveImport];
        assert_eq!(entered, running);
        assert!(
            OpState::ALL
                .into_iter()
                .all(|s| s.needs_tlb_tracking() == running.contains(&s))
        );
    }
}
