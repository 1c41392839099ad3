//! Faults on purpose: a wrapper around any port that fails chosen calls.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use spin::Mutex;

use super::{
    DevicePort, HeldPort, Host, NestedFaults, PagePort, PspPort, Runs, SeamPort, SeamRegs, SevPort,
    SharedMemory, TdPort, VmPort,
};
use crate::guest::GuestProgram;
use crate::{
    Asid, AsidPools, CpuId, Error, FieldCache, Gfn, Gpa, Hkid, Hpa, KeyPool, Level, MemSlot,
    OpName, PackageId, Page, PortId, Result, SharedMask, TdVcpuState, Tech, VcpuId, Vendor, VmId,
    VmParams,
};

/// A port that fails the calls that its [`FaultPlan`] names, without making them. All other calls
/// reach the port inside.
///
/// Use it to walk through the error paths of a back end: fail the first call of a life, then the
/// second, and so on, and check after each that every page and key is freed or reported.
///
/// ```
/// use std::sync::Arc;
/// use kvm_ops::{Error, Fault, FaultPlan, InjectedHost, Kind, Tech, Vendor, VmConfig, create};
/// use kvm_ops::sim::SimHost;
///
/// let plan = Arc::new(FaultPlan::new());
/// let host = InjectedHost::new(SimHost::new(Vendor::Intel), plan.clone());
/// const TDH_MNG_CREATE: u64 = 9;
/// plan.arm(Fault::nth(1).of(TDH_MNG_CREATE).status(0x8000_0200_0000_0000)); // TDX_OPERAND_BUSY
/// let config = VmConfig::new(Kind::Of(Tech::Tdx));
/// let td = create(&host, &config)?; // the back end tries a busy call again
/// assert_eq!(plan.happened(), 1);
/// # drop(td);
/// # Ok::<(), kvm_ops::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FaultInjector<P> {
    port: P,
    plan: Arc<FaultPlan>,
}

impl<P> FaultInjector<P> {
    /// Wraps a port. Several ports may share a plan.
    pub const fn new(port: P, plan: Arc<FaultPlan>) -> Self {
        Self { port, plan }
    }

    /// The port inside.
    pub const fn inner(&self) -> &P {
        &self.port
    }
}

/// The faults that are armed. Shared by the wrapped ports and the test that arms them.
#[derive(Default)]
pub struct FaultPlan(Mutex<State>);

#[derive(Default)]
struct State {
    faults: Vec<Fault>,
    happened: u64,
}

/// One fault: the calls that it meets, and the answer that they get.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    call: Option<u64>,
    when: When,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug)]
enum When {
    /// After `left` calls pass, the next `times` calls fail.
    Nth { left: u64, times: u64 },
    /// Every `every`th call fails; `count` calls came since the last one.
    Every { every: u64, count: u64 },
    /// One call in `one_in` fails, at random.
    Random { state: u64, one_in: u64 },
}

/// The answer of a call that is not made.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Status(u64),
    Error(Error),
}

impl Fault {
    const fn new(when: When) -> Self {
        Self {
            call: None,
            when,
            outcome: Outcome::Error(Error::Busy),
        }
    }

    /// Fails the `n`th call from now, counted from 1.
    pub const fn nth(n: u64) -> Self {
        Self::new(When::Nth {
            left: n.saturating_sub(1),
            times: 1,
        })
    }

    /// Fails every `n`th call.
    pub const fn every(n: u64) -> Self {
        Self::new(When::Every { every: n, count: 0 })
    }

    /// Fails one call in `one_in`, chosen at random from `seed`. The same seed and the same calls give
    /// the same faults.
    pub const fn random(seed: u64, one_in: u64) -> Self {
        Self::new(When::Random {
            state: seed,
            one_in,
        })
    }

    /// Fails that many calls one after the other, for a fault made by [`nth`](Self::nth).
    pub const fn times(mut self, calls: u64) -> Self {
        if let When::Nth { left, .. } = self.when {
            self.when = When::Nth { left, times: calls };
        }
        self
    }

    /// Meets only calls of this number: the leaf of a SEAMCALL (RAX bits 15:0), the id of an SP
    /// command, or one of the constants of [`FaultPlan`].
    pub const fn of(mut self, call: u64) -> Self {
        self.call = Some(call);
        self
    }

    /// The call returns this status word: RAX of a SEAMCALL, the firmware's status, EAX of an RMP
    /// instruction. [`PagePort::alloc`] has no status and fails with
    /// [`Error::NoMemory`](crate::Error::NoMemory).
    pub const fn status(mut self, status: u64) -> Self {
        self.outcome = Outcome::Status(status);
        self
    }

