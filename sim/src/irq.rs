//! Kicks, interrupts and other messages, which wake a vCPU from outside.

use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_ops::Kick;

/// The vector of an NMI.
pub(crate) const NMI: u8 = 2;

/// The mailbox of one vCPU, shared by the vCPU, its kick handles and its VM.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    state: Mutex<State>,
    changed: Condvar,
    source: Source,
}

/// Asked for a reason to leave the guest, beside kicks.
#[derive(Default)]
struct Source(OnceLock<Box<dyn Fn() -> bool + Send + Sync>>);

/// A vCPU that sleeps asks its source this often.
const ASKED: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
pub(crate) struct State {
    kicked: bool,
    waiting: Waiting,
    /// Those of the waiting vectors that came from level-triggered pins.
    levels: [u64; 4],
    nmi_masked: bool,
    /// INIT came, and a start-up interrupt with its vector after it. For processors only.
    init: bool,
    start: Option<u8>,
    /// Time has come to a deadline for which a halted processor sleeps, or a line changed.
    due: bool,
    /// The local APIC is disabled: interrupts are dropped.
    deaf: bool,
}

/// The messages for a processor: all that came since it took them last.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mail {
    pub(crate) vectors: [u64; 4],
    /// Those that came from level-triggered pins.
    pub(crate) levels: [u64; 4],
    /// NMIs: at most two.
    pub(crate) nmis: u8,
    pub(crate) init: bool,
    pub(crate) start: Option<u8>,
}

/// Events that wait until the guest halts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) nmi: bool,
    /// Another NMI came before the processor took that one. KVM keeps two as well, and drops a third (Linux `process_nmi`).
    pub(crate) second_nmi: bool,
    /// One bit a vector: the IRR of a local APIC.
    pub(crate) vectors: [u64; 4],
}

impl Waiting {
    /// Waits with one NMI, or with none.
    pub(crate) fn set_nmi(&mut self, waits: bool) {
        (self.nmi, self.second_nmi) = (waits, false);
    }

    fn add_nmi(&mut self) {
        self.second_nmi |= self.nmi;
        self.nmi = true;
    }

    /// True if an NMI waited. The other one waits then.
    fn take_nmi(&mut self) -> bool {
        let second = std::mem::take(&mut self.second_nmi);
        std::mem::replace(&mut self.nmi, second)
    }

    /// The interrupt that the guest takes first: the highest vector, as a local APIC has it.
    pub(crate) fn interrupt(&self) -> Option<u8> {
        let i = self.vectors.iter().rposition(|word| *word != 0)?;
        Some((i as u32 * 64 + self.vectors[i].ilog2()) as u8)
    }
}

impl State {
    /// `Some` if a halt would end now.
    pub(crate) fn any(&mut self) -> Option<()> {
        let nmi = self.waiting.nmi && !self.nmi_masked;
        (nmi || self.waiting.interrupt().is_some()).then_some(())
    }

    /// True if there is a message for a processor.
    pub(crate) fn has_mail(&self) -> bool {
        self.waiting != Waiting::default() || self.init || self.start.is_some()
    }

    /// `Some` if there is a message for a processor, or its deadline has come.
    pub(crate) fn any_mail(&mut self) -> Option<()> {
        (self.take_due() || self.has_mail()).then_some(())
    }

    /// Takes the note that time has come to a deadline.
    pub(crate) fn take_due(&mut self) -> bool {
        std::mem::take(&mut self.due)
    }

    /// Takes the event that ends a halt now: an NMI unless it is masked, then the highest vector.
    pub(crate) fn take(&mut self) -> Option<u8> {
        if !self.nmi_masked && self.waiting.take_nmi() {
            return Some(NMI);
        }
        self.take_interrupt()
    }

    fn take_interrupt(&mut self) -> Option<u8> {
        let vector = self.waiting.interrupt()?;
        self.waiting.vectors[usize::from(vector / 64)] &= !(1 << (vector % 64));
        Some(vector)
    }
}

impl Wake {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain values; a panic elsewhere leaves nothing half done in it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take_kick(&self) -> bool {
        std::mem::take(&mut self.lock().kicked) || self.source.interrupts()
    }

    /// Sets the source that is asked whether the vCPU shall leave the guest. Only the first one counts.
    pub(crate) fn set_source(&self, source: Box<dyn Fn() -> bool + Send + Sync>) {
        let _ = self.source.0.set(source);
    }

