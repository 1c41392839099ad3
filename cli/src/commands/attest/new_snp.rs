//! `attest new`: an SNP guest that asks for its report.

use std::fs;

use kvm_ops_attest::snp::{Product, Tcb};
use kvm_ops_attest::software::{IssueError, Kds, Revocation, Subject, VekRequest};
use kvm_ops_attest::x509::Certificate;
use soft_amd_sp::command::{
    CommandStruct, PageAddress, SnpActivate, SnpDfFlush, SnpGctxCreate, SnpGuestRequest, SnpInit,
    SnpLaunchFinish, SnpLaunchStart, SnpLaunchUpdate, SnpLaunchUpdateFlags, SnpPolicy, SnpVlekLoad,
};
use soft_amd_sp::measure::{InitialVmsa, PageInfo, PageType, SnpDigest, VMSA_GPA, Vmm};
use soft_amd_sp::message::GuestChannel;
use soft_amd_sp::{GuestPage, Platform, RmpUpdate, TcbVersion, VlekSeed};

use super::args::{KeyChoice, NewArgs, ProductChoice};
use super::files::{self, write_new};
use super::written::Written;
use crate::failure::{Failure, Outcome};

/// Addresses in the platform's memory.
const GCTX: u64 = 0x1000;
const REQUEST: u64 = 0x2000;
const RESPONSE: u64 = 0x3000;
const PAGES: u64 = 0x10_0000;

const ASID: u32 = 1;
/// The owner of the VLEK.
const PROVIDER: &str = "kvm-ops demo";
/// The guest's policy: SMT and the reserved bit that must be 1. Debugging is not allowed.
const POLICY: SnpPolicy = SnpPolicy::SMT;
const SECRETS_GPA: u64 = 0x8000;
/// The CPUID signature of EPYC-v4.
const VCPU_SIG: u32 = 0x80_0f12;

/// A page of the guest's launch.
struct Page {
    gpa: u64,
    page_type: PageType,
    contents: Box<[u8; 4096]>,
}

pub(super) fn new_report(args: &NewArgs) -> Outcome {
    let directory = &args.directory;
    let processors = Processors::of(args.product);
    let launched = launch(&processors, args.key, &args.report_data.0)?;
    let refuse = |error: IssueError| Failure::because("cannot certify the chip's key", error);
    let evidence = certified(&processors, args.key, &launched).map_err(refuse)?;
    fs::create_dir_all(directory).map_err(|error| {
        Failure::because(format!("cannot create {}", directory.display()), error)
    })?;
    let contents: [(&str, &[u8]); 3] = [
        (files::REPORT, &launched.report),
        (files::CHAIN, evidence.chain.as_bytes()),
        (files::CRL, &evidence.crl),
    ];
    for (name, bytes) in contents {
        write_new(&directory.join(name), bytes)?;
    }
    Written {
        about: format!(
            "a report of {} bytes, its chain of certificates and a revocation list",
            launched.report.len()
        ),
        files: &[files::REPORT, files::CHAIN, files::CRL],
        question: question(args, &processors, &launched),
    }
    .tell(args)
}

/// The command that verifies the evidence, with everything that was known before the launch.
fn question(args: &NewArgs, processors: &Processors, launched: &Launched) -> String {
    let data = match &args.report_data.0 {
        data if *data == [0; 64] => "00".to_owned(),
        data => hex::encode(data),
    };
    format!(
        "kvm-ops attest verify {} --root software \\\n    --measurement {} \\\n    --report-data {data} \
         --host-data 00 --vmpl 0 --policy {:#x} \\\n    --min-tcb {} \\\n    --chip-id {}",
        args.directory.display(),
        hex::encode(launched.measurement),
        POLICY.bits(),
        processors.tcb,
        hex::encode(&launched.chip_id[..processors.product.chip_id_len()]),
    )
}

/// The processors that the software AMD SP emulates.
struct Processors {
    product: Product,
    fms: (u8, u8, u8),
    report_version: u32,
    tcb: Tcb,
}

