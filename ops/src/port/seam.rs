//! The SEAMCALL instruction.

use crate::{CpuId, FieldCache, Hkid, Hpa, KeyPool, PackageId, Result};

/// Registers of a SEAMCALL besides RAX, in and out.
#[allow(missing_docs)] // Each is the register of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeamRegs {
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
}

/// The SEAMCALL instruction, on a machine whose TDX module is loaded.
///
/// The port knows about processors, because the module does: keys are configured and caches
/// written back once for each package, and a vCPU is flushed on the processor that it last ran on.
pub trait SeamPort: Send + Sync {
    /// Issues one SEAMCALL on the processor `cpu` and returns RAX, the status word. From another
    /// processor the call travels there (`smp_call_function_single`).
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if the caller cannot get onto `cpu`; nothing was
    /// called then.
    ///
    /// # Safety
    /// The caller owns the pages that the operands name, and stops using a page that it gives to the
    /// module until the module gives it back.
    unsafe fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64>;

    /// The package of an online processor, `None` if it is offline or does not exist.
    fn package_of(&self, cpu: CpuId) -> Option<PackageId>;

    /// The number of processors, online or not; their numbers are below this.
    fn cpus(&self) -> u32;

    /// The number of packages, with online processors or without.
    fn packages(&self) -> u32;

    /// The processor that the caller runs on, or is to issue its SEAMCALLs on. Online.
    fn this_cpu(&self) -> CpuId;

    /// Makes the processor leave the TD that it is in, if any (an IPI). Does not wait.
    fn kick(&self, cpu: CpuId);

    /// Called in every turn of a loop that waits for another processor.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// Called in every turn of a loop that waits for an event from outside, as a halted vCPU does.
    /// May sleep for a moment.
    fn idle(&self) {
        self.relax();
    }

    /// The values of the module's read-only fields, for all TDs of the machine: each is read by
    /// TDH.SYS.RD once. A module that is replaced comes with a new port.
    fn fields(&self) -> &FieldCache;

    /// The private KeyIDs of the machine: one pool for all TDs, however many handles the port has.
    fn key_ids(&self) -> &KeyPool;

    /// The address of `page` with a KeyID in its upper bits, as TDH.PHYMEM.PAGE.WBINVD takes it to
    /// tell whose cache lines are meant. The machine knows the place of the KeyID
    /// (IA32_MKTME_KEYID_PARTITIONING, MAXPHYADDR). `None` is the module's own KeyID, the global
    /// one that TDH.SYS.CONFIG was given.
    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa;
}
