//! The table of staged guests: each token with its source.
//!
//! ```text
//!            stage                 take                      (received)
//!   absent ---------> staged ------------> out ------------------------> absent
//!                       |  ^                |
//!             withdraw  |  +-- put_back ----+   refused where the source withdrew meanwhile
//!                       v                   |
//!                     absent <--------------+
//! ```
//! An entry only names its source; the guest stays with the source until the receiver takes it
//! there. So an entry that is lost, or never received, loses nothing.

use alloc::sync::Weak;
use alloc::vec::Vec;
use core::fmt;

use subtle::ConstantTimeEq;

use super::Movable;
use super::sync::Lock;
use crate::{Error, Field, Result};

/// A one-time token for a staged guest: 128 bits of the host's random numbers.
///
/// Its holder may take the guest over, so it is not printed.
#[derive(Clone, Copy)]
pub struct MoveToken([u8; 16]);

impl MoveToken {
    /// The token as it is handed from program to program.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// A token that came from another program.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Draws a token. All zeros means a broken source of random numbers.
    pub(super) fn draw(random: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<Self> {
        let mut bytes = [0; 16];
        random(&mut bytes)?;
        if bytes == [0; 16] {
            return Err(Error::Again);
        }
        Ok(Self(bytes))
    }

    /// Compares in constant time.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for MoveToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MoveToken(..)")
    }
}

/// Staged guests of one machine, each under a [`MoveToken`].
///
/// One value for all VMs of a machine, whatever their technology. It holds no key, no page and no VM,
/// only a weak reference by which the source is found.
#[derive(Default)]
pub struct StagingTable(Table<Weak<dyn Movable>>);

impl StagingTable {
    /// Nothing is staged.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of staged guests.
    pub fn len(&self) -> usize {
        self.0.staged.lock().len()
    }

    /// True if none is staged.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn stage(&self, token: MoveToken, source: Weak<dyn Movable>) -> Result<()> {
        self.0.stage(token, source)
    }

    pub(super) fn take(&self, token: &MoveToken) -> Result<Weak<dyn Movable>> {
        self.0.take(token)
    }

    pub(super) fn put_back(
        &self,
        token: MoveToken,
        source: Weak<dyn Movable>,
        still: impl FnOnce(&Weak<dyn Movable>) -> bool,
    ) {
        self.0.put_back(token, source, still);
    }

    pub(super) fn withdraw(&self, token: &MoveToken) {
        self.0.withdraw(token);
    }
}

impl fmt::Debug for StagingTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StagingTable")
            .field("len", &self.len())
            .finish()
    }
}

/// The error for a token that is not good. It does not say which token it was.
pub(super) const fn gone() -> Error {
    Error::NotFound(Field::Token, 0)
}

/// Tokens, and what finds the source of each.
struct Table<S> {
    staged: Lock<Vec<(MoveToken, S)>>,
}

/// The most guests that one machine can have staged: it has no more keys.
const MOST: usize = 1 << 16;

impl<S> Table<S> {
    fn new() -> Self {
        Self {
            staged: Lock::new(Vec::new()),
        }
    }

    /// Makes a token good for a source.
    fn stage(&self, token: MoveToken, source: S) -> Result<()> {
        let mut staged = self.staged.lock();
        if staged.len() >= MOST {
            return Err(Error::NoMemory);
        }
        // Two equal draws of 128 bits: the source of random numbers does not work.
        if find(&staged, &token).is_some() {
            return Err(Error::Again);
        }
        staged.push((token, source));
        Ok(())
    }

    /// Trades a token, once.
    fn take(&self, token: &MoveToken) -> Result<S> {
        let mut staged = self.staged.lock();
        match find(&staged, token) {
            Some(at) => Ok(staged.swap_remove(at).1),
            None => Err(gone()),
        }
    }

    /// Undoes a trade that failed: the token is good again if `still` returns true, under the
    /// table's lock, because the source has not withdrawn.
    fn put_back(&self, token: MoveToken, source: S, still: impl FnOnce(&S) -> bool) {
        let mut staged = self.staged.lock();
        if still(&source) {
            staged.push((token, source));
        }
    }

    /// Makes a token worthless. The caller first changes the state that `still` reads.
    fn withdraw(&self, token: &MoveToken) -> Option<S> {
        let mut staged = self.staged.lock();
        find(&staged, token).map(|at| staged.swap_remove(at).1)
    }
}

impl<S> Default for Table<S> {
    fn default() -> Self {
        Self::new()
    }
}

