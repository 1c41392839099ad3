//! An SNP guest goes to another platform: out of memory there, its context by the migration agents of both platforms, and into
//! memory here.
//!
//! Firmware gives a guest's context only to the guest's migration agent ([`SevParams::migration_agent`]), another guest on the same
//! platform, and takes one from any guest, which is the guest's agent from then on. The two agents have a channel of their own, which is no business of
//! their hosts. What travels beside it, this image and the pages of the store, is not secret and not trusted: firmware checks
//! every page by the context.
//!
//! ```text
//!  source                                            target
//!  depart:  suspend; its agent asks for the context
//!           image, pages ------------------------->  arrive: SNP_GCTX_CREATE; its agent gives the context;
//!                                                            SNP_ACTIVATE; records and pages into memory
//!           <------------------------------------------------ the guest is there and stopped
//!  hand_off: never runs here again
//!           -------------------------------------->  resume: runs
//! ```
//!
//! Up to `hand_off` the guest is the source's, whose `resume` lets it run on. **Firmware does not keep a guest from running at
//! both ends**, as far as open sources say: agents and hosts do.
//!
//! [`SevParams::migration_agent`]: kvm_ops::SevParams::migration_agent

use alloc::vec::Vec;

use kvm_ops::moves::{Claimed, mark_left};
use kvm_ops::{Error, Field, Gfn, GuestResponse, Host, Hpa, Level, Privacy, Result, Step, VcpuId};
use kvm_ops_sev_stream::{Fields, MigrateError, ProtocolError};

use super::is_plain_owner;
use crate::SevVm;
use crate::context::{Context, Guest, GuestState};
use crate::rules::{check_features, check_ghcb};
use crate::shared::Shared;
use crate::sp::Held;
use crate::swap::{Leaf, Place, Suspended, SwapSlot, SwapSpace, SwapStore};

/// The migration agent of a platform, as a host reaches it. It is a guest; the host carries its messages to firmware
/// ([`SevVm::guest_request`]).
pub trait MigrationAgent {
    /// Has the agent ask firmware for the context of its charge (MSG_EXPORT_REQ), by the address of the context page. Returns
    /// what it gives its peer, which only that can read.
    ///
    /// # Errors
    /// The guest stays.
    fn export(&mut self, gctx: Hpa) -> Result<Vec<u8>>;

    /// Has the agent put a context, as its peer gave it, into the fresh one at that address (MSG_IMPORT_REQ). The VM that takes the
    /// guest waits meanwhile: its operations are not called.
    ///
    /// # Errors
    /// The fresh context is given up.
    fn import(&mut self, gctx: Hpa, sealed: &[u8]) -> Result<()>;
}

/// A guest on its way: what its next host must know beside the pages of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnpImage {
    policy: u64,
    vmsa_features: u64,
    ghcb_version: u16,
    measurement: Option<[u8; 48]>,
    vcpus: u32,
    /// In the order of their slots.
    leaves: Vec<Option<Leaf>>,
    /// Frames that are shared with the host: first frame and number.
    shared: Vec<(Gfn, u64)>,
    /// From agent to agent.
    sealed: Vec<u8>,
}

/// The first bytes of an encoded image.
const MAGIC: [u8; 8] = *b"kvm-snp\x01";

impl SnpImage {
    /// The pages that must come with it, and their records.
    pub fn totals(&self) -> Suspended {
        SwapSpace::of_arrival(&self.leaves).totals()
    }

    /// The pages that must come with it, each with its size: those of the guest, then those of records.
    pub(super) fn pages(&self) -> Vec<(SwapSlot, Level)> {
        SwapSpace::of_arrival(&self.leaves).names()
    }

    /// Frames that are shared with the host, whose contents the embedder carries: first frame and number.
    pub fn shared(&self) -> &[(Gfn, u64)] {
        &self.shared
    }

