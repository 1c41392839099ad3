//! Which call of a record a thread makes, and when it is answered.

use std::sync::{MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Instant;

use super::format::Call;
use super::play::{Inner, Mismatch, State};

/// The end of a wait for other threads.
pub(super) enum Waited<'a> {
    /// Something may have changed.
    On(MutexGuard<'a, State>),
    /// It took too long. The first call that is not answered.
    Over(usize),
}

impl Inner {
    /// The next call of this thread, if it is the one that the program makes. A thread that makes its first call takes the
    /// part of one of the record's that begins with it.
    pub(super) fn claim<T>(
        &self,
        fits: impl Fn(&Call) -> Result<T, String>,
    ) -> Result<(usize, T), Mismatch> {
        let own = thread::current().id();
        let mut nearest = None;
        for (part, n) in self.candidates(own)? {
            match fits(&self.calls[n]) {
                Ok(found) if self.take(own, part) => return Ok((n, found)),
                // Another thread was faster.
                Ok(_) => {}
                Err(got) => {
                    nearest.get_or_insert((n, got));
                }
            }
        }
        let one_more = || (self.calls.len(), "a thread makes a call".to_owned());
        let (n, got) = nearest.unwrap_or_else(one_more);
        Err(self.mismatch(n, got))
    }

    /// The calls that a thread may make: the next of its part, or the first of each part that is nobody's.
    fn candidates(&self, own: ThreadId) -> Result<Vec<(u32, usize)>, Mismatch> {
        let state = self.lock();
        if let Some(part) = state.threads.get(&own) {
            let next = state
                .left
                .get(part)
                .and_then(|calls| calls.as_slice().first());
            let n = next.copied().ok_or_else(|| {
                self.mismatch(
                    self.calls.len(),
                    format!("thread {part} makes one more call"),
                )
            })?;
            return Ok(vec![(*part, n)]);
        }
        let is_free = |part: &u32| state.threads.values().all(|taken| taken != part);
        let free = state.left.iter().filter(|(part, _)| is_free(part));
        let mut first: Vec<(u32, usize)> = free
            .filter_map(|(part, calls)| Some((*part, *calls.as_slice().first()?)))
            .collect();
        first.sort_unstable();
        Ok(first)
    }

    /// Gives a thread the next call of a part. False if the part is another thread's.
    fn take(&self, own: ThreadId, part: u32) -> bool {
        let mut state = self.lock();
        let mut others = state.threads.iter();
        if others.any(|(thread, taken)| *thread != own && *taken == part) {
            return false;
        }
        state.threads.insert(own, part);
        state.left.get_mut(&part).and_then(Iterator::next).is_some()
    }

    /// Waits until another thread has done something.
    pub(super) fn wait<'a>(&'a self, state: MutexGuard<'a, State>, late: Instant) -> Waited<'a> {
        let left = late.saturating_duration_since(Instant::now());
        if state.stopped || left.is_zero() {
            return Waited::Over(state.next);
        }
        let waited = self.moved.wait_timeout(state, left);
        Waited::On(waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Waits until all calls in front of one are answered.
    pub(super) fn turn(&self, call: usize) -> Result<(), Mismatch> {
        let late = Instant::now() + self.patience;
        let mut state = self.lock();
        while state.next != call {
            state = match self.wait(state, late) {
                Waited::On(state) => state,
                Waited::Over(missing) => {
                    let got = format!("it was not made, and call {call} waits for it");
                    return Err(self.mismatch(missing, got));
                }
            };
        }
        Ok(())
    }

    pub(super) fn done(&self, call: usize) {
        self.lock().next = call + 1;
        self.moved.notify_all();
    }

    /// Waits until another thread stops or ends the program.
    pub(super) fn wait_for_the_end(&self) {
        let state = self.lock();
        let waited = self
            .moved
            .wait_timeout_while(state, self.patience, |state| !state.stopped);
        drop(waited);
    }
}