    pub(crate) fn take_vector(&self) -> Option<u8> {
        self.lock().take()
    }

    /// Takes the messages for a processor. `vectors` are taken only if its local APIC holds them.
    pub(crate) fn take_mail(&self, apic: bool) -> Mail {
        let mut state = self.lock();
        let vectors = match apic {
            true => std::mem::take(&mut state.waiting.vectors),
            false => [0; 4],
        };
        Mail {
            vectors,
            levels: std::mem::take(&mut state.levels),
            nmis: u8::from(state.waiting.take_nmi()) + u8::from(state.waiting.take_nmi()),
            init: std::mem::take(&mut state.init),
            start: state.start.take(),
        }
    }

    /// INIT, which takes back a start that came before.
    pub(crate) fn init(&self) {
        let mut state = self.lock();
        (state.init, state.start) = (true, None);
        self.changed.notify_all();
    }

    /// A start-up interrupt.
    pub(crate) fn start(&self, vector: u8) {
        self.lock().start.get_or_insert(vector);
        self.changed.notify_all();
    }

    pub(crate) fn nmi(&self) {
        self.lock().waiting.add_nmi();
        self.changed.notify_all();
    }

    /// Ends the sleep of a halted processor, which looks at the time and its lines then.
    pub(crate) fn nudge(&self) {
        self.lock().due = true;
        self.changed.notify_all();
    }

    pub(crate) fn post(&self, vector: u8) {
        let mut state = self.lock();
        if !state.deaf {
            state.waiting.vectors[usize::from(vector / 64)] |= 1 << (vector % 64);
            self.changed.notify_all();
        }
    }

    /// A vector from a level-triggered pin.
    pub(crate) fn post_level(&self, vector: u8) {
        let mut state = self.lock();
        let (word, bit) = (usize::from(vector / 64), 1 << (vector % 64));
        state.waiting.vectors[word] |= bit;
        state.levels[word] |= bit;
        self.changed.notify_all();
    }

    /// Takes the highest vector.
    pub(crate) fn take_interrupt(&self) -> Option<u8> {
        self.lock().take_interrupt()
    }

    pub(crate) fn waiting(&self) -> Waiting {
        self.lock().waiting
    }

