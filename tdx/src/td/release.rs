//! The first step of the teardown: the key.

use kvm_ops::{Error, Hkid, Host, Result, SeamPort, Step};

use super::{Key, Td};
use crate::Leaf;
use crate::seamcall::{Failed, Outcome};
use crate::topology::one_cpu_per_package;

impl<H: Host> Td<H> {
    /// Gets all vCPUs out for ever and gives the key back. After a failure the TD is poisoned, and
    /// the call may be repeated: it goes on where it failed.
    pub(crate) fn end_key(&self) -> Result<()> {
        self.step.get().require_one_of(&[
            Step::Created,
            Step::Initialized,
            Step::Runnable,
            Step::Poisoned,
        ])?;
        self.close_gate();
        // Faults that are on their way end; those that come find the gate closed.
        drop(self.write_private());
        match self.release_key() {
            Ok(()) => {
                self.step.set(Step::KeyReleased);
                Ok(())
            }
            Err(failed) => {
                self.step.set(Step::Poisoned);
                self.lock(&self.control).failed = Some(failed);
                Err(failed.error())
            }
        }
    }

    /// Takes the key from wherever it is back to the pool.
    pub(crate) fn release_key(&self) -> Outcome {
        loop {
            let key = self.lock(&self.control).key;
            match key {
                Key::None => return Ok(()),
                Key::Leased(hkid) => self.return_key(hkid),
                Key::Assigned(hkid) => {
                    self.flush_vcpus()?;
                    let calls = self.calls_for(Leaf::MngVpflushdone)?;
                    calls.mng_vpflushdone(self.tdr_for(Leaf::MngVpflushdone)?)?;
                    self.lock(&self.control).key = Key::Flushed(hkid);
                }
                Key::Flushed(hkid) => {
                    self.write_caches_back()?;
                    let calls = self.calls_for(Leaf::MngKeyFreeid)?;
                    calls.mng_key_freeid(self.tdr_for(Leaf::MngKeyFreeid)?)?;
                    self.return_key(hkid);
                }
            }
        }
    }

    pub(crate) fn return_key(&self, hkid: Hkid) {
        let mut control = self.lock(&self.control);
        control.key = Key::None;
        control.keys_freed += 1;
        if let Some(seam) = self.host.seam() {
            seam.key_ids().give_back(hkid.0.into());
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