    /// The image in bytes, little-endian: magic, policy (8), SEV_FEATURES (8), GHCB version (2), vCPUs (4), measurement (a byte
    /// that says whether there is one, and 48), slots (their number in 4, and 9 for each), shared ranges (their number in 4, and 16 for
    /// each), the agents' bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::from(MAGIC);
        out.extend_from_slice(&self.policy.to_le_bytes());
        out.extend_from_slice(&self.vmsa_features.to_le_bytes());
        out.extend_from_slice(&self.ghcb_version.to_le_bytes());
        out.extend_from_slice(&self.vcpus.to_le_bytes());
        out.push(u8::from(self.measurement.is_some()));
        out.extend_from_slice(&self.measurement.unwrap_or([0; 48]));
        out.extend_from_slice(&(self.leaves.len() as u32).to_le_bytes());
        for leaf in &self.leaves {
            let (kind, value) = encode_leaf(leaf.as_ref());
            out.push(kind);
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&(self.shared.len() as u32).to_le_bytes());
        for (first, pages) in &self.shared {
            out.extend_from_slice(&first.get().to_le_bytes());
            out.extend_from_slice(&pages.to_le_bytes());
        }
        out.extend_from_slice(&self.sealed);
        out
    }

    /// Reads an image. Nothing in it is trusted: a wrong one does not arrive.
    ///
    /// # Errors
    /// The field that is not understood.
    pub fn decode(bytes: &[u8]) -> Result<Self, MigrateError> {
        let mut fields = Fields::of(bytes);
        if fields.array()? != MAGIC {
            return Err(ProtocolError::Field("magic of an SNP image").into());
        }
        let (policy, vmsa_features) = (fields.u64()?, fields.u64()?);
        let (ghcb_version, vcpus) = (fields.u16()?, fields.u32()?);
        let measurement = match (fields.u8()?, fields.array()?) {
            (0, _) => None,
            (1, digest) => Some(digest),
            _ => return Err(ProtocolError::Field("measurement").into()),
        };
        let mut leaves = Vec::new();
        for _ in 0..fields.u32()? {
            leaves.push(decode_leaf(fields.u8()?, fields.u64()?)?);
        }
        let mut shared = Vec::new();
        for _ in 0..fields.u32()? {
            shared.push((Gfn::new(fields.u64()?), fields.u64()?));
        }
        Ok(Self {
            policy,
            vmsa_features,
            ghcb_version,
            measurement,
            vcpus,
            leaves,
            shared,
            sealed: fields.rest().to_vec(),
        })
    }
}

/// Kinds of slots.
const UNUSED: u8 = 0;
const SMALL: u8 = 1;
const LARGE: u8 = 2;
const GUEST_VMSA: u8 = 3;
const VMSA: u8 = 4;

fn encode_leaf(leaf: Option<&Leaf>) -> (u8, u64) {
    match leaf {
        None => (UNUSED, 0),
        Some(leaf) => match (leaf.place, leaf.level) {
            (Place::Vcpu(vcpu), _) => (VMSA, vcpu.0.into()),
            (Place::Memory(gfn), Level::Size4K) if leaf.is_vmsa => (GUEST_VMSA, gfn.get()),
            (Place::Memory(gfn), Level::Size4K) => (SMALL, gfn.get()),
            (Place::Memory(gfn), _) => (LARGE, gfn.get()),
        },
    }
}

fn decode_leaf(kind: u8, value: u64) -> Result<Option<Leaf>, MigrateError> {
    let memory = |level, is_vmsa| {
        Some(Leaf {
            place: Place::Memory(Gfn::new(value)),
            level,
            is_vmsa,
        })
    };
    let wrong = || MigrateError::from(ProtocolError::Field("slot of an SNP image"));
    Ok(match kind {
        UNUSED => None,
        SMALL => memory(Level::Size4K, false),
        LARGE if Gfn::new(value).is_aligned(Level::Size2M) => memory(Level::Size2M, false),
        GUEST_VMSA => memory(Level::Size4K, true),
        VMSA => Some(Leaf {
            place: Place::Vcpu(VcpuId(u32::try_from(value).map_err(|_| wrong())?)),
            level: Level::Size4K,
            is_vmsa: true,
        }),
        _ => return Err(wrong()),
    })
}

impl<H: Host> SevVm<H> {
    /// SNP_GUEST_REQUEST with a message of the guest.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a guest that is not launched; the errors of the ports. A refusal of firmware is a response.
    pub fn guest_request(&self, message: &[u8; 4096]) -> Result<GuestResponse> {
        self.shared.guest_request(message)
    }

