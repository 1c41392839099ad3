//! Whether a peer is what the policy wants, by its attestation report.

use kvm_ops_attest::snp::{Evidence, Expected, REPORT_LEN, Report, Roots, Tcb, verify};
use kvm_ops_attest::{Outcome, Verdict, Waivers};

use super::policy::{AgentPolicy, LeastTcb};
use crate::failure::Failure;
use crate::policy::Mismatch;

/// A report as firmware makes it.
pub(crate) type ReportBytes = [u8; REPORT_LEN];

/// Believes the reports whose chain ends at a root that it trusts.
pub struct AgentVerifier {
    roots: Roots,
    clock: Box<dyn FnMut() -> u64 + Send>,
}

/// What says whether a report is believed, beside the rows that are always made.
const BELIEVED: [&str; 2] = ["validity", "revocation"];
/// Rows that the policy has its own words for, and those of the host's choice.
const WAIVED: [&str; 4] = ["policy", "tcb", "host-data", "chip-id"];

impl AgentVerifier {
    /// Trusts these roots. `clock` tells the time in seconds of Unix time: certificates and revocation lists are compared with it, and an
    /// agent has it from its host or from a source that it trusts more.
    pub fn new(roots: Roots, clock: impl FnMut() -> u64 + Send + 'static) -> Self {
        Self {
            roots,
            clock: Box::new(clock),
        }
    }

    /// Judges the peer by its evidence, a report over this data and a table of certificates behind it.
    pub(crate) fn judge(
        &mut self,
        policy: &AgentPolicy,
        own: &ReportBytes,
        evidence: &[u8],
        data: &[u8; 64],
    ) -> Result<(), Failure> {
        let own = Report::from_bytes(own).map_err(|_| Failure::Host)?;
        let (report, table) = evidence
            .split_first_chunk::<REPORT_LEN>()
            .ok_or(Failure::Evidence)?;
        let expected = Expected {
            measurement: Some(policy.measurement.unwrap_or(own.measurement)),
            report_data: Some(*data),
            vmpl: Some(0),
            ..Expected::default()
        };
        let evidence = Evidence {
            report,
            certificates: &[table],
            crl: None,
        };
        let waivers = Waivers::new(WAIVED, &kvm_ops_attest::snp::CHECKS);
        let waivers = waivers.map_err(|_| Failure::Evidence)?;
        let verified = verify(&evidence, &self.roots, &expected, &waivers, (self.clock)());
        let verdict = &verified.verdict;
        if !verdict.is_authentic() || !BELIEVED.iter().all(|row| passed(verdict, row)) {
            return Err(Failure::Evidence);
        }
        if !passed(verdict, "report-data") {
            return Err(Failure::Binding);
        }
        let (Some(peer), Some(product)) = (verified.report, verified.product) else {
            return Err(Failure::Evidence);
        };
        let tcb = |report: &Report| Tcb::from_bytes(product, report.reported_tcb);
        let least = match policy.tcb {
            LeastTcb::Own => tcb(&own),
            LeastTcb::AtLeast(least) => Some(least),
        };
        let is_new_enough = match (tcb(&peer), least) {
            (Some(has), Some(least)) => has.below(least).is_none(),
            _ => false,
        };
        let rules = [
            (passed(verdict, "debugging"), Mismatch::GuestPolicy),
            (
                peer.policy & policy.policy_forbidden == 0,
                Mismatch::GuestPolicy,
            ),
            (passed(verdict, "vmpl"), Mismatch::Vmpl),
            (passed(verdict, "measurement"), Mismatch::Measurement),
            (is_new_enough, Mismatch::Tcb),
        ];
        if let Some((_, mismatch)) = rules.into_iter().find(|(holds, _)| !holds) {
            return Err(mismatch.into());
        }
        match verdict.is_accepted() {
            true => Ok(()),
            false => Err(Failure::Evidence),
        }
    }
}

fn passed(verdict: &Verdict, name: &str) -> bool {
    let row = verdict.row(name).map(|row| &row.outcome);
    matches!(row, Some(Outcome::Passed))
}
