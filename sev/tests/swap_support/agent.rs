//! Migration agents: guests whose secrets page the test reads as they do themselves.

use kvm_ops_core::{
    Error, FreeReport, Gpa, GuestResponse, Host, Hpa, InitialPage, InitialPageKind, OpName, Result,
    SevParams, VmOps,
};
use kvm_ops_sev::migrate::MigrationAgent;
use kvm_ops_sev::{Identity, SevVcpu, SevVm};
use kvm_ops_sim::SimHost;
use soft_amd_sp::GuestPage;
use soft_amd_sp::attestation::Report;
use soft_amd_sp::message::{AgentChannel, AgentError, GuestChannel};

use super::{POLICY, finish_guest, waiting, waiting_with};
use crate::common::{RAM, Ram, free, sp};

/// The guest page with the message keys.
pub(crate) const SECRETS: u64 = RAM + (200 << 12);
/// Policy: a migration agent may be named.
const MIGRATE_MA: u64 = 1 << 18;

/// What an agent answers that firmware or its peer refused.
pub(crate) static REFUSED: OpName = OpName("the migration agent's request");

/// An agent that runs, with its memory.
pub(crate) struct Agent<H: Host> {
    pub(crate) vm: SevVm<H>,
    _vcpu: SevVcpu<H>,
    _ram: Ram,
    channel: AgentChannel,
}

/// The agents of two platforms, which know each other's keys.
pub(crate) fn agents(here: &SimHost, there: &SimHost) -> (Agent<SimHost>, Agent<SimHost>) {
    agents_over((here, here), (there, there))
}

/// The same, over hosts of another kind with the platforms below.
pub(crate) fn agents_over<H: Host>(
    (here, below): (&H, &SimHost),
    (there, below_there): (&H, &SimHost),
) -> (Agent<H>, Agent<H>) {
    let keys = [[0x11; 32], [0x22; 32]];
    (
        Agent::new(here, below, keys[0], keys[1]),
        Agent::new(there, below_there, keys[1], keys[0]),
    )
}

impl<H: Host> Agent<H> {
    fn new(host: &H, below: &SimHost, to_peer: [u8; 32], from_peer: [u8; 32]) -> Self {
        let ram = Ram::new(1 << 20);
        let (mut vm, vcpu) = waiting(host, &ram, POLICY);
        vm.add_initial_page(&secrets(&[0; 4096])).unwrap();
        vm.vm_finalize().unwrap();
        let mut channel = AgentChannel::new(channel(below, &vm, SECRETS));
        channel.meet(to_peer, from_peer);
        Self {
            channel,
            vm,
            _vcpu: vcpu,
            _ram: ram,
        }
    }

    /// The REPORT_ID of the agent, as a report of its own has it.
    pub(crate) fn report_id(&mut self) -> [u8; 32] {
        let channel = self.channel.firmware();
        let request = channel.report_request(&[0; 64], 0).unwrap();
        let answer = send(&self.vm, &request).unwrap();
        let (_, bytes) = channel.open_report(&answer[..]).unwrap();
        Report::from_bytes(bytes[..Report::LEN].try_into().unwrap()).report_id
    }

    pub(crate) fn free(self) {
        assert_eq!(self.into_report().leaks, []);
    }

    pub(crate) fn into_report(self) -> FreeReport {
        let Self { vm, _vcpu, .. } = self;
        drop(_vcpu);
        free(vm)
    }
}

fn refused(_: AgentError) -> Error {
    Error::Protected(&REFUSED)
}

fn secrets(contents: &[u8; 4096]) -> InitialPage<'_> {
    InitialPage {
        gpa: Gpa::new(SECRETS),
        contents,
        kind: InitialPageKind::Secrets,
    }
}

/// A guest of that agent with measured pages and a secrets page.
pub(crate) fn charge_of<H: Host>(
    host: &H,
    agent: &SevVm<H>,
    ram: &Ram,
    pages: u64,
) -> (SevVm<H>, SevVcpu<H>) {
    let Some(Identity::Gctx(gctx)) = agent.identity() else {
        panic!("the agent was launched")
    };
    let sev = SevParams {
        policy: Some(POLICY | MIGRATE_MA),
        migration_agent: gctx.base(),
        ..SevParams::default()
    };
    let (mut vm, vcpu) = waiting_with(host, ram, sev);
    vm.add_initial_page(&secrets(&[0; 4096])).unwrap();
    finish_guest(vm, vcpu, pages)
}

/// The channel of a guest, as it reads its keys.
pub(crate) fn channel<H: Host>(host: &SimHost, vm: &SevVm<H>, gpa: u64) -> GuestChannel {
    let spa = vm
        .page_of(kvm_ops_core::Gfn::new(gpa >> 12))
        .unwrap()
        .base()
        .unwrap();
    let at = GuestPage::new(vm.asid().unwrap().0, gpa, spa.get());
    let mut page = [0; 4096];
    sp(host).guest_read(&at, &mut page).unwrap();
    GuestChannel::from_secrets_page(&page, 0).unwrap()
}

/// Carries a guest's message to firmware.
pub(crate) fn send<H: Host>(vm: &SevVm<H>, message: &[u8]) -> Result<Box<[u8; 4096]>> {
    let mut page = [0; 4096];
    page[..message.len()].copy_from_slice(message);
    match vm.guest_request(&page)? {
        GuestResponse::Message(answer) => Ok(answer),
        _ => Err(Error::Protected(&REFUSED)),
    }
}

impl<H: Host> MigrationAgent for Agent<H> {
    fn export(&mut self, gctx: Hpa) -> Result<Vec<u8>> {
        let request = self.channel.export_request(gctx.get()).unwrap();
        let answer = send(&self.vm, &request)?;
        self.channel.exported(&answer[..]).map_err(refused)
    }

    fn import(&mut self, gctx: Hpa, sealed: &[u8]) -> Result<()> {
        let request = self.channel.import_request(gctx.get(), sealed);
        let answer = send(&self.vm, &request.map_err(refused)?)?;
        self.channel.imported(&answer[..]).map_err(refused)
    }
}
