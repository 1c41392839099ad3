//! The values that the caller expects in a quote, and the rows about them.

use super::TdReport;
use super::verify::check;
use crate::row::{Rows, same};

/// Expected values. `None` asks nothing; the check then has to be waived by name, except for the
/// FMSPC's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// MRTD.
    pub mrtd: Option<[u8; 48]>,
    /// RTMR 0 to 3.
    pub rtmr: [Option<[u8; 48]>; 4],
    /// MRCONFIGID.
    pub mr_config_id: Option<[u8; 48]>,
    /// MROWNER.
    pub mr_owner: Option<[u8; 48]>,
    /// MROWNERCONFIG.
    pub mr_owner_config: Option<[u8; 48]>,
    /// Measurement of the TDX module.
    pub mr_seam: Option<[u8; 48]>,
    /// All of ATTRIBUTES.
    pub attributes: Option<u64>,
    /// All of XFAM.
    pub xfam: Option<u64>,
    /// The data that the TD must have put in: a nonce, or the digest of a key.
    pub report_data: Option<[u8; 64]>,
    /// TCB statuses that are accepted beside `UpToDate`, in Intel's words (`OutOfDate`).
    pub tcb_statuses: Vec<String>,
    /// Security advisories that are accepted, in Intel's words (`INTEL-SA-00837`).
    pub advisories: Vec<String>,
    /// Family, model, stepping, platform and custom SKU of the processor.
    pub fmspc: Option<[u8; 6]>,
}

impl Expected {
    /// Adds the rows that compare the report with what is expected.
    pub(super) fn compare(&self, rows: &mut Rows<'_>, report: &TdReport) {
        rows.made(check::DEBUGGING, debugging(report.attributes));
        rows.made(check::SERVICE_TD, service_td(report));
        rows.asked(check::ATTRIBUTES, self.attributes, |expected| {
            number("ATTRIBUTES", report.attributes, expected)
        });
        rows.asked(check::XFAM, self.xfam, |expected| {
            number("XFAM", report.xfam, expected)
        });
        let digests = [
            (check::MRTD, "MRTD", self.mrtd, report.mrtd),
            (check::RTMR0, "RTMR0", self.rtmr[0], report.rtmr[0]),
            (check::RTMR1, "RTMR1", self.rtmr[1], report.rtmr[1]),
            (check::RTMR2, "RTMR2", self.rtmr[2], report.rtmr[2]),
            (check::RTMR3, "RTMR3", self.rtmr[3], report.rtmr[3]),
            (
                check::MRCONFIGID,
                "MRCONFIGID",
                self.mr_config_id,
                report.mr_config_id,
            ),
            (check::MROWNER, "MROWNER", self.mr_owner, report.mr_owner),
            (
                check::MROWNERCONFIG,
                "MROWNERCONFIG",
                self.mr_owner_config,
                report.mr_owner_config,
            ),
            (check::MRSEAM, "MRSEAM", self.mr_seam, report.mr_seam),
        ];
        for (check, name, expected, has) in digests {
            rows.asked(check, expected, |expected| same(name, &has, &expected));
        }
        rows.asked(check::REPORT_DATA, self.report_data, |expected| {
            same("report data", &report.report_data, &expected)
        });
    }

    /// Adds the rows about the platform's TCB and kind.
    pub(super) fn judge(
        &self,
        rows: &mut Rows<'_>,
        status: &str,
        advisories: &[String],
        fmspc: &[u8; 6],
    ) {
        let accepted = status == "UpToDate" || self.tcb_statuses.iter().any(|s| s == status);
        let outcome = match accepted {
            true => Ok(()),
            false => Err(format!("the TCB status is {status}")),
        };
        rows.made(check::TCB_STATUS, outcome);
        rows.note(status.to_owned());
        let open: Vec<_> = advisories
            .iter()
            .filter(|advisory| !self.advisories.contains(advisory))
            .map(String::as_str)
            .collect();
        let outcome = match open.is_empty() {
            true => Ok(()),
            false => Err(format!("not accepted are {}", open.join(", "))),
        };
        rows.made(check::ADVISORIES, outcome);
        rows.asked(check::FMSPC, self.fmspc, |expected| {
            same("FMSPC", fmspc, &expected)
        });
    }
}

/// ATTRIBUTES bits 7:0 are those of a TD under debug (bit 0 DEBUG, 6:4 profiling of its code).
fn debugging(attributes: u64) -> Result<(), String> {
    match attributes & 0xff {
        0 => Ok(()),
        bits => Err(format!(
            "ATTRIBUTES has the bits {bits:#x} of a TD under debug"
        )),
    }
}

fn service_td(report: &TdReport) -> Result<(), String> {
    match report.mr_service_td {
        Some(hash) if hash != [0; 48] => Err(format!(
            "service TDs with the hash {} are bound to it",
            hex::encode(hash)
        )),
        _ => Ok(()),
    }
}

fn number(what: &str, has: u64, expected: u64) -> Result<(), String> {
    match has == expected {
        true => Ok(()),
        false => Err(format!("{what} is {has:#x}, expected {expected:#x}")),
    }
}
