//! Migration streams: their keys, counters and interrupted calls.

use super::cipher::{KeyWords, Working};
use super::interrupt::Interrupted;
use crate::arena::lock;
use std::sync::{Mutex, MutexGuard, OnceLock, TryLockError};

/// Streams of a TD at most, the backward one included.
pub(crate) const MAX_STREAMS: usize = 512;

/// A migration stream, which one call at a time uses.
#[derive(Default)]
pub(crate) struct Stream {
    /// Present once initialised.
    key: Option<Box<Working>>,
    /// IV counter of the last message.
    pub(crate) iv_counter: u64,
    /// Counter of the next bundle to export.
    pub(crate) next_mb: u32,
    /// Counter of the next bundle to import.
    pub(crate) expected_mb: u32,
    /// The call to resume.
    pub(crate) interrupted: Option<Box<Interrupted>>,
}

impl Stream {
    pub(crate) fn is_initialised(&self) -> bool {
        self.key.is_some()
    }

    /// Makes the stream ready for its first message under a key.
    pub(crate) fn initialise(&mut self, key: KeyWords) {
        *self = Stream {
            key: Some(Box::new(Working::new(key))),
            ..Stream::default()
        };
    }

    /// The key, if the stream is initialised.
    pub(crate) fn key(&self) -> Option<&Working> {
        self.key.as_deref()
    }

    /// The counter for another message.
    pub(crate) fn next_iv(&mut self) -> u64 {
        self.iv_counter = self.iv_counter.wrapping_add(1);
        self.iv_counter
    }
}

/// The streams of a TD: link 0 is the backward stream, link `n + 1` forward stream `n`.
#[derive(Default)]
pub(crate) struct Streams {
    links: OnceLock<Box<[Mutex<Stream>]>>,
    /// PAs of the streams' pages, in the order they were created.
    pages: Mutex<Vec<u64>>,
}

impl Streams {
    fn links(&self) -> &[Mutex<Stream>] {
        self.links
            .get_or_init(|| (0..MAX_STREAMS).map(|_| Mutex::default()).collect())
    }

    /// Takes a forward stream; `None` if it is taken. The caller has compared `index` with the number of
    /// streams the TD has.
    pub(crate) fn forward(&self, index: u16) -> Option<MutexGuard<'_, Stream>> {
        try_lock(self.links().get(usize::from(index) + 1)?)
    }

    /// Takes the backward stream; `None` if it is taken.
    pub(crate) fn backward(&self) -> Option<MutexGuard<'_, Stream>> {
        try_lock(self.links().first()?)
    }

    /// Makes every stream uninitialised but the one the caller holds: the forward stream of this index.
    pub(crate) fn forget_others(&self, held: u16) {
        for (link, stream) in self.allocated().iter().enumerate() {
            if link != usize::from(held) + 1 {
                *lock(stream) = Stream::default();
            }
        }
    }

    /// Adds the page of another stream.
    pub(crate) fn add_page(&self, pa: u64) {
        lock(&self.pages).push(pa);
    }

    /// MIGSC_LINKS: the stream's page, and whether the stream is initialised. 0 for a stream there is not.
    pub(crate) fn link(&self, n: usize) -> u64 {
        const INITIALISED: u64 = 1 << 1;
        let Some(pa) = lock(&self.pages).get(n).copied() else {
            return 0;
        };
        let stream = self.allocated().get(n);
        match stream.is_some_and(|s| lock(s).is_initialised()) {
            true => pa | INITIALISED,
            false => pa,
        }
    }

    /// Forgets the streams and their pages.
    pub(crate) fn reset(&self) {
        self.forget_all();
        lock(&self.pages).clear();
    }

    /// Makes every stream uninitialised. The caller holds none of them.
    pub(crate) fn forget_all(&self) {
        for stream in self.allocated() {
            *lock(stream) = Stream::default();
        }
    }

    fn allocated(&self) -> &[Mutex<Stream>] {
        self.links.get().map_or(&[], |links| links)
    }
}

fn try_lock(stream: &Mutex<Stream>) -> Option<MutexGuard<'_, Stream>> {
    match stream.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_held_by_one_at_a_time() {
        let streams = Streams::default();
        let held = streams.forward(0).expect("free");
        assert!(streams.forward(0).is_none());
        assert!(streams.forward(1).is_some());
        assert!(streams.backward().is_some());
        drop(held);
        assert!(streams.forward(0).is_some());
        assert!(streams.forward(MAX_STREAMS as u16).is_none());
    }

    #[test]
    fn forgetting_spares_the_stream_in_hand() {
        let streams = Streams::default();
        streams.forward(1).expect("free").initialise([1; 4]);
        let mut held = streams.forward(0).expect("free");
        held.initialise([1; 4]);
        streams.forget_others(0);
        assert!(held.is_initialised());
        assert!(!streams.forward(1).expect("free").is_initialised());
    }
}
