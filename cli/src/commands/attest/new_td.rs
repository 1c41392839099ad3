//! `attest new`: a TD that asks for its report, and the quoting service that signs it.

use std::fs;
use std::sync::{Arc, Mutex};

use kvm_ops_attest::event_log::{EventKind, EventLog, Writer};
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService, TD_REPORT_LEN};
use soft_tdx_module::report::{TEE_TCB_SVN, mr_seam};
use soft_tdx_module::{GuestLeaf, GuestOp, HostLeaf as L, Outcome as Done, Platform, Regs};

use super::args::NewArgs;
use super::files::{self, write_new};
use super::written::Written;
use crate::failure::{Failure, Outcome};

const HKID: u64 = 33;
/// Addresses in the platform's memory: parameters, the source of a page, the TD's pages.
const PARAMS: u64 = 0x10_0000;
const SOURCE: u64 = 0x20_0000;
const PAGES: u64 = 0x4000_0000;
/// In the TD's only page: the data that it puts into its report, and the report.
const DATA_GPA: u64 = 0x800;
const REPORT_GPA: u64 = 0x400;
/// In that page: the digest that an RTMR is extended with.
const DIGEST_GPA: u64 = 0x880;
/// SEPT_VE_DISABLE, which verifiers insist on.
const ATTRIBUTES: u64 = 1 << 28;
/// x87 and SSE.
const XFAM: u64 = 3;

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

pub(super) fn new_quote(args: &NewArgs) -> Outcome {
    let directory = &args.directory;
    let refuse = |error| Failure::because("the software TDX module gives no quote", error);
    let made = make(args).map_err(refuse)?;
    fs::create_dir_all(directory).map_err(|error| {
        Failure::because(format!("cannot create {}", directory.display()), error)
    })?;
    write_new(&directory.join(files::QUOTE), &made.quote)?;
    write_new(
        &directory.join(files::COLLATERAL),
        made.collateral.as_bytes(),
    )?;
    write_new(&directory.join(files::EVENT_LOG), &made.event_log)?;
    Written {
        about: format!(
            "a quote of {} bytes, its collateral, and an event log",
            made.quote.len()
        ),
        files: &[files::QUOTE, files::COLLATERAL, files::EVENT_LOG],
        question: question(args, &made),
    }
    .tell(args)
}

/// The command that verifies the evidence, with everything that was known before the launch.
fn question(args: &NewArgs, made: &Made) -> String {
    let data = match &args.report_data.0 {
        data if *data == [0; 64] => "00".to_owned(),
        data => hex::encode(data),
    };
    let zero = [0; 48];
    let [rtmr0, rtmr1, rtmr2, rtmr3] = made.rtmrs;
    let digests = [
        ("rtmr0", rtmr0),
        ("rtmr1", rtmr1),
        ("rtmr2", rtmr2),
        ("rtmr3", rtmr3),
        ("mrconfigid", zero),
        ("mrowner", zero),
        ("mrownerconfig", zero),
    ];
    let digests: Vec<_> = digests
        .iter()
        .map(|(name, value)| format!("--{name} {} \\\n    ", hex::encode(value)))
        .collect();
    format!(
        "kvm-ops attest verify {} --root software \\\n    --mrtd {} \\\n    --report-data {data} \
         --attributes {ATTRIBUTES:#x} --xfam {XFAM:#x} \\\n    {}--mrseam {}",
        args.directory.display(),
        hex::encode(made.mrtd),
        digests.concat(),
        hex::encode(mr_seam()),
    )
}

/// A TD's evidence.
struct Made {
    quote: Vec<u8>,
    collateral: String,
    /// Computed beside the launch, not by the platform.
    mrtd: [u8; 48],
    event_log: Vec<u8>,
    /// The values that the log replays to.
    rtmrs: [[u8; 48]; 4],
}

/// What the TD measures while it starts, as firmware and a boot loader would: RTMR, type, data.
const EVENTS: [(usize, EventKind, &[u8]); 4] = [
    (
        0,
        EventKind::EFI_ACTION,
        b"Calling EFI Application from Boot Option",
    ),
    (0, EventKind::SEPARATOR, &[0; 4]),
    (1, EventKind::SEPARATOR, &[0; 4]),
    (2, EventKind::IPL, b"a demo of kvm-ops"),
];

/// An RTMR and the digest that it is extended with.
type Extension = (u64, [u8; 48]);

/// The log of these events, and the extensions that the TD makes of them.
fn measured() -> Fallible<(Vec<u8>, Vec<Extension>)> {
    let mut log = Writer::new();
    let mut extensions = Vec::new();
    for (rtmr, kind, data) in EVENTS {
        extensions.push((rtmr as u64, log.measure(rtmr, kind, data)?));
    }
    Ok((log.as_bytes().to_vec(), extensions))
}

fn make(args: &NewArgs) -> Fallible<Made> {
    let platform = Platform::builder().build()?;
    platform.bring_up()?;
    let (event_log, extensions) = measured()?;
    let (report, mrtd) = launch(&platform, &extensions, &args.report_data.0)?;
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)?;
    let service = QuotingService::new(seed)?;
    let format = match args.quote_version {
        5 => QuoteFormat::V5,
        _ => QuoteFormat::V4,
    };
    let mac = |report: &[u8; TD_REPORT_LEN]| platform.verify_report(report);
    let says = Collateral::new(service.platform(), TEE_TCB_SVN);
    Ok(Made {
        quote: service.quote(&report, &mac, format)?,
        collateral: format!("{:#}", Pcs.collateral(service.platform(), &says)?),
        mrtd,
        rtmrs: EventLog::from_bytes(&event_log)?.rtmrs(),
        event_log,
    })
}

