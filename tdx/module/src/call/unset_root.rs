//! The Secure EPT of a TD whose import failed before the TD had a root.
//!
//! Its EPTP is zero: no root page, and a walk of one level. So the module takes the words of physical page 0 for
//! leaf entries, by bits 20:12 of the GPA. The page is the host's; on hardware the TD's key garbles what is read,
//! the recorded module reads it as it stands.

use super::{Call, Leaf, busy};
use crate::sept::SeptState;
use crate::status::{Operand, Status};

/// A leaf; also the higher one of the two type bits of a state.
const LEAF: u64 = 1 << 7;
const LOCKED: u64 = 1 << 11;
const PRESENT: u64 = 0b111;
/// Bits of a leaf that TDH.MEM.SEPT.RD shows: suppression of #VE, the page, and the lowest eight.
const SHOWN: u64 = 1 << 63 | 0x000F_FFFF_FFFF_F000 | 0xFF;

/// An entry as the module has it in memory.
#[derive(Clone, Copy)]
struct RawEntry(u64);

impl RawEntry {
    /// The state of bits 7:6, 56:53 and 9; `None` for an encoding that no state has.
    fn state(self) -> Option<SeptState> {
        use SeptState as S;
        let w = self.0;
        let state = match (w >> 6 & 3) << 5 | (w >> 53 & 0xF) << 1 | w >> 9 & 1 {
            0x00 => S::NlMapped,
            0x08 => S::NlBlocked,
            0x0C => S::Removed,
            0x0E => S::Free,
            0x60 => S::Mapped,
            0x63 => S::ExportedDirty,
            0x64 => S::BlockedW,
            0x66 => S::ExportedBlockedW,
            0x67 => S::ExportedDirtyBlockedW,
            0x68 => S::Blocked,
            0x70 => S::Pending,
            0x73 => S::PendingExportedDirty,
            0x74 => S::PendingBlockedW,
            0x76 => S::PendingExportedBlockedW,
            0x77 => S::PendingExportedDirtyBlockedW,
            0x78 => S::PendingBlocked,
            _ => return None,
        };
        Some(state)
    }

    /// RCX and RDX of "S-EPT details". An encoding without a state shows 0 for it.
    fn details(self) -> (u64, u64) {
        let shown = if self.0 & LEAF != 0 { SHOWN } else { PRESENT };
        let state = self.state().map_or(0, |state| state as u64);
        (self.0 & shown, state << 8)
    }
}

impl Call<'_, '_> {
    /// Answers a leaf that reaches an entry of such a TD.
    ///
    /// Only TDH.MEM.SEPT.RD accepts every state; what other leaves would do with a page that such an entry
    /// names was never recorded, and they refuse its state here.
    pub(super) fn without_root(
        &mut self,
        gpa: u64,
        level: u8,
        accepts: impl Fn(SeptState) -> Leaf,
    ) -> Status {
        // No recording reads a higher level; page 0 then counts as zeros.
        let index = gpa >> 12 & 0x1FF;
        let entry = match level {
            0 => RawEntry(self.p.mem.host_read_u64(8 * index)),
            _ => RawEntry(0),
        };
        let (rcx, rdx) = entry.details();
        self.show((rcx, rdx | u64::from(level)));
        if entry.0 & LOCKED != 0 {
            return busy(Operand::RCX);
        }
        match accepts(SeptState::NlMapped) {
            Ok(()) => Status::SUCCESS,
            Err(status) => status,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::RawEntry;

    /// Words of page 0 and what the recorded module showed of them.
    #[test]
    fn words_of_the_hosts_page_show_as_recorded() {
        for (word, details) in [
            (0x16BC_E2BC_EFFD_3686, (0x000C_E2BC_EFFD_3086, 0)),
            (0x6E87_328F_FA2E_FCF4, (0x0007_328F_FA2E_F0F4, 0x100)),
            (0xB2FA_1808_DCFE_04F9, (0x800A_1808_DCFE_00F9, 0)),
            (0xC221_78F2_94EF_CD68, (0, 0)),
            (0x6735_1E09_8301_2B41, (1, 0)),
            (0, (0, 0x8400)),
        ] {
            assert_eq!(RawEntry(word).details(), details, "{word:#x}");
        }
    }
}
