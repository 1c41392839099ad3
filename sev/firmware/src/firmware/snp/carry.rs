//! A guest's context goes to another platform and comes from one: the messages of a migration agent.
//!
//! The agent is a guest too. It asks with its own message key, and gets the context in the clear inside of its message: the
//! guest's reports name the agent, so whoever trusts the guest trusts it. No open source has the layouts;
//! `docs/inferred.md` has what is recalled and what is chosen.

use super::super::rules::SnpState;
use super::super::{Firmware, Outcome};
use super::{GuestIdentity, Launch, SnpGuest};
use crate::builder::TcbVersion;
use crate::command::{MdataEntry, MdataFlags, Reserved, SnpPolicy, U32, U64, bits, layout};
use crate::measure::{IdBlock, SnpDigest};
use crate::message::{
    EXPORTED_CONTEXT, ExportRequest, ExportResponse, ImportRequest, StatusResponse, VmrkRequest,
};
use crate::status::Status;
use zerocopy::{FromBytes, transmute};

/// The version of [`Exported`].
const VERSION: u32 = 1;

bits! {
    /// Properties of a guest whose context is exported.
    ExportedFlags: u32, ones 0, subfields 0 {
        IMI = 0,
        SECURE_TSC = 1,
        VCEK_DIS = 2,
        /// The fields of the ID block, of the ID key, of the author key count.
        ID_BLOCK = 3,
        ID_KEY = 4,
        AUTHOR_KEY = 5,
    }
}

layout! {
    /// A guest's context, but for the key of its memory and what names this platform.
    Exported 0x2e0 {
        0x000 out policy: SnpPolicy,
        0x008 out launch_tcb: U64,
        0x010 out flags: ExportedFlags,
        0x014 out desired_tsc_khz: U32,
        0x018 out swap_iv: U64,
        0x020 out swap_key: [u8; 32],
        /// The record of the last page of records, which is swapped out.
        0x040 out root: [u8; 64],
        0x080 out vmpck: [[u8; 32]; 4],
        0x100 out sequence: [U64; 4],
        0x120 out vmrk: [u8; 32],
        0x140 out report_id: [u8; 32],
        0x160 out digest: [u8; 48],
        0x190 out id_key_digest: [u8; 48],
        0x1c0 out author_key_digest: [u8; 48],
        0x1f0 out gosvw: [u8; 16],
        0x200 out id_block: [u8; 96],
        0x260 out host_data: [u8; 32],
        0x280 _ reserved: Reserved<96>,
    }
}

const _: () = assert!(size_of::<Exported>() == EXPORTED_CONTEXT);

/// The answer to a request that returns nothing.
fn answer(done: Outcome) -> StatusResponse {
    StatusResponse {
        status: number(done),
        ..Default::default()
    }
}

/// A number of a status, as answers have it.
fn number(status: Outcome) -> U32 {
    let status = status.err().unwrap_or(Status::SUCCESS);
    u32::from(status.0).into()
}

