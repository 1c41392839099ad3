//! The quoting service of a software platform.

use kvm_ops::sim::SimHost;
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService};
use kvm_ops_machine::{
    ExitContext, ExitHandler, Flow, Inside, NoQuote, QuoteService, Quoting, TD_REPORT_LEN,
};
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

/// Devices, and the answers to a TD's requests for quotes.
pub(crate) struct WithQuotes<'a> {
    devices: &'a dyn ExitHandler,
    quoting: Option<&'a Quoting<Quotes>>,
}

impl<'a> WithQuotes<'a> {
    pub(crate) const fn new(
        devices: &'a dyn ExitHandler,
        quoting: Option<&'a Quoting<Quotes>>,
    ) -> Self {
        Self { devices, quoting }
    }

    /// Makes the quotes that are asked for until the run ends.
    pub(crate) fn make_quotes(&self, machine: &dyn Inside) {
        if let Some(quoting) = self.quoting {
            quoting.serve(machine);
        }
    }
}

impl ExitHandler for WithQuotes<'_> {
    fn handle(&self, exit: &mut ExitContext<'_>) -> Flow {
        match self.quoting.is_some_and(|quoting| quoting.answer(exit)) {
            true => Flow::Continue,
            false => self.devices.handle(exit),
        }
    }
}
