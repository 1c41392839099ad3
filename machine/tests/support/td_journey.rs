//! Two hosts of TDs, each with a migration TD, and the journey of a TD that executes machine code from one to the other.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use embedded_io_adapters::std::FromStd;
use kvm_ops::sim::SimHost;
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::{Binding, Flow, Progress, Receiver, SendLimits, Sender};
use kvm_ops::{AnyVm, EncParams, IntelVm, PreboundTd, TdParams, VcpuId, Vendor, Vm};
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService};
use kvm_ops_attest::tdx::{Quote, Root};
use kvm_ops_machine::{Machine, MachineConfig, NoQuote, TD_REPORT_LEN};
use kvm_ops_migtd::{Dcap, MigrationTd, Policy, Program, Role, Untrusted};

use crate::support::limits;

type Report = [u8; TD_REPORT_LEN];
type Service = Box<dyn Fn(&Report) -> Result<Vec<u8>, NoQuote> + Send + Sync>;

const MIGRATABLE: u64 = 1 << 29;
const JANUARY_2026: u64 = 1_767_225_600;

fn quoting() -> QuotingService {
    QuotingService::new([7; 32]).expect("a service")
}

fn service(host: &SimHost) -> Service {
    let platform = Arc::clone(host.tdx_platform().expect("TDX"));
    let service = quoting();
    Box::new(move |report| {
        let mac = |report: &Report| platform.verify_report(report);
        let quote = service.quote(report, &mac, QuoteFormat::V4);
        quote.map_err(|_| NoQuote::Refused)
    })
}

fn random(out: &mut [u8]) -> kvm_ops::Result<()> {
    getrandom::fill(out).map_err(|_| kvm_ops::Error::Again)
}

fn program() -> Program {
    let root = Root::software().expect("a root");
    let collateral = |quote: &Quote| {
        let service = quoting();
        let platform = service.platform();
        let says = Collateral::new(platform, quote.report.tee_tcb_svn);
        let collateral = Pcs.collateral(platform, &says);
        let collateral = collateral.map_err(|error| Untrusted(error.to_string()))?;
        Ok((collateral.to_string().into_bytes(), JANUARY_2026))
    };
    Program::new(Policy::default(), Dcap::new(root, collateral), random)
}

/// A host of TDs.
pub(crate) struct Side {
    pub(crate) host: SimHost,
    keeper: MigrationTd<SimHost, Service>,
    prebound: PreboundTd,
}

impl Side {
    pub(crate) fn new() -> Self {
        let host = SimHost::new(Vendor::Intel);
        let service = service(&host);
        let mut keeper = MigrationTd::start(&host, program(), service).expect("a migration TD");
        let info_hash = keeper.info_hash(limits()).expect("its name");
        Self {
            host,
            keeper,
            prebound: PreboundTd {
                info_hash,
                attributes: 0,
            },
        }
    }

    /// A machine for the TD that is launched here, or that comes.
    pub(crate) fn machine(
        &self,
        config: MachineConfig,
        params: TdParams,
        arrives: bool,
    ) -> Machine<SimHost> {
        let params = TdParams {
            attributes: params.attributes | MIGRATABLE,
            migration_td: Some(self.prebound),
            arrives,
            ..params
        };
        let config = config.enc(EncParams::Td(Box::new(params)));
        Machine::build(&self.host, config.awaits_guest(arrives)).expect("a machine")
    }

    fn bind(&self, td: &TdxVm<SimHost>) -> Binding {
        td.bind_migration_td(self.keeper.td(), 0).expect("BIND")
    }

    pub(crate) fn destroy(self) {
        assert!(self.keeper.destroy().is_clean());
        assert_eq!(self.host.live_vms(), 0);
    }
}

pub(crate) fn td(vm: &Vm<AnyVm<SimHost>>) -> &TdxVm<SimHost> {
    match vm.back_end() {
        AnyVm::Intel(IntelVm::Tdx(td)) => td,
        _ => panic!("no TD"),
    }
}

/// Lets the migration TDs exchange the keys of a session between two TDs.
fn exchange_keys(sides: &mut [Side; 2], source: &TdxVm<SimHost>, target: &TdxVm<SimHost>) {
    let bindings = [sides[0].bind(source), sides[1].bind(target)];
    let (near, far) = UnixStream::pair().expect("sockets");
    let [here, there] = sides;
    thread::scope(|scope| {
        let (mut near, mut far) = (FromStd::new(near), FromStd::new(far));
        let target = scope.spawn(move || {
            let [_, binding] = bindings;
            there
                .keeper
                .exchange(Role::Target, binding, &mut far, limits())
        });
        let [binding, _] = bindings;
        let source = here
            .keeper
            .exchange(Role::Source, binding, &mut near, limits());
        source.expect("keys");
        target.join().expect("no panic").expect("keys");
    });
}

/// Takes the TD of `source`, which has one vCPU and may run meanwhile, to the machine that awaits it.
pub(crate) fn travel(
    sides: &mut [Side; 2],
    source: &Vm<AnyVm<SimHost>>,
    target: &mut Machine<SimHost>,
) -> Progress {
    let progress = {
        let (from, to) = (td(source), td(target.vm()));
        exchange_keys(sides, from, to);
        let (near, far) = UnixStream::pair().expect("sockets");
        let outgoing = from.outgoing(1).expect("a session");
        let mut sender = Sender::new(outgoing, SendLimits::default(), &mut random).expect("a name");
        let mut receiver = Receiver::new(to.incoming(1).expect("a session"));
        thread::scope(|scope| {
            let arrival = scope.spawn(move || {
                let mut link = FromStd::new(far);
                receiver.run(&mut link, &mut |_| Flow::GoOn).map(drop)
            });
            let mut link = FromStd::new(near);
            let sent = sender.run(&mut link, &mut |_| Flow::GoOn).expect("it goes");
            arrival.join().expect("no panic").expect("it comes");
            sent
        })
    };
    target.take_arrived_vcpus(1).expect("its vCPU");
    assert!(target.enable_vcpu(VcpuId(0)));
    progress
}
