//! TCB info and QE identity, as JSON (Provisioning Certification Service, version 4).

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::super::parts::{ALWAYS, IssueError, Result};
use super::Platform;

/// Least ISVSVN of a quoting enclave that is up to date.
const QE_SVN: u16 = 4;

/// A TCB level of the collateral: what it takes at least, and what it then says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level {
    /// Least security versions of the processor's parts.
    pub cpu_svn: [u8; 16],
    /// Least security versions of the TDX module's parts.
    pub tee_tcb_svn: [u8; 16],
    /// Intel's word for the status: `UpToDate`, `OutOfDate`, `Revoked`, ...
    pub status: String,
    /// Advisories about platforms on that level.
    pub advisories: Vec<String>,
}

/// The contents of a platform's collateral.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collateral {
    /// The levels, highest first.
    pub levels: Vec<Level>,
    /// When everything was issued and when the next is due, in seconds of Unix time.
    pub validity: (u64, u64),
    /// The last 19 digits of the PCK's serial number are revoked.
    pub revoked_pck: bool,
    /// The PCK's authority is revoked by the root.
    pub revoked_ca: bool,
}

impl Collateral {
    /// Collateral that is valid from 2020 to 2049, for a platform that is up to date.
    pub fn new(platform: &Platform, tee_tcb_svn: [u8; 16]) -> Self {
        let older = |svn: [u8; 16]| svn.map(|part| part.saturating_sub(1));
        let level = |cpu_svn, tee_tcb_svn, status: &str, advisories: &[&str]| Level {
            cpu_svn,
            tee_tcb_svn,
            status: status.into(),
            advisories: advisories.iter().map(|a| (*a).to_owned()).collect(),
        };
        Self {
            levels: vec![
                level(platform.cpu_svn, tee_tcb_svn, "UpToDate", &[]),
                level(
                    older(platform.cpu_svn),
                    older(tee_tcb_svn),
                    "OutOfDate",
                    &["SOFTWARE-SA-00001"],
                ),
            ],
            validity: ALWAYS,
            revoked_pck: false,
            revoked_ca: false,
        }
    }
}

fn date(seconds: u64) -> Result<String> {
    let duration = std::time::Duration::from_secs(seconds);
    let date = x509_cert::der::DateTime::from_unix_duration(duration);
    Ok(date.map_err(|_| IssueError::Date(seconds))?.to_string())
}

fn components(svn: &[u8; 16]) -> Vec<Value> {
    svn.iter().map(|svn| json!({ "svn": svn })).collect()
}

const NO_SIGNER: &str = "000000000000000000000000000000000000000000000000\
                         000000000000000000000000000000000000000000000000";

pub(super) fn tcb_info(platform: &Platform, says: &Collateral) -> Result<Value> {
    let issued = date(says.validity.0)?;
    let levels = says.levels.iter().map(|level| {
        json!({
            "tcb": {
                "sgxtcbcomponents": components(&level.cpu_svn),
                "pcesvn": platform.pce_svn,
                "tdxtcbcomponents": components(&level.tee_tcb_svn),
            },
            "tcbDate": issued,
            "tcbStatus": level.status,
            "advisoryIDs": level.advisories,
        })
    });
    let identity = json!({
        "mrsigner": NO_SIGNER,
        "attributes": "0000000000000000",
        "attributesMask": "FFFFFFFFFFFFFFFF",
    });
    // The module's own levels: of major version 1, whose minor versions the levels above name.
    let mut module = identity.clone();
    module["id"] = "TDX_01".into();
    let module_levels = says.levels.iter().map(|level| {
        // A module can be up to date, out of date or revoked, and nothing else.
        let status = match level.status.as_str() {
            status @ ("UpToDate" | "OutOfDate" | "Revoked") => status,
            _ => "UpToDate",
        };
        json!({
            "tcb": { "isvsvn": level.tee_tcb_svn[0] },
            "tcbDate": issued,
            "tcbStatus": status,
        })
    });
    module["tcbLevels"] = module_levels.collect();
    Ok(json!({
        "id": "TDX",
        "version": 3,
        "issueDate": issued,
        "nextUpdate": date(says.validity.1)?,
        "fmspc": hex::encode_upper(platform.fmspc),
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 1,
        "tdxModule": identity,
        "tdxModuleIdentities": [module],
        "tcbLevels": levels.collect::<Vec<_>>(),
    }))
}

/// MRSIGNER of the software quoting enclave.
pub(crate) fn qe_signer() -> [u8; 32] {
    Sha256::digest("kvm-ops software platform: QE signer").into()
}

/// ISVSVN of the software quoting enclave.
pub(crate) const fn qe_svn() -> u16 {
    QE_SVN
}

pub(super) fn qe_identity(says: &Collateral) -> Result<Value> {
    let issued = date(says.validity.0)?;
    Ok(json!({
        "id": "TD_QE",
        "version": 2,
        "issueDate": issued,
        "nextUpdate": date(says.validity.1)?,
        "tcbEvaluationDataNumber": 1,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11000000000000000000000000000000",
        "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
        "mrsigner": hex::encode_upper(qe_signer()),
        "isvprodid": 2,
        "tcbLevels": [{
            "tcb": { "isvsvn": QE_SVN },
            "tcbDate": issued,
            "tcbStatus": "UpToDate",
        }],
    }))
}
