//! Quotes verified by `kvm-ops-attest`.

use kvm_ops_attest::tdx::{Evidence, Expected, Quote, Root, verify};
use kvm_ops_attest::{Outcome, Waivers};

use crate::identity::{EvidenceVerifier, Identity, Untrusted};

/// Finds the collateral of a quote, as JSON (`kvm_ops_attest::tdx::Evidence::collateral`). It is signed, so
/// that it may come from anywhere: the host, a cache, the peer.
pub trait CollateralSource: Send {
    /// The collateral, at this moment in seconds of Unix time.
    ///
    /// # Errors
    /// [`Untrusted`] where there is none.
    fn collateral(&mut self, quote: &Quote) -> Result<(Vec<u8>, u64), Untrusted>;
}

impl<F: FnMut(&Quote) -> Result<(Vec<u8>, u64), Untrusted> + Send> CollateralSource for F {
    fn collateral(&mut self, quote: &Quote) -> Result<(Vec<u8>, u64), Untrusted> {
        self(quote)
    }
}

/// Believes the quotes whose chain ends at a root, and whose platform has an accepted TCB.
pub struct Dcap<C> {
    root: Root,
    source: C,
    expected: Expected,
}

/// The rows that say whether a quote is believed. What it says of the TD is the policy's to judge.
const NEEDED: [&str; 6] = [
    "form",
    "collateral",
    "root",
    "authentic",
    "tcb-status",
    "advisories",
];

impl<C: CollateralSource> Dcap<C> {
    /// Believes quotes under `root` with the TCB status `UpToDate` and no open advisories.
    pub fn new(root: Root, source: C) -> Self {
        Self {
            root,
            source,
            expected: Expected::default(),
        }
    }

    /// Accepts these TCB statuses too, in Intel's words.
    #[must_use]
    pub fn accept_statuses(mut self, statuses: Vec<String>) -> Self {
        self.expected.tcb_statuses = statuses;
        self
    }

    /// Accepts these advisories, in Intel's words.
    #[must_use]
    pub fn accept_advisories(mut self, advisories: Vec<String>) -> Self {
        self.expected.advisories = advisories;
        self
    }
}

impl<C: CollateralSource> EvidenceVerifier for Dcap<C> {
    fn verify(&mut self, quote: &[u8]) -> Result<Identity, Untrusted> {
        let read = Quote::from_bytes(quote).map_err(|error| Untrusted(error.to_string()))?;
        let (collateral, now) = self.source.collateral(&read)?;
        let evidence = Evidence {
            quote,
            collateral: &collateral,
            event_log: None,
        };
        let waivers = Waivers::none();
        let verified = verify(&evidence, &self.root, &self.expected, &waivers, now);
        for name in NEEDED {
            match verified.verdict.row(name).map(|row| &row.outcome) {
                Some(Outcome::Passed) => {}
                outcome => return Err(Untrusted(format!("{name}: {outcome:?}"))),
            }
        }
        let said = verified.quote.ok_or(Untrusted("no quote".into()))?.report;
        Ok(Identity {
            tee_tcb_svn: said.tee_tcb_svn,
            mrseam: said.mr_seam,
            attributes: said.attributes,
            xfam: said.xfam,
            mrtd: said.mrtd,
            measurement_ids: [said.mr_config_id, said.mr_owner, said.mr_owner_config],
            rtmr: said.rtmr,
            report_data: said.report_data,
        })
    }
}
