//! The SEAMCALL instruction of a software TDX machine.

use std::sync::Arc;

use kvm_ops::{
    CpuId, Error, Field, FieldCache, Hkid, Hpa, KeyPool, PackageId, Result, SeamPort, SeamRegs,
};
use soft_tdx_module::{Flow, HostLeaf, LpError, Platform, Regs, Status};

use super::cpus::Cpus;
use super::regs::{from_host, to_host};
use super::vcpus::{Vcpu, Vcpus};

/// SEAMCALLs of a software TDX module.
///
/// Each thread is assigned to one logical processor of the machine, the one with the fewest threads,
/// and keeps it while it lives. A processor executes for one thread at a time; a thread that waits for
/// it has a guest that runs there interrupted after a millisecond, so that threads may be more
/// than processors and no guest keeps another from running.
///
/// A kick ends whatever guest the processor runs, and the entry of every thread that waits for it.
/// **A thread that is just about to call may miss it** where processors are shared; its guest then
/// leaves at the next timer interrupt, at most `guest_steps_per_entry` operations later.
///
/// Clones are handles to the same machine.
#[derive(Clone, Debug)]
pub struct SoftSeam {
    platform: Arc<Platform>,
    /// Those whose entries run a processor.
    vcpus: Arc<Vcpus>,
    cpus: Arc<Cpus>,
    keys: Arc<KeyPool>,
    fields: Arc<FieldCache>,
}

impl SoftSeam {
    pub(super) fn new(platform: Arc<Platform>, vcpus: Arc<Vcpus>) -> Self {
        let config = platform.config();
        let keys = guest_keys(config.private_hkids, config.global_hkid);
        Self {
            cpus: Cpus::new(config.lp_package.len()),
            keys: Arc::new(KeyPool::new(keys)),
            fields: Arc::default(),
            platform,
            vcpus,
        }
    }

    fn call(&self, lp: usize, regs: &mut Regs) -> Result<Status, LpError> {
        let enters = regs.rax & LEAF == HostLeaf::VpEnter.number();
        match enters.then(|| self.vcpus.entered_by(regs.rcx)).flatten() {
            Some(vcpu) => self.enter(&vcpu, lp, regs),
            None => self.platform.seamcall(lp, regs),
        }
    }

    /// TDH.VP.ENTER of a vCPU that executes machine code.
    fn enter(&self, vcpu: &Vcpu, lp: usize, regs: &mut Regs) -> Result<Status, LpError> {
        let host = match self.platform.seamcall_step(lp, regs)? {
            Flow::Returned(status) => return Ok(status),
            Flow::Entered {
                guest, injected, ..
            } => vcpu.run(&self.platform, lp, guest, injected)?,
        };
        *regs = Regs {
            rsp: regs.rsp,
            ..host
        };
        Ok(Status(host.rax))
    }
}

/// The number of the leaf in RAX.
const LEAF: u64 = 0xffff;

/// The private KeyIDs beside the module's own: Linux gives that one the first, and where it lies
/// in the middle the longer side is taken.
fn guest_keys((first, last): (u16, u16), global: u16) -> std::ops::Range<u32> {
    let (first, end, global) = (u32::from(first), u32::from(last) + 1, u32::from(global));
    if !(first..end).contains(&global) {
        return first..end;
    }
    let (below, above) = (first..global, global + 1..end);
    if above.len() >= below.len() {
        above
    } else {
        below
    }
}

impl SeamPort for SoftSeam {
    unsafe fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        let lp = cpu.0 as usize;
        let cannot = Error::Invalid(Field::Cpu, cpu.0.into());
        let mut soft = from_host(rax, regs);
        let status = {
            let interrupt = || self.platform.kick(lp);
            let _turn = self.cpus.take(lp, interrupt).ok_or(cannot)?;
            loop {
                match self.call(lp, &mut soft) {
                    Ok(status) => break status,
                    // The platform is used beside this port.
                    Err(LpError::Busy { .. }) => std::thread::yield_now(),
                    Err(_) => return Err(cannot),
                }
            }
        };
        *regs = to_host(&soft);
        Ok(status.0)
    }

    fn package_of(&self, cpu: CpuId) -> Option<PackageId> {
        let lp = cpu.0 as usize;
        let package = self.platform.config().lp_package.get(lp)?;
        let online = self.platform.is_online(lp);
        online.then_some(PackageId(*package as u32))
    }

    fn cpus(&self) -> u32 {
        self.platform.config().lp_package.len() as u32
    }

    fn packages(&self) -> u32 {
        self.platform.config().packages as u32
    }

    fn this_cpu(&self) -> CpuId {
        CpuId(self.cpus.this(|lp| self.platform.is_online(lp)) as u32)
    }

    fn kick(&self, cpu: CpuId) {
        self.cpus.kick(cpu.0 as usize);
        self.platform.kick(cpu.0 as usize);
    }

    fn relax(&self) {
        std::thread::yield_now();
    }

    fn idle(&self) {
        std::thread::sleep(std::time::Duration::from_micros(50));
    }

    fn fields(&self) -> &FieldCache {
        &self.fields
    }

    fn key_ids(&self) -> &KeyPool {
        &self.keys
    }

    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa {
        let config = self.platform.config();
        let key = key.map_or(config.global_hkid, |key| key.0);
        // The KeyID is in the top bits of a 52-bit address.
        Hpa::new(page.get() | u64::from(key) << (52 - config.keyid_bits))
    }
}

#[cfg(test)]
mod tests {
    use super::guest_keys;

    #[test]
    fn the_modules_own_keyid_is_never_a_guests() {
        assert_eq!(guest_keys((32, 63), 32), 33..64);
        assert_eq!(guest_keys((32, 63), 63), 32..63);
        assert_eq!(guest_keys((32, 63), 40), 41..64);
        assert_eq!(guest_keys((32, 63), 60), 32..60);
        assert_eq!(guest_keys((32, 63), 7), 32..64);
        assert_eq!(guest_keys((5, 5), 5), 6..6);
    }
}