    /// Suspends the guest ([`suspend`](Self::suspend)), and has its agent ask for its context.
    ///
    /// The guest is still this VM's: [`resume`](Self::resume) lets it run on, [`hand_off`](Self::hand_off) gives it up.
    ///
    /// # Errors
    /// As [`suspend`](Self::suspend), and the agent's. [`resume`](Self::resume) brings the guest back.
    pub fn depart(
        &self,
        store: &mut dyn SwapStore,
        agent: &mut dyn MigrationAgent,
    ) -> Result<SnpImage> {
        let shared = &self.shared;
        shared.within("depart", || {
            let _claim = shared.claim_for_suspension()?;
            shared.suspend(store)?;
            let gone = Error::WrongState(shared.step());
            let gctx = shared.context().as_ref().and_then(Context::gctx);
            let sealed = agent.export(crate::sp::base(gctx.ok_or(gone)?)?)?;
            let context = shared.context();
            let context = context.as_ref().ok_or(gone)?;
            let memory = shared.memory();
            Ok(SnpImage {
                policy: context.policy,
                vmsa_features: context.vmsa_features,
                ghcb_version: context.ghcb_version,
                measurement: context.measurement,
                vcpus: shared.all_cells().len() as u32,
                leaves: memory.swap.leaves().collect(),
                shared: memory.shared_frames(),
                sealed,
            })
        })
    }

    /// Gives a guest up that [departed](Self::depart) and is at another platform: only the teardown is left.
    ///
    /// # Errors
    /// [`Error::WrongState`] for a guest that is not suspended.
    pub fn hand_off(&self) -> Result<()> {
        let shared = &self.shared;
        let _claim = shared.claim_for_suspension()?;
        if !shared.memory().swap.is_suspended() {
            return Err(Error::WrongState(shared.step()));
        }
        if let Some(context) = shared.context().as_mut() {
            context.state = GuestState::Sent;
        }
        mark_left(&shared.life);
        Ok(())
    }

    /// Takes a guest in that [departed](Self::depart) elsewhere. The VM is initialised, its launch has not begun, it has the guest's
    /// slots and as many vCPUs. The guest is there afterwards and stopped, until [`resume`](Self::resume) lets it run.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an image that does not fit the VM; [`Error::WrongState`], [`Error::Busy`], [`Error::NoMemory`]; the agent's,
    /// the store's and firmware's: BAD_MEASUREMENT for pages that are not those of the context. The VM is as it was, without an
    /// ASID, which the next start or arrival leases again.
    pub fn arrive(
        &self,
        image: &SnpImage,
        store: &mut dyn SwapStore,
        agent: &mut dyn MigrationAgent,
    ) -> Result<()> {
        let shared = &self.shared;
        shared.within("arrive", || {
            let (_claim, space) = shared.claim_for_arrival(image)?;
            let shared_before = shared.memory().shared_frames();
            shared.gate.close();
            let done = shared
                .take_context(image, agent)
                .and_then(|()| shared.take_memory(image, space, store));
            if let Err(error) = done {
                shared.undo_arrival(&shared_before);
                return Err(error);
            }
            shared.adopt(image);
            shared.advance_to(Step::Runnable);
            Ok(())
        })
    }
}

impl<H: Host> Shared<H> {
    /// Takes back the pages and register states of a guest that came in part. The account lists what firmware keeps.
    ///
    /// # Errors
    /// The first of a page that does not leave the guest's tables.
    pub(super) fn take_back_arrived(&self) -> Result<()> {
        let mut memory = self.memory();
        let mut zapped = Ok(());
        for (gfn, level) in memory.touching(Gfn::new(0), u64::MAX) {
            zapped = zapped.and(self.zap(&mut memory, gfn, level.frames()));
        }
        drop(memory);
        for cell in self.all_cells() {
            if let Some(vmsa) = cell.state().vmsa.take() {
                let _ = self.sp().release(vmsa.page, vmsa.held);
            }
            cell.unprotect();
        }
        zapped
    }