    /// Changes the events that wait, and whether NMIs are masked.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Waiting, &mut bool)) {
        let mut state = self.lock();
        let State {
            waiting,
            nmi_masked,
            ..
        } = &mut *state;
        change(waiting, nmi_masked);
        self.changed.notify_all();
    }

    /// Takes over the events that wait at another vCPU. Kicks stay where they are.
    pub(crate) fn take_events(&self, from: &Self) {
        let (waiting, nmi_masked) = {
            let mut from = from.lock();
            (std::mem::take(&mut from.waiting), from.nmi_masked)
        };
        self.change(|own_waiting, own_masked| (*own_waiting, *own_masked) = (waiting, nmi_masked));
    }

    /// True if a processor that executes has a reason to stop: a kick, or a message.
    pub(crate) fn is_called(&self) -> bool {
        let state = self.lock();
        state.kicked || state.due || state.has_mail()
    }

    /// Blocks until `event` returns a value or a kick comes, which is `None`. A kick wins, and leaves
    /// the event waiting.
    pub(crate) fn wait<T>(&self, event: impl Fn(&mut State) -> Option<T>) -> Option<T> {
        self.wait_until(None, event).flatten()
    }

    /// The same, for so long at the most. Returns false for a kick.
    pub(crate) fn wait_at_most(
        &self,
        time: Option<Duration>,
        event: impl Fn(&mut State) -> Option<()>,
    ) -> bool {
        // A time that the host's clock does not have does not come.
        let end = time.and_then(|time| Instant::now().checked_add(time));
        self.wait_until(end, event).is_some()
    }

    /// Blocks until `event` returns a value, a kick comes (`None`), or it is time (`Some(None)`).
    fn wait_until<T>(
        &self,
        end: Option<Instant>,
        event: impl Fn(&mut State) -> Option<T>,
    ) -> Option<Option<T>> {
        let mut state = self.lock();
        loop {
            if std::mem::take(&mut state.kicked) || self.source.interrupts() {
                return None;
            }
            if let Some(found) = event(&mut state) {
                return Some(Some(found));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Some(None);
            }
            let asked = self.source.is_set().then_some(ASKED);
            state = match left.into_iter().chain(asked).min() {
                None => self.changed.wait(state),
                Some(time) => self
                    .changed
                    .wait_timeout(state, time)
                    .map(|(state, _)| state)
                    .map_err(|poisoned| PoisonError::new(poisoned.into_inner().0)),
            }
            .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The host's side of a TD's vCPU, which takes its interrupts from here.
#[cfg_attr(not(feature = "tdx"), allow(dead_code))]
impl State {
    /// True if an NMI waits, or an interrupt for a processor that takes them.
    pub(crate) fn ends_halt(&self, interrupts: bool) -> bool {
        self.waiting.nmi || interrupts && self.waiting.interrupt().is_some()
    }
}

#[cfg_attr(not(feature = "tdx"), allow(dead_code))]
impl Wake {
    /// Interrupts are taken from now on, or dropped.
    pub(crate) fn accept(&self, accepts: bool) {
        self.lock().deaf = !accepts;
    }

    /// Takes all interrupts, a bit each.
    pub(crate) fn take_vectors(&self) -> [u64; 4] {
        std::mem::take(&mut self.lock().waiting.vectors)
    }

    pub(crate) fn has_nmi(&self) -> bool {
        self.lock().waiting.nmi
    }

    pub(crate) fn take_nmi(&self) -> bool {
        std::mem::take(&mut self.lock().waiting.nmi)
    }

    /// Looks at what waits.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.lock())
    }

    /// Blocks until `event` returns a value, or for that long, which is `None`. A kick does not end it.
    pub(crate) fn wait_for<T>(
        &self,
        time: std::time::Duration,
        mut event: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        let mut found = None;
        let _state = self
            .changed
            .wait_timeout_while(self.lock(), time, |state| {
                found = event(state);
                found.is_none()
            })
            .unwrap_or_else(PoisonError::into_inner);
        found
    }
}

impl Source {
    fn is_set(&self) -> bool {
        self.0.get().is_some()
    }

    fn interrupts(&self) -> bool {
        self.0.get().is_some_and(|source| source())
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.is_set()).finish()
    }
}

#[cfg(test)]
impl Wake {
    /// Takes the note that a deadline has come.
    pub(crate) fn take_due(&self) -> bool {
        std::mem::take(&mut self.lock().due)
    }
}

impl Kick for Wake {
    fn kick(&self) {
        self.lock().kicked = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_come_highest_first_and_once() {
        let wake = Wake::default();
        for vector in [16, 255, 63, 64, 255] {
            wake.post(vector);
        }
        let order: Vec<u8> = std::iter::from_fn(|| wake.take_vector()).collect();
        assert_eq!(order, [255, 64, 63, 16]);
    }

    #[test]
    fn an_nmi_comes_before_interrupts_and_not_while_it_is_masked() {
        let wake = Wake::default();
        wake.post(255);
        wake.change(|waiting, masked| (waiting.nmi, *masked) = (true, true));
        assert_eq!((wake.take_vector(), wake.take_vector()), (Some(255), None));
        wake.post(16);
        wake.change(|_, masked| *masked = false);
        assert_eq!(wake.take_vector(), Some(NMI));
        assert_eq!((wake.take_vector(), wake.take_vector()), (Some(16), None));
    }

    #[test]
    fn two_nmis_that_come_together_are_two_and_three_are_two() {
        let wake = Wake::default();
        for sent in 1..=3 {
            (0..sent).for_each(|_| wake.nmi());
            let taken = std::iter::from_fn(|| wake.take_vector()).count();
            assert_eq!(taken, sent.min(2));
            (0..sent).for_each(|_| wake.nmi());
            let mails = [(); 2].map(|()| usize::from(wake.take_mail(true).nmis));
            assert_eq!(mails, [sent.min(2), 0]);
        }
    }

    #[test]
    fn a_kick_before_the_wait_is_not_lost_and_keeps_the_interrupt() {
        let wake = Wake::default();
        wake.post(32);
        wake.kick();
        assert_eq!(wake.wait(State::take), None);
        assert_eq!(wake.wait(State::take), Some(32));
        wake.post(32);
        wake.kick();
        assert_eq!(wake.wait(State::any), None);
        assert_eq!(wake.wait(State::any), Some(()));
        assert_eq!(wake.waiting().interrupt(), Some(32));
    }
}