/// A TD of one page and one vCPU measures and asks for its report. The report, and its MRTD.
fn launch(
    p: &Platform,
    extensions: &[Extension],
    data: &[u8; 64],
) -> Fallible<(Vec<u8>, [u8; 48])> {
    let mut pages = (PAGES..).step_by(4096);
    let mut take = || pages.next().unwrap_or(PAGES);
    let regs = |rcx, rdx| Regs {
        rcx,
        rdx,
        ..Regs::default()
    };
    let (tdr, tdvpr) = (take(), take());
    p.call(0, L::MngCreate, regs(tdr, HKID))?;
    // One processor of each package.
    for lp in [0, 2] {
        p.call(lp, L::MngKeyConfig, regs(tdr, 0))?;
    }
    for _ in 0..6 {
        p.call(0, L::MngAddcx, regs(take(), tdr))?;
    }
    // ATTRIBUTES, XFAM, one vCPU; 4-level EPT, write-back; TSC at 1 GHz.
    for (offset, value) in [(0, ATTRIBUTES), (8, XFAM), (16, 1), (24, 0x1e), (40, 40)] {
        p.write_memory(PARAMS + offset, &value.to_le_bytes())?;
    }
    p.call(0, L::MngInit, regs(tdr, PARAMS))?;
    p.call(0, L::VpCreate, regs(tdvpr, tdr))?;
    for _ in 0..5 {
        p.call(0, L::VpAddcx, regs(take(), tdvpr))?;
    }
    p.call(0, L::VpInit, regs(tdvpr, 0))?;
    for level in [3, 2, 1] {
        let r8 = take();
        p.call(
            0,
            L::MemSeptAdd,
            Regs {
                r8,
                ..regs(level, tdr)
            },
        )?;
    }
    let add = Regs {
        r8: take(),
        r9: SOURCE,
        ..regs(0, tdr)
    };
    p.write_memory(SOURCE, &page())?;
    p.call(0, L::MemPageAdd, add)?;
    for chunk in (0..4096).step_by(256) {
        p.call(0, L::MrExtend, regs(chunk, tdr))?;
    }
    p.call(0, L::MrFinalize, regs(tdr, 0))?;
    let read = ask(p, tdvpr, extensions, data);
    p.call(0, L::VpEnter, regs(tdvpr, 0))?;
    let report = read.lock().map(|read| read.clone());
    Ok((report.unwrap_or_default(), mrtd()))
}

/// Stops a processor, over and over.
fn page() -> [u8; 4096] {
    let mut page = [0xf4; 4096];
    page[4094..].copy_from_slice(b"\xeb\xfc");
    page
}

/// MRTD of a TD whose only page lies at 0 and is measured.
fn mrtd() -> [u8; 48] {
    use kvm_ops_tdvf::Mrtd;
    let mut mrtd = Mrtd::new();
    mrtd.page_add(0);
    for (chunk, gpa) in page().chunks_exact(256).zip((0..).step_by(256)) {
        if let Ok(chunk) = chunk.try_into() {
            mrtd.extend(gpa, chunk);
        }
    }
    mrtd.value()
}

/// Sets the TD's program: it extends RTMRs, asks for its report, reads it, and calls the host.
fn ask(p: &Platform, tdvpr: u64, extensions: &[Extension], data: &[u8; 64]) -> Arc<Mutex<Vec<u8>>> {
    let call = Regs {
        rcx: REPORT_GPA,
        rdx: DATA_GPA,
        ..Regs::leaf(GuestLeaf::MrReport.number())
    };
    let write = GuestOp::Write {
        gpa: DATA_GPA,
        data: data.to_vec(),
    };
    let read = GuestOp::Read {
        gpa: REPORT_GPA,
        len: TD_REPORT_LEN,
    };
    let mut steps: Vec<_> = extensions.iter().flat_map(extend).collect();
    steps.extend([write, GuestOp::Tdcall(call), read]);
    let mut steps = steps.into_iter();
    let report = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&report);
    p.set_guest(tdvpr, move |last: &Done| {
        if let (Done::Data(data), Ok(mut report)) = (last, into.lock()) {
            report.clone_from(data);
        }
        // Ends with a call of the host: HLT.
        steps.next().unwrap_or_else(|| GuestOp::vmcall(12, [0; 4]))
    });
    report
}

/// The steps of an extension: the digest into memory, TDG.MR.RTMR.EXTEND.
fn extend((rtmr, digest): &Extension) -> [GuestOp; 2] {
    let write = GuestOp::Write {
        gpa: DIGEST_GPA,
        data: digest.to_vec(),
    };
    let call = Regs {
        rcx: DIGEST_GPA,
        rdx: *rtmr,
        ..Regs::leaf(GuestLeaf::MrRtmrExtend.number())
    };
    [write, GuestOp::Tdcall(call)]
}