    /// The port itself fails with this error.
    pub const fn error(mut self, error: Error) -> Self {
        self.outcome = Outcome::Error(error);
        self
    }

    /// Counts a call. True if it fails.
    fn meets(&mut self, call: u64) -> bool {
        if self.call.is_some_and(|only| only != call) {
            return false;
        }
        match &mut self.when {
            When::Nth { times: 0, .. } => false,
            When::Nth { left: 0, times } => {
                *times -= 1;
                true
            }
            When::Nth { left, .. } => {
                *left -= 1;
                false
            }
            When::Every { every, count } => {
                *count += 1;
                let met = *every != 0 && *count >= *every;
                if met {
                    *count = 0;
                }
                met
            }
            When::Random { state, one_in } => split_mix(state).checked_rem(*one_in) == Some(0),
        }
    }

    /// True for an [`nth`](Self::nth) fault whose calls all failed.
    const fn is_spent(&self) -> bool {
        matches!(self.when, When::Nth { times: 0, .. })
    }
}

/// SplitMix64 (Steele, Lea, Flood, 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl FaultPlan {
    /// The call number of [`PagePort::alloc`].
    pub const ALLOC: u64 = 1 << 32;
    /// The call number of [`PspPort::rmpupdate`].
    pub const RMPUPDATE: u64 = 2 << 32;
    /// The call number of [`PspPort::psmash`].
    pub const PSMASH: u64 = 3 << 32;
    /// The call number of [`Host::create_vm`].
    pub const CREATE_VM: u64 = 4 << 32;
    /// The call number of [`VmPort::create_vcpu`].
    pub const CREATE_VCPU: u64 = 5 << 32;
    /// The call number of [`VmPort::set_memory_slot`].
    pub const SET_SLOT: u64 = 6 << 32;
    /// The call number of [`VmPort::delete_memory_slot`].
    pub const DELETE_SLOT: u64 = 7 << 32;
    /// The call number of [`VmPort::close`]. The VM below is closed all the same when it is dropped.
    pub const CLOSE: u64 = 8 << 32;
    /// The call number of [`SharedMemory::set_shared`].
    pub const SET_SHARED: u64 = 9 << 32;
    /// The call number of [`SevPort::bind_asid`].
    pub const BIND_ASID: u64 = 10 << 32;
    /// The call number of [`SevPort::map_encrypted`].
    pub const MAP_ENCRYPTED: u64 = 11 << 32;
    /// The call number of [`VmPort::take_guest`].
    pub const TAKE_GUEST: u64 = 12 << 32;

    /// A plan without faults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a fault. Faults are asked in the order in which they were armed; a call that several meet
    /// counts for each and gets the answer of the first.
    pub fn arm(&self, fault: Fault) {
        self.0.lock().faults.push(fault);
    }

    /// Removes all faults. True if each [`nth`](Fault::nth) fault among them happened.
    pub fn disarm(&self) -> bool {
        self.0
            .lock()
            .faults
            .drain(..)
            .all(|fault| fault.is_spent() || !matches!(fault.when, When::Nth { .. }))
    }

    /// The number of calls that failed so far.
    pub fn happened(&self) -> u64 {
        self.0.lock().happened
    }

    fn meets(&self, call: u64) -> Option<Outcome> {
        let mut state = self.0.lock();
        let mut outcome = None;
        for fault in &mut state.faults {
            if fault.meets(call) {
                outcome = outcome.or(Some(fault.outcome));
            }
        }
        state.happened += u64::from(outcome.is_some());
        outcome
    }

    /// Counts a call, for a port that asks for itself. Returns the status of a call that fails, or `None` for a call to
    /// make.
    ///
    /// # Errors
    /// The error of a fault that has one.
    pub fn status(&self, call: u64) -> Result<Option<u64>> {
        match self.meets(call) {
            None => Ok(None),
            Some(Outcome::Status(status)) => Ok(Some(status)),
            Some(Outcome::Error(error)) => Err(error),
        }
    }

    /// Fails a call that has no status.
    fn check(&self, call: u64, without_status: Error) -> Result<()> {
        match self.meets(call) {
            None => Ok(()),
            Some(Outcome::Status(_)) => Err(without_status),
            Some(Outcome::Error(error)) => Err(error),
        }
    }
}

impl fmt::Debug for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.lock();
        f.debug_struct("FaultPlan")
            .field("faults", &state.faults)
            .field("happened", &state.happened)
            .finish()
    }
}

