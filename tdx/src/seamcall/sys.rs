//! TDH.SYS.RD: what the module is and allows.

use kvm_ops::SeamPort;

use super::{Calls, Leaf, Outcome, regs};

impl<S: SeamPort> Calls<'_, S> {
    /// Reads a read-only metadata field, once for all TDs of the machine.
    pub(crate) fn sys_rd(&self, field: u64) -> Outcome<u64> {
        let fields = self.seam.fields();
        if let Some(value) = fields.get(field) {
            return Ok(value);
        }
        let value = self.here(Leaf::SysRd, regs(0, field)).map(|out| out.r8)?;
        fields.keep(field, value);
        Ok(value)
    }
}
