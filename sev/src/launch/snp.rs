//! SEV-SNP.

use alloc::boxed::Box;
use alloc::vec::Vec;

use kvm_ops::{
    Asid, Error, Field, Gfn, GuestResponse, Host, InitialPageKind, Level, Page, Pfn, Result,
};
use zerocopy::little_endian::{U16, U32, U64};

use super::{Finish, Start};
use crate::cell::{Cell, VmsaPage};
use crate::command::{self, Command};
use crate::context::{Context, Guest, GuestState, GuestStatus};
use crate::memory::Assign;
use crate::shared::Shared;
use crate::sp::{Held, base};
use crate::status::{Failure, Operation};
use crate::vmsa::VMSA_GPA;

/// Policy: SMT may be on.
pub(super) const POLICY_SMT: u64 = 1 << 16;
/// Policy: must be 1.
pub(super) const POLICY_ONE: u64 = 1 << 17;
/// The bits that KVM allows in a policy (Linux `SNP_POLICY_MASK_VALID`), with bits 21 to 25 for the
/// firmware to judge.
const POLICY_BITS: u64 = (1 << 26) - 1;

/// Flag of SNP_LAUNCH_START: the guest has a migration agent.
const MA_EN: u32 = 1;

/// SEV_FEATURES bit of an SNP guest, which the hypervisor adds.
pub(crate) const FEATURE_SNP_ACTIVE: u64 = 1;

/// Page types of SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum PageType {
    Normal = 1,
    Vmsa = 2,
    Zero = 3,
    Unmeasured = 4,
    Secrets = 5,
    Cpuid = 6,
}

pub(super) fn page_type(kind: InitialPageKind) -> Result<PageType> {
    Ok(match kind {
        InitialPageKind::Measured => PageType::Normal,
        InitialPageKind::Unmeasured => PageType::Unmeasured,
        InitialPageKind::Zero => PageType::Zero,
        InitialPageKind::Secrets => PageType::Secrets,
        InitialPageKind::Cpuid => PageType::Cpuid,
        _ => return kvm_ops::not_offered!("add_initial_page of a kind that SNP does not know"),
    })
}

impl<H: Host> Shared<H> {
    /// The context page, SNP_GCTX_CREATE, SNP_LAUNCH_START, SNP_ACTIVATE, and the ASID into the
    /// VMCBs.
    pub(super) fn start_snp(&self, context: &mut Context, asid: Asid, start: &Start) -> Result<()> {
        if start.policy & POLICY_ONE == 0 || start.policy & !POLICY_BITS != 0 {
            return Err(Error::Invalid(Field::Policy, start.policy));
        }
        let gctx = self.create_gctx()?;
        let started = self
            .snp_launch_start(&gctx, start)
            .and_then(|()| self.snp_activate(context, &gctx, asid));
        self.keep_context(context, gctx, started)
    }

    /// Keeps a guest that was started, or gives it back to firmware.
    pub(crate) fn keep_context(
        &self,
        context: &mut Context,
        gctx: Page,
        started: Result<()>,
    ) -> Result<()> {
        if let Err(error) = started {
            // The ASID follows its guest: leaked if that stays, for a flush if it was bound.
            match self.sp().destroy_gctx(gctx) {
                Ok(()) => self.drop_soiled_asid(context),
                Err(kept) if context.soiled => {
                    context.soiled = false;
                    if let Some(lease) = context.lease.take() {
                        self.sp().leak_asid(lease, kept);
                    }
                }
                Err(_) => {}
            }
            return Err(error);
        }
        context.guest = Some(Guest::Gctx(gctx));
        Ok(())
    }

    pub(crate) fn create_gctx(&self) -> Result<Page> {
        self.sp()
            .made_by(Command::SnpGctxCreate, |gctx| command::Context {
                gctx: U64::new(gctx),
            })
    }

    fn snp_launch_start(&self, gctx: &Page, start: &Start) -> Result<()> {
        let mut buffer = command::SnpLaunchStart {
            gctx: U64::new(gctx.hpa().get()),
            policy: U64::new(start.policy),
            gosvw: start.gosvw,
            ..Default::default()
        };
        if let Some(agent) = self.launch.migration_agent {
            buffer.ma_gctx = U64::new(agent.get());
            buffer.flags = U32::new(MA_EN);
        }
        self.sp().run(Command::SnpLaunchStart, &mut buffer)
    }

    pub(crate) fn snp_activate(
        &self,
        context: &mut Context,
        gctx: &Page,
        asid: Asid,
    ) -> Result<()> {
        let mut buffer = command::SnpActivate {
            gctx: U64::new(gctx.hpa().get()),
            asid: U32::new(asid.0),
        };
        self.sp().run(Command::SnpActivate, &mut buffer)?;
        context.soiled = true;
        self.bind(asid)
    }

    /// SNP_LAUNCH_UPDATE of a page that is ours, in Pre-Guest state.
    fn launch_update(&self, context: &Context, page: &Page, kind: PageType) -> Result<()> {
        let gctx = context.gctx().ok_or(Error::WrongState(self.step()))?;
        let mut buffer = command::SnpLaunchUpdate {
            gctx: U64::new(base(gctx)?.get()),
            flags: U32::new((kind as u32) << 1),
            address: U64::new(page.hpa().get()),
            ..Default::default()
        };
        self.sp().run(Command::SnpLaunchUpdate, &mut buffer)
    }

