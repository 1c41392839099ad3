//! The two ends of a byte stream that carries a TD.

use embedded_io_adapters::std::FromStd;
use kvm_ops_tdx::migrate::{
    Flow, MigrateError, Outgoing, Progress, Receiver, SendLimits, Sender, StreamKey,
};

use super::Pair;
use super::link::{Link, Plan};
use crate::common::TestHost;

pub type Ends<'a> = (Sender<'a, TestHost>, Receiver<'a, TestHost>);
pub type Ended = Result<Progress, MigrateError>;

/// The sending end, with so many rounds while the TD runs.
pub fn sends(from: Outgoing<'_, TestHost>, rounds: u32) -> Sender<'_, TestHost> {
    let limits = SendLimits {
        rounds,
        pages_left: 0,
    };
    let mut random = |out: &mut [u8]| {
        out.fill(7);
        Ok(())
    };
    Sender::new(from, limits, &mut random).unwrap()
}

/// The two ends of a pair, with two streams.
pub fn ends(pair: &Pair, rounds: u32, key: Option<StreamKey>) -> Ends<'_> {
    let from = pair.source.outgoing(2).unwrap();
    let to = pair.target.incoming(2).unwrap();
    let mut sender = sends(from, rounds);
    let mut receiver = Receiver::new(to);
    if let Some(key) = key {
        sender = sender.with_key(key.clone());
        receiver = receiver.with_key(key, [9; 16]);
    }
    (sender, receiver)
}

/// Runs both ends over one link. Returns how each ended, and the kinds of the frames that each wrote.
pub fn over_a_link(both: &mut Ends<'_>, plans: [Option<Plan>; 2]) -> ([Ended; 2], [Vec<u8>; 2]) {
    over_a_watched_link(both, plans, &mut |_| Flow::GoOn, &mut |_| Flow::GoOn)
}

/// The same, with a watcher of each end.
pub fn over_a_watched_link(
    (sender, receiver): &mut Ends<'_>,
    plans: [Option<Plan>; 2],
    at_source: &mut dyn FnMut(&Progress) -> Flow,
    at_target: &mut (dyn FnMut(&Progress) -> Flow + Send),
) -> ([Ended; 2], [Vec<u8>; 2]) {
    let [near, far] = Link::pair(plans);
    let (mut near, mut far) = (FromStd::new(near), FromStd::new(far));
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let ended = receiver.run(&mut far, at_target);
            let mut far = far.into_inner();
            // The link stays open, so that a refusal is read before the link is found broken.
            let _ = std::io::copy(&mut far, &mut std::io::sink());
            (ended, far.kinds().to_vec())
        });
        let sent = sender.run(&mut near, at_source);
        let near = near.into_inner();
        let frames = near.kinds().to_vec();
        // The peer hears that the link is over.
        drop(near);
        let (received, there) = receiving.join().unwrap();
        ([sent, received], [frames, there])
    })
}
