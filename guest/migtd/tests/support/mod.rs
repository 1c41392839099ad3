//! Two machines, each with a TD and a migration TD, and a link between them with somebody in the middle.

// Each test file uses a part.
#![allow(dead_code, unreachable_pub)]

pub mod agents;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use embedded_io_adapters::std::FromStd;
use kvm_ops::sim::SimHost;
use kvm_ops::tdx::TdxVm;
use kvm_ops::tdx::migrate::Binding;
use kvm_ops::{
    Backend, EncParams, FreeReport, PreboundTd, TdParams, VcpuId, Vendor, VmOps, VmParams,
};
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService};
use kvm_ops_attest::tdx::{Quote, Root};
use kvm_ops_machine::{NoQuote, QuoteService, RunLimits, TD_REPORT_LEN};
use kvm_ops_migtd::{
    Dcap, EvidenceVerifier, ExchangeError, MigrationTd, Policy, Program, Role, Untrusted,
};

pub type Report = [u8; TD_REPORT_LEN];
pub type Service = Box<dyn Fn(&Report) -> Result<Vec<u8>, NoQuote> + Send + Sync>;
pub type Keeper = MigrationTd<SimHost, Service>;
pub type Done = Result<(), ExchangeError>;

const MIGRATABLE: u64 = 1 << 29;
pub const JANUARY_2026: u64 = 1_767_225_600;

pub fn limits() -> RunLimits {
    RunLimits::none().deadline(Duration::from_secs(60))
}

fn quoting() -> QuotingService {
    QuotingService::new([7; 32]).expect("a service")
}

/// The quoting service of a host.
pub fn service(host: &SimHost) -> Service {
    let platform = Arc::clone(host.tdx_platform().expect("TDX"));
    let service = quoting();
    Box::new(move |report| {
        let mac = |report: &Report| platform.verify_report(report);
        let quote = service.quote(report, &mac, QuoteFormat::V4);
        quote.map_err(|_| NoQuote::Refused)
    })
}

/// The body of a quote of version 4, and where its signed form begins.
const BODY: std::ops::Range<usize> = 48..632;
/// TEE_TCB_SVN and ATTRIBUTES in it.
pub const SVN: usize = 0;
pub const ATTRIBUTES: usize = 120;

/// A service whose quotes are authentic, and say something else than the report in their body.
pub fn other_service(
    host: &SimHost,
    change: impl Fn(&mut [u8]) + Send + Sync + 'static,
) -> Service {
    let (honest, service) = (self::service(host), quoting());
    Box::new(move |report| {
        let mut body = honest.quote(report)?[BODY].to_vec();
        change(&mut body);
        Ok(service.quote_of_body(&body, QuoteFormat::V4))
    })
}

/// Believes the software platform's quotes, which are up to date whatever their versions are.
fn verifier() -> impl EvidenceVerifier {
    let root = Root::software().expect("a root");
    Dcap::new(root, |quote: &Quote| {
        let service = quoting();
        let platform = service.platform();
        let says = Collateral::new(platform, quote.report.tee_tcb_svn);
        let collateral = Pcs.collateral(platform, &says);
        let collateral = collateral.map_err(|error| Untrusted(error.to_string()))?;
        Ok((collateral.to_string().into_bytes(), JANUARY_2026))
    })
}

pub fn random(out: &mut [u8]) -> kvm_ops::Result<()> {
    getrandom::fill(out).map_err(|_| kvm_ops::Error::Again)
}

pub fn program(policy: Policy) -> Program {
    Program::new(policy, verifier(), random)
}

/// A machine with a migration TD, and a TD that it serves.
pub struct Side {
    pub host: SimHost,
    pub keeper: Keeper,
    pub td: Option<TdxVm<SimHost>>,
}

pub fn td(host: &SimHost, change: impl FnOnce(&mut TdParams)) -> TdxVm<SimHost> {
    let mut td = TdParams {
        attributes: MIGRATABLE,
        ..TdParams::default()
    };
    change(&mut td);
    let params = VmParams {
        enc: EncParams::Td(Box::new(td)),
        ..VmParams::new(1)
    };
    let mut td = TdxVm::create(host, kvm_ops::Host::next_vm_id(host), &params).expect("a TD");
    td.vm_init().expect("vm_init");
    td
}

impl Side {
    pub fn new(policy: Policy, service: impl FnOnce(&SimHost) -> Service) -> Self {
        let host = SimHost::new(Vendor::Intel);
        let service = service(&host);
        let keeper = MigrationTd::start(&host, program(policy), service).expect("a TD");
        Self {
            host,
            keeper,
            td: None,
        }
    }