    /// A new page at `gfn`. A CPUID page that the firmware corrected comes back in `contents`.
    pub(crate) fn snp_update(
        &self,
        context: &mut Context,
        gfn: Gfn,
        contents: &mut [u8; 4096],
        kind: PageType,
    ) -> Result<()> {
        let mut memory = self.memory();
        let sp = self.sp();
        let page = sp.alloc(Level::Size4K)?;
        // The host writes before the page is the guest's: afterwards it may not.
        let assigned = sp
            .write(&page, contents)
            .and_then(|()| self.assign(&memory, gfn, &page, Assign::Launch));
        let held = match assigned {
            Ok(held) => held,
            Err(error) => {
                sp.free(page);
                return Err(error);
            }
        };
        if let Err(error) = self.launch_update(context, &page, kind) {
            if kind == PageType::Cpuid {
                // Linux copies the page back so that the VMM sees what would do.
                let _ = sp.read(&page, contents);
            }
            let _ = sp.release(page, held);
            return Err(error);
        }
        context.digest.add(kind, gfn.get() << 12, contents);
        // Guest-Valid now: no longer immutable.
        self.enter(&mut memory, gfn, page, Held::Assigned)
    }

    /// The VMSA page of a vCPU, measured at an address that no guest memory has.
    fn snp_update_vmsa(&self, context: &mut Context, cell: &Cell) -> Result<()> {
        let sp = self.sp();
        let mut state = cell.state();
        let contents = state.start.page(context.vmsa_features | FEATURE_SNP_ACTIVE);
        let page = sp.alloc_vmsa()?;
        let gfn = Gfn::new(VMSA_GPA >> 12);
        let assigned = sp
            .write(&page, &contents[..])
            .and_then(|()| self.asid())
            .and_then(|asid| sp.assign(&page, asid.0, gfn, true));
        if let Err(error) = assigned {
            sp.free(page);
            return Err(error);
        }
        if let Err(error) = self.launch_update(context, &page, PageType::Vmsa) {
            let _ = sp.release(page, Held::Immutable);
            return Err(error);
        }
        context.digest.add(PageType::Vmsa, VMSA_GPA, &contents);
        let held = Held::Assigned;
        state.vmsa = Some(VmsaPage { page, held });
        cell.protect();
        Ok(())
    }

    /// The VMSAs that are left, then SNP_LAUNCH_FINISH.
    pub(super) fn finish_snp(&self, context: &mut Context, finish: &Finish) -> Result<()> {
        if context.state != GuestState::LaunchUpdate {
            return Err(Error::WrongState(self.step()));
        }
        for cell in self.all_cells() {
            if !cell.is_protected() {
                self.snp_update_vmsa(context, &cell)?;
            }
        }
        let gctx = context.gctx().ok_or(Error::WrongState(self.step()))?;
        let flags = u16::from(finish.id_block.is_some())
            | u16::from(finish.author_key) << 1
            | u16::from(finish.vcek_disabled) << 2;
        let mut buffer = command::SnpLaunchFinish {
            gctx: U64::new(base(gctx)?.get()),
            flags: U16::new(flags),
            host_data: finish.host_data,
            ..Default::default()
        };
        let sp = self.sp();
        let (block, auth) = match &finish.id_block {
            Some((block, auth)) => (&block[..], &auth[..]),
            None => (&[][..], &[][..]),
        };
        sp.with_input(block, |block| {
            buffer.id_block = U64::new(block);
            sp.with_input(auth, |auth| {
                buffer.id_auth = U64::new(auth);
                sp.run(Command::SnpLaunchFinish, &mut buffer)
            })
        })?;
        context.state = GuestState::Running;
        context.measurement = Some(context.digest.value());
        Ok(())
    }

    /// SNP_GUEST_REQUEST.
    pub(crate) fn guest_request(&self, message: &[u8; 4096]) -> Result<GuestResponse> {
        let context = self.context();
        let wrong = Error::WrongState(self.step());
        let context = context.as_ref().filter(|c| c.state == GuestState::Running);
        let gctx = context.and_then(Context::gctx).ok_or(wrong)?;
        let gctx = U64::new(base(gctx)?.get());
        let sp = self.sp();
        let asked = sp.with_input(&message[..], |request| {
            sp.with_output(message.len(), |response| {
                let (request, response) = (U64::new(request), U64::new(response));
                let mut buffer = command::SnpGuestRequest {
                    gctx,
                    request,
                    response,
                };
                sp.run(Command::SnpGuestRequest, &mut buffer)
            })
        });
        match asked {
            Ok(((), answer)) => {
                let mut page = Box::new([0; 4096]);
                page.copy_from_slice(&answer);
                Ok(GuestResponse::Message(page))
            }
            Err(error) => match Failure::of(&error) {
                Some(Failure {
                    operation: Operation::Command(Command::SnpGuestRequest),
                    code,
                }) => Ok(GuestResponse::Refused(code)),
                _ => Err(error),
            },
        }
    }

    /// SNP_GUEST_STATUS.
    pub(crate) fn snp_status(&self, gctx: Pfn) -> Result<GuestStatus> {
        let sp = self.sp();
        let gctx = U64::new(base(gctx)?.get());
        let ((), answer): ((), Vec<u8>) = sp.with_output(0x10, |at| {
            let address = U64::new(at);
            let mut buffer = command::SnpGuestStatus { gctx, address };
            sp.run(Command::SnpGuestStatus, &mut buffer)
        })?;
        let mut policy = [0; 8];
        policy.copy_from_slice(&answer[..8]);
        let mut asid = [0; 4];
        asid.copy_from_slice(&answer[8..12]);
        Ok(GuestStatus {
            policy: u64::from_le_bytes(policy),
            asid: u32::from_le_bytes(asid),
            state: answer[12],
        })
    }
}
