//! The progress of a fleet on standard error: a bar on a terminal, else a line for each VM.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::term::{self, ERROR};
use crate::units;

use super::report::{Status, VmReport};

/// Shows the number of VMs that have ended.
pub(crate) struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    /// Creates the progress display of `vms` VMs; `quiet` shows failures only.
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

    /// Counts a VM that has ended and is torn down.
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

    /// Removes the bar.
    pub(crate) fn done(self) {
        self.bar.finish_and_clear();
    }
}
