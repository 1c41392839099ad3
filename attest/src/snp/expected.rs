//! Values that the caller expects in a report, and the rows about them.

use super::verify::check;
use super::{Endorsement, Report, Tcb};
use crate::row::{Rows, same};

/// Expected values. `None` asks nothing; the check then has to be waived by name, except for those
/// of ID key, author key and guest SVN, which not every guest has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Launch digest.
    pub measurement: Option<[u8; 48]>,
    /// REPORT_DATA, which the guest puts in: a nonce, or the digest of a key.
    pub report_data: Option<[u8; 64]>,
    /// HOST_DATA, which the host puts in at launch.
    pub host_data: Option<[u8; 32]>,
    /// The VMPL that must have asked.
    pub vmpl: Option<u32>,
    /// The whole policy.
    pub policy: Option<u64>,
    /// The least version of each part of the reported TCB.
    pub tcb: Option<Tcb>,
    /// The chip, zeros added at the end.
    pub chip_id: Option<[u8; 64]>,
    /// SHA-384 of the ID key.
    pub id_key: Option<[u8; 48]>,
    /// SHA-384 of the author key.
    pub author_key: Option<[u8; 48]>,
    /// The least security version of the guest.
    pub guest_svn: Option<u32>,
}

impl Expected {
    /// Adds the rows that compare the report with what is expected.
    pub(super) fn compare(
        &self,
        rows: &mut Rows<'_>,
        report: &Report,
        endorsement: Option<&Endorsement>,
    ) {
        let debugging = match report.allows_debugging() {
            true => Err(format!(
                "the policy {:#x} lets the host read and write the guest's memory",
                report.policy
            )),
            false => Ok(()),
        };
        rows.made(check::DEBUGGING, debugging);
        rows.asked(check::POLICY, self.policy, |policy| {
            number("policy", report.policy, policy)
        });
        rows.asked(check::VMPL, self.vmpl, |vmpl| {
            number("VMPL", report.vmpl.into(), vmpl.into())
        });
        rows.asked(check::MEASUREMENT, self.measurement, |expected| {
            same("measurement", &report.measurement, &expected)
        });
        rows.asked(check::HOST_DATA, self.host_data, |expected| {
            same("host data", &report.host_data, &expected)
        });
        rows.asked(check::REPORT_DATA, self.report_data, |expected| {
            same("report data", &report.report_data, &expected)
        });
        rows.asked(check::TCB, self.tcb, |least| {
            let product = endorsement.ok_or("the product is not known")?.product;
            let tcb = Tcb::from_bytes(product, report.reported_tcb)
                .ok_or("the reported TCB has reserved bytes that are not zero")?;
            match tcb.below(least) {
                Some((part, has, least)) => Err(format!("{part} is {has}, the minimum is {least}")),
                None => Ok(()),
            }
        });
        rows.asked(check::CHIP_ID, self.chip_id, |expected| {
            same("chip id", &report.chip_id, &expected)
        });
        rows.asked(check::ID_KEY, self.id_key, |expected| {
            same("ID key digest", &report.id_key_digest, &expected)
        });
        rows.asked(
            check::AUTHOR_KEY,
            self.author_key,
            |expected| match report.author_key_enabled {
                true => same("author key digest", &report.author_key_digest, &expected),
                false => Err("the report vouches for no author key".into()),
            },
        );
        rows.asked(check::GUEST_SVN, self.guest_svn, |least| {
            match report.guest_svn < least {
                true => Err(format!(
                    "it is {}, the minimum is {least}",
                    report.guest_svn
                )),
                false => Ok(()),
            }
        });
    }
}

fn number(what: &str, has: u64, expected: u64) -> Result<(), String> {
    match has == expected {
        true => Ok(()),
        false => Err(format!("the {what} is {has:#x}, expected {expected:#x}")),
    }
}
