//! The steps of a confidential VM's run, with the calls of the host to the firmware below that each took.

use kvm_ops::FreeReport;
use serde::Serialize;

use super::report::{Ran, Told};
use crate::confidential::{Account, Books, Firmware, Leaks, Measured, Start};
use crate::doctor::text::{finish, table};
use crate::exit_code::Code;
use crate::failure::{Failure, Outcome};
use crate::hosts::{AnyMachine, Place};
use crate::term;
use crate::units::plural;

/// The steps so far.
pub(super) struct Steps<'a> {
    place: &'a Place,
    firmware: Firmware,
    books: Vec<Books>,
    rows: Vec<Step>,
    measured: Option<Measured>,
}

/// A step, with the calls that it took: SEAMCALLs, or commands to the AMD SP.
#[derive(Serialize)]
struct Step {
    step: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    seamcalls: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    commands: Option<u64>,
    detail: String,
}

/// The report in JSON: that of any run, the steps, and the firmware's account.
#[derive(Serialize)]
struct Report<'a, R: Serialize> {
    #[serde(flatten)]
    run: R,
    steps: &'a [Step],
    firmware: Option<&'a Account>,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<&'a Measured>,
}

impl<'a> Steps<'a> {
    pub(super) fn new(place: &'a Place, firmware: Firmware) -> Self {
        Self {
            place,
            firmware,
            books: place.books(firmware).into_iter().collect(),
            rows: Vec::new(),
            measured: None,
        }
    }

    /// Records a step that is done.
    pub(super) fn took(&mut self, step: &'static str, detail: String) {
        let now = self.place.books(self.firmware);
        let calls = match (&now, self.books.last()) {
            (Some(now), Some(before)) => now.host_calls_since(before),
            _ => 0,
        };
        let of = |firmware| (self.firmware == firmware).then_some(calls);
        self.rows.push(Step {
            step,
            seamcalls: of(Firmware::TdxModule),
            commands: of(Firmware::AmdSp),
            detail,
        });
        self.books.extend(now);
    }

    /// Holds what the firmware measured against the image.
    ///
    /// # Errors
    /// The measurement is another, or cannot be had.
    pub(super) fn compare(
        &mut self,
        step: &'static str,
        measurement: &str,
        start: &Start,
        machine: &dyn AnyMachine,
    ) -> Outcome<()> {
        let measured = start.measurement(self.place, machine);
        let checked = measured.checked().map_err(|why| {
            let what = format!("{measurement} is not that of the image");
            Failure::because(what, why).code(Code::Guest)
        });
        let detail = match &checked {
            Ok(digest) => format!("{digest}, as off line"),
            Err(failure) => failure.in_a_line(),
        };
        self.took(step, detail);
        checked.map(drop)
    }

    /// Records what a TD's registers hold.
    pub(super) fn measured(&mut self, measured: Measured) {
        for (name, value) in measured.rows() {
            self.took(name, value);
        }
        self.measured = Some(measured);
    }

    /// Tells of a run, gives the machine back, and returns the exit code.
    pub(super) fn tear_down(
        mut self,
        told: &Told<'_>,
        machine: Box<dyn AnyMachine>,
        ran: Outcome<Ran>,
    ) -> Outcome {
        if let (Ok(ran), false) = (&ran, told.args.json) {
            told.lines(ran);
        }
        let freed = machine.destroy();
        let key = match self.firmware {
            Firmware::TdxModule => "KeyID",
            Firmware::AmdSp => "ASID",
        };
        self.took(
            "tear down",
            format!(
                "{} and {} freed",
                plural(freed.pages_freed, "page"),
                plural(freed.keys_freed.into(), key)
            ),
        );
        let account = self.account(&freed);
        let sums_agree = account
            .as_ref()
            .is_none_or(|account| account.disagreements.is_empty());
        let code = match &ran {
            _ if !freed.is_clean() || !sums_agree => Code::Leak,
            Ok(ran) => ran.code(),
            Err(_) => Code::Guest,
        };
        match &ran {
            Ok(ran) if told.args.json => term::say_json(&Report {
                run: told.json(ran, &freed, code),
                steps: &self.rows,
                firmware: account.as_ref(),
                measured: self.measured.as_ref(),
            })?,
            _ => self.print(&freed, account.as_ref()),
        }
        ran.map(|_| code)
    }

    /// The firmware's account from the first step to the last, if the host shows it.
    fn account(&self, freed: &FreeReport) -> Option<Account> {
        let (before, after) = (self.books.first()?, self.books.last()?);
        let mut leaks = Leaks::default();
        leaks.add(freed);
        Some(Account::draw(self.firmware, before, after, leaks))
    }

    /// Prints the steps, the leaks and the account.
    fn print(&self, freed: &FreeReport, account: Option<&Account>) {
        let calls = match self.firmware {
            Firmware::TdxModule => "SEAMCALLS",
            Firmware::AmdSp => "COMMANDS",
        };
        let mut shown = table(&["STEP", calls, ""]);
        for row in &self.rows {
            let calls = row.seamcalls.or(row.commands).unwrap_or(0);
            shown.add_row([row.step, &calls.to_string(), &row.detail]);
        }
        term::complain(format!("\n{}", finish(shown)));
        for leak in &freed.leaks {
            term::complain(leak);
        }
        if let Some(account) = account {
            term::complain(format!("\n{account}"));
        }
    }
}
