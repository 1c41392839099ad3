//! The host's hands: the nested page table, the RMP, and what an honest host does with them.

use super::guest::Inner;
use super::launch::{Machine, Technology};
use super::{Exit, Reply};
use crate::sync::lock;
use kvm_ops_guest::Privacy;
use kvm_ops_guest::sev::{MAP_GPA_RANGE, MsrRequest, msr::Features};
use soft_amd_sp::{
    AccessFault, Command, GuestPage, PageSize, Platform, RmpError, RmpUpdate, Status,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

const PAGE: u64 = 0x1000;
const LARGE: u64 = 2 << 20;
/// The answer to a hypercall that does not exist (KVM_ENOSYS, negated).
const NO_SUCH_HYPERCALL: u64 = (-1000_i64) as u64;
/// Responses of the GHCB MSR protocol.
const SEV_INFO: u64 = 0x001;
const CPUID: u64 = 0x005;
const PREFERRED_GHCB_ANY: u64 = 0xFFFF_FFFF_FFFF_F011;
const REGISTERED_GHCB: u64 = 0x013;
const PAGE_STATE: u64 = 0x015;
const PAGE_STATE_REFUSED: u64 = 1 << 32 | PAGE_STATE;
const FEATURES: u64 = 0x081;

/// The host's books of the guest's memory.
pub(super) struct World {
    /// 4 KiB guest pages to host pages; a large page has its size at each of its pieces.
    npt: BTreeMap<u64, (u64, PageSize)>,
    shared: BTreeSet<u64>,
    next: u64,
    end: u64,
}

impl World {
    pub(super) fn new(next: u64, end: u64) -> Self {
        Self {
            npt: BTreeMap::new(),
            shared: BTreeSet::new(),
            next,
            end,
        }
    }

    pub(super) fn free_page(&mut self, size: PageSize) -> Result<u64, HostError> {
        let page = self.next.next_multiple_of(size.bytes());
        if page + size.bytes() > self.end {
            return Err(HostError::Full);
        }
        self.next = page + size.bytes();
        Ok(page)
    }

    pub(super) fn map(&mut self, gpa: u64, spa: u64, size: PageSize) {
        for offset in (0..size.bytes()).step_by(PAGE as usize) {
            let Some(at) = gpa.checked_add(offset) else {
                return;
            };
            self.npt.insert(at, (spa + offset, size));
        }
    }

    pub(super) fn set_shared(&mut self, gpa: u64, shared: bool) {
        match shared {
            true => self.shared.insert(gpa),
            false => self.shared.remove(&gpa),
        };
    }

    fn mapped(&self, gpa: u64) -> Option<(u64, PageSize)> {
        self.npt.get(&(gpa & !(PAGE - 1))).copied()
    }

    fn is_shared(&self, gpa: u64) -> bool {
        self.shared.contains(&(gpa & !(PAGE - 1)))
    }
}

impl Machine {
    /// Gives a new page to an SNP guest, not validated.
    pub(super) fn assign(
        &self,
        world: &mut World,
        gpa: u64,
        size: PageSize,
    ) -> Result<u64, HostError> {
        let spa = world.free_page(size)?;
        let update = RmpUpdate::guest(self.asid, gpa).size(size);
        self.p.rmpupdate(spa, &update)?;
        world.map(gpa, spa, size);
        Ok(spa)
    }

    /// Maps a new page of the host: shared memory, and all that a guest without SNP needs.
    pub(super) fn back(&self, world: &mut World, gpa: u64) -> Result<u64, HostError> {
        let spa = world.free_page(PageSize::Size4K)?;
        world.map(gpa, spa, PageSize::Size4K);
        Ok(spa)
    }

    /// Splits the large page around a guest page, as KVM does on a size mismatch.
    fn split(&self, world: &mut World, gpa: u64) -> Result<(), HostError> {
        let head = gpa & !(LARGE - 1);
        let (spa, _) = world.mapped(head).ok_or(HostError::NotMapped { gpa })?;
        self.p.psmash(spa)?;
        for offset in (0..LARGE).step_by(PAGE as usize) {
            world.map(head + offset, spa + offset, PageSize::Size4K);
        }
        Ok(())
    }

    /// Makes a 4 KiB page of an SNP guest private or shared, where it is.
    fn change(&self, world: &mut World, gpa: u64, to: Privacy) -> Result<(), HostError> {
        let (spa, size) = match world.mapped(gpa) {
            Some(mapped) => mapped,
            None => (self.back(world, gpa)?, PageSize::Size4K),
        };
        if size == PageSize::Size2M {
            self.split(world, gpa)?;
        }
        let update = match to {
            Privacy::Private => RmpUpdate::guest(self.asid, gpa),
            Privacy::Shared => RmpUpdate::shared(),
        };
        self.p.rmpupdate(spa, &update)?;
        world.set_shared(gpa, to == Privacy::Shared);
        Ok(())
    }
}

/// The host's side of a [`TestSev`](super::TestSev): its nested page table, its RMP instructions and its
/// memory. Addresses of the guest come without the C-bit.
pub struct Hypervisor<'a> {
    pub(super) inner: &'a Inner,
}

