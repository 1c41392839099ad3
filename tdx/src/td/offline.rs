//! A processor goes offline.

use kvm_ops::{CpuId, Error, Field, Host, Result, SeamPort};

use super::Td;
use crate::topology::is_last_of_package;

impl<H: Host> Td<H> {
    /// Takes the state of every vCPU of this TD off `cpu`.
    pub(crate) fn leave_cpu(&self, cpu: CpuId) -> Result<()> {
        let seam = self.seam()?;
        if seam.package_of(cpu).is_none() {
            return Err(Error::Invalid(Field::Cpu, cpu.0.into()));
        }
        // The key of a TD is freed only after the caches of every package are written back, which
        // takes an online processor of each.
        if is_last_of_package(seam, cpu) && seam.key_ids().in_use() > 0 {
            return Err(Error::Busy);
        }
        if self.lock(&self.control).hkid().is_none() {
            return Ok(());
        }
        let _held = self.hold_out();
        for vcpu in self.ready_vcpus() {
            let mut associated = self.lock(&vcpu.associated);
            if *associated == Some(cpu) {
                self.flush_vcpu(&vcpu, &mut associated)
                    .map_err(|failed| self.failed(&failed))?;
            }
        }
        Ok(())
    }
}
