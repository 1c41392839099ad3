//! The quoting service of a software platform.

use kvm_ops::sim::SimHost;
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService};
use kvm_ops_machine::{NoQuote, QuoteService, TD_REPORT_LEN};
use soft_tdx_module::report::TEE_TCB_SVN;

use crate::failure::{Failure, Outcome};

/// Signs the reports of a software platform's TDs. The key is that of its seed, so its quotes prove nothing about hardware.
pub(crate) struct Quotes {
    service: QuotingService,
    host: SimHost,
}

impl Quotes {
    pub(crate) fn new(host: &SimHost, seed: [u8; 32]) -> Outcome<Self> {
        let service = QuotingService::new(seed)
            .map_err(|error| Failure::because("cannot make a quoting service", error))?;
        Ok(Self {
            service,
            host: host.clone(),
        })
    }

    /// The collateral by which the quotes are verified, in JSON.
    pub(crate) fn collateral(&self) -> Outcome<String> {
        let says = Collateral::new(self.service.platform(), TEE_TCB_SVN);
        let made = Pcs.collateral(self.service.platform(), &says);
        made.map(|collateral| format!("{collateral:#}"))
            .map_err(|error| Failure::because("cannot make the collateral of quotes", error))
    }
}

impl QuoteService for Quotes {
    fn quote(&self, report: &[u8; TD_REPORT_LEN]) -> Result<Vec<u8>, NoQuote> {
        let platform = self.host.tdx_platform().ok_or(NoQuote::Unavailable)?;
        let mac = |report: &[u8; TD_REPORT_LEN]| platform.verify_report(report);
        let quote = self.service.quote(report, &mac, QuoteFormat::V4);
        quote.map_err(|_| NoQuote::Refused)
    }
}
