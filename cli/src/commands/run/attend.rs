//! The program beside a run: keys for the guest, and how far it is.

use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvm_ops::sim::SimHost;
use kvm_ops_machine::{Inside, Stopper};

use super::keys::{Ask, Keyboard, Parser};
use crate::term;
use crate::units;

/// The time between two looks at the run.
const TICK: Duration = Duration::from_millis(20);

const HELP: &str = "Ctrl-A x ends the run, Ctrl-A s tells how far it is, Ctrl-A a is Ctrl-A";

/// Types on a guest's serial line; returns how many bytes found room.
pub(super) type TypeIn<'a> = dyn Fn(&[u8], &dyn Inside) -> usize + 'a;

pub(super) struct Attendant<'a> {
    platform: Option<&'a SimHost>,
    stopper: Stopper,
    keyboard: Option<Keyboard>,
    parser: Parser,
    /// Shown where the guest's console does not go to the same terminal.
    bar: Option<ProgressBar>,
    start: Instant,
    asked_to_end: bool,
}

impl<'a> Attendant<'a> {
    /// Takes the terminal, where there is one. `is_quiet` if the report is for a program.
    pub(super) fn new(platform: Option<&'a SimHost>, stopper: Stopper, is_quiet: bool) -> Self {
        let keyboard = (!is_quiet).then(Keyboard::open).flatten();
        if keyboard.is_some() {
            term::complain(HELP);
        }
        let apart = term::has_bars() && !term::shows_output();
        Self {
            platform,
            stopper,
            keyboard,
            parser: Parser::default(),
            bar: (apart && !is_quiet).then(bar),
            start: Instant::now(),
            asked_to_end: false,
        }
    }

    /// True if a key ended the run.
    pub(super) const fn was_asked_to_end(&self) -> bool {
        self.asked_to_end
    }

    /// True if there is something to do while the guest runs.
    pub(super) const fn is_needed(&self) -> bool {
        self.keyboard.is_some() || self.bar.is_some()
    }

    /// Works until the run is over.
    pub(super) fn attend(&mut self, machine: &dyn Inside, type_in: &TypeIn<'_>) {
        while !machine.is_ending() {
            match &self.keyboard {
                Some(keyboard) => match keyboard.wait(TICK) {
                    Some(keys) => self.answer(&keys),
                    None => self.keyboard = None,
                },
                None => thread::sleep(TICK),
            }
            self.parser.give(|keys| type_in(keys, machine));
            if let Some(bar) = &self.bar {
                bar.set_message(self.progress());
                bar.tick();
            }
        }
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn answer(&mut self, keys: &[u8]) {
        for ask in self.parser.take(keys) {
            match ask {
                Ask::End => {
                    self.asked_to_end = true;
                    self.stopper.stop();
                }
                Ask::Progress => term::complain(format!("\n{}", self.progress())),
                Ask::Help => term::complain(format!("\n{HELP}")),
            }
        }
    }

    /// Time, and instructions where the host counts them.
    fn progress(&self) -> String {
        let elapsed = self.start.elapsed();
        let time = units::time(elapsed);
        match self.platform.map(SimHost::instructions) {
            Some(count) => {
                let rate = units::millions_in_a_second(count, elapsed);
                format!("{time}, {} M instructions, {rate}", count / 1_000_000)
            }
            None => time,
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{spinner} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar
}
