//! Threads on which the streams of a TD run side by side. They are the embedder's: this crate starts none.

use kvm_ops::Result;

use super::bundle::Bundle;

/// Runs the work of several streams at the same time.
///
/// The calls of one stream are made one after the other, and `make` and `take` are called for no stream
/// any more once a method has returned.
pub trait Threads: Send {
    /// Calls `make` with each stream below `streams`, again and again until it answers `None`, and gives
    /// all that it made to `take` on this thread, that of one stream in the order in which it was made.
    /// Ends early once `take` answers false.
    fn make(
        &self,
        streams: u16,
        make: &(dyn Fn(u16) -> Option<Result<Bundle>> + Sync),
        take: &mut dyn FnMut(Result<Bundle>) -> bool,
    );

    /// Calls `next` on this thread until it answers `None`, and gives each bundle to `take`, those of one
    /// [stream](Bundle::stream) in the order in which they came. A stream number may be any: it is the
    /// peer's.
    fn take(
        &self,
        streams: u16,
        next: &mut dyn FnMut() -> Option<Bundle>,
        take: &(dyn Fn(Bundle) + Sync),
    );
}

/// All streams in turn on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneThread;

impl Threads for OneThread {
    fn make(
        &self,
        streams: u16,
        make: &(dyn Fn(u16) -> Option<Result<Bundle>> + Sync),
        take: &mut dyn FnMut(Result<Bundle>) -> bool,
    ) {
        for stream in (0..streams).cycle() {
            if !make(stream).is_some_and(&mut *take) {
                return;
            }
        }
    }

    fn take(
        &self,
        _: u16,
        next: &mut dyn FnMut() -> Option<Bundle>,
        take: &(dyn Fn(Bundle) + Sync),
    ) {
        while let Some(bundle) = next() {
            take(bundle);
        }
    }
}
