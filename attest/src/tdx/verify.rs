//! Verification of a quote, as rows.

use dcap_qvl::config::Config;
use dcap_qvl::verify::QuoteVerifier;
use dcap_qvl::{QuoteClaims, QuoteCollateralV3, QuotePolicy};

use super::backend::Backend;
use super::roots::is_software;
use super::{Expected, Quote, Root};
use crate::event_log::{EventLog, RTMRS};
use crate::row::{Check, Rows, Verdict, Waivers};
use crate::x509::Certificate;

/// Most bytes of collateral that are read: its revocation lists may have thousands of entries.
pub const MAX_COLLATERAL: usize = 0x20_0000;

/// The checks, in the order in which they are made.
pub(super) mod check {
    use crate::row::Check;
    use crate::row::Weight::{Always, Needed, Optional};

    pub(crate) const FORM: Check =
        Check::new("form", Always, "the quote is a TD's, of version 4 or 5");
    pub(crate) const COLLATERAL: Check =
        Check::new("collateral", Always, "the collateral can be read");
    pub(crate) const ROOT: Check =
        Check::new("root", Always, "the PCK chain ends at the trusted root");
    pub(crate) const AUTHENTIC: Check = Check::new(
        "authentic",
        Always,
        "signatures, chains, revocation lists, dates and TCB levels hold (dcap-qvl)",
    );
    pub(crate) const TCB_STATUS: Check = Check::new(
        "tcb-status",
        Needed,
        "the platform's TCB has an accepted status",
    );
    pub(crate) const ADVISORIES: Check = Check::new(
        "advisories",
        Needed,
        "every advisory about the TCB is accepted",
    );
    pub(crate) const DEBUGGING: Check = Check::new(
        "debugging",
        Needed,
        "the host can neither debug nor profile the TD",
    );
    pub(crate) const SERVICE_TD: Check =
        Check::new("service-td", Needed, "no service TD is bound to the TD");
    pub(crate) const ATTRIBUTES: Check =
        Check::new("attributes", Needed, "ATTRIBUTES is the expected one");
    pub(crate) const XFAM: Check = Check::new("xfam", Needed, "XFAM is the expected one");
    pub(crate) const MRTD: Check = Check::new("mrtd", Needed, "MRTD is the expected one");
    pub(crate) const RTMR0: Check = Check::new("rtmr0", Needed, "RTMR0 is the expected one");
    pub(crate) const RTMR1: Check = Check::new("rtmr1", Needed, "RTMR1 is the expected one");
    pub(crate) const RTMR2: Check = Check::new("rtmr2", Needed, "RTMR2 is the expected one");
    pub(crate) const RTMR3: Check = Check::new("rtmr3", Needed, "RTMR3 is the expected one");
    pub(crate) const EVENT_LOG: Check = Check::new(
        "event-log",
        Optional,
        "the event log replays to RTMR0 to RTMR3",
    );
    pub(crate) const MRCONFIGID: Check =
        Check::new("mrconfigid", Needed, "MRCONFIGID is the expected one");
    pub(crate) const MROWNER: Check = Check::new("mrowner", Needed, "MROWNER is the expected one");
    pub(crate) const MROWNERCONFIG: Check =
        Check::new("mrownerconfig", Needed, "MROWNERCONFIG is the expected one");
    pub(crate) const MRSEAM: Check =
        Check::new("mrseam", Needed, "the TDX module is the expected one");
    pub(crate) const REPORT_DATA: Check =
        Check::new("report-data", Needed, "the report data is the expected one");
    pub(crate) const FMSPC: Check =
        Check::new("fmspc", Optional, "the platform is of the expected kind");
}

/// Every check, in the order of the rows.
pub const CHECKS: [Check; 22] = [
    check::FORM,
    check::COLLATERAL,
    check::ROOT,
    check::AUTHENTIC,
    check::TCB_STATUS,
    check::ADVISORIES,
    check::DEBUGGING,
    check::SERVICE_TD,
    check::ATTRIBUTES,
    check::XFAM,
    check::MRTD,
    check::RTMR0,
    check::RTMR1,
    check::RTMR2,
    check::RTMR3,
    check::EVENT_LOG,
    check::MRCONFIGID,
    check::MROWNER,
    check::MROWNERCONFIG,
    check::MRSEAM,
    check::REPORT_DATA,
    check::FMSPC,
];

/// The evidence to verify.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// The quote.
    pub quote: &'a [u8],
    /// The collateral as JSON, in the form of `dcap-qvl` (`QuoteCollateralV3`): revocation lists
    /// and signatures in hex, the chains as PEM, TCB info and QE identity as they were signed.
    pub collateral: &'a [u8],
    /// The TD's event log, if there is one: its digests are believed if they replay to the RTMRs.
    pub event_log: Option<&'a [u8]>,
}