impl Processors {
    fn of(choice: ProductChoice) -> Self {
        let tcb = Tcb {
            fmc: 0,
            boot_loader: 4,
            tee: 0,
            snp: 22,
            microcode: 213,
        };
        let (product, fms, report_version, fmc) = match choice {
            ProductChoice::Milan => (Product::Milan, (0x19, 0x01, 1), 2, 0),
            ProductChoice::Genoa => (Product::Genoa, (0x19, 0x11, 1), 3, 0),
            ProductChoice::Turin => (Product::Turin, (0x1a, 0x02, 1), 5, 1),
        };
        Self {
            product,
            fms,
            report_version,
            tcb: Tcb { fmc, ..tcb },
        }
    }
}

/// The certificates that the vendor's service adds to a report.
struct Certified {
    chain: String,
    crl: Vec<u8>,
}

fn certified(
    processors: &Processors,
    key: KeyChoice,
    launched: &Launched,
) -> Result<Certified, IssueError> {
    let kds = Kds::new(processors.product);
    let (subject, authority) = match key {
        KeyChoice::Vcek => (Subject::Chip(launched.chip_id), kds.ask()?),
        KeyChoice::Vlek => (Subject::Provider(PROVIDER.into()), kds.asvk()?),
    };
    let request = VekRequest::new(&launched.signer, processors.tcb, subject);
    let chain = [kds.certify(&request)?, authority, kds.ark()?];
    Ok(Certified {
        chain: chain.iter().map(Certificate::to_pem).collect(),
        crl: kds.crl(&Revocation::default())?.as_der().to_vec(),
    })
}

/// The launch pages of the guest: code, zeros, its secrets and the state of its vCPU.
fn pages() -> Vec<Page> {
    let page = |gpa, page_type, contents| Page {
        gpa,
        page_type,
        contents,
    };
    // HLT throughout, with a jump back at the end.
    let mut code = Box::new([0xf4; 4096]);
    code[4094..].copy_from_slice(b"\xeb\xfc");
    let vmsa = InitialVmsa {
        eip: 0xffff_fff0,
        vcpu_sig: VCPU_SIG,
        sev_features: 1,
        vmm: Vmm::Qemu,
    };
    vec![
        page(0xffff_f000, PageType::Normal, code),
        page(0x7000, PageType::Zero, Box::new([0; 4096])),
        page(SECRETS_GPA, PageType::Secrets, Box::new([0; 4096])),
        page(VMSA_GPA, PageType::Vmsa, vmsa.page()),
    ]
}

fn failed(what: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::because(format!("the software AMD SP refuses {what}"), error)
}

/// Runs a command of the firmware.
fn command<C: CommandStruct>(platform: &Platform, mut buffer: C) -> Result<(), Failure> {
    platform
        .run(&mut buffer)
        .ok()
        .map_err(|status| failed(C::COMMAND.name(), status))
}

fn page_address(spa: u64) -> Result<PageAddress, Failure> {
    PageAddress::new(spa).map_err(|error| failed("a page", error))
}

/// Creates a platform and enables SNP, in the order that the firmware requires.
fn platform(processors: &Processors) -> Result<Platform, Failure> {
    let (family, model, stepping) = processors.fms;
    let tcb = processors.tcb.to_bytes(processors.product);
    let platform = Platform::builder()
        .memory(4 << 20)
        .cpuid_fms(family, model, stepping)
        .report_version(processors.report_version)
        .tcb(TcbVersion(u64::from_le_bytes(tcb)))
        .build()
        .map_err(|error| Failure::because("the software AMD SP cannot be built", error))?;
    platform.enable_snp_all();
    command(&platform, SnpInit)?;
    platform.wbinvd_all();
    command(&platform, SnpDfFlush)?;
    Ok(platform)
}

/// Loads a provider's VLEK, wrapped for this chip by the vendor's key service.
fn load_vlek(platform: &Platform) -> Result<(), Failure> {
    const SEED: u64 = 1;
    // It is the first wrapping for a chip that exists as long as this command.
    let wrapped = platform.wrap_vlek(&VlekSeed::from_seed(SEED), [0; 12]);
    platform
        .host_write(REQUEST, &wrapped.to_bytes())
        .map_err(|error| failed("a write", error))?;
    let load = SnpVlekLoad {
        vlek_wrapped_address: REQUEST.into(),
        ..Default::default()
    };
    command(platform, load)
}

