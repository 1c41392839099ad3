//! Two platforms, each with a migration agent, and somebody in the middle of their link.

use std::os::unix::net::UnixStream;
use std::thread;

use embedded_io_adapters::std::FromStd;
use kvm_ops::sev::migrate::StreamKey;
use kvm_ops::sim::{SevSetup, SimHost};
use kvm_ops::{SevParams, Vendor};
use kvm_ops_attest::snp::table::{self, EntryKind};
use kvm_ops_attest::snp::{Product, Roots, Tcb};
use kvm_ops_attest::software::{Kds, Revocation, Subject, VekRequest};
use kvm_ops_attest::x509::{Certificate, Crl};
use kvm_ops_migtd::agent::{AgentPolicy, AgentProgram, AgentVerifier, SnpAgent};
use kvm_ops_migtd::{ExchangeError, Role};
use soft_amd_sp::{Platform, TcbVersion};

use super::{JANUARY_2026, Middle, carry, limits, random};

pub type Done = Result<StreamKey, ExchangeError>;

/// The processor of the software platforms.
const PRODUCT: Product = Product::Genoa;

pub fn tcb(snp: u8) -> Tcb {
    Tcb {
        fmc: 0,
        boot_loader: 4,
        tee: 0,
        snp,
        microcode: 213,
    }
}

/// A host of SNP guests on a chip of its own.
pub fn host(seed: u64, snp: u8) -> SimHost {
    let packed = tcb(snp).to_bytes(PRODUCT);
    let platform = Platform::builder()
        .seed(seed)
        .memory(64 << 20)
        .cpuid_fms(0x19, 0x11, 1)
        .tcb(TcbVersion(u64::from_le_bytes(packed)));
    let host = SimHost::builder(Vendor::Amd).sev(SevSetup::new(platform));
    host.build().expect("a host")
}

pub fn platform(host: &SimHost) -> &Platform {
    host.sev_platform().expect("an AMD SP")
}

/// The certificates of a chip and of its vendor, as its service gives them.
pub struct Chain {
    pub vcek: Certificate,
    pub ask: Certificate,
    pub ark: Certificate,
    pub crl: Crl,
}

impl Chain {
    pub fn of(host: &SimHost) -> Self {
        let platform = platform(host);
        let kds = Kds::new(PRODUCT);
        let reported = platform.reported_tcb().0.to_le_bytes();
        let tcb = Tcb::from_bytes(PRODUCT, reported).expect("a TCB");
        let key = platform.cert_chain().vcek.key().expect("a key").to_sec1();
        let chip = Subject::Chip(platform.chip_id());
        let vcek = kds.certify(&VekRequest::new(&key, tcb, chip));
        Self {
            vcek: vcek.expect("a VCEK"),
            ask: kds.ask().expect("an ASK"),
            ark: kds.ark().expect("an ARK"),
            crl: kds.crl(&Revocation::default()).expect("a list"),
        }
    }

    /// With the ASK on the revocation list.
    pub fn revoked(mut self) -> Self {
        let revoked = Revocation {
            revoked: vec![self.ask.clone()],
            ..Revocation::default()
        };
        self.crl = Kds::new(PRODUCT).crl(&revoked).expect("a list");
        self
    }

    /// With the ASK and the ARK of somebody who uses the vendor's names.
    pub fn forged(mut self) -> Self {
        [self.ask, self.ark] = Kds::new(PRODUCT).forged().expect("certificates");
        self
    }

    pub fn table(&self) -> Vec<u8> {
        table::write(&[
            (EntryKind::Vcek, self.vcek.as_der()),
            (EntryKind::Ask, self.ask.as_der()),
            (EntryKind::Ark, self.ark.as_der()),
            (EntryKind::Crl, self.crl.as_der()),
        ])
    }
}

/// How an agent is started.
pub struct Start {
    pub seed: u64,
    pub snp: u8,
    pub policy: AgentPolicy,
    pub params: SevParams,
    pub chain: fn(&SimHost) -> Vec<u8>,
    pub roots: Roots,
    pub now: u64,
}

impl Start {
    /// An agent as it should be, on a chip of this seed.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            snp: 22,
            policy: AgentPolicy::default(),
            params: SevParams::default(),
            chain: |host| Chain::of(host).table(),
            roots: Roots::software(),
            now: JANUARY_2026,
        }
    }

    pub fn agent(self) -> (SimHost, SnpAgent<SimHost>) {
        let host = host(self.seed, self.snp);
        let now = self.now;
        let verifier = AgentVerifier::new(self.roots, move || now);
        let program = AgentProgram::new(self.policy, verifier, random);
        let table = (self.chain)(&host);
        let agent = SnpAgent::start(&host, program, self.params, table, limits());
        (host, agent.expect("an agent"))
    }
}

/// Lets two agents judge each other, with somebody in the middle.
pub fn meet(agents: [&mut SnpAgent<SimHost>; 2], middle: Middle<'_>) -> [Done; 2] {
    let (near, near_middle) = UnixStream::pair().expect("sockets");
    let (far, far_middle) = UnixStream::pair().expect("sockets");
    let [agent, peer] = agents;
    thread::scope(|scope| {
        scope.spawn(|| carry(near_middle, far_middle, middle));
        let target = scope.spawn(|| peer.exchange(Role::Target, &mut FromStd::new(far)));
        let mut link = FromStd::new(near);
        let source = agent.exchange(Role::Source, &mut link);
        drop(link);
        [source, target.join().expect("no panic")]
    })
}
