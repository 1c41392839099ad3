//! Looking at the tree of an L2 VM from outside.

use super::L2SeptState;
use crate::platform::Platform;

/// An entry in the Secure EPT of an L2 VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct L2SeptView {
    /// Level at which the walk ended; above the level asked for if a table is missing.
    pub level: u8,
    /// State of the entry.
    pub state: L2SeptState,
    /// GPA attributes as `TDG.MEM.PAGE.ATTR.RD` gives them for one VM: bit 15 valid, bits 7:0 R, W, Xs, Xu,
    /// verify guest paging, paging-write, supervisor shadow stack, suppress #VE. 0 for a free entry.
    pub attributes: u16,
}

impl Platform {
    /// The entry of a GPA and level in the tree of an L2 VM (1 to 3) of a TD, by the PA of its TDR.
    /// `None` if there is no such TD or VM.
    #[must_use]
    pub fn l2_sept(&self, tdr: u64, vm: usize, gpa: u64, level: u8) -> Option<L2SeptView> {
        let w = self.td_at(tdr)?.walk_l2(&self.tables, vm, gpa, level)?;
        Some(L2SeptView {
            level: w.level,
            state: w.content.state(),
            attributes: w.content.attributes().raw(),
        })
    }
}