impl Firmware<'_> {
    /// MSG_EXPORT_REQ: the context of a guest whose agent asks.
    pub(super) fn export(&self, agent: u64, request: &ExportRequest) -> ExportResponse {
        match self.exported(agent, request) {
            Ok(context) => ExportResponse {
                gctx_size: (EXPORTED_CONTEXT as u32).into(),
                gctx_version: VERSION.into(),
                gctx: transmute!(context),
                ..Default::default()
            },
            Err(status) => ExportResponse {
                status: number(Err(status)),
                ..Default::default()
            },
        }
    }

    fn exported(&self, agent: u64, request: &ExportRequest) -> Outcome<Exported> {
        if request.reserved != Default::default() {
            return Err(Status::INVALID_PARAM);
        }
        let guest = self.charge_of(agent, request.gctx_paddr)?;
        let is_out = guest.swap.root().flags.contains(MdataFlags::VALID);
        match guest.swap.key() {
            Some(key) if is_out && guest.state == SnpState::Running => {
                Ok(self.context_of(guest, key))
            }
            _ => Err(Status::INVALID_GUEST_STATE),
        }
    }

    /// The guest at an address, if the agent that asks is its own.
    fn charge_of(&self, agent: u64, address: U64) -> Outcome<&SnpGuest> {
        let own = self.snp_guest(agent)?.report_id;
        let guest = self.snp_guest(self.address(address.get()))?;
        match guest.launch.migration_agent == Some(own) {
            true => Ok(guest),
            false => Err(Status::INVALID_GUEST),
        }
    }

    fn context_of(&self, guest: &SnpGuest, swap_key: [u8; 32]) -> Exported {
        let (launch, identity) = (&guest.launch, &guest.identity);
        let mut flags = ExportedFlags::default();
        for (flag, is_set) in [
            (ExportedFlags::IMI, launch.imi),
            (ExportedFlags::SECURE_TSC, launch.secure_tsc),
            (ExportedFlags::VCEK_DIS, identity.vcek_disabled),
            (ExportedFlags::ID_BLOCK, identity.block.is_some()),
            (ExportedFlags::ID_KEY, identity.id_key_digest.is_some()),
            (
                ExportedFlags::AUTHOR_KEY,
                identity.author_key_digest.is_some(),
            ),
        ] {
            if is_set {
                flags = flags | flag;
            }
        }
        Exported {
            policy: guest.policy,
            launch_tcb: launch.tcb.0.into(),
            flags,
            desired_tsc_khz: launch.desired_tsc_khz.into(),
            swap_iv: guest.swap.iv().into(),
            swap_key,
            root: transmute!(guest.swap.root()),
            vmpck: guest.vmpck,
            sequence: guest.sequence.map(U64::from),
            vmrk: self.root_key(guest),
            report_id: guest.report_id,
            digest: guest.digest.value(),
            id_key_digest: identity.id_key_digest.unwrap_or([0; 48]),
            author_key_digest: identity.author_key_digest.unwrap_or([0; 48]),
            gosvw: launch.gosvw,
            id_block: identity.block.map_or([0; 96], |block| block.to_bytes()),
            host_data: identity.host_data,
            ..Default::default()
        }
    }

    /// The root of the derived keys that go with a guest: its agent's gift, or one of this guest alone.
    pub(super) fn root_key(&self, guest: &SnpGuest) -> [u8; 32] {
        let own = || self.sp.identity.chip_key(b"vmrk", &guest.report_id);
        guest.vmrk.unwrap_or_else(own)
    }

    /// MSG_IMPORT_REQ: a context that was just created becomes that of the guest. The agent that asks is its own from now on.
    pub(super) fn import(&mut self, agent: u64, request: &ImportRequest) -> StatusResponse {
        answer(self.imported(agent, request))
    }

    fn imported(&mut self, agent: u64, request: &ImportRequest) -> Outcome {
        let context = Exported::read_from_bytes(&request.incoming_gctx);
        let context = context.map_err(|_| Status::INVALID_LEN)?;
        let root: MdataEntry = transmute!(context.root);
        let is_known = request.in_gctx_size.get() as usize == EXPORTED_CONTEXT
            && request.in_gctx_version.get() == VERSION
            && request.reserved == Default::default()
            && context.reserved == Default::default()
            && context.flags.reserved() == 0
            && root.flags.contains(MdataFlags::VALID);
        if !is_known {
            return Err(Status::INVALID_PARAM);
        }
        let migration_agent = Some(self.snp_guest(agent)?.report_id);
        let address = self.address(request.gctx_paddr.get());
        if self.snp_guest(address)?.state != SnpState::Init {
            return Err(Status::INVALID_GUEST_STATE);
        }
        self.check_snp_policy(context.policy)?;
        if !context.policy.contains(SnpPolicy::MIGRATE_MA) {
            return Err(Status::POLICY_FAILURE);
        }
        let has = |flag| context.flags.contains(flag);
        let guest = self.snp_guest_mut(address)?;
        guest.state = SnpState::Running;
        guest.policy = context.policy;
        guest.digest = SnpDigest::from_value(context.digest);
        guest.report_id = context.report_id;
        guest.vmpck = context.vmpck;
        guest.sequence = context.sequence.map(U64::get);
        guest.vmrk = Some(context.vmrk);
        guest
            .swap
            .load(context.swap_key, context.swap_iv.get(), root);
        guest.launch = Launch {
            imi: has(ExportedFlags::IMI),
            migration_agent,
            desired_tsc_khz: context.desired_tsc_khz.get(),
            gosvw: context.gosvw,
            secure_tsc: has(ExportedFlags::SECURE_TSC),
            tcb: TcbVersion(context.launch_tcb.get()),
        };
        guest.identity = GuestIdentity {
            block: has(ExportedFlags::ID_BLOCK).then(|| IdBlock::from_bytes(&context.id_block)),
            id_key_digest: has(ExportedFlags::ID_KEY).then_some(context.id_key_digest),
            author_key_digest: has(ExportedFlags::AUTHOR_KEY).then_some(context.author_key_digest),
            host_data: context.host_data,
            vcek_disabled: has(ExportedFlags::VCEK_DIS),
        };
        Ok(())
    }

    /// MSG_VMRK_REQ: the agent gives the root of the derived keys that go with a guest, during its launch.
    pub(super) fn set_vmrk(&mut self, agent: u64, request: &VmrkRequest) -> StatusResponse {
        answer(self.take_vmrk(agent, request))
    }

    fn take_vmrk(&mut self, agent: u64, request: &VmrkRequest) -> Outcome {
        if request.reserved != Default::default() {
            return Err(Status::INVALID_PARAM);
        }
        if self.charge_of(agent, request.gctx_paddr)?.state != SnpState::Launch {
            return Err(Status::INVALID_GUEST_STATE);
        }
        let address = self.address(request.gctx_paddr.get());
        self.snp_guest_mut(address)?.vmrk = Some(request.vmrk);
        Ok(())
    }
}
