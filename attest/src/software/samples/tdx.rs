//! Quotes of TDs.

use super::super::parts::Result;
use super::super::{Collateral, Pcs, Platform, QuoteFormat, QuotingService};
use super::{Sample, TIME};
use crate::event_log::{EventKind, EventLog, Writer};
use crate::tdx::Expected;

const DAY: u64 = 86_400;
const TEE_TCB_SVN: [u8; 16] = [5, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const ATTRIBUTES: u64 = 1 << 28;
const SEED: [u8; 32] = *b"kvm-ops: service of the samples\0";
/// Offset of the signature data of a version 5 quote: after header, frame, body and length.
const AUTH: usize = 48 + 6 + 648 + 4;
/// Offset of the first digest in the event log: behind the header and the event's first fields.
const LOG_DIGEST: usize = 65 + 14;
/// Length of the last event: its fields and its data.
const LAST_EVENT: usize = 66 + 21;

/// The values that a verifier of the samples expects.
pub fn expected() -> Expected {
    let digest = |n: u8| [0x10 + n; 48];
    Expected {
        mrtd: Some(digest(0)),
        mr_config_id: Some(digest(1)),
        mr_owner: Some(digest(2)),
        mr_owner_config: Some(digest(3)),
        rtmr: replayed().map(Some),
        mr_seam: Some([0x5e; 48]),
        attributes: Some(ATTRIBUTES),
        xfam: Some(3),
        report_data: Some([0xda; 64]),
        ..Expected::default()
    }
}

/// What the TD of the samples measured: RTMR, type, data.
const EVENTS: [(usize, EventKind, &[u8]); 5] = [
    (
        0,
        EventKind::EFI_ACTION,
        b"Calling EFI Application from Boot Option",
    ),
    (0, EventKind::SEPARATOR, &[0; 4]),
    (1, EventKind::SEPARATOR, &[0; 4]),
    (2, EventKind::EVENT_TAG, b"console=hvc0"),
    (3, EventKind::IPL, b"of the owner's choice"),
];

/// The log of that.
fn log() -> Vec<u8> {
    let mut log = Writer::new();
    for (rtmr, kind, data) in EVENTS {
        // Refused are other RTMRs and long logs only.
        let _ = log.measure(rtmr, kind, data);
    }
    log.as_bytes().to_vec()
}

/// The RTMRs after that.
fn replayed() -> [[u8; 48]; 4] {
    EventLog::from_bytes(&log()).map_or([[0; 48]; 4], |log| log.rtmrs())
}

/// A quote in the making, with the parts that a sample changes.
struct Making {
    format: QuoteFormat,
    body: Vec<u8>,
    quote: Vec<u8>,
    pck_valid: Option<(u64, u64)>,
    platform: Platform,
    says: Collateral,
    json: String,
    log: Vec<u8>,
}

impl Making {
    fn new(format: QuoteFormat) -> Self {
        let mut body = vec![0; 584];
        body[..16].copy_from_slice(&TEE_TCB_SVN);
        body[16..64].fill(0x5e);
        body[120..128].copy_from_slice(&ATTRIBUTES.to_le_bytes());
        body[128..136].copy_from_slice(&3_u64.to_le_bytes());
        for (n, digest) in body[136..328].chunks_exact_mut(48).enumerate() {
            digest.fill(0x10 + n as u8);
        }
        body[328..520].copy_from_slice(replayed().as_flattened());
        body[520..584].fill(0xda);
        if format == QuoteFormat::V5 {
            body.extend_from_slice(&TEE_TCB_SVN);
            body.extend_from_slice(&[0; 48]);
        }
        let platform = Platform::default();
        Self {
            format,
            body,
            quote: Vec::new(),
            pck_valid: None,
            says: Collateral::new(&platform, TEE_TCB_SVN),
            platform,
            json: String::new(),
            log: log(),
        }
    }

    fn make(&mut self) -> Result<()> {
        let service = QuotingService::on(Platform::default(), SEED, self.pck_valid)?;
        self.quote = service.quote_of_body(&self.body, self.format);
        self.json = Pcs.collateral(&self.platform, &self.says)?.to_string();
        Ok(())
    }

    fn files(&self) -> Vec<(&'static str, Vec<u8>)> {
        vec![
            ("quote.bin", self.quote.clone()),
            ("collateral.json", self.json.clone().into_bytes()),
            ("event_log.bin", self.log.clone()),
        ]
    }
}

type Change = fn(&mut Making);

fn nothing(_: &mut Making) {}

/// Name, the check that fails, what is wrong, the change before signing, the change after.
const BAD: [(&str, &str, &str, Change, Change); 32] = [
    ("mrtd", "mrtd", "another MRTD", |m| m.body[136] = 1, nothing),
    (
        "mrconfigid",
        "mrconfigid",
        "another MRCONFIGID",
        |m| m.body[184] = 1,
        nothing,
    ),
    (
        "mrowner",
        "mrowner",
        "another MROWNER",
        |m| m.body[232] = 1,
        nothing,
    ),
    (
        "mrownerconfig",
        "mrownerconfig",
        "another MROWNERCONFIG",
        |m| m.body[280] = 1,
        nothing,
    ),
    (
        "rtmr0",
        "rtmr0",
        "another RTMR0",
        |m| m.body[328] = 1,
        nothing,
    ),
    (
        "rtmr1",
        "rtmr1",
        "another RTMR1",
        |m| m.body[376] = 1,
        nothing,
    ),
    (
        "rtmr2",
        "rtmr2",
        "another RTMR2",
        |m| m.body[424] = 1,
        nothing,
    ),
    (
        "rtmr3",
        "rtmr3",
        "another RTMR3",
        |m| m.body[472] = 1,
        nothing,
    ),
    (
        "report-data",
        "report-data",
        "other report data: an answer to another nonce",
        |m| m.body[520] = 1,
        nothing,
    ),
    (
        "mrseam",
        "mrseam",
        "another TDX module",
        |m| m.body[16] = 1,
        nothing,
    ),
    (
        "attributes",
        "attributes",
        "ATTRIBUTES with PKS",
        |m| m.body[123] |= 0x40,
        nothing,
    ),
    (
        "xfam",
        "xfam",
        "XFAM with AVX",
        |m| m.body[128] |= 4,
        nothing,
    ),
    (
        "debug",
        "debugging",
        "a TD under debug",
        |m| m.body[120] |= 1,
        nothing,
    ),
    (
        "migratable",
        "authentic",
        "a TD that may migrate",
        |m| m.body[123] |= 0x20,
        nothing,
    ),
    (
        "service-td",
        "service-td",
        "a TD with a service TD",
        |m| m.body[600] = 1,
        nothing,
    ),
    (
        "signer",
        "authentic",
        "a TDX module of another signer",
        |m| m.body[64] = 1,
        nothing,
    ),
    (
        "tcb-out-of-date",
        "tcb-status",
        "a platform whose TCB is out of date",
        |m| m.says.levels[0].tee_tcb_svn[2] += 1,
        nothing,
    ),
    (
        "tcb-revoked",
        "authentic",
        "a platform whose TCB level is revoked",
        |m| m.says.levels[0].status = "Revoked".into(),
        nothing,
    ),
    (
        "tcb-unknown",
        "authentic",
        "a platform below every TCB level",
        |m| m.says.levels.iter_mut().for_each(|l| l.cpu_svn[0] = 99),
        nothing,
    ),
    (
        "collateral-expired",
        "authentic",
        "collateral that is out of date",
        |m| m.says.validity = (TIME - 2 * DAY, TIME - DAY),
        nothing,
    ),
    (
        "collateral-of-another-platform",
        "authentic",
        "TCB info for another FMSPC",
        |m| m.platform.fmspc = [1; 6],
        nothing,
    ),
    (
        "tcb-info-changed",
        "authentic",
        "TCB info changed after signing",
        nothing,
        |m| m.json = m.json.replacen("OutOfDate", "UpToDate", 1),
    ),
    (
        "pck-revoked",
        "authentic",
        "the PCK is revoked",
        |m| m.says.revoked_pck = true,
        nothing,
    ),
    (
        "pck-ca-revoked",
        "authentic",
        "the PCK's authority is revoked",
        |m| m.says.revoked_ca = true,
        nothing,
    ),
    (
        "pck-expired",
        "authentic",
        "the PCK's certificate is expired",
        |m| m.pck_valid = Some((TIME - 2 * DAY, TIME - DAY)),
        nothing,
    ),
    (
        "changed",
        "authentic",
        "a bit of MRTD changed after signing",
        nothing,
        |m| m.quote[54 + 136] ^= 1,
    ),
    (
        "signature",
        "authentic",
        "a bit of the signature changed",
        nothing,
        |m| m.quote[AUTH] ^= 1,
    ),
    (
        "qe-report",
        "authentic",
        "a bit of the quoting enclave's report changed",
        nothing,
        |m| m.quote[AUTH + 134] ^= 1,
    ),
    (
        "tail",
        "form",
        "bytes behind the quote that are not zero",
        nothing,
        |m| m.quote.push(1),
    ),
    (
        "event-log-changed",
        "event-log",
        "a digest in the event log changed",
        nothing,
        |m| m.log[LOG_DIGEST] ^= 1,
    ),
    (
        "event-log-short",
        "event-log",
        "the last event of the log left out",
        nothing,
        |m| m.log.truncate(m.log.len() - LAST_EVENT),
    ),
    (
        "event-log-cut",
        "event-log",
        "an event log that is cut",
        nothing,
        |m| m.log.truncate(m.log.len() - 1),
    ),
];

/// The samples: good ones of both versions, and bad ones of version 5.
pub fn quotes() -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let good = [
        ("good-v4", QuoteFormat::V4, "a good quote of version 4"),
        ("good-v5", QuoteFormat::V5, "a good quote of version 5"),
    ];
    for (name, format, about) in good {
        let mut making = Making::new(format);
        making.make()?;
        samples.push(Sample {
            name,
            about,
            fails: None,
            files: making.files(),
            is_turin: false,
        });
    }
    for (name, fails, about, before, after) in BAD {
        let mut making = Making::new(QuoteFormat::V5);
        before(&mut making);
        making.make()?;
        after(&mut making);
        samples.push(Sample {
            name,
            about,
            fails: Some(fails),
            files: making.files(),
            is_turin: false,
        });
    }
    Ok(samples)
}