impl Hypervisor<'_> {
    /// The platform, for everything else: RMPUPDATE, RMPREAD, firmware commands, failures.
    pub fn platform(&self) -> &Platform {
        &self.inner.machine.p
    }

    /// The guest's ASID.
    pub fn asid(&self) -> u32 {
        self.inner.machine.asid
    }

    /// Reads memory of the host: of private pages it sees ciphertext.
    ///
    /// # Errors
    /// There is no such memory.
    pub fn read(&self, spa: u64, len: usize) -> Result<Vec<u8>, AccessFault> {
        let mut data = vec![0; len];
        self.platform().host_read(spa, &mut data)?;
        Ok(data)
    }

    /// Writes memory of the host.
    ///
    /// # Errors
    /// There is no such memory, or the RMP says that it is not the host's.
    pub fn write(&self, spa: u64, bytes: &[u8]) -> Result<(), AccessFault> {
        self.platform().host_write(spa, bytes)
    }

    /// A page of the host that the guest has not had.
    ///
    /// # Errors
    /// [`HostError::Full`].
    pub fn free_page(&self, size: PageSize) -> Result<u64, HostError> {
        lock(&self.inner.world).free_page(size)
    }

    /// Points a guest page at a host page, in the nested page table alone.
    pub fn map(&self, gpa: u64, spa: u64, size: PageSize) {
        lock(&self.inner.world).map(gpa & !(PAGE - 1), spa, size);
    }

    /// The host address of a guest page; `None` if the nested page table has none.
    pub fn behind(&self, gpa: u64) -> Option<u64> {
        let mapped = lock(&self.inner.world).mapped(gpa);
        mapped.map(|(spa, _)| spa)
    }

    /// Gives a new page to an SNP guest, to be validated. Its host address.
    ///
    /// # Errors
    /// RMPUPDATE refuses, or the host has no page.
    pub fn assign(&self, gpa: u64, size: PageSize) -> Result<u64, HostError> {
        let world = &mut lock(&self.inner.world);
        self.inner.machine.assign(world, gpa, size)
    }

    /// Maps a new page of the host: shared memory, and all that a guest without SNP needs. Its host
    /// address.
    ///
    /// # Errors
    /// The host has no page.
    pub fn back(&self, gpa: u64) -> Result<u64, HostError> {
        let world = &mut lock(&self.inner.world);
        self.inner.machine.back(world, gpa & !(PAGE - 1))
    }

    /// Returns whether the host takes a page for shared.
    pub fn is_shared(&self, gpa: u64) -> bool {
        lock(&self.inner.world).is_shared(gpa)
    }

    /// Carries a message of an SNP guest to the firmware, and its answer back (SNP_GUEST_REQUEST).
    ///
    /// # Errors
    /// The message is longer than a page, or the firmware refuses it.
    pub fn guest_request(&self, message: &[u8]) -> Result<Vec<u8>, HostError> {
        let _world = lock(&self.inner.world);
        self.inner.machine.guest_request(message)
    }

    /// The nested page table's view of an access at `gpa`.
    pub(super) fn guest_page(&self, gpa: u64, vmpl: u8) -> Option<GuestPage> {
        let (spa, mapping) = lock(&self.inner.world).mapped(gpa)?;
        let page = GuestPage::new(self.asid(), gpa, spa | gpa & (PAGE - 1));
        Some(page.mapping(mapping).vmpl(vmpl))
    }

    /// An honest host's answer, as KVM gives it: page states change, pages come when the guest first
    /// touches them, large pages are split where sizes differ. It speaks versions 1 and 2 of the
    /// protocol; CPUID reads as zeros. It stops a guest that uses a page as what it did not make it,
    /// beyond memory, or that asks to be ended.
    pub fn honestly(&self, exit: &Exit) -> Reply {
        match *exit {
            Exit::Msr(msr) => self.msr(msr),
            Exit::Ghcb { gpa } => self.ghcb_exit(gpa),
            Exit::Hypercall {
                nr: MAP_GPA_RANGE,
                args,
            } => Reply::Value(self.map_gpa_range(args)),
            Exit::Hypercall { .. } => Reply::Value(NO_SUCH_HYPERCALL),
            Exit::Fault(fault) => self.fault(fault),
        }
    }

    fn msr(&self, msr: u64) -> Reply {
        let c_bit = u64::from(self.platform().c_bit());
        match MsrRequest::from_msr(msr) {
            Some(MsrRequest::SevInfo) => {
                Reply::Value(2 << 48 | 1 << 32 | (c_bit & 0xFF) << 24 | SEV_INFO)
            }
            Some(MsrRequest::Cpuid { register, .. }) => {
                Reply::Value((register as u64) << 30 | CPUID)
            }
            Some(MsrRequest::PreferredGhcb) => Reply::Value(PREFERRED_GHCB_ANY),
            Some(MsrRequest::RegisterGhcb { gpa }) => Reply::Value(gpa | REGISTERED_GHCB),
            Some(MsrRequest::PageState { gpa, to }) => Reply::Value(self.page_state(gpa, to)),
            Some(MsrRequest::Features) => Reply::Value(Features::SNP << 12 | FEATURES),
            Some(MsrRequest::Terminate(_) | MsrRequest::ApResetHold) => Reply::Stop,
            _ => Reply::Enter,
        }
    }

    /// An honest host's page state change; the response in the GHCB MSR.
    pub fn page_state(&self, gpa: u64, to: Privacy) -> u64 {
        let machine = &self.inner.machine;
        let is_page = self.inner.is_ram(gpa) && machine.technology == Technology::Snp;
        let world = &mut lock(&self.inner.world);
        match is_page && machine.change(world, gpa, to).is_ok() {
            true => PAGE_STATE,
            false => PAGE_STATE_REFUSED,
        }
    }

    /// Assigns the 2 MiB around a page that is to be private, if nothing is there.
    pub(super) fn page_state_large(&self, msr: u64) -> Reply {
        let Some(MsrRequest::PageState { gpa, to }) = MsrRequest::from_msr(msr) else {
            return Reply::Enter;
        };
        let head = gpa & !(LARGE - 1);
        let is_new = to == Privacy::Private && self.behind(gpa).is_none();
        if is_new && self.inner.is_ram(head + LARGE - PAGE) {
            return match self.assign(head, PageSize::Size2M) {
                Ok(_) => Reply::Value(PAGE_STATE),
                Err(_) => Reply::Value(PAGE_STATE_REFUSED),
            };
        }
        let is_large = {
            let world = lock(&self.inner.world);
            world
                .mapped(gpa)
                .is_some_and(|(_, size)| size == PageSize::Size2M)
        };
        match to == Privacy::Private && is_large {
            true => Reply::Value(PAGE_STATE),
            false => Reply::Value(self.page_state(gpa, to)),
        }
    }

    fn map_gpa_range(&self, [gpa, pages, attributes, _]: [u64; 4]) -> u64 {
        const EINVAL: u64 = (-22_i64) as u64;
        const PRIVATE: u64 = 1 << 4;
        let end = pages
            .checked_mul(PAGE)
            .and_then(|bytes| gpa.checked_add(bytes));
        match end {
            Some(end) if end <= self.inner.machine.ram && gpa % PAGE == 0 => {
                let world = &mut lock(&self.inner.world);
                for page in (gpa..end).step_by(PAGE as usize) {
                    world.set_shared(page, attributes & PRIVATE == 0);
                }
                0
            }
            _ => EINVAL,
        }
    }

    fn fault(&self, fault: AccessFault) -> Reply {
        let AccessFault::NestedPage { gpa, .. } = fault else {
            return Reply::Stop;
        };
        let page = gpa & !(PAGE - 1);
        if !self.inner.is_ram(page) {
            return Reply::Stop;
        }
        let machine = &self.inner.machine;
        let world = &mut lock(&self.inner.world);
        let cured = match world.mapped(page) {
            Some((_, PageSize::Size2M)) if fault.is_size_mismatch() => machine.split(world, page),
            // Another vCPU was at it, and the page is split by now.
            Some(_) if fault.is_size_mismatch() => Ok(()),
            Some(_) => return Reply::Stop,
            None if machine.technology == Technology::Snp && !world.is_shared(page) => {
                machine.assign(world, page, PageSize::Size4K).map(|_| ())
            }
            None => machine.back(world, page).map(|_| ()),
        };
        match cured {
            Ok(()) => Reply::Enter,
            Err(_) => Reply::Stop,
        }
    }
}

