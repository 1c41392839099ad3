//! A TD: what a VM shares with its vCPUs.
//!
//! | file | part of the life |
//! |---|---|
//! | `gate` | entry to the TD |
//! | `enter` | passing the gate, association with a processor, emptying an epoch |
//! | `build` | from the KeyID to TDH.MNG.INIT, and back |
//! | `vcpus` | creation of vCPUs |
//! | `cpuid` | the CPUID values that the TD sees |
//! | `initial` | measured pages and TDH.MR.FINALIZE |
//! | `hooks` | changes of Secure-EPT entries, TLB flushes |
//! | `private` | faults, conversions, slots |
//! | `offline` | a processor goes |
//! | `moves` | the TD moves to another VM |
//! | `release`, `free` | the teardown: the key, then the pages |
//!
//! Locks are taken in this order: `creating`, `private`, the book of a migration, a vCPU's
//! `associated`, and then at most one of `vcpus`, `control` and `port`, which are never held across a
//! SEAMCALL: a failed call may poison the TD, which looks through `vcpus`. Only a move takes locks of two
//! TDs: it holds the claims of both.

mod build;
mod cpuid;
mod enter;
mod free;
mod gate;
mod hooks;
mod initial;
mod moves;
mod offline;
mod private;
mod release;
mod vcpus;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use kvm_ops::moves::MoveState;
use kvm_ops::{
    Diagnosis, Error, Gpaw, Hkid, Host, Hpa, KeyLease, Level, Life, OpName, PAGE_SIZE, Page,
    PageAccount, PagePort, Pfn, Result, SeamPort, SharedMask, Step, TdParams, TdPort, Tech, VcpuId,
    VmId, VmParams, VmPort,
};
use kvm_ops_mmu::{
    Attributes, Mirror, Mutex, MutexGuard, ReadGuard, ReaderLock, Slots, WriteGuard,
};
use spin::RwLock;

use crate::migrate::Journey;
use crate::seamcall::{Calls, Failed};
use crate::status::CompletionStatus;
use crate::vcpu::{Unfinished, VcpuRecord};
use gate::Gate;
pub(crate) use gate::Held;
pub(crate) use moves::{local_receive, local_send, move_context};
pub(crate) use private::{Fault, PATIENCE};
pub use vcpus::VcpuStart;

/// The consequence of a failure that breaks a TD.
pub(crate) const POISONED: &str = "the TD is poisoned: destroy it";

/// The consequence of a failure after which the module may still have a page.
pub(crate) const LEAKED: &str = "the page is leaked until the host restarts";

/// The state of a TD.
pub(crate) struct Td<H: Host> {
    pub(crate) host: H,
    pub(crate) life: Life,
    pub(crate) params: VmParams,
    /// Of the TD, with which they move.
    pub(crate) td_params: Mutex<TdParams>,
    pub(crate) mask: SharedMask,
    pub(crate) gate: Gate,
    /// The TDR's address, 0 while there is none.
    tdr: AtomicU64,
    pub(crate) vcpus: Mutex<BTreeMap<VcpuId, Vcpu>>,
    /// Held while a vCPU is created.
    pub(crate) creating: Mutex<()>,
    /// Private memory: faults read, everything that takes away or changes attributes writes.
    pub(crate) private: ReaderLock<Private>,
    pub(crate) control: Mutex<Control>,
    pub(crate) account: PageAccount,
    pub(crate) journey: Journey,
    /// Claimed while the TD moves.
    pub(crate) moving: MoveState,
    /// The VM below, which holds the shared memory. `None` once it is closed.
    pub(crate) port: RwLock<Option<H::Vm>>,
}

/// A vCPU's place.
#[derive(Debug)]
pub(crate) enum Vcpu {
    /// Its creation was interrupted; the next attempt goes on from here.
    Unfinished(Unfinished),
    /// It came from another host, and has no handle yet.
    Arrived(Arc<VcpuRecord>),
    Ready(Arc<VcpuRecord>),
}

/// A TD's private memory: its mapping, and the frames where it is allowed.
#[derive(Debug)]
pub(crate) struct Private {
    pub(crate) mirror: Mirror,
    pub(crate) slots: Slots,
    pub(crate) attributes: Attributes,
}

