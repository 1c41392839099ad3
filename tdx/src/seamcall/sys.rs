//! TDH.SYS.RD: what the module is and allows.

use kvm_ops::SeamPort;

use super::{Calls, Leaf, Outcome, regs};

impl<S: SeamPort> Calls<'_, S> {
    /// Reads a metadata field.
    pub(crate) fn sys_rd(&self, field: u64) -> Outcome<u64> {
        self.here(Leaf::SysRd, regs(0, field)).map(|out| out.r8)
    }
}