    /// Binds a TD that is built here, while it is built.
    pub fn bind_source(&mut self) -> Binding {
        let mut td = td(&self.host, |_| ());
        let binding = td.bind_migration_td(self.keeper.td(), 0).expect("BIND");
        finish(&mut td);
        self.td = Some(td);
        binding
    }

    /// Binds a TD that waits for its guest.
    pub fn bind_target(&mut self) -> Binding {
        let td = td(&self.host, |td| td.arrives = true);
        let binding = td.bind_migration_td(self.keeper.td(), 0).expect("BIND");
        self.td = Some(td);
        binding
    }

    pub fn prebound(info_hash: [u8; 48]) -> Option<PreboundTd> {
        Some(PreboundTd {
            info_hash,
            attributes: 0,
        })
    }

    pub fn destroy(self) {
        if let Some(td) = self.td {
            assert!(destroy(td).is_clean());
        }
        assert!(self.keeper.destroy().is_clean());
        assert_eq!(self.host.live_vms(), 0);
    }
}

/// Gives a TD a vCPU, and closes its launch.
pub fn finish(td: &mut TdxVm<SimHost>) {
    drop(td.create_vcpu(VcpuId(0)).expect("a vCPU"));
    td.vm_finalize().expect("vm_finalize");
}

pub fn destroy(mut td: TdxVm<SimHost>) -> FreeReport {
    let released = td
        .mmu_release_hkid()
        .and_then(|key| td.drain_private(key).map_err(|(error, _)| error));
    match released {
        Ok(drained) => td.vm_free(drained),
        Err(error) => td.vm_abandon(error),
    }
}

/// Bytes of a frame before its payload, and the places of the payload's length and of the checksum.
const HEADER: usize = 36;
const LENGTH: usize = 16;
const SUM: usize = 20;

/// Somebody in the middle: gets each message with its number, counted over both directions, and says
/// what goes on in its place. `None` ends the link.
pub type Middle<'m> = &'m mut (dyn FnMut(usize, Vec<u8>) -> Option<Vec<u8>> + Send);

fn read_message(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header).ok()?;
    let length = u32::from_le_bytes(*header[LENGTH..].first_chunk()?);
    let mut message = vec![0; length as usize];
    from.read_exact(&mut message).ok()?;
    Some([&header[..], &message].concat())
}

/// Puts a message into the frame of another, with a good checksum.
fn framed(frame: &[u8], message: &[u8]) -> Vec<u8> {
    let mut out = [&frame[..HEADER], message].concat();
    out[LENGTH..SUM].copy_from_slice(&(message.len() as u32).to_le_bytes());
    let mut sum = crc32fast::Hasher::new();
    sum.update(&out[..SUM]);
    sum.update(&out[HEADER..]);
    out[SUM..SUM + 4].copy_from_slice(&sum.finalize().to_le_bytes());
    out
}

/// Carries messages in turn, the source's first, until an end hangs up.
pub fn carry(mut source: UnixStream, mut target: UnixStream, middle: Middle<'_>) {
    for nth in 0.. {
        let (from, to) = match nth % 2 {
            0 => (&mut source, &mut target),
            _ => (&mut target, &mut source),
        };
        let Some(frame) = read_message(from) else {
            return;
        };
        let Some(message) = middle(nth, frame[HEADER..].to_vec()) else {
            return;
        };
        if to.write_all(&framed(&frame, &message)).is_err() {
            return;
        }
    }
}

/// Exchanges keys between two sides, with somebody in the middle.
pub fn exchange(
    [source, target]: [&mut Side; 2],
    [at_source, at_target]: [Binding; 2],
    middle: Middle<'_>,
) -> [Done; 2] {
    let (near, near_middle) = UnixStream::pair().expect("sockets");
    let (far, far_middle) = UnixStream::pair().expect("sockets");
    thread::scope(|scope| {
        scope.spawn(|| carry(near_middle, far_middle, middle));
        let target = scope.spawn(|| {
            let mut link = FromStd::new(far);
            target
                .keeper
                .exchange(Role::Target, at_target, &mut link, limits())
        });
        let mut link = FromStd::new(near);
        let source = source
            .keeper
            .exchange(Role::Source, at_source, &mut link, limits());
        drop(link);
        [source, target.join().expect("no panic")]
    })
}