/// The TD's key and control pages.
#[derive(Debug, Default)]
pub(crate) struct Control {
    pub(crate) key: KeyState,
    /// The KeyID, unless `key` is [`KeyState::None`].
    pub(crate) lease: Option<KeyLease>,
    /// Pages that the module took as TDR, TDCS, TDVPR and TDCX, in the order in which it took them:
    /// given back from the end, the TDR comes last.
    pub(crate) pages: alloc::vec::Vec<Page>,
    /// The call that failed at the last attempt to release the key.
    pub(crate) failed: Option<Failed>,
    /// The first failure that left a page with the module, which then keeps the TDR too.
    pub(crate) kept: Option<Failed>,
    /// The host's page that the module reads from while the TD is built.
    pub(crate) scratch: Option<Page>,
    /// The contents of the initial page that is being added.
    pub(crate) source: Option<Hpa>,
    /// The number of pages of a vCPU; known from `vm_init` on.
    pub(crate) tdvps_pages: u32,
}

impl Control {
    /// The KeyID that the module has for the TD.
    pub(crate) fn hkid(&self) -> Option<Hkid> {
        match self.key {
            KeyState::Assigned | KeyState::Flushed => self.lease.as_ref().map(KeyLease::hkid),
            KeyState::None | KeyState::Leased => None,
        }
    }
}

/// The address of a page that an entry of the Secure-EPT names.
pub(crate) const fn at(page: Pfn) -> Hpa {
    Hpa::new(page.get() << PAGE_SIZE.ilog2())
}

/// The state of the TD's KeyID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum KeyState {
    /// The TD has none yet, or not any more.
    #[default]
    None,
    /// Leased from the pool; the module knows nothing of it.
    Leased,
    /// The module has assigned it to the TD (TDH.MNG.CREATE).
    Assigned,
    /// No vCPU uses it any more (TDH.MNG.VPFLUSHDONE).
    Flushed,
}

impl<H: Host> Drop for Td<H> {
    /// A TD that was torn down has closed its port. Any other is lost with all that it holds.
    fn drop(&mut self) {
        if self.port.get_mut().is_some() {
            let pages = self.account.totals().held();
            let (vm, step) = (self.life.id().0, self.life.step());
            let key = self.control.get_mut().hkid().map(|hkid| hkid.0);
            tracing::error!(
                technology = "tdx", vm, %step, pages, key,
                "the TD was dropped without its teardown: its pages and KeyID are lost"
            );
        }
    }
}

static SEAM: OpName = OpName("a TDX module (SEAMCALL port)");
static PAGES: OpName = OpName("memory for private pages (page port)");
static TD_PORT: OpName = OpName("VMs that can be TDs (TD port)");

impl<H: Host> Td<H> {
    /// A TD of which the module knows nothing yet. The VM below is created last, so that no failure
    /// leaves one behind.
    pub(crate) fn new(host: &H, id: VmId, params: &VmParams, td_params: TdParams) -> Result<Self> {
        let (bit, root) = match td_params.gpaw {
            Gpaw::Bits48 => (47, Level::Size512G),
            Gpaw::Bits52 => (51, Level::Size256T),
        };
        let pages = host.pages().ok_or(Error::HostLacks(&PAGES))?;
        let private = Private {
            mirror: Mirror::new(root, pages.id())?,
            slots: Slots::new(),
            attributes: Attributes::default(),
        };
        let port = host.create_vm(Tech::Tdx, params)?;
        Ok(Self {
            host: host.clone(),
            life: Life::new(id, Tech::Tdx),
            // One slot for each vCPU and one for everybody else.
            private: ReaderLock::new(params.vcpus as usize + 1, private),
            params: params.clone(),
            td_params: Mutex::new(td_params),
            mask: SharedMask::shared_bit(bit).unwrap_or(SharedMask::NONE),
            gate: Gate::default(),
            tdr: AtomicU64::new(0),
            vcpus: Mutex::new(BTreeMap::new()),
            creating: Mutex::new(()),
            control: Mutex::default(),
            account: PageAccount::new(),
            journey: Journey::default(),
            moving: MoveState::new(),
            port: RwLock::new(Some(port)),
        })
    }

    pub(crate) fn seam(&self) -> Result<&H::Seam> {
        self.host.seam().ok_or(Error::HostLacks(&SEAM))
    }