impl<P: SeamPort> SeamPort for FaultInjector<P> {
    unsafe fn seamcall(&self, cpu: CpuId, rax: u64, regs: &mut SeamRegs) -> Result<u64> {
        match self.plan.status(rax & 0xffff)? {
            Some(status) => Ok(status),
            // SAFETY: the caller keeps the contract, which is the same.
            None => unsafe { self.port.seamcall(cpu, rax, regs) },
        }
    }

    fn package_of(&self, cpu: CpuId) -> Option<PackageId> {
        self.port.package_of(cpu)
    }

    fn cpus(&self) -> u32 {
        self.port.cpus()
    }

    fn packages(&self) -> u32 {
        self.port.packages()
    }

    fn this_cpu(&self) -> CpuId {
        self.port.this_cpu()
    }

    fn kick(&self, cpu: CpuId) {
        self.port.kick(cpu);
    }

    fn relax(&self) {
        self.port.relax();
    }

    fn idle(&self) {
        self.port.idle();
    }

    fn fields(&self) -> &FieldCache {
        self.port.fields()
    }

    fn key_ids(&self) -> &KeyPool {
        self.port.key_ids()
    }

    fn with_key_id(&self, page: Hpa, key: Option<Hkid>) -> Hpa {
        self.port.with_key_id(page, key)
    }
}

impl<P: PspPort> PspPort for FaultInjector<P> {
    unsafe fn command(&self, id: u32, buffer: &mut [u8]) -> Result<u32> {
        match self.plan.status(id.into())? {
            Some(status) => Ok(status as u32),
            // SAFETY: the caller keeps the contract, which is the same.
            None => unsafe { self.port.command(id, buffer) },
        }
    }

    fn wbinvd_all(&self) {
        self.port.wbinvd_all();
    }

    unsafe fn rmpupdate(&self, page: Hpa, entry: &[u8; 16]) -> Result<u32> {
        match self.plan.status(FaultPlan::RMPUPDATE)? {
            Some(status) => Ok(status as u32),
            // SAFETY: the caller keeps the contract, which is the same.
            None => unsafe { self.port.rmpupdate(page, entry) },
        }
    }

    unsafe fn psmash(&self, page: Hpa) -> Result<u32> {
        match self.plan.status(FaultPlan::PSMASH)? {
            Some(status) => Ok(status as u32),
            // SAFETY: the caller keeps the contract, which is the same.
            None => unsafe { self.port.psmash(page) },
        }
    }

    fn rmpread(&self, page: Hpa) -> Result<[u8; 16]> {
        self.port.rmpread(page)
    }

    fn relax(&self) {
        self.port.relax();
    }

    fn asid_pools(&self) -> &AsidPools {
        self.port.asid_pools()
    }

    fn c_bit(&self) -> u32 {
        self.port.c_bit()
    }

    fn asids(&self) -> (u32, u32) {
        self.port.asids()
    }
}

impl<P: PagePort> PagePort for FaultInjector<P> {
    fn id(&self) -> PortId {
        self.port.id()
    }

    fn alloc(&self, level: Level) -> Result<Page> {
        self.plan.check(FaultPlan::ALLOC, Error::NoMemory)?;
        self.port.alloc(level)
    }

    fn free(&self, page: Page) -> Result<(), Page> {
        self.port.free(page)
    }

    fn write(&self, at: Hpa, data: &[u8]) -> Result<()> {
        self.port.write(at, data)
    }

    fn read(&self, at: Hpa, data: &mut [u8]) -> Result<()> {
        self.port.read(at, data)
    }
}

/// Failures of a VM's port have no status: a fault with one gives [`Error::NoMemory`].
impl<P: VmPort> VmPort for FaultInjector<P> {
    type Vcpu = P::Vcpu;

    fn create_vcpu(&self, id: VcpuId) -> Result<P::Vcpu> {
        self.plan.check(FaultPlan::CREATE_VCPU, Error::NoMemory)?;
        self.port.create_vcpu(id)
    }