/// The result of a launch, and the vendor's record of the chip.
struct Launched {
    report: Vec<u8>,
    chip_id: [u8; 64],
    /// The public key that verifies the report, as an uncompressed point.
    signer: Vec<u8>,
    /// Computed beside the launch, without the platform.
    measurement: [u8; 48],
}

/// Launches the guest, and has it ask for its report.
fn launch(
    processors: &Processors,
    key: KeyChoice,
    report_data: &[u8; 64],
) -> Result<Launched, Failure> {
    let platform = platform(processors)?;
    if key == KeyChoice::Vlek {
        load_vlek(&platform)?;
    }
    let rmpupdate = |spa, new: &RmpUpdate| {
        platform
            .rmpupdate(spa, new)
            .map_err(|error| failed("RMPUPDATE", error))
    };
    rmpupdate(GCTX, &RmpUpdate::firmware())?;
    let gctx_paddr = page_address(GCTX)?;
    command(&platform, SnpGctxCreate { gctx_paddr })?;
    let start = SnpLaunchStart {
        gctx_paddr,
        policy: POLICY,
        ..Default::default()
    };
    command(&platform, start)?;
    let asid = ASID.into();
    command(&platform, SnpActivate { gctx_paddr, asid })?;

    let mut measurement = SnpDigest::new();
    let mut secrets = None;
    for (page, spa) in pages().iter().zip((PAGES..).step_by(4096)) {
        platform
            .host_write(spa, &page.contents[..])
            .map_err(|error| failed("a write", error))?;
        rmpupdate(spa, &RmpUpdate::pre_guest(ASID, page.gpa))?;
        let update = SnpLaunchUpdate {
            gctx_paddr,
            flags: SnpLaunchUpdateFlags::of(page.page_type),
            page_paddr: page_address(spa)?,
            ..Default::default()
        };
        command(&platform, update)?;
        measurement.add_page(&PageInfo::new(page.page_type, page.gpa), &page.contents);
        if page.page_type == PageType::Secrets {
            secrets = Some(spa);
        }
    }
    let finish = SnpLaunchFinish {
        gctx_paddr,
        ..Default::default()
    };
    command(&platform, finish)?;

    let mut page = [0; 4096];
    let secrets = GuestPage::new(ASID, SECRETS_GPA, secrets.unwrap_or_default());
    platform
        .guest_read(&secrets, &mut page)
        .map_err(|error| failed("the guest its secrets page", error))?;
    let mut channel = GuestChannel::from_secrets_page(&page, 0)
        .ok_or_else(|| Failure::new("the guest has no key for messages"))?;
    let talk = |error| {
        Failure::because(
            "the guest and the AMD SP do not understand each other",
            error,
        )
    };
    let request = channel.report_request(report_data, 0).map_err(talk)?;
    platform
        .host_write(REQUEST, &request)
        .map_err(|error| failed("a write", error))?;
    rmpupdate(RESPONSE, &RmpUpdate::firmware())?;
    let carry = SnpGuestRequest {
        gctx_paddr,
        request_paddr: page_address(REQUEST)?,
        response_paddr: page_address(RESPONSE)?,
    };
    command(&platform, carry)?;
    platform
        .host_read(RESPONSE, &mut page)
        .map_err(|error| failed("a read", error))?;
    let (_, report) = channel.open_report(&page).map_err(talk)?;
    // With a VLEK loaded, that is what signs for a guest that leaves the choice open.
    let chain = platform.vlek_chain().unwrap_or(platform.cert_chain());
    let signer = chain.vcek.key();
    let signer = signer.ok_or_else(|| Failure::new("the software AMD SP has no key that signs"))?;
    Ok(Launched {
        report,
        chip_id: platform.chip_id(),
        signer: signer.to_sec1().to_vec(),
        measurement: measurement.value(),
    })
}