impl fmt::Debug for Hypervisor<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hypervisor").finish_non_exhaustive()
    }
}

/// Why the machine did not do what its host wanted.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostError {
    /// A firmware command failed.
    Command {
        /// The command.
        command: Command,
        /// Its status.
        status: Status,
    },
    /// RMPUPDATE or PSMASH failed.
    Rmp(RmpError),
    /// Memory of the host does not exist, or is not the host's to touch.
    Memory(AccessFault),
    /// The host has no page left.
    Full,
    /// The nested page table has no such page.
    NotMapped {
        /// The page.
        gpa: u64,
    },
    /// A message of so many bytes does not fit a page.
    TooLong(usize),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Command { command, status } => write!(f, "{command} answers {status}"),
            Self::Rmp(_) => f.write_str("the rmp cannot be changed so"),
            Self::Memory(_) => f.write_str("no access to the host's memory"),
            Self::Full => f.write_str("the host has no page left"),
            Self::NotMapped { gpa } => write!(f, "no page at gpa {gpa:#x}"),
            Self::TooLong(len) => write!(f, "a message of {len:#x} bytes does not fit a page"),
        }
    }
}

impl std::error::Error for HostError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Rmp(error) => Some(error),
            Self::Memory(error) => Some(error),
            _ => None,
        }
    }
}

impl From<RmpError> for HostError {
    fn from(error: RmpError) -> Self {
        Self::Rmp(error)
    }
}

impl From<AccessFault> for HostError {
    fn from(error: AccessFault) -> Self {
        Self::Memory(error)
    }
}
