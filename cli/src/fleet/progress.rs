//! How far a fleet is: a bar on a terminal, a line for each VM elsewhere. On standard error.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::term::{self, ERROR};
use crate::units;

use super::report::{Status, VmReport};

/// Shows how many VMs have ended.
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// For that many VMs; `quiet` shows nothing but failures.
    pub(crate) fn new(vms: usize, quiet: bool) -> Self {
        let target = if term::has_bars() && !quiet {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(vms as u64), target);
        let template = if term::colours_err() {
            "{bar:30.green} {pos}/{len} VMs ended  {elapsed}  {msg}"
        } else {
            "{bar:30} {pos}/{len} VMs ended  {elapsed}  {msg}"
        };
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.tick();
        Self {
            bar,
            lines: !term::has_bars() && !quiet,
        }
    }

    /// A VM has ended and is torn down.
    pub(crate) fn ended(&self, vm: &VmReport) {
        self.bar.set_message(vm.name.clone());
        self.bar.inc(1);
        if vm.status == Status::Failed {
            let why = vm.problems.first().unwrap_or(&vm.end);
            let line = format!("{ERROR}{}{ERROR:#}: {why}", vm.name);
            self.bar.suspend(|| term::complain(line));
        } else if self.lines {
            term::complain(format!(
                "{}: {} after {}",
                vm.name,
                vm.end,
                units::time(vm.elapsed)
            ));
        }
    }

    /// Takes the bar away.
    pub(crate) fn done(self) {
        self.bar.finish_and_clear();
    }
}