    fn set_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.plan.check(FaultPlan::SET_SLOT, Error::NoMemory)?;
        self.port.set_memory_slot(slot)
    }

    fn delete_memory_slot(&self, slot: &MemSlot) -> Result<()> {
        self.plan.check(FaultPlan::DELETE_SLOT, Error::NoMemory)?;
        self.port.delete_memory_slot(slot)
    }

    fn dirty_log(&self, slot: &MemSlot, bitmap: &mut [u64]) -> Result<()> {
        self.port.dirty_log(slot, bitmap)
    }

    fn set_tss_addr(&self, gpa: Gpa) -> Result<()> {
        self.port.set_tss_addr(gpa)
    }

    fn set_identity_map_addr(&self, gpa: Gpa) -> Result<()> {
        self.port.set_identity_map_addr(gpa)
    }

    fn has_emulated_msr(&self, index: u32) -> bool {
        self.port.has_emulated_msr(index)
    }

    fn deliver_interrupt(&self, vcpu: VcpuId, vector: u8) -> Result<()> {
        self.port.deliver_interrupt(vcpu, vector)
    }

    fn take_guest(&self, from: &Self) -> Result<()> {
        self.plan.check(FaultPlan::TAKE_GUEST, Error::NoMemory)?;
        self.port.take_guest(&from.port)
    }

    fn held(&self) -> Option<&dyn HeldPort> {
        self.port.held()
    }

    fn td(&self) -> Option<&dyn TdPort> {
        self.port.td().map(|_| self as &dyn TdPort)
    }

    fn sev(&self) -> Option<&dyn SevPort> {
        self.port.sev().map(|_| self as &dyn SevPort)
    }

    fn devices(&self) -> Option<&dyn DevicePort> {
        self.port.devices()
    }

    fn close(self) -> Result<()> {
        self.plan.check(FaultPlan::CLOSE, Error::NoMemory)?;
        self.port.close()
    }
}

impl<P: VmPort> FaultInjector<P> {
    fn td_below(&self) -> Result<&dyn TdPort> {
        static TDS: OpName = OpName("TDs");
        self.port.td().ok_or(Error::HostLacks(&TDS))
    }

    fn sev_below(&self) -> Result<&dyn SevPort> {
        static SEV: OpName = OpName("SEV guests");
        self.port.sev().ok_or(Error::HostLacks(&SEV))
    }
}

/// The shared memory of a TD or of an SEV guest, whichever the port below offers.
impl<P: VmPort> SharedMemory for FaultInjector<P> {
    fn set_shared(&self, first: Gfn, pages: u64, shared: bool) -> Result<()> {
        self.plan.check(FaultPlan::SET_SHARED, Error::NoMemory)?;
        match self.port.td() {
            Some(td) => td.set_shared(first, pages, shared),
            None => self.sev_below()?.set_shared(first, pages, shared),
        }
    }

    fn read_slot(&self, gpa: Gpa, data: &mut [u8]) -> Result<()> {
        match self.port.td() {
            Some(td) => td.read_slot(gpa, data),
            None => self.sev_below()?.read_slot(gpa, data),
        }
    }

    fn write_slot(&self, gpa: Gpa, data: &[u8]) -> Result<()> {
        match self.port.td() {
            Some(td) => td.write_slot(gpa, data),
            None => self.sev_below()?.write_slot(gpa, data),
        }
    }
}

impl<P: VmPort> TdPort for FaultInjector<P> {
    fn td_vcpu_created(&self, vcpu: VcpuId, tdvpr: Hpa) -> Result<()> {
        self.td_below()?.td_vcpu_created(vcpu, tdvpr)
    }

    fn td_read_msr(&self, vcpu: VcpuId, index: u32) -> Result<Option<u64>> {
        self.td_below()?.td_read_msr(vcpu, index)
    }

    fn td_write_msr(&self, vcpu: VcpuId, index: u32, value: u64) -> Result<bool> {
        self.td_below()?.td_write_msr(vcpu, index, value)
    }

    fn td_wait(&self, vcpu: VcpuId, interrupts: bool) -> bool {
        self.port
            .td()
            .is_some_and(|td| td.td_wait(vcpu, interrupts))
    }

    fn td_take_nmi(&self, vcpu: VcpuId) -> bool {
        self.port.td().is_some_and(|td| td.td_take_nmi(vcpu))
    }

    fn td_vcpu_state(&self, vcpu: VcpuId) -> Result<Option<TdVcpuState>> {
        self.td_below()?.td_vcpu_state(vcpu)
    }

    fn set_td_vcpu_state(&self, vcpu: VcpuId, tdvpr: Hpa, state: &TdVcpuState) -> Result<()> {
        self.td_below()?.set_td_vcpu_state(vcpu, tdvpr, state)
    }

    fn td_instructions(&self, tdvpr: Hpa) -> Option<u64> {
        self.port.td()?.td_instructions(tdvpr)
    }

    fn td_clock(&self) -> Option<u64> {
        self.port.td()?.td_clock()
    }

    fn load_td_program(
        &self,
        vcpu: VcpuId,
        tdvpr: Hpa,
        mask: SharedMask,
        program: Box<dyn GuestProgram>,
    ) -> Result<()> {
        self.td_below()?.load_td_program(vcpu, tdvpr, mask, program)
    }
}