/// The rows, and what the quote says.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The rows.
    pub verdict: Verdict,
    /// The quote, if it can be read. Believe it only if the verdict
    /// [is authentic](Verdict::is_authentic).
    pub quote: Option<Quote>,
}

/// Verifies a quote against a root that the caller trusts and values that it expects, at `now` in
/// seconds of Unix time.
pub fn verify(
    evidence: &Evidence<'_>,
    root: &Root,
    expected: &Expected,
    waivers: &Waivers,
    now: u64,
) -> Verified {
    verify_by::<Backend>(evidence, root, expected, waivers, now)
}

/// Verifies a quote with this arithmetic.
pub(crate) fn verify_by<B: Config>(
    evidence: &Evidence<'_>,
    root: &Root,
    expected: &Expected,
    waivers: &Waivers,
    now: u64,
) -> Verified {
    let mut rows = Rows::new(waivers);
    let quote = Quote::from_bytes(evidence.quote).map_err(|error| error.to_string());
    let quote = rows.value(check::FORM, quote);
    let collateral = rows.value(check::COLLATERAL, collateral(evidence.collateral));
    if let Some(quote) = &quote {
        rows.made(check::ROOT, ends_at(quote, root));
        rows.note(root.name().to_owned());
        expected.compare(&mut rows, &quote.report);
        rows.asked(check::EVENT_LOG, evidence.event_log, |log| {
            replays(log, &quote.report.rtmr)
        });
    }
    if let (Some(_), Some(collateral)) = (&quote, collateral) {
        let claims = rows.value(
            check::AUTHENTIC,
            authentic::<B>(evidence.quote, collateral, root, now),
        );
        if let Some(claims) = claims {
            let status = claims.tcb.status.to_string();
            let fmspc = &claims.platform.pck.fmspc;
            expected.judge(&mut rows, &status, &claims.tcb.advisory_ids, fmspc);
        }
    }
    Verified {
        verdict: rows.finish(&CHECKS),
        quote,
    }
}

fn collateral(json: &[u8]) -> Result<QuoteCollateralV3, String> {
    if json.len() > MAX_COLLATERAL {
        let length = json.len();
        return Err(format!(
            "{length:#x} bytes are more than the {MAX_COLLATERAL:#x} that are read"
        ));
    }
    let read = serde_json::from_slice(json).map_err(|error| error.to_string());
    read.map(|collateral| QuoteCollateralV3 {
        // The chain is the quote's own. dcap-qvl would take this one in its place, and the quote's
        // would be shown without having been verified.
        pck_certificate_chain: None,
        ..collateral
    })
}

/// The root's own certificate is in the quote, too. What counts is its key; with another signature
/// than that key's it is no root.
fn ends_at(quote: &Quote, root: &Root) -> Result<(), String> {
    let last = quote.pck_chain.last();
    let last = last.ok_or("the quote has no chain of certificates")?;
    let last = Certificate::from_der(last).map_err(|error| error.to_string())?;
    if last.key() == root.certificate().key() {
        let own = last.verify_own_p256();
        return own.map_err(|error| format!("the root is not signed by itself: {error}"));
    }
    let whose = match is_software(&last) {
        true => " of the software platform, whose private key is public,",
        false => "",
    };
    Err(format!(
        "it ends at {}{whose} which is not trusted",
        last.subject()
    ))
}

/// Compares the RTMRs that a log replays to with those of the quote.
fn replays(log: &[u8], rtmrs: &[[u8; 48]; RTMRS]) -> Result<(), String> {
    let log = EventLog::from_bytes(log).map_err(|error| error.to_string())?;
    for (n, (replayed, has)) in log.rtmrs().iter().zip(rtmrs).enumerate() {
        if replayed != has {
            let (replayed, has) = (hex::encode(replayed), hex::encode(has));
            return Err(format!(
                "it replays to {replayed} in RTMR{n}, which is {has}"
            ));
        }
    }
    Ok(())
}

/// The work of `dcap-qvl`. Debugging and service TDs have rows of their own.
fn authentic<B: Config>(
    quote: &[u8],
    collateral: QuoteCollateralV3,
    root: &Root,
    now: u64,
) -> Result<QuoteClaims, String> {
    let root = root.certificate().as_der().to_vec();
    QuoteVerifier::<B>::new_with_config(root)
        .allow_debug(true)
        .allow_service_td(true)
        .verify_with_policy(quote, collateral, now, &QuotePolicy::claims_only(now))
        .map_err(|error| format!("{error:#}"))
}
