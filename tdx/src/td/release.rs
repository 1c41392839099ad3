//! The first step of the teardown: the key.

use kvm_ops::{Error, Field, Host, Leaked, Result, SeamPort};

use super::{KeyState, Td};
use crate::Leaf;
use crate::seamcall::{Failed, Outcome};
use crate::topology::one_cpu_per_package;

impl<H: Host> Td<H> {
    /// Gets all vCPUs out for good and gives the key back. After a failure the TD is poisoned, and
    /// the call may be repeated: it goes on where it failed. It does nothing once the key is gone.
    pub(crate) fn end_key(&self) -> Result<()> {
        self.leave_moves();
        self.close_gate();
        // Faults under way end; later ones find the gate closed.
        drop(self.write_private());
        let key = self.lock(&self.control).hkid().map(|hkid| hkid.0);
        let released = self.release_key();
        if released.is_ok() {
            self.took_step("key released", key);
        }
        released.map_err(|failed| {
            let advice = "the KeyID stays with the TD: release it again, or abandon the VM";
            self.life.poison_by(failed.report(&self.life, Some(advice)));
            self.lock(&self.control).failed = Some(failed);
            failed.error()
        })
    }

    /// Takes the key from its state back to the pool.
    pub(crate) fn release_key(&self) -> Outcome {
        loop {
            let key = self.lock(&self.control).key;
            match key {
                KeyState::None => return Ok(()),
                KeyState::Leased => self.return_key(),
                KeyState::Assigned => {
                    self.flush_vcpus()?;
                    let calls = self.calls_for(Leaf::MngVpflushdone)?;
                    calls.mng_vpflushdone(self.tdr_for(Leaf::MngVpflushdone)?)?;
                    self.lock(&self.control).key = KeyState::Flushed;
                }
                KeyState::Flushed => {
                    self.write_caches_back()?;
                    let calls = self.calls_for(Leaf::MngKeyFreeid)?;
                    calls.mng_key_freeid(self.tdr_for(Leaf::MngKeyFreeid)?)?;
                    self.return_key();
                }
            }
        }
    }

    /// Gives the lease back to the pool. A lease that the pool refuses is counted as leaked.
    pub(crate) fn return_key(&self) {
        let lease = {
            let mut control = self.lock(&self.control);
            control.key = KeyState::None;
            control.lease.take()
        };
        let Some(lease) = lease else { return };
        let number = lease.number();
        let foreign = |_| Error::Invalid(Field::Hkid, number.into());
        let returned = self
            .seam()
            .and_then(|seam| seam.key_ids().give_back(lease).map_err(foreign));
        match returned {
            Ok(()) => self.account.key_freed(),
            Err(error) => {
                let what = Leaked::Key(number);
                self.account.leak_other(what, "give a KeyID back", error);
            }
        }
    }

    /// TDH.VP.FLUSH of every vCPU, where it is associated.
    fn flush_vcpus(&self) -> Outcome {
        for vcpu in self.ready_vcpus() {
            let mut associated = self.lock(&vcpu.associated);
            self.flush_vcpu(&vcpu, &mut associated)?;
        }
        Ok(())
    }

    fn write_caches_back(&self) -> Outcome {
        let calls = self.calls_for(Leaf::PhymemCacheWb)?;
        let cpus = one_cpu_per_package(calls.port())
            .map_err(|error| Failed::port(Leaf::PhymemCacheWb, error))?;
        for cpu in cpus {
            calls.phymem_cache_wb(cpu)?;
        }
        Ok(())
    }

    fn tdr_for(&self, leaf: Leaf) -> Outcome<kvm_ops::Hpa> {
        self.tdr().map_err(|error: Error| Failed::port(leaf, error))
    }
}