    /// Keeps moves away, and returns the books of what is to come.
    fn claim_for_arrival(&self, image: &SnpImage) -> Result<(Claimed<'_>, SwapSpace)> {
        self.require_snp()?;
        let claim = self.moving.claim().claim()?;
        self.step().require(Step::Initialized)?;
        is_plain_owner(self)?;
        check_features(self.tech(), image.vmsa_features)?;
        check_ghcb(self.tech(), image.ghcb_version)?;
        if self
            .context()
            .as_ref()
            .is_none_or(|context| context.guest.is_some())
        {
            return Err(Error::WrongState(self.step()));
        }
        let memory = self.memory();
        let cells = self.cells();
        let vcpus = cells.len() as u64;
        let mut register_states = 0;
        for leaf in image.leaves.iter().flatten() {
            match leaf.place {
                Place::Memory(gfn) if memory.has_slot(gfn, leaf.level.frames()) => {}
                Place::Memory(gfn) => return Err(Error::Invalid(Field::Gfn, gfn.get())),
                Place::Vcpu(vcpu) if cells.contains_key(&vcpu) => register_states += 1,
                Place::Vcpu(vcpu) => return Err(Error::Invalid(Field::Vcpu, vcpu.0.into())),
            }
        }
        if u64::from(image.vcpus) != vcpus || register_states != vcpus {
            return Err(Error::Invalid(Field::VcpuCount, image.vcpus.into()));
        }
        // A frame twice, or a vCPU, would lose a page.
        let space = SwapSpace::of_arrival(&image.leaves);
        match space.names_each_once() && memory.has_no_page() {
            true => Ok((claim, space)),
            false => Err(Error::Invalid(Field::Page, image.leaves.len() as u64)),
        }
    }

    /// A fresh context, which the agent fills, and the ASID.
    fn take_context(&self, image: &SnpImage, agent: &mut dyn MigrationAgent) -> Result<()> {
        let mut context = self.context();
        let context = context.as_mut().ok_or(Error::WrongState(self.step()))?;
        let asid = self.leased(context)?;
        let gctx = self.create_gctx()?;
        let filled = agent.import(gctx.hpa(), &image.sealed);
        let bound = filled.and_then(|()| self.snp_activate(context, &gctx, asid));
        self.keep_context(context, gctx, bound)?;
        context.state = GuestState::Running;
        Ok(())
    }

    /// The guest is here: its image tells the rest of the context.
    fn adopt(&self, image: &SnpImage) {
        if let Some(context) = self.context().as_mut() {
            context.policy = image.policy;
            context.vmsa_features = image.vmsa_features;
            context.ghcb_version = image.ghcb_version;
            context.measurement = image.measurement;
        }
    }

    fn take_memory(
        &self,
        image: &SnpImage,
        space: SwapSpace,
        store: &mut dyn SwapStore,
    ) -> Result<()> {
        for (first, pages) in &image.shared {
            self.check_range(*first, *pages)?;
            if self.set_attributes(*first, *pages, Privacy::Shared)? != *pages {
                return Err(Error::Invalid(Field::Gfn, first.get()));
            }
        }
        let mut memory = self.memory();
        let not_private = |leaf: &Leaf| match leaf.place {
            Place::Memory(gfn) if !memory.is_private(gfn, leaf.level.frames()) => Some(gfn),
            Place::Memory(_) | Place::Vcpu(_) => None,
        };
        if let Some(gfn) = image.leaves.iter().flatten().find_map(not_private) {
            return Err(Error::Invalid(Field::Gfn, gfn.get()));
        }
        memory.swap = space;
        drop(memory);
        self.bring_back(store)
    }

    /// Gives up what came, so that the VM can begin anew; these frames are shared again, and no others.
    fn undo_arrival(&self, shared_before: &[(Gfn, u64)]) {
        let sp = self.sp();
        let mut memory = self.memory();
        for table in memory.swap.clear() {
            // The account lists a page that leaks; so below.
            let _ = sp.release(table, Held::Immutable);
        }
        memory.swap = SwapSpace::default();
        let shared_now = memory.shared_frames();
        drop(memory);
        let _ = self.take_back_arrived();
        for (ranges, to) in [
            (&shared_now[..], Privacy::Private),
            (shared_before, Privacy::Shared),
        ] {
            for (first, pages) in ranges {
                let _ = self.set_attributes(*first, *pages, to);
            }
        }
        if let Some(context) = self.context().as_mut()
            && matches!(context.guest, Some(Guest::Gctx(_)))
            && self.unbind().is_ok()
        {
            sp.decommission(context);
        }
        self.gate.open();
    }
}