impl<P: VmPort> SevPort for FaultInjector<P> {
    fn bind_asid(&self, asid: Option<Asid>, mask: SharedMask) -> Result<()> {
        self.plan.check(FaultPlan::BIND_ASID, Error::NoMemory)?;
        self.sev_below()?.bind_asid(asid, mask)
    }

    fn map_encrypted(&self, gfn: Gfn, level: Level, page: Option<&Page>) -> Result<()> {
        self.plan.check(FaultPlan::MAP_ENCRYPTED, Error::NoMemory)?;
        self.sev_below()?.map_encrypted(gfn, level, page)
    }

    fn handle_nested_faults(&self, handler: Option<Arc<dyn NestedFaults>>) -> Result<()> {
        self.sev_below()?.handle_nested_faults(handler)
    }
}

/// A host all of whose ports fail by one [`FaultPlan`].
#[derive(Clone, Debug)]
pub struct InjectedHost<H: Host> {
    host: H,
    plan: Arc<FaultPlan>,
    seam: Option<FaultInjector<H::Seam>>,
    psp: Option<FaultInjector<H::Psp>>,
    pages: Option<FaultInjector<H::Pages>>,
}

impl<H: Host> InjectedHost<H>
where
    H::Seam: Clone,
    H::Psp: Clone,
    H::Pages: Clone,
{
    /// Wraps a host whose ports are handles.
    pub fn new(host: H, plan: Arc<FaultPlan>) -> Self {
        let seam = host.seam().cloned();
        let psp = host.psp().cloned();
        let pages = host.pages().cloned();
        Self {
            host,
            seam: seam.map(|port| FaultInjector::new(port, plan.clone())),
            psp: psp.map(|port| FaultInjector::new(port, plan.clone())),
            pages: pages.map(|port| FaultInjector::new(port, plan.clone())),
            plan,
        }
    }

    /// The host inside.
    pub const fn inner(&self) -> &H {
        &self.host
    }
}

impl<H: Host> Host for InjectedHost<H>
where
    H::Seam: Clone + 'static,
    H::Psp: Clone + 'static,
    H::Pages: Clone + 'static,
{
    type Vm = FaultInjector<H::Vm>;
    type Seam = FaultInjector<H::Seam>;
    type Psp = FaultInjector<H::Psp>;
    type Pages = FaultInjector<H::Pages>;

    fn name(&self) -> &'static str {
        self.host.name()
    }

    fn vendor(&self) -> Vendor {
        self.host.vendor()
    }

    fn next_vm_id(&self) -> VmId {
        self.host.next_vm_id()
    }

    fn create_vm(&self, tech: Tech, params: &VmParams) -> Result<Self::Vm> {
        self.plan.check(FaultPlan::CREATE_VM, Error::NoMemory)?;
        let vm = self.host.create_vm(tech, params)?;
        Ok(FaultInjector::new(vm, self.plan.clone()))
    }

    fn holds(&self, tech: Tech) -> bool {
        self.host.holds(tech)
    }

    fn runs(&self) -> Runs {
        self.host.runs()
    }

    fn seam(&self) -> Option<&Self::Seam> {
        self.seam.as_ref()
    }

    fn psp(&self) -> Option<&Self::Psp> {
        self.psp.as_ref()
    }

    fn pages(&self) -> Option<&Self::Pages> {
        self.pages.as_ref()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    fn failures(plan: &FaultPlan, calls: u64) -> Vec<u64> {
        (1..=calls).filter(|_| plan.meets(7).is_some()).collect()
    }

    #[test]
    fn each_schedule_fails_the_calls_that_it_names() {
        let plan = FaultPlan::new();
        plan.arm(Fault::nth(3).times(2));
        assert_eq!(failures(&plan, 9), [3, 4]);
        assert!(plan.disarm());
        plan.arm(Fault::every(4));
        assert_eq!(failures(&plan, 9), [4, 8]);
        assert!(plan.disarm());
        plan.arm(Fault::nth(2).of(8));
        assert_eq!(failures(&plan, 9), []);
        assert!(!plan.disarm(), "the fault never happened");
        assert_eq!(plan.happened(), 4);
    }

    #[test]
    fn a_seed_gives_the_same_faults_again() {
        let run = |seed| {
            let plan = FaultPlan::new();
            plan.arm(Fault::random(seed, 5));
            failures(&plan, 1000)
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        assert!((120..280).contains(&run(1).len()), "one call in five");
    }

    #[test]
    fn zero_in_a_schedule_fails_nothing() {
        let plan = FaultPlan::new();
        plan.arm(Fault::every(0));
        plan.arm(Fault::random(1, 0));
        assert_eq!(failures(&plan, 9), []);
    }
}
