//! From an ASID to a guest that may run, in KVM's order.
//!
//! | | SEV, SEV-ES | SNP |
//! |---|---|---|
//! | `vm_init` | lease an ASID | lease an ASID |
//! | start | LAUNCH_START, ACTIVATE | context page, SNP_GCTX_CREATE, SNP_LAUNCH_START, SNP_ACTIVATE |
//! | each page | LAUNCH_UPDATE_DATA | RMPUPDATE, SNP_LAUNCH_UPDATE |
//! | each vCPU | ES: LAUNCH_UPDATE_VMSA | RMPUPDATE, SNP_LAUNCH_UPDATE of its VMSA |
//! | `vm_finalize` | LAUNCH_MEASURE, LAUNCH_FINISH | SNP_LAUNCH_FINISH |
//!
//! The start is taken by the first operation that needs it, or by its command
//! (`mem_enc_op`): between `vm_init` and it a VM may as well receive a guest. Every step that fails
//! undoes its own commands; a thing that firmware keeps nevertheless is leaked and listed.

mod debug;
mod legacy;
mod snp;

pub(crate) use snp::PageType;

use kvm_ops::{
    Asid, AsidLease, Error, Field, Gfn, Host, InitialPage, InitialPageKind, PspPort, Result, Step,
};

use crate::context::{Context, GuestState};
use crate::shared::Shared;
use crate::status::Failure;

/// The operands of a start.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    pub(crate) policy: u64,
    /// The owner's Diffie-Hellman certificate and session.
    pub(crate) session: Option<(alloc::vec::Vec<u8>, alloc::vec::Vec<u8>)>,
    /// The handle of a guest whose key is shared; 0 for a new key.
    pub(crate) share: u32,
    pub(crate) gosvw: [u8; 16],
}

/// The operands of SNP_LAUNCH_FINISH.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finish {
    pub(crate) id_block: Option<(alloc::vec::Vec<u8>, alloc::vec::Vec<u8>)>,
    pub(crate) author_key: bool,
    pub(crate) vcek_disabled: bool,
    pub(crate) host_data: [u8; 32],
}

impl<H: Host> Shared<H> {
    /// Leases an ASID for the VM's technology.
    pub(crate) fn lease(&self) -> Result<AsidLease> {
        let sp = self.sp();
        let pools = sp.psp.asid_pools();
        pools.lease(self.tech(), || sp.psp.relax(), || sp.flush())
    }

    /// `vm_init`: the ASID.
    pub(crate) fn init(&self, vmsa_features: u64) -> Result<()> {
        self.step().require(Step::Created)?;
        if self.launch.arrives {
            return self.life.advance(Step::Initialized);
        }
        let charge = match self.payer() {
            Some(account) => Some(account.charge(self.tech())?),
            None => None,
        };
        let lease = self.lease()?;
        self.took_step("ASID leased", Some(lease.asid()));
        let ghcb_version = self.launch.ghcb_version;
        let mut context = Context::new(lease, self.policy(), vmsa_features, ghcb_version);
        context.charge = charge;
        *self.context() = Some(context);
        self.life.advance(Step::Initialized)
    }

    /// The policy of the parameters, or the least that the technology demands: ES for a SEV-ES
    /// guest; for SNP the bit that must be 1, and SMT, which is the host's to switch off.
    pub(crate) fn policy(&self) -> u64 {
        self.launch.policy.unwrap_or(match self.tech() {
            kvm_ops::Tech::SevEs => legacy::POLICY_ES,
            kvm_ops::Tech::SevSnp => snp::POLICY_ONE | snp::POLICY_SMT,
            _ => 0,
        })
    }

    /// Starts the launch as the VM's parameters say.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a policy of another technology, which firmware would refuse with the ASID.
    fn start_default(&self, context: &mut Context) -> Result<()> {
        let policy = self.policy();
        let wants_es = policy & legacy::POLICY_ES != 0;
        if !self.is_snp() && wants_es != self.is_es() {
            return Err(Error::Invalid(Field::Policy, policy));
        }
        let start = Start {
            policy,
            session: self.launch.session.clone(),
            share: 0,
            gosvw: self.launch.gosvw,
        };
        self.start(context, &start)
    }

    /// Starts the launch.
    pub(crate) fn start(&self, context: &mut Context, start: &Start) -> Result<()> {
        if context.guest.is_some() {
            return Err(Error::WrongState(self.step()));
        }
        let asid = self.leased(context)?;
        if self.is_snp() {
            self.start_snp(context, asid, start)?;
        } else {
            self.start_legacy(context, asid, start)?;
        }
        context.policy = start.policy;
        context.state = GuestState::LaunchUpdate;
        self.took_step("launch started", Some(asid));
        Ok(())
    }

    /// The context's ASID; leases one, and charges it, after an undone start.
    pub(crate) fn leased(&self, context: &mut Context) -> Result<Asid> {
        if let (None, Some(account)) = (&context.charge, self.payer()) {
            context.charge = Some(account.charge(self.tech())?);
        }
        if context.lease.is_none() {
            context.soiled = false;
            context.lease = Some(self.lease()?);
        }
        context
            .lease
            .as_ref()
            .map(AsidLease::asid)
            .ok_or(Error::NoKeyId)
    }

    /// After a failed start: an ASID that firmware was given needs a flush before its next guest,
    /// so the next start takes another.
    pub(crate) fn drop_soiled_asid(&self, context: &mut Context) {
        if context.soiled {
            if let Some(lease) = context.lease.take() {
                self.sp().retire(lease, true);
            }
            context.soiled = false;
        }
    }

    /// A launch under way, started if it is not.
    pub(crate) fn launching<T>(&self, body: impl FnOnce(&mut Context) -> Result<T>) -> Result<T> {
        let mut context = self.context();
        let Some(context) = context.as_mut() else {
            return Err(Error::WrongState(self.step()));
        };
        if context.state == GuestState::Uninit {
            self.start_default(context)?;
        }
        body(context)
    }

    /// Adds a page to the measured start.
    pub(crate) fn add_page(&self, page: &InitialPage<'_>) -> Result<()> {
        self.step().require(Step::Initialized)?;
        if !page.gpa.is_page_aligned() {
            return Err(Error::Invalid(Field::Gpa, page.gpa.get()));
        }
        let gfn = Gfn::containing(page.gpa);
        self.check_frame(gfn)?;
        if !self.memory().has_slot(gfn, 1) {
            return Err(Error::NotFound(Field::Gpa, page.gpa.get()));
        }
        self.launching(|context| {
            if self.is_snp() {
                let kind = snp::page_type(page.kind)?;
                let mut contents = *page.contents;
                self.snp_update(context, gfn, &mut contents, kind)
            } else if page.kind == InitialPageKind::Measured {
                self.update_data(context, gfn, page.contents)
            } else {
                kvm_ops::not_offered!("add_initial_page of a kind that SEV does not know")
            }
        })
    }

    /// `vm_finalize`: the rest of the launch.
    pub(crate) fn finalize(&self, finish: &Finish) -> Result<()> {
        self.step().require(Step::Initialized)?;
        self.launching(|context| {
            if self.is_snp() {
                self.finish_snp(context, finish)
            } else {
                self.finish_legacy(context)
            }
        })?;
        self.took_step("launch finished", self.asid().ok());
        self.life.advance(Step::Runnable)
    }
}

/// True if firmware refused, and not a part of the way to it.
pub(crate) fn is_refusal(error: &Error) -> bool {
    Failure::of(error).is_some()
}