/// Compares every entry, whichever fits.
fn find<S>(staged: &[(MoveToken, S)], token: &MoveToken) -> Option<usize> {
    let mut found = None;
    for (at, (known, _)) in staged.iter().enumerate() {
        if known.is(token) {
            found = Some(at);
        }
    }
    found
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn token(n: u8) -> MoveToken {
        MoveToken::from_bytes([n; 16])
    }

    #[test]
    fn a_token_is_good_once() {
        let table = Table::new();
        table.stage(token(1), "a").unwrap();
        table.stage(token(2), "b").unwrap();
        assert_eq!(table.take(&token(3)), Err(Error::NotFound(Field::Token, 0)));
        assert_eq!(table.take(&token(1)), Ok("a"));
        assert_eq!(table.take(&token(1)), Err(Error::NotFound(Field::Token, 0)));
        assert_eq!(table.withdraw(&token(2)), Some("b"));
        assert_eq!(table.take(&token(2)), Err(Error::NotFound(Field::Token, 0)));
        assert!(table.staged.lock().is_empty());
    }

    #[test]
    fn a_trade_that_fails_leaves_the_token_good_unless_the_source_withdrew() {
        let table = Table::new();
        table.stage(token(1), "a").unwrap();
        let source = table.take(&token(1)).unwrap();
        table.put_back(token(1), source, |_| true);
        let source = table.take(&token(1)).unwrap();
        table.put_back(token(1), source, |_| false);
        assert!(table.take(&token(1)).is_err());
    }

    #[test]
    fn random_numbers_that_are_none_are_refused() {
        let table = Table::new();
        assert_eq!(MoveToken::draw(&mut |_| Ok(())).unwrap_err(), Error::Again);
        let broken = MoveToken::draw(&mut |_| Err(Error::Busy));
        assert_eq!(broken.unwrap_err(), Error::Busy);
        table.stage(token(1), ()).unwrap();
        assert_eq!(table.stage(token(1), ()), Err(Error::Again));
    }

    #[test]
    fn a_token_is_not_printed() {
        extern crate std;
        assert_eq!(std::format!("{:?}", token(0xab)), "MoveToken(..)");
    }
}

/// The table and the flag of a move under the model checker:
/// `RUSTFLAGS="--cfg loom" cargo test -p kvm-ops-core --lib --release models`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::moves::Claim;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use loom::thread;

    fn token() -> MoveToken {
        MoveToken::from_bytes([7; 16])
    }

    #[test]
    fn one_of_two_receivers_gets_the_context() {
        loom::model(|| {
            let table = Arc::new(Table::new());
            table.stage(token(), ()).unwrap();
            let other = Arc::clone(&table);
            let there = thread::spawn(move || other.take(&token()).is_ok());
            let here = table.take(&token()).is_ok();
            assert!(here ^ there.join().unwrap());
        });
    }

    #[test]
    fn a_source_that_withdraws_leaves_no_token_behind_a_trade_that_fails() {
        loom::model(|| {
            let table = Arc::new(Table::new());
            let staged = Arc::new(AtomicBool::new(true));
            table.stage(token(), Arc::clone(&staged)).unwrap();
            let receiver = {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    if let Ok(source) = table.take(&token()) {
                        table.put_back(token(), source, |s| s.load(Ordering::Acquire));
                    }
                })
            };
            // As in the teardown: first the state of the source, then the table.
            staged.store(false, Ordering::Release);
            table.withdraw(&token());
            receiver.join().unwrap();
            assert!(table.staged.lock().is_empty());
        });
    }

    #[test]
    fn moves_in_opposite_directions_exclude_each_other_and_neither_waits() {
        loom::model(|| {
            let vms = Arc::new([Claim::new(), Claim::new()]);
            let inside = Arc::new(AtomicUsize::new(0));
            let pass = |to: usize, vms: &[Claim; 2], inside: &AtomicUsize| {
                let (Ok(_to), Ok(_from)) = (vms[to].claim(), vms[1 - to].claim()) else {
                    return;
                };
                assert_eq!(inside.fetch_add(1, Ordering::AcqRel), 0);
                inside.fetch_sub(1, Ordering::AcqRel);
            };
            let (v, i) = (Arc::clone(&vms), Arc::clone(&inside));
            let other = thread::spawn(move || pass(1, &v, &i));
            pass(0, &vms, &inside);
            other.join().unwrap();
            assert!(vms[0].claim().is_ok() && vms[1].claim().is_ok());
        });
    }
}
