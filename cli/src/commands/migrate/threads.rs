//! The threads of a TD's streams.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use kvm_ops::Result;
use kvm_ops::tdx::migrate::{Bundle, Threads};

/// Bundles of a stream that wait, at most.
const WAITING: usize = 2;

/// A thread for each stream, beside the one that has the link.
#[derive(Debug)]
pub(super) struct EachStream;

impl Threads for EachStream {
    fn make(
        &self,
        streams: u16,
        make: &(dyn Fn(u16) -> Option<Result<Bundle>> + Sync),
        take: &mut dyn FnMut(Result<Bundle>) -> bool,
    ) {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let (give, made) = mpsc::sync_channel(WAITING * usize::from(streams));
            for stream in 0..streams {
                let (give, ended) = (give.clone(), &ended);
                scope.spawn(move || {
                    while !ended.load(Ordering::Relaxed)
                        && let Some(bundle) = make(stream)
                        && give.send(bundle).is_ok()
                    {}
                });
            }
            drop(give);
            let _ = made.into_iter().all(take);
            // Those who make more find the channel closed, or this.
            ended.store(true, Ordering::Relaxed);
        });
    }

    fn take(
        &self,
        streams: u16,
        next: &mut dyn FnMut() -> Option<Bundle>,
        take: &(dyn Fn(Bundle) + Sync),
    ) {
        thread::scope(|scope| {
            let lines: Vec<_> = (0..streams)
                .map(|_| {
                    let (give, came) = mpsc::sync_channel(WAITING);
                    scope.spawn(move || came.into_iter().for_each(take));
                    give
                })
                .collect();
            while let Some(bundle) = next() {
                match lines.get(usize::from(bundle.stream())) {
                    // A thread that is gone has panicked, which ends the scope in the same way.
                    Some(line) => {
                        let _ = line.send(bundle);
                    }
                    // There is no such stream, which is refused.
                    None => take(bundle),
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;

    /// A bundle without pages on a stream, with a number in its counter.
    fn bundle(stream: u16, number: u32) -> Bundle {
        let mut bytes = [0; 56];
        // vCPU, entries and pages are 0; the MBMD begins at 8: size, version, stream, type, counter.
        bytes[12..14].copy_from_slice(&stream.to_le_bytes());
        bytes[14] = 32;
        bytes[16..20].copy_from_slice(&number.to_le_bytes());
        Bundle::decode(&bytes).unwrap()
    }

    fn number(bundle: &Bundle) -> u32 {
        let mut bytes = Vec::new();
        bundle.encode(&mut bytes);
        u32::from_le_bytes(bytes[16..20].try_into().unwrap())
    }

    fn in_order(got: &[(u16, u32)], streams: u16, each: u32) {
        let mut by_stream = BTreeMap::<u16, Vec<u32>>::new();
        for (stream, number) in got {
            by_stream.entry(*stream).or_default().push(*number);
        }
        assert_eq!(by_stream.len(), usize::from(streams));
        for numbers in by_stream.values() {
            assert!(numbers.iter().copied().eq(0..each), "{numbers:?}");
        }
    }

    #[test]
    fn all_that_is_made_is_taken_in_the_order_of_its_stream() {
        let counts: Vec<_> = (0..4).map(|_| AtomicU32::new(0)).collect();
        let mut got = Vec::new();
        EachStream.make(
            4,
            &|stream| {
                let n = counts[usize::from(stream)].fetch_add(1, Ordering::Relaxed);
                (n < 50).then(|| Ok(bundle(stream, n)))
            },
            &mut |made| {
                let made = made.unwrap();
                got.push((made.stream(), number(&made)));
                true
            },
        );
        in_order(&got, 4, 50);
    }

    #[test]
    fn making_ends_when_no_more_is_taken() {
        let made = AtomicU32::new(0);
        let mut taken = 0;
        EachStream.make(
            3,
            &|stream| Some(Ok(bundle(stream, made.fetch_add(1, Ordering::Relaxed)))),
            &mut |_| {
                taken += 1;
                taken < 5
            },
        );
        assert_eq!(taken, 5);
    }

    #[test]
    fn all_that_comes_is_taken_in_the_order_of_its_stream_also_of_one_there_is_not() {
        let got = Mutex::new(Vec::new());
        let mut left = (0..40).flat_map(|n| (0..4).map(move |stream| bundle(stream, n)));
        EachStream.take(3, &mut || left.next(), &|bundle| {
            got.lock().unwrap().push((bundle.stream(), number(&bundle)));
        });
        in_order(&got.into_inner().unwrap(), 4, 40);
    }
}