    pub(crate) fn calls(&self) -> Result<Calls<'_, H::Seam>> {
        self.seam().map(Calls::new)
    }

    pub(crate) fn pages(&self) -> Result<&H::Pages> {
        self.host.pages().ok_or(Error::HostLacks(&PAGES))
    }

    /// The TDR, by which SEAMCALLs name the TD.
    pub(crate) fn tdr(&self) -> Result<Hpa> {
        match self.tdr.load(Ordering::Acquire) {
            0 => Err(Error::WrongState(self.life.step())),
            tdr => Ok(Hpa::new(tdr)),
        }
    }

    pub(crate) fn set_tdr(&self, tdr: Option<Hpa>) {
        self.tdr.store(tdr.map_or(0, Hpa::get), Ordering::Release);
    }

    /// A turn of a loop that waits for another thread.
    pub(crate) fn relax(&self) {
        match self.host.seam() {
            Some(seam) => seam.relax(),
            None => core::hint::spin_loop(),
        }
    }

    /// Waits a moment for what comes from outside.
    pub(crate) fn idle(&self) {
        match self.host.seam() {
            Some(seam) => seam.idle(),
            None => core::hint::spin_loop(),
        }
    }

    /// Locks, with the port's pauses while it waits.
    pub(crate) fn lock<'a, T>(&self, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
        mutex.lock(|| self.relax())
    }

    /// Runs `f` on the VM below, until that is closed.
    pub(crate) fn on_port<T>(&self, f: impl FnOnce(&H::Vm) -> Result<T>) -> Result<T> {
        match &*self.port.read() {
            Some(port) => f(port),
            None => Err(Error::WrongState(self.life.step())),
        }
    }

    /// Runs `f` on the TD's operations of the VM below.
    pub(crate) fn on_td_port<T>(&self, f: impl FnOnce(&dyn TdPort) -> Result<T>) -> Result<T> {
        self.on_port(|port| f(port.td().ok_or(Error::HostLacks(&TD_PORT))?))
    }

    /// Private memory, to be looked at by a thread that is no vCPU's.
    pub(crate) fn read_private(&self) -> ReadGuard<'_, Private> {
        let slot = self.private.slots() - 1;
        self.private.read(slot, || self.relax())
    }

    /// Private memory, to be changed.
    pub(crate) fn write_private(&self) -> WriteGuard<'_, Private> {
        self.private.write(|| self.relax())
    }

    /// Takes a page out of the host's use.
    pub(crate) fn take_page(&self, level: Level) -> Result<Page> {
        self.account.take(self.pages()?, level)
    }

    /// Gives a page back that the module does not have.
    pub(crate) fn give_page_back(&self, page: Page) {
        match self.pages() {
            Ok(pages) => self.account.give_back(pages, page),
            // The port that gave the page is gone.
            Err(error) => self.account.leak(page, "free page", error),
        }
    }

    /// Reports a step of the TD's life, with the KeyID that it is about.
    #[cold]
    pub(crate) fn took_step(&self, what: &'static str, key: Option<u16>) {
        let (vm, pages) = (self.life.id().0, self.account.totals().held());
        tracing::debug!(technology = "tdx", vm, key, pages, "{what}");
    }

    /// The caller's error for a failed call. Poisons the VM if the failure demands it.
    pub(crate) fn failed(&self, failed: &Failed) -> Error {
        let poisons = failed.poisons();
        let diagnosis = failed.report(&self.life, poisons.then_some(POISONED));
        if poisons {
            self.poison_by(diagnosis);
        }
        failed.error()
    }

    /// Lets no vCPU run any more, and no operation but the teardown.
    pub(crate) fn poison_by(&self, diagnosis: Diagnosis) {
        self.life.poison_by(diagnosis);
        self.kick_all();
    }

    /// All that is known of an error of the TD: a status word has its name even if the failure is no
    /// longer remembered.
    pub(crate) fn explain(&self, error: Error) -> Diagnosis {
        let found = self.life.explain(error);
        match error {
            Error::Firmware(word) if found.call.is_none() => {
                let status = CompletionStatus::new(word);
                found.called(status.answer_of_call("the TDX module"))
            }
            _ => found,
        }
    }

    /// The step, if it is one in which private memory may change.
    pub(crate) fn require_live(&self) -> Result<Step> {
        self.life.require_live().map(|()| self.life.step())
    }
}
